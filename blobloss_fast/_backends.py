"""What runs where, and why not something faster."""

from __future__ import annotations

import torch

from . import _ops
from .kernels import native


def backends() -> dict[str, str]:
    """Return, for every kind of device, the backend that computes the table of sums there, and why.

    Returns:
        A dict from the device type ("cpu", "cuda", "other") to a line of text.

    Synchronises:
        Never.

    Example:
        >>> backends()["cpu"].split()[0] in ("native", "reference")
        True
    """
    reference = "reference (pure PyTorch)"
    why_not = native.why_not()
    cpu = f"native ({native.isa()})" if why_not is None else f"{reference}: {why_not}"
    if not _ops.has_triton():
        cuda = (
            f"{reference}: Triton is not installed; it comes with the CUDA and ROCm builds of PyTorch for Linux, and "
            "triton-windows has it for Windows"
        )
    elif not torch.cuda.is_available():
        cuda = "triton, but this PyTorch sees no CUDA or ROCm device"
    else:
        cuda = "triton"
    return {"cpu": cpu, "cuda": cuda, "other": reference}
