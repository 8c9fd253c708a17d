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
    reference = "reference (pure PyTorch)"
    if not _ops.has_triton():
        cuda = (
            f"{reference}: Triton is not installed; it comes with the CUDA and ROCm builds of PyTorch for Linux, and "
            "triton-windows has it for Windows"
        )
    elif not torch.cuda.is_available():
        cuda = "triton, but this PyTorch sees no CUDA or ROCm device"
    else:
        cuda = "triton; instances of a bare mask are found on the CPU"
    return {"cpu": reference, "cuda": cuda, "other": reference}
