"""The table of sums in Triton: one kernel reads the volume forward, one kernel reads and writes it backward.

A program owns one block of voxels of one (sample, channel), or with a softmax of one sample, looping over the channels.
Full blocks and the tail of a row run the same code compiled twice: only without a mask on the loads does the compiler
move 16 bytes per instruction. Shapes and strides are run-time arguments, so a new patch size never compiles again;
what is static is the meaning: features, activation, gamma, what a target is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import Overflow, compute_dtype, rows, target_kind
from .triton_voxel import (
    IGNORED,
    INVALID,
    difference,
    feature,
    feature_codes,
    load_cells,
    load_real,
    log_others,
    prob_and_logs,
    slope,
    softmax_parts,
)

# 4 voxels per thread is one 16-byte load in fp32; with 8 the wider specialisations spill registers. A softmax needs
# most registers per thread: small programs leave the compiler room.
BLOCK = {"sigmoid": 1024, "softmax": 512, "none": 1024}
NUM_WARPS = {"sigmoid": 8, "softmax": 4, "none": 8}
# By compute dtype. Left alone, the assembler spills a few registers so that one program more fits on a multiprocessor.
MAX_REGISTERS = {torch.float32: 128, torch.float64: 255}
_MAX_CELLS = 2**28  # a row of the table must fit int32 offsets (kernels compose 2 * id + bit and multiply it by 1 + F)
_HEAD = 2  # fp64 slots in front of the accumulator: the poison, and padding that keeps the table 16-byte aligned

# Cells of one block that are reduced before its remaining voxels add themselves one by one.
_MAX_DISTINCT = tl.constexpr(16)

# Argument lists this long fill lines instead of making columns.
# fmt: off
# ---------------------------------------------------------------- forward


@triton.jit
def _accumulate(
    cell, z, row_ptr, poison_ptr, overflow_ptr, num_cells, CODES: tl.constexpr, NUM_FEATURES: tl.constexpr,
    ACTIVATION: tl.constexpr, GAMMA: tl.constexpr
):
    """Add the voxels of a block to their row of the table: [cells, 1 + features] fp64, the count first.

    Sums of masked values select, never multiply: 0 * inf is not 0.
    """
    WIDTH: tl.constexpr = NUM_FEATURES + 1
    if ACTIVATION == "none":  # not a probability
        cell = tl.where((cell >= 0) & ((z < 0.0) | (z > 1.0)), INVALID, cell)
    p, _, log_p, log_q = prob_and_logs(z, ACTIVATION)

    # The background owns nearly all voxels: it is reduced without asking whether it is there.
    here = cell == 0
    count = tl.sum(here.to(tl.int32), 0)
    tl.atomic_add(row_ptr, count.to(tl.float64), mask=count > 0, sem="relaxed")
    for j in tl.static_range(NUM_FEATURES):
        value = feature((CODES >> (3 * j)) & 7, p, log_p, log_q, GAMMA, ACTIVATION)
        part = tl.sum(tl.where(here, value, 0.0), 0)
        tl.atomic_add(row_ptr + 1 + j, part.to(tl.float64), mask=count > 0, sem="relaxed")

    # What is left, smallest cell first; num_cells stands for "done". One reduction also finds the invalid ones.
    left = tl.where(cell > 0, cell, tl.where(cell == INVALID, -1, num_cells))
    lowest = tl.min(left, 0)
    if lowest < 0:
        tl.store(poison_ptr, float("nan"))
        tl.store(overflow_ptr, 1)
        left = tl.where(left < 0, num_cells, left)
        lowest = tl.min(left, 0)
    found = 0
    while (lowest < num_cells) & (found < _MAX_DISTINCT):
        here = left == lowest
        cell_ptr = row_ptr + lowest * WIDTH
        count = tl.sum(here.to(tl.int32), 0)
        tl.atomic_add(cell_ptr, count.to(tl.float64), sem="relaxed")
        for j in tl.static_range(NUM_FEATURES):
            value = feature((CODES >> (3 * j)) & 7, p, log_p, log_q, GAMMA, ACTIVATION)
            part = tl.sum(tl.where(here, value, 0.0), 0)
            tl.atomic_add(cell_ptr + 1 + j, part.to(tl.float64), sem="relaxed")
        left = tl.where(here, num_cells, left)
        lowest = tl.min(left, 0)
        found += 1
    if lowest < num_cells:  # a crowded block
        crowd = left < num_cells
        cell_ptrs = row_ptr + tl.where(crowd, left, 0) * WIDTH
        tl.atomic_add(cell_ptrs, tl.where(crowd, 1.0, 0.0).to(tl.float64), mask=crowd, sem="relaxed")
        for j in tl.static_range(NUM_FEATURES):
            value = feature((CODES >> (3 * j)) & 7, p, log_p, log_q, GAMMA, ACTIVATION)
            tl.atomic_add(cell_ptrs + 1 + j, value.to(tl.float64), mask=crowd, sem="relaxed")


@triton.jit
def _forward_block(
    logits_ptr, cells_ptr, target_ptr, row_ptr, poison_ptr, overflow_ptr, remaining, channel, num_channels, num_cells,
    logits_stride_c, cells_stride_c, target_stride_c, CODES: tl.constexpr, NUM_FEATURES: tl.constexpr,
    ACTIVATION: tl.constexpr, GAMMA: tl.constexpr, TARGET: tl.constexpr, CHANNEL0: tl.constexpr, BLOCK: tl.constexpr,
    TAIL: tl.constexpr
):
    """Pointers stand at the block's first voxel: of its channel, or with a softmax of channel 0."""
    lanes = tl.arange(0, BLOCK)
    if ACTIVATION == "softmax":
        largest, winner, log_rest, rest = softmax_parts(
            logits_ptr, logits_stride_c, lanes, remaining, num_channels, TAIL
        )
        for c in range(num_channels):
            x = load_real(logits_ptr, lanes, remaining, TAIL)
            z = x - log_others(x, winner == c, largest, log_rest, rest)
            cell = load_cells(
                cells_ptr, target_ptr, lanes, remaining, c, num_channels, num_cells, TARGET, CHANNEL0, TAIL
            )
            _accumulate(cell, z, row_ptr, poison_ptr, overflow_ptr, num_cells, CODES, NUM_FEATURES, ACTIVATION, GAMMA)
            logits_ptr += logits_stride_c
            cells_ptr += cells_stride_c
            target_ptr += target_stride_c
            row_ptr += num_cells.to(tl.int64) * (NUM_FEATURES + 1)
    else:
        z = load_real(logits_ptr, lanes, remaining, TAIL)
        cell = load_cells(
            cells_ptr, target_ptr, lanes, remaining, channel, num_channels, num_cells, TARGET, CHANNEL0, TAIL
        )
        _accumulate(cell, z, row_ptr, poison_ptr, overflow_ptr, num_cells, CODES, NUM_FEATURES, ACTIVATION, GAMMA)


