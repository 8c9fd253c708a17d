"""The native library (csrc/blobloss.h), called through ctypes: the CPU backend wherever it could be built.

It is loaded at the first use. If that fails, `why_not` has the reason, and it is for the caller to take the reference.
ctypes releases the GIL while the library works.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import structs
from .finish import LossSpec, sizes_of_saved
from .layout import NOT_A_CLASS, NOT_A_PROBABILITY, NOT_BINARY, TOO_LARGE, IdTooLargeError
from .reference import compute_dtype

PATH = Path(__file__).parents[1] / ("_native" + {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so"))
ABI = 6

_STATUS = {2: NOT_BINARY, 4: NOT_A_CLASS, 1: TOO_LARGE, 8: NOT_A_PROBABILITY}  # the first one found is raised
_NO_MEMORY = 16
_WITHOUT_GRADIENT = ("terms", "instances")  # reductions to several numbers, whose weights come with the backward pass


class _Library(NamedTuple):
    isa: str
    forward: Any
    backward: Any
    finish: Any
    loss: Any
    largest_id: Any
    nearest_instance: Any
    find_components: Any
    write_components: Any


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
        library.blobloss_segment_stats_backward.argtypes = (pointer, pointer, pointer, integer, pointer)
        library.blobloss_finish.argtypes = (pointer,)
        library.blobloss_loss.argtypes = (pointer, pointer, pointer, pointer)
        library.blobloss_largest_id.argtypes = (pointer, ctypes.c_int32, ctypes.c_int32, pointer)
        library.blobloss_largest_id.restype = integer
        library.blobloss_nearest_instance.argtypes = (pointer,)
        library.blobloss_find_components.argtypes = (pointer, pointer)
        library.blobloss_write_components.argtypes = (pointer, pointer, ctypes.c_int32)
        library.blobloss_write_components.restype = None
        return _Library(
            library.blobloss_isa().decode(),
            library.blobloss_segment_stats_forward,
            library.blobloss_segment_stats_backward,
            library.blobloss_finish,
            library.blobloss_loss,
            library.blobloss_largest_id,
            library.blobloss_nearest_instance,
            library.blobloss_find_components,
            library.blobloss_write_components,
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
    if len(features) > len(set(features)):
        features, place = _distinct(features)
        counts, sums = segment_stats_forward(logits, cells, target, num_cells, features, activation, gamma, channel0)
        return counts, sums[..., place]
    problem, _kept = structs.problem(
        _threads(), logits, cells, target, num_cells, features, activation, gamma, channel0, 0
    )
    shape = (*logits.shape[:2], num_cells)
    counts = torch.empty(shape, dtype=torch.int64)
    sums = torch.empty(*shape, len(features), dtype=compute_dtype(logits.dtype))
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
    if len(features) > len(set(features)):
        features, place = _distinct(features)
        grad_sums = grad_sums.new_zeros(*grad_sums.shape[:3], len(features)).index_add_(3, place, grad_sums)
    num_cells = grad_sums.shape[2]
    return _gradient(grad_sums, None, logits, cells, target, num_cells, features, activation, gamma, channel0, 0)


def _gradient(
    grad_sums: Tensor,
    scales: Tensor | None,
    logits: Tensor,
    cells: Tensor,
    target: Tensor | None,
    num_cells: int,
    features: tuple[str, ...],
    activation: str,
    gamma: float,
    channel0: str,
    notes: int,
) -> Tensor:
    """Return the gradient with respect to the logits, times the scales: one, or ``[B, C]``.

    ``grad_sums``: the numbers of ``[B, C, K, F]``, whatever its shape, and whatever is behind them.
    """
    problem, _kept = structs.problem(
        _threads(), logits, cells, target, num_cells, features, activation, gamma, channel0, notes
    )
    dtype = compute_dtype(logits.dtype)
    grad_sums = grad_sums.to(dtype).contiguous()
    grad = torch.empty(logits.shape, dtype=logits.dtype)
    scale, num_scales = 0, 0
    if scales is not None:
        scales = scales.to(dtype).contiguous()
        scale, num_scales = scales.data_ptr(), scales.numel()
    if _library().backward(problem, grad_sums.data_ptr(), scale, num_scales, grad.data_ptr()):
        _raise(_NO_MEMORY)  # the forward pass has raised for everything else
    return grad


def _distinct(features: tuple[str, ...]) -> tuple[tuple[str, ...], Tensor]:
    """Return each of the features once, and where in these every one is found."""
    distinct = tuple(dict.fromkeys(features))
    return distinct, torch.tensor([distinct.index(name) for name in features])


def _raise(status: int) -> None:
    if status & _NO_MEMORY:
        raise MemoryError("the native library got no memory for its tables: use fewer cells or smaller volumes")
    message = next(message for bit, message in _STATUS.items() if status & bit)
    raise IdTooLargeError(message) if message is TOO_LARGE else ValueError(message)


def largest_in_grid(ids: Tensor, steps: tuple[int, ...]) -> int:
    """Return the largest id among every ``steps``-th voxel along the spatial axes, beginning half a step in."""
    if ids.dtype not in structs.INTEGERS or ids.device.type != "cpu":
        raise TypeError(f"ids must be integers on the CPU; got {ids.dtype} on {ids.device.type}")
    axes, offset, grid = structs.grid_view(ids.shape, ids.stride(), steps)
    first = ids.data_ptr() + offset * ids.element_size()
    return int(_library().largest_id(first, structs.TYPES[ids.dtype], axes, grid))


# ---------------------------------------------------------------- the loss


def blob_loss(
    logits: Tensor,
    instances: Tensor,
    target: Tensor | None,
    weights: Tensor | None,
    num_cells: int,
    features: tuple[str, ...],
    spec: LossSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over the cells and reduce the table to the loss, in one call: return the value, the counts, and what
    ``blob_loss_backward`` needs: the numbers of a table, and behind them, as bits, the notes on blocks.
    """
    counts = torch.empty(*logits.shape[:2], num_cells, dtype=torch.int64)
    dtype = compute_dtype(logits.dtype)
    table_size, size = sizes_of_saved(logits, num_cells, len(features), dtype)
    saved = torch.empty(size, dtype=dtype)
    notes = saved.data_ptr() + table_size * dtype.itemsize
    threads = _threads()
    problem, _kept = structs.problem(
        threads, logits, instances, target, num_cells, features, spec.activation, spec.gamma, spec.channel0, notes
    )
    value = _empty_value(counts, dtype, target is not None, spec)
    gradient = None if spec.reduction in _WITHOUT_GRADIENT else saved  # it replaces the sums
    weights = _as_sums(weights, saved)
    arguments = structs.finish(
        threads, counts, saved, None, value, gradient, features, target is not None, spec, weights
    )
    status = _library().loss(problem, counts.data_ptr(), saved.data_ptr(), arguments)
    if status:
        _raise(status)
    return value, counts, saved


