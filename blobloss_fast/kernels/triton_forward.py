"""The forward pass in Triton: the volume is read once, and what remains of it is the table of sums.

A program owns a few blocks of voxels side by side, of one (sample, channel). How many depends on the shape alone, and
within a block the order of a sum is fixed: with the integers of ``triton_table`` the result does not depend on the
order of the programs. A softmax over two channels is the sigmoid of their difference, and reads both logits; over more
than two, a program owns its blocks in all channels. A channel 0 that is unused has no programs.

Two cells are kept in registers from block to block and reach the table at the end: the background, which owns nearly
all voxels, and the first other cell that the program meets, at home there until its end. So neither a giant instance
nor the background is ever added to more than once per program (and channel, of as many of a softmax as a program has
threads). A block of background alone costs one reduction: whether it is one. Others are searched for further cells,
smallest first; in crowded ones the rest of the voxels add themselves. With a softmax over more than two channels each
has two such cells: their sums are reduced in every block, and kept by a lane.

Bytes per voxel and channel, at fp32 logits and int32 ids: 4 + 4, and 1 to 8 for a target where there is one; 12 bytes a
voxel for a softmax over two channels of which the first is unused. What several channels read, their softmax's logits
and a common map of ids or classes, comes from cache but for the first of them: their programs are neighbours. Atomics:
1 + 2 F for the background and for the home of a program (and channel), and for every further cell of a block. A cell
that every program meets, as the background is, is added to 1,024 times at 128^3 and 2,048 times at 256^3: at one atomic
per nanosecond and line, 7 and 14 us for the 7 numbers of Dice+CE, beside 6 and 45 us for the bytes of a channel on an
H100.

Instructions, counted by hand in the disassembly for sm_90 by Triton 3.9, along the path of a block of background alone:
46 a voxel for Dice, 100 for Dice+CE with a target, 92 for that with a softmax over two channels. At four per clock and
multiprocessor, 1.7 GHz and 132 of them, 2x1x256^3 take 54, 117 and 107 us; their bytes take 89, 101 and 134 us at 3
TB/s. So Dice and the softmax are bound by the memory, and Dice+CE with a target by its arithmetic.

All of these are estimates until ``bench.gpu`` has run, which has rows for both kinds of softmax.
"""

import triton
import triton.language as tl

from .triton_table import HEAD, add_sums
from .triton_voxel import (
    INVALID,
    feature,
    load,
    load_cells,
    load_labels,
    load_real,
    log_others,
    place,
    prob_and_logs,
    softmax_parts,
    to_cells,
    to_real,
)

# Cells of one block that are reduced before its remaining voxels add themselves one by one.
_MAX_DISTINCT = tl.constexpr(16)
_HEAD = tl.constexpr(HEAD)

# Argument lists this long fill lines instead of making columns.
# fmt: off


@triton.jit
def _features(
    z, CODES: tl.constexpr, NUM_FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, GAMMA: tl.constexpr
):
    p, _, log_p, log_q = prob_and_logs(z, ACTIVATION)
    values = ()
    for j in tl.static_range(NUM_FEATURES):
        values = values + (feature((CODES >> (3 * j)) & 7, p, log_p, log_q, GAMMA, ACTIVATION),)
    return values


@triton.jit
def _zeros(z, NUM_FEATURES: tl.constexpr):
    values = ()
    for _ in tl.static_range(NUM_FEATURES):
        values = values + (tl.zeros_like(z),)
    return values


@triton.jit
def _add(sums, here, values, NUM_FEATURES: tl.constexpr):
    """Sums of masked values select, never multiply: 0 * inf is not 0."""
    added = ()
    for j in tl.static_range(NUM_FEATURES):
        added = added + (sums[j] + tl.where(here, values[j], 0.0),)
    return added


@triton.jit
def _total(counts, here, values, NUM_FEATURES: tl.constexpr):
    """Counts and sums over the lanes that are here."""
    sums = ()
    for j in tl.static_range(NUM_FEATURES):
        sums = sums + (tl.sum(tl.where(here, values[j], 0.0), 0),)
    return tl.sum(counts, 0), sums


