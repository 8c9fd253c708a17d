"""The domains of a blob term in Triton: read from the table, weighed, and given to a criterion, many side by side.

A tile is ``[stats, domains]``: stat 0 is the count, stat j + 1 the sum of feature j; all in double.
"""

import triton
import triton.language as tl

from .layout import ROW_HEAD
from .triton_table import HEAD, read_stats

_HEAD = tl.constexpr(HEAD)
_ROW_HEAD = tl.constexpr(ROW_HEAD)

# Argument lists this long fill lines instead of making columns.
# fmt: off
# ---------------------------------------------------------------- reading the table


@triton.jit
def read_cells(
    table_ptr, real_ptr, counts_ptr, sums_ptr, poison, pair, cell, stat, num_cells, mask, NUM_FEATURES: tl.constexpr,
    FROM_TABLE: tl.constexpr
):
    """Stats of cells of a pair, ``[stats, cells]``: from the table, or from what the forward pass made of it."""
    if FROM_TABLE:
        first = _HEAD + pair * num_cells * (1 + 3 * NUM_FEATURES)
        stats = read_stats(table_ptr + first, real_ptr + first, poison, cell, stat, mask, NUM_FEATURES)
    else:
        cell = pair * num_cells + cell
        is_count = (mask & (stat == 0)).to(tl.int1)
        is_sum = (mask & (stat > 0)).to(tl.int1)
        count = tl.load(counts_ptr + cell + stat, mask=is_count, other=0)
        sums = tl.load(sums_ptr + cell * NUM_FEATURES + stat - 1, mask=is_sum, other=0.0)
        stats = tl.where(stat == 0, count.to(tl.float64), sums.to(tl.float64))
    return stats


@triton.jit
def read_bits(
    table_ptr, real_ptr, counts_ptr, sums_ptr, poison, pair, ids, stat, num_cells, mask, NUM_FEATURES: tl.constexpr,
    HAS_TARGET: tl.constexpr, FROM_TABLE: tl.constexpr
):
    """Stats of instances by bit, 0 and 1; without a target they are all of bit 1."""
    if HAS_TARGET:
        bit0 = read_cells(
            table_ptr, real_ptr, counts_ptr, sums_ptr, poison, pair, 2 * ids, stat, num_cells, mask, NUM_FEATURES,
            FROM_TABLE
        )
        bit1 = read_cells(
            table_ptr, real_ptr, counts_ptr, sums_ptr, poison, pair, 2 * ids + 1, stat, num_cells, mask, NUM_FEATURES,
            FROM_TABLE
        )
    else:
        bit1 = read_cells(
            table_ptr, real_ptr, counts_ptr, sums_ptr, poison, pair, ids, stat, num_cells, mask, NUM_FEATURES,
            FROM_TABLE
        )
        bit0 = tl.zeros_like(bit1)
    return bit0, bit1


@triton.jit
def weights_of(weights_ptr, pair, ids, num_instances, exist, HAS_WEIGHTS: tl.constexpr):
    """The weights of the instances that exist, 0 of the others."""
    weights = exist.to(tl.float64)
    if HAS_WEIGHTS:
        weights = tl.load(weights_ptr + pair * num_instances + ids - 1, mask=exist.to(tl.int1), other=0.0)
    return weights.to(tl.float64)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")  # False for NaN


# ---------------------------------------------------------------- criteria


