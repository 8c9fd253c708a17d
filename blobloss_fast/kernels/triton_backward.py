"""The backward pass in Triton: the volume is read once more, and the gradient is written.

``grad[v] = upstream * sum_f g[cell(v), f] f'(z_v)``, a gather without atomics; ``upstream`` is read on the device. With
a softmax the classes' cells are added up; over two channels it is the sigmoid of their difference.

Bytes per voxel and channel, at fp32 logits and int32 ids: 4 + 4 read (1 to 8 more for a target), 4 written. A softmax
of more than two channels reads logits and ids again from cache. The F coefficients of a cell come from cache:
neighbours share their cell.
"""

import triton
import triton.language as tl

from .triton_voxel import (
    IGNORED,
    INVALID,
    difference,
    exp,
    load_cells,
    load_real,
    log_others,
    place,
    prob_and_logs,
    slope,
    softmax_parts,
)

# Argument lists this long fill lines instead of making columns.
# fmt: off


@triton.jit
def _gradient_of_z(
    cell, z, upstream_ptr, row_ptr, CODES: tl.constexpr, NUM_FEATURES: tl.constexpr, ACTIVATION: tl.constexpr,
    GAMMA: tl.constexpr, HAS_UPSTREAM: tl.constexpr
):
    """upstream * sum_f g[cell, f] f'(z): 0 where ignored, NaN where invalid (a gradient scaler must notice)."""
    p, q, log_p, log_q = prob_and_logs(z, ACTIVATION)
    counted = cell >= 0
    coefficient_ptrs = row_ptr + tl.where(counted, cell, 0) * NUM_FEATURES
    grad = tl.zeros_like(z)
    for j in tl.static_range(NUM_FEATURES):
        coefficient = tl.load(coefficient_ptrs + j, mask=counted, other=0.0)
        grad += coefficient * slope((CODES >> (3 * j)) & 7, p, q, log_p, log_q, GAMMA, ACTIVATION)
    if HAS_UPSTREAM:
        grad = grad * tl.load(upstream_ptr)
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
    logits_ptr, cells_ptr, target_ptr, upstream_ptr, row_ptr, grad_ptr, remaining, channel, num_channels, num_cells,
    logits_stride_c, cells_stride_c, target_stride_c, upstream_stride_c, grad_stride, CODES: tl.constexpr,
    NUM_FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, GAMMA: tl.constexpr, TARGET: tl.constexpr,
    CHANNEL0: tl.constexpr, HAS_UPSTREAM: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr
):
    """Pointers stand at the block's first voxel: of its channel, or with any softmax of channel 0."""
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
        scale_ptr = upstream_ptr
        for c in range(num_channels):
            x = load_real(x_ptr, lanes, remaining, TAIL)
            is_winner = winner == c
            others_log = log_others(x, is_winner, largest, log_rest, rest)
            cell = load_cells(ids_ptr, label_ptr, lanes, remaining, c, num_channels, num_cells, TARGET, CHANNEL0, TAIL)
            grad_z = _gradient_of_z(
                cell, x - others_log, scale_ptr, coefficient_ptr, CODES, NUM_FEATURES, ACTIVATION, GAMMA, HAS_UPSTREAM
            )
            total += tl.where(is_winner, 0.0, grad_z * exp(difference(largest, others_log)))
            grad_winner = tl.where(is_winner, grad_z, grad_winner)
            counted = counted | (cell != IGNORED).to(tl.int32)
            x_ptr += logits_stride_c
            ids_ptr += cells_stride_c
            label_ptr += target_stride_c
            scale_ptr += upstream_stride_c
            coefficient_ptr += num_cells.to(tl.int64) * NUM_FEATURES
        for c in range(num_channels):
            x = load_real(logits_ptr, lanes, remaining, TAIL)
            is_winner = winner == c
            others_log = log_others(x, is_winner, largest, log_rest, rest)
            cell = load_cells(
                cells_ptr, target_ptr, lanes, remaining, c, num_channels, num_cells, TARGET, CHANNEL0, TAIL
            )
            grad_z = _gradient_of_z(
                cell, x - others_log, upstream_ptr, row_ptr, CODES, NUM_FEATURES, ACTIVATION, GAMMA, HAS_UPSTREAM
            )
            others = total - grad_z * exp(difference(largest, others_log))
            grad = grad_z - exp(difference(x, largest)) * others - grad_winner * exp(difference(x, log_rest))
            grad = tl.where(is_winner, grad_z - total, grad)
            _store(grad_ptr, lanes, remaining, tl.where(counted != 0, grad, 0.0), TAIL)
            logits_ptr += logits_stride_c
            cells_ptr += cells_stride_c
            target_ptr += target_stride_c
            upstream_ptr += upstream_stride_c
            row_ptr += num_cells.to(tl.int64) * NUM_FEATURES
            grad_ptr += grad_stride
    elif ACTIVATION == "difference":
        z = load_real(logits_ptr, lanes, remaining, TAIL)
        z = z - load_real(logits_ptr + logits_stride_c, lanes, remaining, TAIL)
        cell = load_cells(
            cells_ptr, target_ptr, lanes, remaining, 0, num_channels, num_cells, TARGET, CHANNEL0, TAIL
        )
        grad = _gradient_of_z(cell, z, upstream_ptr, row_ptr, CODES, NUM_FEATURES, ACTIVATION, GAMMA, HAS_UPSTREAM)
        cell = load_cells(
            cells_ptr + cells_stride_c, target_ptr + target_stride_c, lanes, remaining, 1, num_channels, num_cells,
            TARGET, CHANNEL0, TAIL
        )
        other = _gradient_of_z(
            cell, -z, upstream_ptr + upstream_stride_c, row_ptr + num_cells * NUM_FEATURES, CODES, NUM_FEATURES,
            ACTIVATION, GAMMA, HAS_UPSTREAM
        )
        _store(grad_ptr, lanes, remaining, grad - other, TAIL)
        _store(grad_ptr + grad_stride, lanes, remaining, other - grad, TAIL)
    else:
        z = load_real(logits_ptr, lanes, remaining, TAIL)
        cell = load_cells(
            cells_ptr, target_ptr, lanes, remaining, channel, num_channels, num_cells, TARGET, CHANNEL0, TAIL
        )
        grad = _gradient_of_z(cell, z, upstream_ptr, row_ptr, CODES, NUM_FEATURES, ACTIVATION, GAMMA, HAS_UPSTREAM)
        _store(grad_ptr, lanes, remaining, grad, TAIL)