@triton.jit
def _add_cell(row_ptr, row_real_ptr, cell, counts, here, values, largest, NUM_FEATURES: tl.constexpr):
    """Add up the lanes that are here, and that to a cell of the table."""
    count, sums = _total(counts, here, values, NUM_FEATURES)
    add_sums(row_ptr, row_real_ptr, cell, count, sums, largest, count > 0, NUM_FEATURES)


@triton.jit
def _other_cells(cell, home, num_cells):
    """What is neither background nor home nor ignored; num_cells stands for "none", also as a home, -1 for invalid."""
    other = tl.where((cell > 0) & (cell != home), cell, num_cells)
    return tl.where(cell == INVALID, -1, other)


@triton.jit
def _add_other_cells(
    left, lowest, home, values, others_ptr, x_ptr, cells_ptr, target_ptr, row_ptr, row_real_ptr, poison_ptr,
    invalid_ptr, remaining, channel, num_channels, num_cells, largest, logits_stride_c, CODES: tl.constexpr,
    NUM_FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, GAMMA: tl.constexpr, TARGET: tl.constexpr,
    CHANNEL0: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, TAIL: tl.constexpr
):
    """Add the cells of a block that are ``left``, smallest first, but for one that becomes home where there is none."""
    if lowest < 0:
        tl.store(poison_ptr, float("nan"))
        tl.store(invalid_ptr, 1)
        left = tl.where(left < 0, num_cells, left)
        lowest = tl.min(left, 0)
    if home == num_cells:
        home = lowest
        left = tl.where(left == home, num_cells, left)
        lowest = tl.min(left, 0)
    found = 0
    while (lowest < num_cells) & (found < _MAX_DISTINCT):
        here = left == lowest
        _add_cell(row_ptr, row_real_ptr, lowest, here.to(tl.int32), here, values, largest, NUM_FEATURES)
        left = tl.where(here, num_cells, left)
        lowest = tl.min(left, 0)
        found += 1
    if lowest < num_cells:
        # A crowded block. It is read once more, a voxel to a thread: with four, registers would not do.
        for part in range(0, BLOCK, PART):
            lanes = part + tl.arange(0, PART)
            z = _load_z(others_ptr, x_ptr, lanes, remaining, channel, num_channels, logits_stride_c, ACTIVATION, TAIL)
            cell = load_cells(
                cells_ptr, target_ptr, lanes, remaining, channel, num_channels, num_cells, TARGET, CHANNEL0, TAIL
            )
            cell = _valid(cell, z, ACTIVATION)
            crowd = (cell >= lowest) & (cell != home)
            again = _features(z, CODES, NUM_FEATURES, ACTIVATION, GAMMA)
            cell = tl.where(crowd, cell, 0)
            add_sums(row_ptr, row_real_ptr, cell, crowd.to(tl.int32), again, largest, crowd, NUM_FEATURES)
    return home