@triton.jit
def evaluate(
    rows_ptr, first_row, last_row, positive, negative, grad, valid, stat, STATS: tl.constexpr
):
    """The values of domains ``[1, L]``, 0 where not valid, and the slopes of their two sides ``[stats, L]``.

    Coefficients that are 0 select, never multiply: an unread sum may be infinite.
    """
    value = tl.zeros_like(grad)
    slope_positive = tl.zeros_like(positive)
    slope_negative = tl.zeros_like(positive)
    for r in range(first_row, last_row):
        row_ptr = rows_ptr + r * (_ROW_HEAD + 4 * STATS)
        weight = tl.load(row_ptr)
        a = tl.load(row_ptr + _ROW_HEAD + stat)
        a_neg = tl.load(row_ptr + _ROW_HEAD + STATS + stat)
        b = tl.load(row_ptr + _ROW_HEAD + 2 * STATS + stat)
        b_neg = tl.load(row_ptr + _ROW_HEAD + 3 * STATS + stat)
        above = tl.where(a != 0.0, a * positive, 0.0) + tl.where(a_neg != 0.0, a_neg * negative, 0.0)
        below = tl.where(b != 0.0, b * positive, 0.0) + tl.where(b_neg != 0.0, b_neg * negative, 0.0)
        above = tl.sum(above, 0)[None, :] + tl.load(row_ptr + 2)
        below = tl.sum(below, 0)[None, :] + tl.load(row_ptr + 3)
        ratio = above / below
        value += weight * (tl.load(row_ptr + 1) + ratio)
        scale = tl.where(valid, weight * grad / below, 0.0)
        ratio = tl.where(valid, ratio, 0.0)
        slope_above = tl.load(row_ptr + 4)
        slope_below = tl.load(row_ptr + 5)
        d = tl.where(b != 0.0, a * slope_above - (b * slope_below) * ratio, a * slope_above)
        d_neg = tl.where(b_neg != 0.0, a_neg * slope_above - (b_neg * slope_below) * ratio, a_neg * slope_above)
        slope_positive += tl.where((a != 0.0) | (b != 0.0), d * scale, 0.0)
        slope_negative += tl.where((a_neg != 0.0) | (b_neg != 0.0), d_neg * scale, 0.0)
    return tl.where(valid, value, 0.0), slope_positive, slope_negative


@triton.jit
def terms_of_pair(
    table_ptr, real_ptr, counts_ptr, sums_ptr, weights_ptr, pair, num_cells, num_instances, num_tiles, may_be_empty,
    NUM_FEATURES: tl.constexpr, HAS_TARGET: tl.constexpr, HAS_WEIGHTS: tl.constexpr, FROM_TABLE: tl.constexpr,
    LANES: tl.constexpr
):
    """1 if a pair has a blob term: an instance with a weight above 0, or none where that counts as empty. Reads until
    it knows, which nearly always is one tile."""
    lanes = tl.arange(0, LANES)[None, :]
    stat = tl.zeros([1, 1], tl.int32)
    found = 0
    weighted = 0
    tile = 0
    while (weighted == 0) & (tile < num_tiles):
        ids = 1 + tile * LANES + lanes
        bit0, bit1 = read_bits(
            table_ptr, real_ptr, counts_ptr, sums_ptr, 0.0, pair, ids, stat, num_cells, ids <= num_instances,
            NUM_FEATURES, HAS_TARGET, FROM_TABLE
        )
        exist = bit0 + bit1 > 0.0
        weights = weights_of(weights_ptr, pair, ids, num_instances, exist, HAS_WEIGHTS)
        found = tl.maximum(found, tl.max(tl.max(exist.to(tl.int32), 1), 0))
        weighted = tl.maximum(weighted, tl.max(tl.max((weights > 0.0).to(tl.int32), 1), 0))
        tile += 1
    bit0, bit1 = read_bits(
        table_ptr, real_ptr, counts_ptr, sums_ptr, 0.0, pair, stat, stat, num_cells, stat == 0, NUM_FEATURES,
        HAS_TARGET, FROM_TABLE
    )
    background = tl.sum(tl.sum(bit0 + bit1, 1), 0)
    is_empty = ((found == 0) & (may_be_empty != 0) & (background > 0.0)).to(tl.int32)
    return tl.maximum(weighted, is_empty), is_empty


@triton.jit
def without_own(own, finite, bad, num_bad):
    """A total without one's own part, where a part that is not finite must not spoil what the others are to see."""
    is_own = (is_finite(own) == 0).to(tl.int32)
    rest = finite - tl.where(is_own != 0, 0.0, own)
    return rest + tl.where(num_bad - is_own > 0, bad, 0.0)


@triton.jit
def poison_of_sums(sums_ptr, num_sums, LANES: tl.constexpr):
    """NaN if every sum is, which invalid labels have done; else 0. Reads until one is not."""
    lanes = tl.arange(0, LANES)
    all_nan = num_sums > 0
    first = num_sums * 0
    while all_nan & (first < num_sums):
        sums = tl.load(sums_ptr + first + lanes, mask=(first + lanes < num_sums).to(tl.int1), other=float("nan"))
        all_nan = tl.max((sums == sums).to(tl.int32), 0) == 0
        first += LANES
    return tl.where(all_nan, float("nan"), 0.0).to(tl.float64)


# ---------------------------------------------------------------- the instances of a pair


@triton.jit
def store_cells(out_ptr, cells, stat, values, mask, NUM_FEATURES: tl.constexpr):
    values = values.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + cells * NUM_FEATURES + stat - 1, values, mask=(mask & (stat > 0)).to(tl.int1))


