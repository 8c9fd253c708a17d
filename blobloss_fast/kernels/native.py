"""The native library (csrc/blobloss.h), called through ctypes: the CPU backend wherever it could be built.

It is loaded at the first use. If that fails, `why_not` has the reason, and it is for the caller to take the reference.
Between two passes over a small volume the time goes into Python, so a call packs all that it has to say into one string
of bytes in the layout of the C struct: bytes never change, so calls from several threads need no lock, and ctypes
releases the GIL while the library works.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
from array import array
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .finish import LossSpec
from .layout import (
    ACTIVATIONS,
    CHANNEL0,
    FEATURES,
    MASKINGS,
    NOT_A_CLASS,
    NOT_A_PROBABILITY,
    NOT_BINARY,
    ROW_SIZE,
    TOO_LARGE,
    IdTooLargeError,
)
from .reference import compute_dtype
from .rows import rows

PATH = Path(__file__).parents[1] / ("_native" + {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so"))
ABI = 1

# Everything from here to the library must agree with csrc/blobloss.h; the order of names is that of its enumerators.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_TYPES = {dtype: code for code, dtype in enumerate((*_FLOATS, torch.bool, *_INTEGERS))}
_REDUCTIONS = ("mean", "none", "sum", "terms", "instances")
_MOST_FEATURES = 6
_STATUS = {2: NOT_BINARY, 4: NOT_A_CLASS, 1: TOO_LARGE, 8: NOT_A_PROBABILITY}  # the first one found is raised
_NO_MEMORY = 16

_VOLUME = struct.Struct("@Pqqii")
_OPTIONS = struct.Struct("@diii6i4x")
_THREADS = struct.Struct("@qP")
_PROBLEM = struct.Struct(f"@{3 * 'Pqqii'}qqqq{_OPTIONS.size}sqP")
_FINISH = struct.Struct("@7P5q3d13i4xqP")
_NO_VOLUME = (0, 0, 0, 0, 0)


class _Library(NamedTuple):
    isa: str
    forward: Any
    backward: Any
    finish: Any
    largest: Any


# ---------------------------------------------------------------- the library


def why_not() -> str | None:
    """Return why the library cannot be used, and what to do; None if it can."""
    found = _load()
    return found if isinstance(found, str) else None


def available() -> bool:
    """Return whether the library can be used."""
    return why_not() is None


def isa() -> str:
    """Return the instruction set that the kernels run on: "avx512", "avx2" or "baseline"."""
    return _library().isa


def open_library(path: Path) -> _Library | str:
    """Load a library, or return why that cannot be done."""
    if not path.exists():
        return (
            "the native library was not built when blobloss_fast was installed: install it again where GCC or Clang is "
            "found, with BLOBLOSS_FAST_NATIVE=1 set to see why it does not build"
        )
    again = "install blobloss_fast again, with pip install --force-reinstall --no-deps"
    try:
        library = ctypes.CDLL(str(path))
        abi = library.blobloss_abi()
        if abi != ABI:
            return f"the native library has version {abi} of its interface, this package needs {ABI}: {again}"
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        library.blobloss_isa.restype = ctypes.c_char_p
        library.blobloss_segment_stats_forward.argtypes = (pointer, pointer, pointer)
        library.blobloss_segment_stats_backward.argtypes = (pointer, pointer, pointer)
        library.blobloss_finish.argtypes = (pointer,)
        library.blobloss_largest.argtypes = (pointer, integer, integer, pointer)
        library.blobloss_largest.restype = integer
        return _Library(
            library.blobloss_isa().decode(),
            library.blobloss_segment_stats_forward,
            library.blobloss_segment_stats_backward,
            library.blobloss_finish,
            library.blobloss_largest,
        )
    except (OSError, AttributeError) as error:  # another platform's file, or not a library of ours
        return f"the native library cannot be loaded ({error}): {again}"


@functools.cache
def _load() -> _Library | str:
    return open_library(PATH)


def _library() -> _Library:
    found = _load()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


# ---------------------------------------------------------------- threads

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True  # PyTorch's pool hangs in a forked child; threads of the library's own do not


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@functools.cache
def _pool() -> int:
    """The address of PyTorch's parallel_for, 0 before PyTorch 2.10.

    It is looked up through torch._C, which depends on the library that has it, wherever that lies: a path could load a
    second copy.
    """
    try:
        function = ctypes.CDLL(torch._C.__file__).torch_parallel_for
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _threads() -> tuple[int, int]:
    return torch.get_num_threads(), 0 if _forked else _pool()


# ---------------------------------------------------------------- the table of sums


def segment_stats_forward(
    logits: Tensor,
    cells: Tensor,
    target: Tensor | None,
    num_cells: int,
    features: tuple[str, ...],
    activation: str,
    gamma: float,
    channel0: str,
) -> tuple[Tensor, Tensor]:
    """Sum the features over every cell; see ``reference.segment_stats_forward``."""
    if len(features) > _MOST_FEATURES:
        features, place = _distinct(features)
        counts, sums = segment_stats_forward(logits, cells, target, num_cells, features, activation, gamma, channel0)
        return counts, sums[..., place]
    problem, _kept = _problem(logits, cells, target, num_cells, features, activation, gamma, channel0)
    shape = (*logits.shape[:2], num_cells)
    counts = logits.new_empty(shape, dtype=torch.int64)
    sums = logits.new_empty((*shape, len(features)), dtype=compute_dtype(logits.dtype))
    status = _library().forward(problem, counts.data_ptr(), sums.data_ptr())
    if status:
        _raise(status)
    return counts, sums


def segment_stats_backward(
    grad_sums: Tensor,
    logits: Tensor,
    cells: Tensor,
    target: Tensor | None,
    features: tuple[str, ...],
    activation: str,
    gamma: float,
    channel0: str,
) -> Tensor:
    """Gradient with respect to the logits, contiguous; see ``reference.segment_stats_backward``."""
    if len(features) > _MOST_FEATURES:
        features, place = _distinct(features)
        grad_sums = grad_sums.new_zeros(*grad_sums.shape[:3], len(features)).index_add_(3, place, grad_sums)
    problem, _kept = _problem(logits, cells, target, grad_sums.shape[2], features, activation, gamma, channel0)
    grad_sums = grad_sums.to(compute_dtype(logits.dtype)).contiguous()
    grad = logits.new_empty(logits.shape)
    if _library().backward(problem, grad_sums.data_ptr(), grad.data_ptr()):
        _raise(_NO_MEMORY)  # the forward pass has raised for everything else
    return grad


def largest(ids: Tensor) -> int:
    """Return the largest of the ids, at least 0."""
    shape = ids.shape
    voxels = ids[0, 0].numel()
    ids, volume = _volume("ids", ids, _INTEGERS, shape[0], shape[1], voxels)
    return _library().largest(_VOLUME.pack(*volume), shape[0], voxels, _THREADS.pack(*_threads()))


def _problem(
    logits: Tensor,
    cells: Tensor,
    target: Tensor | None,
    num_cells: int,
    features: tuple[str, ...],
    activation: str,
    gamma: float,
    channel0: str,
) -> tuple[bytes, tuple[Tensor | None, ...]]:
    """Return a bl_problem, and the tensors whose memory it points to: keep them until the library is done."""
    shape = logits.shape
    batch, channels = shape[0], shape[1]
    voxels = logits.numel() // (batch * channels or 1)
    logits, of_logits = _volume("logits", logits, _FLOATS, batch, channels, voxels)
    cells, of_cells = _volume("cells", cells, _INTEGERS, batch, channels, voxels)
    of_target = _NO_VOLUME
    if target is not None:
        target, of_target = _volume("target", target, _TYPES, batch, channels, voxels)
    options = _options(features, activation, gamma, channel0)
    problem = _PROBLEM.pack(*of_logits, *of_cells, *of_target, batch, channels, voxels, num_cells, options, *_threads())
    return problem, (logits, cells, target)


def _volume(
    name: str, volume: Tensor, dtypes: Collection[torch.dtype], batch: int, channels: int, voxels: int
) -> tuple[Tensor, tuple[int, int, int, int, int]]:
    """Return a volume with dense spatial axes, and the fields of its bl_volume.

    Operators do not look at shapes and dtypes, and in C a wrong one would read other memory.
    """
    shape = volume.shape
    own = shape[1]
    if own not in (1, channels) or shape[0] != batch or volume.numel() != batch * own * voxels:
        raise ValueError(
            f"{name} must be [{batch}, 1 or {channels}, *spatial] with {voxels} voxels, like logits; got {list(shape)}"
        )
    dtype = volume.dtype
    if dtype not in dtypes:
        raise TypeError(f"{name} must be one of {', '.join(map(str, dtypes))}; got {dtype}: convert it")
    volume, batch_stride, channel_stride = rows(volume)
    return volume, (volume.data_ptr(), batch_stride, channel_stride, _TYPES[dtype], own)


@functools.lru_cache
def _options(features: tuple[str, ...], activation: str, gamma: float, channel0: str) -> bytes:
    return _OPTIONS.pack(gamma, ACTIVATIONS.index(activation), CHANNEL0.index(channel0), *_feature_codes(features))


@functools.lru_cache
def _feature_codes(features: tuple[str, ...]) -> tuple[int, ...]:
    """Return the number of features and their codes, filled up to the size of the array in C."""
    return len(features), *map(FEATURES.index, features), *(0,) * (_MOST_FEATURES - len(features))


def _distinct(features: tuple[str, ...]) -> tuple[tuple[str, ...], Tensor]:
    """Return each of the features once, and where in these every one is found."""
    distinct = tuple(dict.fromkeys(features))
    return distinct, torch.tensor([distinct.index(name) for name in features])


def _raise(status: int) -> None:
    if status & _NO_MEMORY:
        raise MemoryError("the native library got no memory for its tables: use fewer cells or smaller volumes")
    message = next(message for bit, message in _STATUS.items() if status & bit)
    raise IdTooLargeError(message) if message is TOO_LARGE else ValueError(message)


# ---------------------------------------------------------------- the loss


def finish(
    counts: Tensor, sums: Tensor, features: tuple[str, ...], has_target: bool, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """Reduce the table to the loss; see ``finish.finish``."""
    counts, sums = counts.contiguous(), sums.contiguous()
    shape = counts.shape
    if spec.reduction == "instances":
        value = sums.new_empty(shape[0], shape[1], shape[2] // (1 + has_target) - 1)
    else:
        value = sums.new_empty({"none": shape[:2], "terms": (2,)}.get(spec.reduction, ()))
    saved = sums if spec.reduction in ("terms", "instances") else torch.empty_like(sums)
    _finish(counts, sums, None, value, None if saved is sums else saved, features, has_target, spec)
    return value, saved


def finish_backward(
    grad: Tensor, counts: Tensor, saved: Tensor, features: tuple[str, ...], has_target: bool, spec: LossSpec
) -> Tensor:
    """Return the gradient of ``finish`` with respect to the sums; see ``finish.finish_backward``."""
    if spec.reduction not in ("terms", "instances"):
        return saved * (grad[:, :, None, None] if spec.reduction == "none" else grad)
    grad_sums = torch.empty_like(saved, memory_format=torch.contiguous_format)
    grad = grad.to(saved.dtype).contiguous()
    _finish(counts.contiguous(), saved.contiguous(), grad, None, grad_sums, features, has_target, spec)
    return grad_sums


def _finish(
    counts: Tensor,
    sums: Tensor,
    grad: Tensor | None,
    value: Tensor | None,
    grad_sums: Tensor | None,
    features: tuple[str, ...],
    has_target: bool,
    spec: LossSpec,
) -> None:
    main_rows, blob_rows = _row_array(spec.main_rows), _row_array(spec.blob_rows)
    arguments = _FINISH.pack(
        counts.data_ptr(),
        sums.data_ptr(),
        main_rows.buffer_info()[0],
        blob_rows.buffer_info()[0],
        0 if grad is None else grad.data_ptr(),
        0 if value is None else value.data_ptr(),
        0 if grad_sums is None else grad_sums.data_ptr(),
        len(main_rows) // ROW_SIZE,
        len(blob_rows) // ROW_SIZE,
        *counts.shape,
        spec.gamma,
        spec.main_weight,
        spec.blob_weight,
        sums.dtype == torch.float64,
        has_target,
        *_spec_codes(spec.activation, spec.masking, spec.channel0, spec.reduction),
        *_feature_codes(features),
        *_threads(),
    )
    if _library().finish(arguments):
        _raise(_NO_MEMORY)


@functools.lru_cache
def _row_array(rows: tuple[float, ...]) -> array[float]:
    return array("d", rows)


@functools.lru_cache
def _spec_codes(activation: str, masking: str, channel0: str, reduction: str) -> tuple[int, int, int, int]:
    return (
        ACTIVATIONS.index(activation),
        MASKINGS.index(masking),
        CHANNEL0.index(channel0),
        _REDUCTIONS.index(reduction),
    )