# Bytes per voxel and channel, at fp32 logits and int32 ids: 4 + 4, and 1 to 8 for a target where there is one. A
# softmax reads the logits twice, the second time from cache. Atomics: 1 + F per cell and block of 1024 voxels.
@triton.jit(do_not_specialize=["num_channels", "num_cells", "num_blocks"])
def segment_stats_fwd_kernel(
    logits_ptr, cells_ptr, target_ptr, table_ptr, overflow_ptr, num_voxels, num_channels, num_cells, num_blocks,
    logits_stride_b, logits_stride_c, cells_stride_b, cells_stride_c, target_stride_b, target_stride_c,
    CODES: tl.constexpr, NUM_FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, GAMMA: tl.constexpr,
    TARGET: tl.constexpr, CHANNEL0: tl.constexpr, BLOCK: tl.constexpr
):
    """table: fp64, two slots (the poison: 0, or NaN after something invalid), then [B, C, cells, 1 + F]."""
    row = tl.program_id(0) // num_blocks
    block = tl.program_id(0) - row * num_blocks
    if ACTIVATION == "softmax":
        sample = row
        channel = row * 0
    else:
        sample = row // num_channels
        channel = row - sample * num_channels
    start = block.to(tl.int64) * BLOCK
    batch64 = sample.to(tl.int64)
    channel64 = channel.to(tl.int64)
    logits_ptr += batch64 * logits_stride_b + channel64 * logits_stride_c + start
    cells_ptr += batch64 * cells_stride_b + channel64 * cells_stride_c + start
    target_ptr += batch64 * target_stride_b + channel64 * target_stride_c + start
    row_ptr = table_ptr + 2 + (batch64 * num_channels + channel64) * num_cells * (NUM_FEATURES + 1)
    if start + BLOCK <= num_voxels:
        _forward_block(
            logits_ptr, cells_ptr, target_ptr, row_ptr, table_ptr, overflow_ptr, BLOCK, channel, num_channels,
            num_cells, logits_stride_c, cells_stride_c, target_stride_c, CODES, NUM_FEATURES, ACTIVATION, GAMMA, TARGET,
            CHANNEL0, BLOCK, False
        )
    else:
        _forward_block(
            logits_ptr, cells_ptr, target_ptr, row_ptr, table_ptr, overflow_ptr, (num_voxels - start).to(tl.int32),
            channel, num_channels, num_cells, logits_stride_c, cells_stride_c, target_stride_c, CODES, NUM_FEATURES,
            ACTIVATION, GAMMA, TARGET, CHANNEL0, BLOCK, True
        )


