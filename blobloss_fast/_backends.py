"""What runs where, and why not something faster."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, _ops
from .kernels import native, native_labels
from .kernels.rows import rows

_REFERENCE = "reference (pure PyTorch)"


def backends(tensor: Tensor | None = None) -> dict[str, str]:
    """Return what computes the losses, and why not something faster.

    Args:
        tensor: ``[B, C, *spatial]``, of any real dtype and any device; None: every kind of device.

    Returns:
        A dict to lines of text. Without a tensor, the backend of the table of sums for every kind of device, "cpu",
        "cuda" and "other". For a tensor, "losses", "components" and "zones", what finds each on its device, and
        "layout", whether it is read where it lies.

    Raises:
        TypeError, ValueError: for what no loss takes.

    Synchronises:
        Never.

    Example:
        >>> backends()["cpu"].split()[0] in ("native", "reference")
        True
        >>> backends(torch.zeros(2, 1, 8, 8, 8))["layout"]
        'read as it is'
    """
    why_not = native.why_not()
    cpu = f"native ({native.isa()})" if why_not is None else f"{_REFERENCE}: {why_not}"
    if not _ops.has_triton():
        cuda = (
            f"{_REFERENCE}: Triton is not installed; it comes with the CUDA and ROCm builds of PyTorch for Linux, and "
            "triton-windows has it for Windows"
        )
    elif not torch.cuda.is_available():
        cuda = "triton, but this PyTorch sees no CUDA or ROCm device"
    else:
        cuda = "triton"
    by_device = {"cpu": cpu, "cuda": cuda, "other": _REFERENCE}
    if tensor is None:
        return by_device
    _checks.tensor("tensor", tensor)
    if tensor.ndim < 3:
        raise ValueError(f"tensor must be [B, C, *spatial]; got {list(tensor.shape)}")
    if tensor.is_complex():
        raise TypeError(f"tensor must be of a real dtype; got {tensor.dtype}")
    kind = tensor.device.type
    losses = by_device.get(kind, f"{_REFERENCE}: there are no kernels for {kind} devices")
    layout = "read as it is"
    if losses.startswith(_REFERENCE):
        components = losses.replace(_REFERENCE, "connected-components-3d on the CPU")
        zones = losses.replace(_REFERENCE, "pure PyTorch")
    else:
        components = zones = losses
        if kind == "cpu" and tensor.dtype not in native_labels.DTYPES:
            components = f"connected-components-3d on the CPU: the native library does not label {tensor.dtype}"
        if rows(tensor)[0] is not tensor:
            layout = (
                "copied at every call, because its spatial axes are not dense in row-major order (channels_last_3d, "
                "crops): call .contiguous() once if it is used again"
            )
    return {"losses": losses, "components": components, "zones": zones, "layout": layout}
