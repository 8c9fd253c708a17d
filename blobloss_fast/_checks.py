"""Validation of user input: what was expected, what came, what to do. TypeError for a kind, ValueError for a value."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .kernels.layout import CONNECTIVITIES

INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_WIDER = {
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    torch.uint64: torch.int64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}


def one_of(name: str, value: Any, allowed: Collection[Any]) -> None:
    """Require one of a few names or whole numbers."""
    if isinstance(value, bool) or not isinstance(value, (str, Integral)) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def number(name: str, value: Any, *, minimum: float = -math.inf) -> float:
    """Require a finite real number, at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    real: Any = value
    if not -math.inf < real < math.inf or real < minimum:  # math.isfinite cannot be traced
        bound = "" if minimum == -math.inf else f" and at least {minimum:g}"
        raise ValueError(f"{name} must be finite{bound}; got {value}")
    return float(real)


def flag(name: str, value: Any) -> None:
    """Require True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")


def count(name: str, value: Any, *, minimum: int, maximum: int) -> Any:
    """Require a whole number (or a traced size) between the bounds; return it as a Python integer."""
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer; got {type(value).__name__}")
    whole = int(value)
    if whole < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {whole}")
    if whole > maximum:
        raise ValueError(f"{name} must be at most {maximum}; got {whole}")
    return whole


def tensor(name: str, value: Any) -> None:
    """Require a dense tensor."""
    if not isinstance(value, Tensor):
        advice = ": convert it with torch.from_numpy" if type(value).__module__ == "numpy" else ""
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}{advice}")
    if value.layout != torch.strided or value.is_quantized:
        raise TypeError(f"{name} must be a dense tensor; got layout {value.layout}: call {name}.to_dense()")


def logits(value: Any, activation: str) -> None:
    """Require ``[B, C, *spatial]`` floating point, with one to three spatial axes and at least one voxel."""
    tensor("logits", value)
    if value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        advice = "take its real part or its magnitude" if value.dtype.is_complex else "call logits.float()"
        raise TypeError(f"logits must be float16, bfloat16, float32 or float64; got {value.dtype}: {advice}")
    volume("logits", value)
    if activation == "softmax" and value.shape[1] < 2:
        raise ValueError(
            f"logits must have at least two channels with activation='softmax'; got {list(value.shape)}: "
            "use activation='sigmoid' for one channel"
        )


def volume(name: str, value: Tensor) -> None:
    """Require two leading axes, one to three spatial axes and at least one voxel."""
    if not 3 <= value.ndim <= 5:
        raise ValueError(
            f"{name} must be [B, C, *spatial] with 1 to 3 spatial axes; got {list(value.shape)}: "
            f"add a batch or channel axis with {name}[None] or {name}[:, None]"
        )
    if value.numel() == 0:
        raise ValueError(f"{name} must have at least one voxel; got {list(value.shape)}")


def matching(name: str, value: Tensor, like: Tensor, channels: Collection[int]) -> None:
    """Require the batch, device and spatial shape of the logits, and one of the given numbers of channels."""
    shape, expected = value.shape, like.shape
    if len(shape) != len(expected) or shape[0] != expected[0] or shape[2:] != expected[2:]:
        wanted = " or ".join(str(c) for c in dict.fromkeys(channels))
        lacks_axis = len(shape) == len(expected) - 1 and shape[1:] == expected[2:]
        raise ValueError(
            f"{name} must be [B, {wanted}, *spatial] matching logits {list(expected)}; got {list(shape)}"
            + (f": add a channel axis with {name}[:, None]" if lacks_axis else "")
        )
    if shape[1] not in channels:
        wanted = " or ".join(str(c) for c in dict.fromkeys(channels))
        raise ValueError(f"{name} must have {wanted} channel(s) for logits {list(expected)}; got {list(shape)}")
    if value.device != like.device:
        raise RuntimeError(
            f"{name} must be on the device of the logits, {like.device}; got {value.device}: "
            f"call {name}.to(logits.device)"
        )


def integers(name: str, value: Tensor) -> Tensor:
    """Require integer ids; return them in a dtype that the kernels read (unsigned 16 bits and more are widened)."""
    if value.dtype == torch.bool and name == "instances":
        raise TypeError(
            "instances must hold integer ids; got bool: pass a binary mask as target, its instances are found for you"
        )
    value = _widened(name, value)
    if value.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} must hold integer ids; got {value.dtype}: call {name}.long()")
    return value


def binary_or_classes(name: str, value: Tensor) -> Tensor:
    """Require bool, integers or floating point; return it in a dtype that holds every class exactly."""
    if value.dtype.is_complex:
        raise TypeError(f"{name} must be bool, integer or floating point; got {value.dtype}")
    return _widened(name, value)


def _widened(name: str, value: Tensor) -> Tensor:
    if value.dtype not in _WIDER:
        return value
    wide = value.to(_WIDER[value.dtype])
    if value.dtype == torch.uint64 and wide.device.type == "cpu" and bool((wide < 0).any()):
        raise ValueError(f"{name} must be below 2**63; got larger uint64 values: renumber them")
    return wide


def connectivity(value: Any, axes: int) -> None:
    """Require a neighbourhood that a volume with this number of spatial axes has."""
    names = CONNECTIVITIES[axes]
    if isinstance(value, bool) or not isinstance(value, Integral) or value not in names:
        raise ValueError(
            f"connectivity must be {' or '.join(map(str, names))} in {axes}D; got {value!r}: 26 means all neighbours"
        )


def spacing(value: Any, axes: int | None = None) -> list[float]:
    """Require one positive finite number per spatial axis, where the number of axes is known."""
    if isinstance(value, (str, Real)) or not isinstance(value, Iterable):
        wanted = "numbers" if axes is None else f"{axes} numbers"
        raise TypeError(f"spacing must be a sequence of {wanted}, one per spatial axis; got {value!r}")
    numbers = [number("spacing", one) for one in value]
    if axes is not None and len(numbers) != axes:
        raise ValueError(f"spacing must have one number for each of the {axes} spatial axes; got {numbers}")
    if min(numbers or [1.0]) <= 0:
        raise ValueError(f"spacing must be above 0 along every axis; got {numbers}")
    return numbers