# ---------------------------------------------------------------- backward


@triton.jit
def _gradient_of_z(
    cell, z, row_ptr, CODES: tl.constexpr, NUM_FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, GAMMA: tl.constexpr
):
    """sum_f g[cell, f] f'(z): 0 where ignored, NaN where invalid (a gradient scaler must notice)."""
    p, q, log_p, log_q = prob_and_logs(z, ACTIVATION)
    counted = cell >= 0
    coefficient_ptrs = row_ptr + tl.where(counted, cell, 0) * NUM_FEATURES
    grad = tl.zeros_like(z)
    for j in tl.static_range(NUM_FEATURES):
        coefficient = tl.load(coefficient_ptrs + j, mask=counted, other=0.0)
        grad += coefficient * slope((CODES >> (3 * j)) & 7, p, q, log_p, log_q, GAMMA, ACTIVATION)
    grad = tl.where(counted, grad, 0.0)
    return tl.where(cell == INVALID, float("nan"), grad)


@triton.jit
def _store(ptr, lanes, remaining, values, TAIL: tl.constexpr):
    values = values.to(ptr.dtype.element_ty)
    if TAIL:
        tl.store(ptr + lanes, values, mask=lanes < remaining)
    else:
        tl.store(ptr + lanes, values)


@triton.jit
def _backward_block(
    logits_ptr, cells_ptr, target_ptr, row_ptr, grad_ptr, remaining, channel, num_channels, num_cells, num_voxels,
    logits_stride_c, cells_stride_c, target_stride_c, CODES: tl.constexpr, NUM_FEATURES: tl.constexpr,
    ACTIVATION: tl.constexpr, GAMMA: tl.constexpr, TARGET: tl.constexpr, CHANNEL0: tl.constexpr, BLOCK: tl.constexpr,
    TAIL: tl.constexpr
):
    """Pointers as in _forward_block."""
    lanes = tl.arange(0, BLOCK)
    if ACTIVATION == "softmax":
        # d z_c / d x_j = -softmax of x_j among the channels but c. With a the winner and t_c = G_c exp(largest - lo_c):
        # grad_a = G_a - T, grad_j = G_j - exp(x_j - largest) (T - t_j) - G_a exp(x_j - lo_a), T = sum of t_c, c != a.
        largest, winner, log_rest, rest = softmax_parts(
            logits_ptr, logits_stride_c, lanes, remaining, num_channels, TAIL
        )
        counted = tl.zeros_like(lanes)
        total = tl.zeros_like(largest)
        grad_winner = tl.zeros_like(largest)
        x_ptr = logits_ptr
        ids_ptr = cells_ptr
        label_ptr = target_ptr
        coefficient_ptr = row_ptr
        for c in range(num_channels):
            x = load_real(x_ptr, lanes, remaining, TAIL)
            is_winner = winner == c
            others_log = log_others(x, is_winner, largest, log_rest, rest)
            cell = load_cells(ids_ptr, label_ptr, lanes, remaining, c, num_channels, num_cells, TARGET, CHANNEL0, TAIL)
            grad_z = _gradient_of_z(cell, x - others_log, coefficient_ptr, CODES, NUM_FEATURES, ACTIVATION, GAMMA)
            total += tl.where(is_winner, 0.0, grad_z * tl.exp(difference(largest, others_log)))
            grad_winner = tl.where(is_winner, grad_z, grad_winner)
            counted = counted | (cell != IGNORED).to(tl.int32)
            x_ptr += logits_stride_c
            ids_ptr += cells_stride_c
            label_ptr += target_stride_c
            coefficient_ptr += num_cells.to(tl.int64) * NUM_FEATURES
        for c in range(num_channels):
            x = load_real(logits_ptr, lanes, remaining, TAIL)
            is_winner = winner == c
            others_log = log_others(x, is_winner, largest, log_rest, rest)
            cell = load_cells(
                cells_ptr, target_ptr, lanes, remaining, c, num_channels, num_cells, TARGET, CHANNEL0, TAIL
            )
            grad_z = _gradient_of_z(cell, x - others_log, row_ptr, CODES, NUM_FEATURES, ACTIVATION, GAMMA)
            others = total - grad_z * tl.exp(difference(largest, others_log))
            grad = grad_z - tl.exp(difference(x, largest)) * others - grad_winner * tl.exp(difference(x, log_rest))
            grad = tl.where(is_winner, grad_z - total, grad)
            _store(grad_ptr, lanes, remaining, tl.where(counted != 0, grad, 0.0), TAIL)
            logits_ptr += logits_stride_c
            cells_ptr += cells_stride_c
            target_ptr += target_stride_c
            row_ptr += num_cells.to(tl.int64) * NUM_FEATURES
            grad_ptr += num_voxels
    else:
        z = load_real(logits_ptr, lanes, remaining, TAIL)
        cell = load_cells(
            cells_ptr, target_ptr, lanes, remaining, channel, num_channels, num_cells, TARGET, CHANNEL0, TAIL
        )
        grad = _gradient_of_z(cell, z, row_ptr, CODES, NUM_FEATURES, ACTIVATION, GAMMA)
        _store(grad_ptr, lanes, remaining, grad, TAIL)


