"""The table of sums on a device, in integers: what programs add up in any order comes out the same, bit for bit.

A table is one int64 tensor: ``HEAD`` slots (the poison: the bits of a double, 0 or NaN; how many programs of the finish
are done), then ``[pairs, cells, 1 + 3 F]``, a pair being a sample and a class. A cell holds its count, and of every
feature a sum in three slots:

    high   in units of 2^-16
    low    in units of 2^-46, what the first leaves over: less than 2^30 of them each time
    real   the bits of a double, where what is infinite, NaN or out of range is added as it is; 0 nearly always

Range: what is added is a sum over n voxels, and goes into the integers only if it is at most n * 2^46 / V, of V voxels
in a sample and class. Then ``high`` stays below 2^63 and, up to ``MOST_VOXELS``, so does ``low``, in whatever portions
the voxels come: nothing ever wraps. At 2^31 voxels the limit is 32,768 a voxel, at 2^24 it is 4.2 million, which is a
negative log-likelihood of logits as large, and the focal loss's is no larger. A probability and its square, at most 1,
are never beyond it. No feature is below 0, and so there is no limit from below. Where several sums beyond it meet in a
cell, and only there, the order of their addition is left to chance, and with it the last bit of a double.

Resolution: an addition is off by at most 2^-46, 1.4e-14. That is 1e-8 of a lone 1e-6, and less than the last bit of a
float32 for anything larger.
"""

import triton
import triton.language as tl

HEAD = 2
DONE = 1  # the slot of the counter
MOST_VOXELS = 2**32  # of a sample and class

UNIT = 2.0**-46

_HIGH_UNIT = tl.constexpr(2.0**-16)
_LOW_UNIT = tl.constexpr(UNIT)
_HIGH = tl.constexpr(2.0**16)
_LOW = tl.constexpr(1 / UNIT)


def largest(voxels: int) -> float:
    """What a voxel may add on average, so that nothing wraps."""
    return 2.0**46 / max(voxels, 1)


@triton.jit
def add_sums(row_ptr, row_real_ptr, cell, count, sums, largest, mask, NUM_FEATURES: tl.constexpr):
    """Add counts, and sums over so many voxels, to their cells; all of one shape, or all scalars."""
    first = cell * (1 + 3 * NUM_FEATURES)
    tl.atomic_add(row_ptr + first, count.to(tl.int64), mask=mask, sem="relaxed")
    for j in tl.static_range(NUM_FEATURES):
        at = first + 1 + 3 * j
        fits = sums[j] <= largest * count.to(tl.float32)  # False for NaN
        inside = tl.where(fits, sums[j], 0.0)
        high = tl.floor(inside * _HIGH)
        low = tl.floor((inside - high * _HIGH_UNIT) * _LOW + 0.5)  # the difference is exact
        tl.atomic_add(row_ptr + at, high.to(tl.int64), mask=mask & fits, sem="relaxed")
        tl.atomic_add(row_ptr + at + 1, low.to(tl.int64), mask=mask & fits, sem="relaxed")
        tl.atomic_add(row_real_ptr + at + 2, sums[j].to(tl.float64), mask=mask & (fits == 0), sem="relaxed")


@triton.jit
def read_stats(row_ptr, row_real_ptr, poison, cell, stat, mask, NUM_FEATURES: tl.constexpr):
    """Stats of cells as doubles: number 0 is the count, and j + 1 the sum of feature j, NaN where there is a poison."""
    first = cell * (1 + 3 * NUM_FEATURES)
    mask = mask.to(tl.int1)
    is_sum = (mask & (stat > 0)).to(tl.int1)
    high = tl.load(row_ptr + first + tl.where(stat > 0, 3 * stat - 2, 0), mask=mask, other=0).to(tl.float64)
    low = tl.load(row_ptr + first + 3 * stat - 1, mask=is_sum, other=0).to(tl.float64)
    real = tl.load(row_real_ptr + first + 3 * stat, mask=is_sum, other=0.0)
    return tl.where(stat > 0, high * _HIGH_UNIT + low * _LOW_UNIT + (real + poison), high)


@triton.jit(do_not_specialize=["num_cells"])
def read_table_kernel(
    table_ptr, real_ptr, counts_ptr, sums_ptr, num_cells, NUM_FEATURES: tl.constexpr, STATS: tl.constexpr,
    LANES: tl.constexpr
):  # fmt: skip
    """counts int64 ``[cells]`` and sums ``[cells, F]``, of all pairs in a row.

    Bytes per cell: 8 (1 + 3 F) read, 8 + 4 F written (8 + 8 F of float64 logits).
    """
    cell = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)[None, :]
    stat = tl.arange(0, STATS)[:, None]
    inside = ((cell < num_cells) & (stat <= NUM_FEATURES)).to(tl.int1)
    poison = tl.load(real_ptr)
    stats = read_stats(table_ptr + 2, real_ptr + 2, poison, cell, stat, inside, NUM_FEATURES)
    tl.store(counts_ptr + cell + stat, stats.to(tl.int64), mask=(inside & (stat == 0)).to(tl.int1))
    is_sum = (inside & (stat > 0)).to(tl.int1)
    tl.store(sums_ptr + cell * NUM_FEATURES + stat - 1, stats.to(sums_ptr.dtype.element_ty), mask=is_sum)
