"""The table of sums in Triton, and the whole loss: what is launched, and with what.

A step of the loss launches three kernels forward (the table is cleared, the volume summed, the table finished) and one
backward; "terms" and "instances", whose gradient has to wait for the weights of several values, clear and finish once
more. Nothing is ever copied to the host, and nothing waits.

Full blocks and the tail of a row run the same code compiled twice: only without a mask on the loads does the compiler
move 16 bytes per instruction (8 of half precision, 4 of ids of one byte: four voxels). Where there are several rows
whose length is not divisible by 16, no such access is possible, and every voxel is read alone. Shapes and strides are
run-time arguments: a new patch size compiles again only where Triton tells them apart, by whether they are divisible by
16, are 1, or need 64 bits. What is static is the meaning: features, activation, gamma, what a target is.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from . import triton_finish
from .finish import LossSpec
from .triton_backward import segment_stats_bwd_kernel
from .triton_forward import segment_stats_fwd_kernel
from .triton_launch import Invalid, compute_dtype, divide_up, padded_stats, rows, target_kind
from .triton_table import HEAD, MOST_VOXELS, largest, read_table_kernel
from .triton_voxel import feature_codes

BLOCK = 512
# By compute dtype: a thread has 4 voxels, or 2 in double, one 16-byte load of logits; with twice as many the wider
# specialisations spill registers.
NUM_WARPS = {torch.float32: 4, torch.float64: 8}
# Left alone, the assembler spills a few registers so that one program more fits on a multiprocessor.
MAX_REGISTERS = {torch.float32: 168, torch.float64: 255}
MOST_BLOCKS = 16  # of a program of the forward pass
assert BLOCK * MOST_BLOCKS < 2**15, "a program counts its voxels in 16 bits"
_MAX_CELLS = 2**26  # a row of the table must fit int32 offsets: up to 19 slots per cell
READ_ELEMENTS = 1024


# Argument lists this long fill lines instead of making columns.
# fmt: off
def segment_stats_forward(
    logits: Tensor, cells: Tensor, target: Tensor | None, num_cells: int, features: tuple[str, ...], activation: str,
    gamma: float, channel0: str
) -> tuple[Tensor, Tensor]:
    """Sum the features over every cell; arguments as in ``reference.segment_stats_forward``.

    A tensor whose spatial axes are not dense in row-major order (channels_last_3d, crops) is copied; channel slices and
    expanded axes are read where they lie.

    Never waits for the device. A cell beyond ``num_cells`` or a wrong target turns every sum NaN, and the next call
    after the device has got that far raises. The same input gives the same bits.

    Returns:
        counts int64 ``[B, C, K]`` and sums ``[B, C, K, F]`` in the compute dtype.

    Raises:
        RuntimeError: for what an earlier call on this device was given.
        ValueError: more than 2^26 cells, or 2^32 voxels of a sample and channel.
    """
    shape = (*logits.shape[:2], num_cells)
    counts = torch.empty(shape, dtype=torch.int64, device=logits.device)
    sums = torch.empty((*shape, len(features)), dtype=compute_dtype(logits), device=logits.device)
    stats = padded_stats(len(features))
    lanes = READ_ELEMENTS // stats
    with torch.cuda.device_of(logits):  # does nothing for a CPU tensor, that is, in the interpreter
        integers, table = _sum(logits, cells, target, num_cells, 0, None, features, activation, gamma, channel0)
        if counts.numel():
            read_table_kernel[(divide_up(counts.numel(), lanes),)](
                integers, table, counts, sums, counts.numel(), NUM_FEATURES=len(features), STATS=stats,
                LANES=lanes, enable_fp_fusion=False
            )
    return counts, sums


def segment_stats_backward(
    grad_sums: Tensor, logits: Tensor, cells: Tensor, target: Tensor | None, features: tuple[str, ...], activation: str,
    gamma: float, channel0: str, upstream: Tensor | None = None
) -> Tensor:
    """Gradient of ``segment_stats_forward`` with respect to the logits; arguments as there.

    ``grad_sums`` is copied unless it is contiguous and in the compute dtype; for the volumes see the forward pass.
    Never waits for the device.

    Args:
        upstream: what all of it is multiplied with, a scalar or ``[B, C]``, in the compute dtype.

    Returns:
        Contiguous, in the dtype of the logits; exactly 0 where a voxel is ignored, NaN where its cell or target is
        invalid.
    """
    num_cells = grad_sums.shape[2]
    voxels = _voxels(logits, num_cells)
    dtype = compute_dtype(logits)
    if grad_sums.dtype != dtype or not grad_sums.is_contiguous():
        grad_sums = grad_sums.to(dtype).contiguous()
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    strides = (0, 0) if upstream is None or upstream.ndim == 0 else upstream.stride()
    strides = (*strides, 0 if logits.numel() == voxels else voxels)  # 0 hides no alignment
    blocks = divide_up(voxels, BLOCK)
    with torch.cuda.device_of(logits):
        _launch(
            segment_stats_bwd_kernel, blocks, voxels, logits, cells, target,
            (grad_sums if upstream is None else upstream, grad_sums, grad), num_cells, (blocks,), strides, features,
            activation, gamma, channel0, True, upstream is not None
        )
    return grad


def blob_loss(
    logits: Tensor, instances: Tensor, target: Tensor | None, weights: Tensor | None, num_cells: int,
    features: tuple[str, ...], spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole loss forward: value, counts, and what the backward pass needs, as in ``finish.finish``."""
    pairs = logits.shape[0] * logits.shape[1]
    slots = triton_finish.Slots.of(pairs, num_cells // (1 if target is None else 2) - 1, len(features))
    criterion = triton_finish.coefficients_of(spec, logits.shape[1], features, logits.device)
    with torch.cuda.device_of(logits):
        tables = _sum(
            logits, instances, target, num_cells, slots.doubles, criterion.numbers, features, spec.activation,
            spec.gamma, spec.channel0
        )
        return triton_finish.finish(
            *tables, num_cells, slots, criterion, logits, features, target is not None, spec, weights
        )


def blob_loss_backward(
    grad: Tensor, logits: Tensor, instances: Tensor, target: Tensor | None, weights: Tensor | None, counts: Tensor,
    saved: Tensor, features: tuple[str, ...], spec: LossSpec
) -> Tensor:
    """The gradient of the whole loss with respect to the logits, given that with respect to its value."""
    upstream: Tensor | None = grad
    if spec.reduction in ("terms", "instances"):
        with torch.cuda.device_of(logits):
            saved = triton_finish.finish_backward(grad, counts, saved, features, target is not None, spec, weights)
        upstream = None
    return segment_stats_backward(
        saved, logits, instances, target, features, spec.activation, spec.gamma, spec.channel0, upstream
    )


def _sum(
    logits: Tensor, cells: Tensor, target: Tensor | None, num_cells: int, room: int, numbers: Tensor | None,
    features: tuple[str, ...], activation: str, gamma: float, channel0: str
) -> tuple[Tensor, Tensor]:
    """The table, and behind it some room, and a few numbers that lie in pinned memory: as int64, and as float64."""
    voxels = _voxels(logits, num_cells)
    invalid = Invalid.on(logits.device)
    invalid.raise_if_seen()
    batch, channels = logits.shape[:2]
    slots = HEAD + batch * channels * num_cells * (1 + 3 * len(features)) + room
    more = 0 if numbers is None else numbers.numel()
    table = torch.zeros(slots + more, dtype=torch.float64, device=logits.device)
    integers = table.view(torch.int64)
    blocks = divide_up(voxels, BLOCK)
    most_blocks = blocks_of_a_program(blocks)
    programs = divide_up(blocks, most_blocks)
    division = (programs, most_blocks, largest(voxels), more, slots)
    tables = (integers, table, invalid.flag, table if numbers is None else numbers)
    _launch(
        segment_stats_fwd_kernel, programs, voxels, logits, cells, target, tables, num_cells, division, (), features,
        activation, gamma, channel0, False, False
    )
    return integers, table


def blocks_of_a_program(blocks: int) -> int:
    """By the blocks of a row alone: the same volume is summed in the same order, whatever the batch and the device."""
    return min(max(blocks // 1024, 1), MOST_BLOCKS)


def _launch(
    kernel, programs: int, voxels: int, logits: Tensor, cells: Tensor, target: Tensor | None,
    tables: tuple[Tensor, ...], num_cells: int, division: tuple[float, ...], more_strides: tuple[int, ...],
    features: tuple[str, ...], activation: str, gamma: float, channel0: str, backward: bool, has_upstream: bool
) -> None:
    """On the current device. ``programs``: for a row of voxels, be it of one channel or in all of them."""
    batch, channels = logits.shape[:2]
    if activation == "softmax" and channels == 2:
        activation = "difference"  # of which it is the sigmoid
    rows_of_a_sample = channels - (channel0 == "unused" and not backward)
    if activation == "softmax" or (activation == "difference" and backward):
        rows_of_a_sample = min(rows_of_a_sample, 1)
    programs *= batch * rows_of_a_sample
    if programs == 0:
        return
    logits, *logits_strides = rows(logits)
    cells, *cells_strides = rows(cells)
    label, *label_strides = (cells, 0, 0) if target is None else rows(target)
    if label.dtype == torch.bool:
        label = label.view(torch.uint8)
    static = _static(
        features, activation, gamma, channel0, target_kind(target, channels), compute_dtype(logits), backward,
        has_upstream
    )
    kernel[(programs,)](
        logits, cells, label, *tables, voxels, channels, num_cells, *division, *logits_strides, *cells_strides,
        *label_strides, *more_strides, **static
    )


@functools.lru_cache
def _static(
    features: tuple[str, ...], activation: str, gamma: float, channel0: str, target: str, dtype: torch.dtype,
    backward: bool, has_upstream: bool
) -> dict[str, Any]:
    """What a kernel is compiled for."""
    focal = any(name.startswith("focal") for name in features)
    return {
        "CODES": feature_codes(features),
        "NUM_FEATURES": len(features),
        "ACTIVATION": activation,
        "GAMMA": float(gamma) if focal else 0.0,  # gamma that nobody reads must not compile again
        "TARGET": target,
        "CHANNEL0": channel0,
        "BLOCK": BLOCK,
        "num_warps": NUM_WARPS[dtype],
        "enable_fp_fusion": False,  # the compensated log1p must not be simplified
        **({"HAS_UPSTREAM": has_upstream} if backward else {"PART": 32 * NUM_WARPS[dtype]}),
        **({} if torch.version.hip else {"maxnreg": MAX_REGISTERS[dtype]}),  # an option that only CUDA's backend knows
    }


# fmt: on
def _voxels(logits: Tensor, num_cells: int) -> int:
    """Of a sample and channel, checked like the number of cells."""
    batch, channels = logits.shape[:2]
    voxels = logits.numel() // (batch * channels or 1)
    if num_cells > _MAX_CELLS:
        raise ValueError(f"num_cells must be at most {_MAX_CELLS} (2^26) on this backend; got {num_cells}")
    if voxels > MOST_VOXELS:
        raise ValueError(
            f"logits must have at most {MOST_VOXELS} (2^32) voxels per sample and channel on this backend; got "
            f"{list(logits.shape)}"
        )
    return voxels