@triton.jit
def evaluate_instances(
    table_ptr, real_ptr, counts_ptr, sums_ptr, weights_ptr, grad_ptr, rows_ptr, value_ptr, out_ptr, poison, pair, chunk,
    num_chunks, num_cells, num_instances, num_tiles, first_blob, first_empty, last_empty, total_weight, blob_grad,
    background, others, finite, bad, num_bad, per_voxel, main_slope0, main_slope1, slopes_of_all, stat, used,
    NUM_FEATURES: tl.constexpr, STATS: tl.constexpr, LANES: tl.constexpr, HAS_TARGET: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, MASKING: tl.constexpr, REDUCTION: tl.constexpr, FROM_TABLE: tl.constexpr,
    GRADIENT: tl.constexpr, STORES: tl.constexpr
):
    """Evaluate every num_chunks-th tile of a pair's instances, from ``chunk`` on.

    Returns the sum of the values by lane, weighted, and of the slopes with respect to what instances share.
    """
    ZONES: tl.constexpr = MASKING == "zones"
    BITS: tl.constexpr = 2 if HAS_TARGET else 1
    lanes = tl.arange(0, LANES)[None, :]
    blob = tl.zeros([1, LANES], tl.float64)
    slopes = tl.zeros([STATS, LANES], tl.float64)
    for tile in range(chunk, num_tiles, num_chunks):
        ids = 1 + tile * LANES + lanes
        inside = (ids <= num_instances) & used
        bit0, bit1 = read_bits(
            table_ptr, real_ptr, counts_ptr, sums_ptr, poison, pair, ids, stat, num_cells, inside, NUM_FEATURES,
            HAS_TARGET, FROM_TABLE
        )
        own = bit0 + bit1
        count = tl.sum(tl.where(stat == 0, own, 0.0), 0)[None, :]
        exist = count > 0.0
        share = weights_of(weights_ptr, pair, ids, num_instances, exist, HAS_WEIGHTS) / total_weight
        grad = blob_grad * share
        if REDUCTION == "instances":
            if FROM_TABLE:
                grad = exist.to(tl.float64)
            else:
                grad_ptrs = grad_ptr + pair * num_instances + ids - 1
                grad = tl.load(grad_ptrs, mask=exist.to(tl.int1), other=0.0).to(tl.float64)
        if ZONES:
            # A zone without a positive voxel is for the rows for that, if there are any.
            apart = exist & (first_empty < last_empty) & (tl.sum(tl.where(stat == 0, bit1, 0.0), 0)[None, :] == 0.0)
            value, slope1, slope0 = evaluate(
                rows_ptr, first_blob, first_empty, bit1, bit0, grad, exist & (apart == 0), stat, STATS
            )
            more, more1, more0 = evaluate(rows_ptr, first_empty, last_empty, bit1, bit0, grad, apart, stat, STATS)
            value += more
            slope1 += more1
            slope0 += more0
        else:
            negative = background + per_voxel * (others - count)
            if MASKING == "none":
                negative += tl.where(stat > 0, without_own(own, finite, bad, num_bad), 0.0)
            value, slope1, slope_negative = evaluate(
                rows_ptr, first_blob, first_empty, own, negative, grad, exist, stat, STATS
            )
            slopes += slope_negative
            if MASKING == "none":
                slope1 += slopes_of_all - slope_negative
            slope0 = slope1
        blob += share * value
        if STORES:
            cells = pair * num_cells + BITS * ids
            if FROM_TABLE:
                if REDUCTION == "instances":
                    value_ptrs = value_ptr + pair * num_instances + ids - 1
                    values = (value + poison).to(value_ptr.dtype.element_ty)
                    tl.store(value_ptrs, values, mask=(ids <= num_instances).to(tl.int1))
                is_count = (inside & (stat == 0)).to(tl.int1)
                if HAS_TARGET:
                    tl.store(counts_ptr + cells + stat, bit0.to(tl.int64), mask=is_count)
                tl.store(counts_ptr + cells + BITS - 1 + stat, bit1.to(tl.int64), mask=is_count)
            if GRADIENT:
                bit0 = main_slope0 + slope0 + poison
                bit1 = main_slope1 + slope1 + poison
            if HAS_TARGET:
                store_cells(out_ptr, cells, stat, bit0, inside, NUM_FEATURES)
            store_cells(out_ptr, cells + BITS - 1, stat, bit1, inside, NUM_FEATURES)
    return blob, slopes