# Bytes per voxel and channel, at fp32 logits and int32 ids: 4 + 4 read (1 to 8 more for a target), 4 written. A softmax
# reads logits and ids again from cache. The F coefficients of a cell come from cache: neighbours share their cell.
@triton.jit(do_not_specialize=["num_channels", "num_cells", "num_blocks"])
def segment_stats_bwd_kernel(
    logits_ptr, cells_ptr, target_ptr, grad_sums_ptr, grad_ptr, num_voxels, num_channels, num_cells, num_blocks,
    logits_stride_b, logits_stride_c, cells_stride_b, cells_stride_c, target_stride_b, target_stride_c,
    CODES: tl.constexpr, NUM_FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, GAMMA: tl.constexpr,
    TARGET: tl.constexpr, CHANNEL0: tl.constexpr, BLOCK: tl.constexpr
):
    """grad_sums: [B, C, cells, F] in the compute dtype; grad: [B, C, voxels], contiguous, written everywhere."""
    row = tl.program_id(0) // num_blocks
    block = tl.program_id(0) - row * num_blocks
    if ACTIVATION == "softmax":
        sample = row
        channel = row * 0
    else:
        sample = row // num_channels
        channel = row - sample * num_channels
    start = block.to(tl.int64) * BLOCK
    batch64 = sample.to(tl.int64)
    channel64 = channel.to(tl.int64)
    logits_ptr += batch64 * logits_stride_b + channel64 * logits_stride_c + start
    cells_ptr += batch64 * cells_stride_b + channel64 * cells_stride_c + start
    target_ptr += batch64 * target_stride_b + channel64 * target_stride_c + start
    row64 = batch64 * num_channels + channel64
    row_ptr = grad_sums_ptr + row64 * num_cells * NUM_FEATURES
    grad_ptr += row64 * num_voxels + start
    if start + BLOCK <= num_voxels:
        _backward_block(
            logits_ptr, cells_ptr, target_ptr, row_ptr, grad_ptr, BLOCK, channel, num_channels, num_cells, num_voxels,
            logits_stride_c, cells_stride_c, target_stride_c, CODES, NUM_FEATURES, ACTIVATION, GAMMA, TARGET, CHANNEL0,
            BLOCK, False
        )
    else:
        _backward_block(
            logits_ptr, cells_ptr, target_ptr, row_ptr, grad_ptr, (num_voxels - start).to(tl.int32), channel,
            num_channels, num_cells, num_voxels, logits_stride_c, cells_stride_c, target_stride_c, CODES, NUM_FEATURES,
            ACTIVATION, GAMMA, TARGET, CHANNEL0, BLOCK, True
        )


# ---------------------------------------------------------------- launchers


