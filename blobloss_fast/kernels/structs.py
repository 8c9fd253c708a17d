"""The structs of csrc/blobloss.h as strings of bytes, which is how ``native`` hands them over.

Between two passes over a small volume the time goes into Python, so a call packs all that it has to say into one
string. Bytes never change, so calls from several threads need no lock. Everything here must agree with the header.
"""

from __future__ import annotations

import functools
import struct
from array import array
from collections.abc import Collection

import torch
from torch import Tensor

from .finish import LossSpec
from .layout import ACTIVATIONS, CHANNEL0, FEATURES, MASKINGS, ROW_SIZE, ZONES
from .rows import rows

Threads = tuple[int, int]  # how many, and the address of a parallel_for, or 0

# The order of names is that of the enumerators.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
TYPES = {dtype: code for code, dtype in enumerate((*FLOATS, torch.bool, *INTEGERS))}
REDUCTIONS = ("mean", "none", "sum", "terms", "instances")
MOST_FEATURES = 6

VOLUME = struct.Struct("@Pqqii")
OPTIONS = struct.Struct("@diii6i4x")
PROBLEM = struct.Struct(f"@{3 * 'Pqqii'}qqqq{OPTIONS.size}sqPP")
FINISH = struct.Struct("@9P6q3d13i4xqP")
_NO_VOLUME = (0, 0, 0, 0, 0)


def problem(
    threads: Threads,
    logits: Tensor,
    cells: Tensor,
    target: Tensor | None,
    num_cells: int,
    features: tuple[str, ...],
    activation: str,
    gamma: float,
    channel0: str,
    notes: int,
) -> tuple[bytes, tuple[Tensor | None, ...]]:
    """Return a bl_problem, and the tensors whose memory it points to: keep them until the library is done.

    ``notes`` is the address of ``bl_problem.block_cells``, or 0; ``finish.sizes_of_saved`` counts the bytes.
    """
    shape = logits.shape
    batch, channels = shape[0], shape[1]
    voxels = logits.numel() // (batch * channels or 1)
    logits, of_logits = volume("logits", logits, FLOATS, batch, channels, voxels)
    cells, of_cells = volume("cells", cells, INTEGERS, batch, channels, voxels)
    of_target = _NO_VOLUME
    if target is not None:
        target, of_target = volume("target", target, TYPES, batch, channels, voxels)
    options = _options(features, activation, gamma, channel0)
    packed = PROBLEM.pack(
        *of_logits, *of_cells, *of_target, batch, channels, voxels, num_cells, options, *threads, notes
    )
    return packed, (logits, cells, target)


def volume(
    name: str, tensor: Tensor, dtypes: Collection[torch.dtype], batch: int, channels: int, voxels: int
) -> tuple[Tensor, tuple[int, int, int, int, int]]:
    """Return a volume with dense spatial axes, and the fields of its bl_volume.

    Operators do not look at shapes and dtypes, and in C a wrong one would read other memory.
    """
    shape = tensor.shape
    own = shape[1]
    if own not in (1, channels) or shape[0] != batch or tensor.numel() != batch * own * voxels:
        raise ValueError(
            f"{name} must be [{batch}, 1 or {channels}, *spatial] with {voxels} voxels, like logits; got {list(shape)}"
        )
    dtype = tensor.dtype
    if dtype not in dtypes:
        raise TypeError(f"{name} must be one of {', '.join(map(str, dtypes))}; got {dtype}: convert it")
    tensor, batch_stride, channel_stride = rows(tensor)
    return tensor, (tensor.data_ptr(), batch_stride, channel_stride, TYPES[dtype], own)


@functools.lru_cache
def grid_view(shape: tuple[int, ...], strides: tuple[int, ...], steps: tuple[int, ...]) -> tuple[int, int, bytes]:
    """Return of a view of every so many voxels its axes, the offset of its first in elements, and sizes and strides."""
    sizes = [*shape[:2], *(len(range(step // 2, size, step)) for size, step in zip(shape[2:], steps, strict=True))]
    offset = sum(stride * (step // 2) for stride, step in zip(strides[2:], steps, strict=True))
    strides = *strides[:2], *(stride * step for stride, step in zip(strides[2:], steps, strict=True))
    return len(sizes), offset, struct.pack(f"@{2 * len(sizes)}q", *sizes, *strides)


@functools.lru_cache
def _options(features: tuple[str, ...], activation: str, gamma: float, channel0: str) -> bytes:
    return OPTIONS.pack(gamma, ACTIVATIONS.index(activation), CHANNEL0.index(channel0), *_feature_codes(features))


@functools.lru_cache
def _feature_codes(features: tuple[str, ...]) -> tuple[int, ...]:
    """Return the number of features and their codes, filled up to the size of the array in C."""
    return len(features), *map(FEATURES.index, features), *(0,) * (MOST_FEATURES - len(features))


def finish(
    threads: Threads,
    counts: Tensor,
    sums: Tensor,
    grad: Tensor | None,
    value: Tensor | None,
    grad_sums: Tensor | None,
    features: tuple[str, ...],
    has_target: bool,
    spec: LossSpec,
    weights: Tensor | None = None,
) -> bytes:
    """Return a bl_finish: keep the tensors until the library is done."""
    instances = counts.numel() // (1 + has_target) - counts.shape[0] * counts.shape[1]
    if weights is not None and weights.numel() != instances:
        raise ValueError(f"weights must be [B, C, N] with {instances} elements in all; got {list(weights.shape)}")
    if spec.masking == ZONES and not has_target:
        raise ValueError("zones need a target, which says where in them the instances are; got none")
    rows = [_row_array(part) for part in (spec.main_rows, spec.blob_rows, spec.empty_rows)]
    return FINISH.pack(
        counts.data_ptr(),
        sums.data_ptr(),
        *[array.buffer_info()[0] for array in rows],
        0 if weights is None else weights.data_ptr(),
        0 if grad is None else grad.data_ptr(),
        0 if value is None else value.data_ptr(),
        0 if grad_sums is None else grad_sums.data_ptr(),
        *[len(array) // ROW_SIZE for array in rows],
        *counts.shape,
        spec.gamma,
        spec.main_weight,
        spec.blob_weight,
        sums.dtype == torch.float64,
        has_target,
        *_spec_codes(spec.activation, spec.masking, spec.channel0, spec.reduction),
        *_feature_codes(features),
        *threads,
    )


@functools.lru_cache
def _row_array(rows: tuple[float, ...]) -> array[float]:
    return array("d", rows)


@functools.lru_cache
def _spec_codes(activation: str, masking: str, channel0: str, reduction: str) -> tuple[int, int, int, int]:
    return (
        ACTIVATIONS.index(activation),
        (*MASKINGS, ZONES).index(masking),
        CHANNEL0.index(channel0),
        REDUCTIONS.index(reduction),
    )