@triton.jit
def _valid(cell, z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "none":  # not a probability
        cell = tl.where((cell >= 0) & ((z < 0.0) | (z > 1.0)), INVALID, cell)
    return cell


@triton.jit
def _load_z(
    others_ptr, x_ptr, lanes, remaining, channel, num_channels, stride_c, ACTIVATION: tl.constexpr, TAIL: tl.constexpr
):
    """The logit of a voxel, at x_ptr; with a softmax against the others: one at others_ptr, or all from there on."""
    z = load_real(x_ptr, lanes, remaining, TAIL)
    if ACTIVATION == "softmax":
        top, winner, log_rest, rest = softmax_parts(others_ptr, stride_c, lanes, remaining, num_channels, TAIL)
        z = z - log_others(z, winner == channel, top, log_rest, rest)
    if ACTIVATION == "difference":
        z = z - load_real(others_ptr, lanes, remaining, TAIL)
    return z


@triton.jit
def _sum_blocks(
    others_ptr, x_ptr, cells_ptr, target_ptr, row_ptr, row_real_ptr, poison_ptr, invalid_ptr, remaining, num_blocks,
    channel, num_channels, num_cells, largest, CODES: tl.constexpr, NUM_FEATURES: tl.constexpr,
    ACTIVATION: tl.constexpr, GAMMA: tl.constexpr, TARGET: tl.constexpr, CHANNEL0: tl.constexpr, BLOCK: tl.constexpr,
    PART: tl.constexpr, TAIL: tl.constexpr
):
    """Pointers stand at the first voxel of so many blocks; the next one is under way while a block is added."""
    lanes = tl.arange(0, BLOCK)
    counts = tl.zeros_like(lanes)  # of the background, and 2^16 times that at home
    zero = tl.zeros_like(load_real(x_ptr, lanes, 0, True))
    sums = _zeros(zero, NUM_FEATURES)
    sums_home = _zeros(zero, NUM_FEATURES)
    home = num_cells
    raw = load(x_ptr, lanes, remaining, TAIL)
    other = raw
    if ACTIVATION == "difference":
        other = load(others_ptr, lanes, remaining, TAIL)
    ids, label = load_labels(cells_ptr, target_ptr, lanes, remaining, TARGET, TAIL)
    for block in range(num_blocks):
        there = tl.where(block + 1 < num_blocks, remaining - BLOCK, 0)
        if TAIL:
            next_raw = load(x_ptr + BLOCK, lanes, there, True)
            next_other = next_raw
            if ACTIVATION == "difference":
                next_other = load(others_ptr + BLOCK, lanes, there, True)
            next_ids, next_label = load_labels(cells_ptr + BLOCK, target_ptr + BLOCK, lanes, there, TARGET, True)
        else:  # all of it or nothing: one mask for all lanes leaves the loads 16 bytes wide
            here = tl.zeros_like(lanes) + there > 0
            next_raw = tl.load(x_ptr + BLOCK + lanes, mask=here, other=0)
            next_other = next_raw
            if ACTIVATION == "difference":
                next_other = tl.load(others_ptr + BLOCK + lanes, mask=here, other=0)
            next_ids = tl.load(cells_ptr + BLOCK + lanes, mask=here, other=0)
            next_label = next_ids
            if TARGET != "none":
                next_label = tl.load(target_ptr + BLOCK + lanes, mask=here, other=0)
        z = to_real(raw)
        if ACTIVATION == "difference":
            z = z - to_real(other)
        cell = to_cells(ids, label, lanes, remaining, channel, num_channels, num_cells, TARGET, CHANNEL0, TAIL)
        cell = _valid(cell, z, ACTIVATION)
        values = _features(z, CODES, NUM_FEATURES, ACTIVATION, GAMMA)
        if tl.max((cell != 0).to(tl.int32), 0) > 0:  # not background alone
            left = _other_cells(cell, home, num_cells)
            lowest = tl.min(left, 0)
            if lowest < num_cells:
                home = _add_other_cells(
                    left, lowest, home, values, others_ptr, x_ptr, cells_ptr, target_ptr, row_ptr, row_real_ptr,
                    poison_ptr, invalid_ptr, remaining, channel, num_channels, num_cells, largest, 0, CODES,
                    NUM_FEATURES, ACTIVATION, GAMMA, TARGET, CHANNEL0, BLOCK, PART, TAIL
                )
            at_home = (cell == home) & (cell > 0)
            counts += tl.where(at_home, 1 << 16, 0)
            sums_home = _add(sums_home, at_home, values, NUM_FEATURES)
        here = cell == 0
        counts += tl.where(here, 1, 0)
        sums = _add(sums, here, values, NUM_FEATURES)
        others_ptr += BLOCK
        x_ptr += BLOCK
        cells_ptr += BLOCK
        target_ptr += BLOCK
        remaining -= BLOCK
        raw = next_raw
        other = next_other
        ids = next_ids
        label = next_label
    _add_cell(row_ptr, row_real_ptr, 0, counts & 0xFFFF, lanes >= 0, sums, largest, NUM_FEATURES)
    if home < num_cells:
        _add_cell(row_ptr, row_real_ptr, home, counts >> 16, lanes >= 0, sums_home, largest, NUM_FEATURES)


@triton.jit
def _sum_blocks_of_softmax(
    others_ptr, x_ptr, cells_ptr, target_ptr, row_ptr, row_real_ptr, poison_ptr, invalid_ptr, remaining, num_blocks,
    first, num_channels, num_cells, largest, logits_stride_c, cells_stride_c, target_stride_c, CODES: tl.constexpr,
    NUM_FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, GAMMA: tl.constexpr, TARGET: tl.constexpr,
    CHANNEL0: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, TAIL: tl.constexpr
):
    """Pointers stand at the first voxel of so many blocks, in the first channel that has sums; others_ptr in channel 0.

    What a channel adds to the table at the end is kept by a lane.
    """
    lanes = tl.arange(0, BLOCK)
    keepers = tl.arange(0, PART)
    counts = tl.zeros_like(keepers)  # of the background, and 2^16 times that at home
    zero = tl.zeros_like(load_real(x_ptr, keepers, 0, True))
    sums = _zeros(zero, NUM_FEATURES)
    sums_home = _zeros(zero, NUM_FEATURES)
    homes = counts + num_cells
    row_size = num_cells.to(tl.int64) * (1 + 3 * NUM_FEATURES)
    visited = (num_channels - first).to(tl.int64)
    for _ in range(num_blocks):
        top, winner, log_rest, rest = softmax_parts(others_ptr, logits_stride_c, lanes, remaining, num_channels, TAIL)
        for c in range(first, num_channels):
            x = load_real(x_ptr, lanes, remaining, TAIL)
            z = x - log_others(x, winner == c, top, log_rest, rest)
            cell = load_cells(
                cells_ptr, target_ptr, lanes, remaining, c, num_channels, num_cells, TARGET, CHANNEL0, TAIL
            )
            values = _features(z, CODES, NUM_FEATURES, ACTIVATION, GAMMA)
            here = cell == 0
            count, found = _total(here.to(tl.int32), here, values, NUM_FEATURES)
            kept = keepers == c - first
            if c - first < PART:
                counts += tl.where(kept, count, 0)
                sums = _add(sums, kept, found, NUM_FEATURES)
            else:  # more channels than lanes
                add_sums(row_ptr, row_real_ptr, 0, count, found, largest, count > 0, NUM_FEATURES)
            left = _other_cells(cell, 0, num_cells)
            if tl.min(left, 0) < num_cells:
                home = tl.sum(tl.where(kept, homes, 0), 0)  # 0, a home that no cell has, where there is no lane
                left = _other_cells(cell, home, num_cells)
                lowest = tl.min(left, 0)
                if lowest < num_cells:
                    home = _add_other_cells(
                        left, lowest, home, values, others_ptr, x_ptr, cells_ptr, target_ptr, row_ptr, row_real_ptr,
                        poison_ptr, invalid_ptr, remaining, c, num_channels, num_cells, largest, logits_stride_c, CODES,
                        NUM_FEATURES, ACTIVATION, GAMMA, TARGET, CHANNEL0, BLOCK, PART, TAIL
                    )
                    homes = tl.where(kept, home, homes)
                at_home = (cell == home) & (cell > 0)
                count, found = _total(at_home.to(tl.int32), at_home, values, NUM_FEATURES)
                counts += tl.where(kept, count << 16, 0)
                sums_home = _add(sums_home, kept, found, NUM_FEATURES)
            x_ptr += logits_stride_c
            cells_ptr += cells_stride_c
            target_ptr += target_stride_c
            row_ptr += row_size
            row_real_ptr += row_size
        others_ptr += BLOCK
        x_ptr += BLOCK - visited * logits_stride_c
        cells_ptr += BLOCK - visited * cells_stride_c
        target_ptr += BLOCK - visited * target_stride_c
        row_ptr -= visited * row_size
        row_real_ptr -= visited * row_size
        remaining -= BLOCK
    background = keepers * num_cells.to(tl.int64)
    count = counts & 0xFFFF
    add_sums(row_ptr, row_real_ptr, background, count, sums, largest, count > 0, NUM_FEATURES)
    count = counts >> 16
    add_sums(row_ptr, row_real_ptr, background + homes, count, sums_home, largest, count > 0, NUM_FEATURES)


@triton.jit(do_not_specialize=[
    "num_channels", "num_cells", "num_programs", "most_blocks", "num_coefficients", "coefficients_offset"
])
def segment_stats_fwd_kernel(
    logits_ptr, cells_ptr, target_ptr, table_ptr, real_ptr, invalid_ptr, coefficients_ptr, num_voxels, num_channels,
    num_cells, num_programs, most_blocks, largest, num_coefficients, coefficients_offset, logits_stride_b,
    logits_stride_c, cells_stride_b, cells_stride_c, target_stride_b, target_stride_c, CODES: tl.constexpr,
    NUM_FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, GAMMA: tl.constexpr, TARGET: tl.constexpr,
    CHANNEL0: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr
):
    """table: cleared, as in ``triton_table``; real: the same memory as doubles; num_programs: of a row of voxels.

    coefficients: what the finish will read, in the host's memory; the first program brings it into the table's.
    """
    if tl.program_id(0) == 0:
        for done in range(0, num_coefficients, PART):
            which = done + tl.arange(0, PART)
            there = (which < num_coefficients).to(tl.int1)
            coefficient = tl.load(coefficients_ptr + which, mask=there, other=0.0)
            tl.store(real_ptr + coefficients_offset + which, coefficient, mask=there)
    first = 0
    if CHANNEL0 == "unused":
        first = 1
    part, sample, channel = place(num_programs, num_channels, first, ACTIVATION == "softmax")
    channel64 = channel.to(tl.int64)
    start = part * (most_blocks * BLOCK)
    others_ptr = logits_ptr + sample * logits_stride_b + start
    x_ptr = others_ptr + channel64 * logits_stride_c
    if ACTIVATION == "difference":
        others_ptr += (1 - channel64) * logits_stride_c
    cells_ptr += sample * cells_stride_b + channel64 * cells_stride_c + start
    target_ptr += sample * target_stride_b + channel64 * target_stride_c + start
    row_offset = _HEAD + (sample * num_channels + channel64) * num_cells * (1 + 3 * NUM_FEATURES)
    row_ptr = table_ptr + row_offset
    row_real_ptr = real_ptr + row_offset
    if start + most_blocks * BLOCK <= num_voxels:
        if ACTIVATION == "softmax":
            _sum_blocks_of_softmax(
                others_ptr, x_ptr, cells_ptr, target_ptr, row_ptr, row_real_ptr, real_ptr, invalid_ptr,
                most_blocks * BLOCK, most_blocks, channel, num_channels, num_cells, largest, logits_stride_c,
                cells_stride_c, target_stride_c, CODES, NUM_FEATURES, ACTIVATION, GAMMA, TARGET, CHANNEL0, BLOCK, PART,
                False
            )
        else:
            _sum_blocks(
                others_ptr, x_ptr, cells_ptr, target_ptr, row_ptr, row_real_ptr, real_ptr, invalid_ptr,
                most_blocks * BLOCK, most_blocks, channel, num_channels, num_cells, largest, CODES, NUM_FEATURES,
                ACTIVATION, GAMMA, TARGET, CHANNEL0, BLOCK, PART, False
            )
    else:
        remaining = (num_voxels - start).to(tl.int32)
        num_blocks = (remaining + BLOCK - 1) // BLOCK
        if ACTIVATION == "softmax":
            _sum_blocks_of_softmax(
                others_ptr, x_ptr, cells_ptr, target_ptr, row_ptr, row_real_ptr, real_ptr, invalid_ptr, remaining,
                num_blocks, channel, num_channels, num_cells, largest, logits_stride_c, cells_stride_c, target_stride_c,
                CODES, NUM_FEATURES, ACTIVATION, GAMMA, TARGET, CHANNEL0, BLOCK, PART, True
            )
        else:
            _sum_blocks(
                others_ptr, x_ptr, cells_ptr, target_ptr, row_ptr, row_real_ptr, real_ptr, invalid_ptr, remaining,
                num_blocks, channel, num_channels, num_cells, largest, CODES, NUM_FEATURES, ACTIVATION, GAMMA, TARGET,
                CHANNEL0, BLOCK, PART, True
            )