@triton.jit(do_not_specialize=[
    "num_channels", "num_cells", "num_blocks", "upstream_stride_b", "upstream_stride_c"
])
def segment_stats_bwd_kernel(
    logits_ptr, cells_ptr, target_ptr, upstream_ptr, grad_sums_ptr, grad_ptr, num_voxels, num_channels, num_cells,
    num_blocks, logits_stride_b, logits_stride_c, cells_stride_b, cells_stride_c, target_stride_b, target_stride_c,
    upstream_stride_b, upstream_stride_c, grad_stride, CODES: tl.constexpr, NUM_FEATURES: tl.constexpr,
    ACTIVATION: tl.constexpr, GAMMA: tl.constexpr, TARGET: tl.constexpr, CHANNEL0: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr, BLOCK: tl.constexpr
):
    """grad_sums: [B, C, cells, F] in the compute dtype; grad: [B, C, voxels], contiguous, written everywhere.

    grad_stride: from one row of voxels of the gradient to the next.
    """
    part, sample, channel = place(
        num_blocks, num_channels, 0, ACTIVATION == "softmax" or ACTIVATION == "difference"
    )
    channel64 = channel.to(tl.int64)
    start = part * BLOCK
    logits_ptr += sample * logits_stride_b + channel64 * logits_stride_c + start
    cells_ptr += sample * cells_stride_b + channel64 * cells_stride_c + start
    target_ptr += sample * target_stride_b + channel64 * target_stride_c + start
    upstream_ptr += sample * upstream_stride_b + channel64 * upstream_stride_c
    row64 = sample * num_channels + channel64
    row_ptr = grad_sums_ptr + row64 * num_cells * NUM_FEATURES
    grad_ptr += row64 * grad_stride + start
    if start + BLOCK <= num_voxels:
        _backward_block(
            logits_ptr, cells_ptr, target_ptr, upstream_ptr, row_ptr, grad_ptr, BLOCK, channel, num_channels,
            num_cells, logits_stride_c, cells_stride_c, target_stride_c, upstream_stride_c, grad_stride, CODES,
            NUM_FEATURES, ACTIVATION, GAMMA, TARGET, CHANNEL0, HAS_UPSTREAM, BLOCK, False
        )
    else:
        _backward_block(
            logits_ptr, cells_ptr, target_ptr, upstream_ptr, row_ptr, grad_ptr, (num_voxels - start).to(tl.int32),
            channel, num_channels, num_cells, logits_stride_c, cells_stride_c, target_stride_c, upstream_stride_c,
            grad_stride, CODES, NUM_FEATURES, ACTIVATION, GAMMA, TARGET, CHANNEL0, HAS_UPSTREAM, BLOCK, True
        )
