"""What runs where, and why not something faster."""

from __future__ import annotations

import torch

from . import _ops


def backends() -> dict[str, str]:
    """Return, for every kind of device, the backend that computes the table of sums there, and why.

    Returns:
        A dict from the device type ("cpu", "cuda", "other") to a line of text.

    Synchronises:
        Never.

    Example:
        >>> backends()["cpu"]
        'reference (pure PyTorch)'
    """
    if _ops.has_triton():
        cuda = "triton"
        if not torch.cuda.is_available():
            cuda += ", but this PyTorch sees no CUDA or ROCm device"
    else:
        cuda = (
            "reference (pure PyTorch): Triton is not installed; it comes with the CUDA and ROCm builds of PyTorch, "
            'elsewhere: pip install "blobloss_fast[triton]"'
        )
    return {"cpu": "reference (pure PyTorch)", "cuda": cuda, "other": "reference (pure PyTorch)"}