def segment_stats_forward(
    logits: Tensor, cells: Tensor, target: Tensor | None, num_cells: int, features: tuple[str, ...], activation: str,
    gamma: float, channel0: str
) -> tuple[Tensor, Tensor]:
    """Sum the features over every cell; arguments as in ``reference.segment_stats_forward``.

    A tensor whose spatial axes are not dense in row-major order (channels_last_3d, crops) is copied; channel slices and
    expanded axes are read where they lie.

    Never waits for the device. A cell beyond ``num_cells`` or a wrong target turns every sum NaN, and the next call
    after the device has got that far raises.

    Returns:
        counts int64 ``[B, C, K]`` and sums ``[B, C, K, F]`` in the compute dtype.

    Raises:
        RuntimeError: for what an earlier call on this device was given.
        ValueError: more than 2^28 cells.
    """
    _check_capacity(num_cells)
    overflow = Overflow.on(logits.device)
    overflow.raise_if_seen()
    batch, channels, width = logits.shape[0], logits.shape[1], 1 + len(features)
    accumulator = torch.zeros(_HEAD + batch * channels * num_cells * width, dtype=torch.float64, device=logits.device)
    _launch(
        segment_stats_fwd_kernel, logits, cells, target, (accumulator, overflow.flag), num_cells, features, activation,
        gamma, channel0
    )
    overflow.send_to_host()
    table = accumulator[_HEAD:].view(batch, channels, num_cells, width)
    sums = torch.empty((batch, channels, num_cells, len(features)), dtype=compute_dtype(logits), device=logits.device)
    torch.add(table[..., 1:], accumulator[0], out=sums)  # the poison: 0, or NaN for all
    return table[..., 0].to(torch.int64), sums


def segment_stats_backward(
    grad_sums: Tensor, logits: Tensor, cells: Tensor, target: Tensor | None, features: tuple[str, ...], activation: str,
    gamma: float, channel0: str
) -> Tensor:
    """Gradient of ``segment_stats_forward`` with respect to the logits; arguments as there.

    ``grad_sums`` is copied unless it is contiguous and in the compute dtype; for the volumes see the forward pass.
    Never waits for the device.

    Returns:
        Contiguous, in the dtype of the logits; exactly 0 where a voxel is ignored, NaN where its cell or target is
        invalid.
    """
    num_cells = grad_sums.shape[2]
    _check_capacity(num_cells)
    grad_sums = grad_sums.to(compute_dtype(logits)).contiguous()
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _launch(
        segment_stats_bwd_kernel, logits, cells, target, (grad_sums, grad), num_cells, features, activation, gamma,
        channel0
    )
    return grad


def _launch(
    kernel, logits: Tensor, cells: Tensor, target: Tensor | None, tables: tuple[Tensor, Tensor], num_cells: int,
    features: tuple[str, ...], activation: str, gamma: float, channel0: str
) -> None:
    batch, channels = logits.shape[:2]
    voxels = logits.shape[2:].numel()
    blocks = triton.cdiv(voxels, BLOCK[activation])
    programs = blocks * (batch if activation == "softmax" else batch * channels)
    if programs == 0 or channels == 0:
        return
    logits, *logits_strides = rows(logits)
    cells, *cells_strides = rows(cells)
    label, *label_strides = (cells, 0, 0) if target is None else rows(target)
    if label.dtype == torch.bool:
        label = label.view(torch.uint8)
    # An option that only CUDA's backend knows.
    limit = {} if torch.version.hip else {"maxnreg": MAX_REGISTERS[compute_dtype(logits)]}
    focal = any(name.startswith("focal") for name in features)
    with torch.cuda.device_of(logits):  # does nothing for a CPU tensor, that is, in the interpreter
        kernel[(programs,)](
            logits, cells, label, *tables, voxels, channels, num_cells, blocks, *logits_strides, *cells_strides,
            *label_strides,
            CODES=feature_codes(features),
            NUM_FEATURES=len(features),
            ACTIVATION=activation,
            GAMMA=float(gamma) if focal else 0.0,  # gamma that nobody reads must not compile again
            TARGET=target_kind(target, channels),
            CHANNEL0=channel0,
            BLOCK=BLOCK[activation],
            num_warps=NUM_WARPS[activation],
            **limit,
            enable_fp_fusion=False,  # the compensated log1p must not be simplified
        )


# fmt: on
def _check_capacity(num_cells: int) -> None:
    if num_cells > _MAX_CELLS:
        raise ValueError(f"num_cells must be at most {_MAX_CELLS} (2^28) on this backend; got {num_cells}")