def blob_loss_backward(
    grad: Tensor,
    logits: Tensor,
    instances: Tensor,
    target: Tensor | None,
    weights: Tensor | None,
    counts: Tensor,
    saved: Tensor,
    features: tuple[str, ...],
    spec: LossSpec,
) -> Tensor:
    """Return the gradient of ``blob_loss`` with respect to the logits, contiguous."""
    dtype, num_cells = compute_dtype(logits.dtype), counts.shape[2]
    table_size, size = sizes_of_saved(logits, num_cells, len(features), dtype)
    if saved.numel() != size or saved.dtype != dtype or not saved.is_contiguous():
        raise ValueError(f"saved must be what blob_loss returned, {dtype} [{size}]; got {saved.dtype} {saved.shape}")
    notes = saved.data_ptr() + table_size * dtype.itemsize
    grad_sums: Tensor = saved
    scales: Tensor | None = grad
    if spec.reduction in _WITHOUT_GRADIENT:
        scales = None
        sums = saved[:table_size].view(*counts.shape, len(features))
        grad_sums = finish_backward(grad, counts, sums, features, target is not None, spec, weights)
    options = spec.activation, spec.gamma, spec.channel0
    return _gradient(grad_sums, scales, logits, instances, target, num_cells, features, *options, notes)


def finish(
    counts: Tensor,
    sums: Tensor,
    features: tuple[str, ...],
    has_target: bool,
    spec: LossSpec,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reduce the table to the loss; see ``finish.finish``."""
    counts, sums = counts.contiguous(), sums.contiguous()
    value = _empty_value(counts, sums.dtype, has_target, spec)
    gradient = None if spec.reduction in _WITHOUT_GRADIENT else torch.empty_like(sums)
    _finish(counts, sums, None, value, gradient, features, has_target, spec, _as_sums(weights, sums))
    return value, sums if gradient is None else gradient


def _empty_value(counts: Tensor, dtype: torch.dtype, has_target: bool, spec: LossSpec) -> Tensor:
    batch, channels, num_cells = counts.shape
    if spec.reduction == "instances":
        return torch.empty(batch, channels, num_cells // (1 + has_target) - 1, dtype=dtype)
    return torch.empty({"none": (batch, channels), "terms": (2,)}.get(spec.reduction, ()), dtype=dtype)


def _as_sums(tensor: Tensor | None, sums: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(sums.dtype).contiguous()


def finish_backward(
    grad: Tensor,
    counts: Tensor,
    saved: Tensor,
    features: tuple[str, ...],
    has_target: bool,
    spec: LossSpec,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the gradient of ``finish`` with respect to the sums; see ``finish.finish_backward``."""
    if spec.reduction not in _WITHOUT_GRADIENT:
        return saved * (grad[:, :, None, None] if spec.reduction == "none" else grad)
    counts, saved, grad = counts.contiguous(), saved.contiguous(), grad.to(saved.dtype).contiguous()
    grad_sums = torch.empty_like(saved)
    _finish(counts, saved, grad, None, grad_sums, features, has_target, spec, _as_sums(weights, saved))
    return grad_sums


def _finish(*arguments: Any) -> None:
    if _library().finish(structs.finish(_threads(), *arguments)):
        _raise(_NO_MEMORY)
