"""The forward pass in Triton: the volume is read once, and what remains of it is the table of sums.

A program owns a few blocks of voxels side by side, of one (sample, channel); with a softmax one block of one sample, in
all its channels. How many depends on the shape alone, and within a block the order of a sum is fixed: with the integers
of ``triton_table`` the result does not depend on the order of the programs.

Two cells are kept in registers from block to block, lane by lane, and reach the table at the end: the background, which
owns nearly all voxels, and the first other cell that the program meets, at home there until its end. So neither a giant
instance nor the background is ever added to more than once per program, and a block without any further cell costs one
reduction: whether there is one. Blocks with a few are searched, smallest first; in crowded ones the rest of the voxels
add themselves.

Bytes per voxel and channel, at fp32 logits and int32 ids: 4 + 4, and 1 to 8 for a target where there is one. A softmax
reads the logits twice, the second time from cache. Atomics: 1 + 2 F for the background and for the home of a program,
and for every further cell of a block. With a softmax every block adds its background by itself: at 256^3 and Dice+CE
32,768 times 7 numbers in one line of the table. At one atomic per nanosecond and line that is 0.23 ms, more than the
0.06 ms that the traffic of two channels takes on an H100. Unmeasured, as all of it; ``bench.gpu`` has a row for it.
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
def _add_cell(row_ptr, row_real_ptr, cell, counts, here, values, largest, NUM_FEATURES: tl.constexpr):
    """Add up the lanes that are here, and that to a cell of the table."""
    count = tl.sum(counts, 0)
    sums = ()
    for j in tl.static_range(NUM_FEATURES):
        sums = sums + (tl.sum(tl.where(here, values[j], 0.0), 0),)
    add_sums(row_ptr, row_real_ptr, cell, count, sums, largest, count > 0, NUM_FEATURES)


@triton.jit
def _other_cells(cell, home, num_cells):
    """What is neither background nor home nor ignored; num_cells stands for "none", also as a home, -1 for invalid."""
    other = tl.where((cell > 0) & (cell != home), cell, num_cells)
    return tl.where(cell == INVALID, -1, other)


@triton.jit
def _add_other_cells(
    left, lowest, home, values, logits_ptr, x_ptr, cells_ptr, target_ptr, row_ptr, row_real_ptr, poison_ptr,
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
            z = _load_z(logits_ptr, x_ptr, lanes, remaining, channel, num_channels, logits_stride_c, ACTIVATION, TAIL)
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
    logits_ptr, x_ptr, lanes, remaining, channel, num_channels, stride_c, ACTIVATION: tl.constexpr, TAIL: tl.constexpr
):
    """The logit of a voxel, at x_ptr; with a softmax against all other channels, of which logits_ptr is the first."""
    z = load_real(x_ptr, lanes, remaining, TAIL)
    if ACTIVATION == "softmax":
        top, winner, log_rest, rest = softmax_parts(logits_ptr, stride_c, lanes, remaining, num_channels, TAIL)
        z = z - log_others(z, winner == channel, top, log_rest, rest)
    return z


@triton.jit
def _sum_blocks(
    logits_ptr, cells_ptr, target_ptr, row_ptr, row_real_ptr, poison_ptr, invalid_ptr, remaining, num_blocks, channel,
    num_channels, num_cells, largest, CODES: tl.constexpr, NUM_FEATURES: tl.constexpr, ACTIVATION: tl.constexpr,
    GAMMA: tl.constexpr, TARGET: tl.constexpr, CHANNEL0: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
    TAIL: tl.constexpr
):
    """Pointers stand at the first voxel of so many blocks; the next one is under way while a block is added."""
    lanes = tl.arange(0, BLOCK)
    counts = tl.zeros_like(lanes)  # of the background, and 2^16 times that at home
    zero = tl.zeros_like(load_real(logits_ptr, lanes, 0, True))
    sums = _zeros(zero, NUM_FEATURES)
    sums_home = _zeros(zero, NUM_FEATURES)
    home = num_cells
    raw = load(logits_ptr, lanes, remaining, TAIL)
    ids, label = load_labels(cells_ptr, target_ptr, lanes, remaining, TARGET, TAIL)
    for block in range(num_blocks):
        there = tl.where(block + 1 < num_blocks, remaining - BLOCK, 0)
        if TAIL:
            next_raw = load(logits_ptr + BLOCK, lanes, there, True)
            next_ids, next_label = load_labels(cells_ptr + BLOCK, target_ptr + BLOCK, lanes, there, TARGET, True)
        else:  # all of it or nothing: one mask for all lanes leaves the loads 16 bytes wide
            here = tl.zeros_like(lanes) + there > 0
            next_raw = tl.load(logits_ptr + BLOCK + lanes, mask=here, other=0)
            next_ids = tl.load(cells_ptr + BLOCK + lanes, mask=here, other=0)
            next_label = next_ids
            if TARGET != "none":
                next_label = tl.load(target_ptr + BLOCK + lanes, mask=here, other=0)
        z = to_real(raw)
        cell = to_cells(ids, label, lanes, remaining, channel, num_channels, num_cells, TARGET, CHANNEL0, TAIL)
        cell = _valid(cell, z, ACTIVATION)
        values = _features(z, CODES, NUM_FEATURES, ACTIVATION, GAMMA)
        left = _other_cells(cell, home, num_cells)
        lowest = tl.min(left, 0)
        if lowest < num_cells:
            home = _add_other_cells(
                left, lowest, home, values, logits_ptr, logits_ptr, cells_ptr, target_ptr, row_ptr, row_real_ptr,
                poison_ptr, invalid_ptr, remaining, channel, num_channels, num_cells, largest, 0, CODES, NUM_FEATURES,
                ACTIVATION, GAMMA, TARGET, CHANNEL0, BLOCK, PART, TAIL
            )
        here = cell == 0
        at_home = (cell == home) & (cell > 0)
        counts += tl.where(here, 1, 0) + tl.where(at_home, 1 << 16, 0)
        sums = _add(sums, here, values, NUM_FEATURES)
        sums_home = _add(sums_home, at_home, values, NUM_FEATURES)
        logits_ptr += BLOCK
        cells_ptr += BLOCK
        target_ptr += BLOCK
        remaining -= BLOCK
        raw = next_raw
        ids = next_ids
        label = next_label
    _add_cell(row_ptr, row_real_ptr, 0, counts & 0xFFFF, lanes >= 0, sums, largest, NUM_FEATURES)
    if home < num_cells:
        _add_cell(row_ptr, row_real_ptr, home, counts >> 16, lanes >= 0, sums_home, largest, NUM_FEATURES)


@triton.jit
def _sum_block_of_softmax(
    logits_ptr, cells_ptr, target_ptr, row_ptr, row_real_ptr, poison_ptr, invalid_ptr, remaining, num_channels,
    num_cells, largest, logits_stride_c, cells_stride_c, target_stride_c, CODES: tl.constexpr,
    NUM_FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, GAMMA: tl.constexpr, TARGET: tl.constexpr,
    CHANNEL0: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, TAIL: tl.constexpr
):
    """Pointers stand at the block's first voxel in channel 0."""
    lanes = tl.arange(0, BLOCK)
    top, winner, log_rest, rest = softmax_parts(logits_ptr, logits_stride_c, lanes, remaining, num_channels, TAIL)
    x_ptr = logits_ptr
    for c in range(num_channels):
        x = load_real(x_ptr, lanes, remaining, TAIL)
        z = x - log_others(x, winner == c, top, log_rest, rest)
        cell = load_cells(cells_ptr, target_ptr, lanes, remaining, c, num_channels, num_cells, TARGET, CHANNEL0, TAIL)
        values = _features(z, CODES, NUM_FEATURES, ACTIVATION, GAMMA)
        here = cell == 0
        _add_cell(row_ptr, row_real_ptr, 0, here.to(tl.int32), here, values, largest, NUM_FEATURES)
        nowhere = num_cells + 1  # a home in no block: with one per channel, registers would not do
        left = _other_cells(cell, nowhere, num_cells)
        lowest = tl.min(left, 0)
        if lowest < num_cells:
            nowhere = _add_other_cells(
                left, lowest, nowhere, values, logits_ptr, x_ptr, cells_ptr, target_ptr, row_ptr, row_real_ptr,
                poison_ptr, invalid_ptr, remaining, c, num_channels, num_cells, largest, logits_stride_c, CODES,
                NUM_FEATURES, ACTIVATION, GAMMA, TARGET, CHANNEL0, BLOCK, PART, TAIL
            )
        x_ptr += logits_stride_c
        cells_ptr += cells_stride_c
        target_ptr += target_stride_c
        row_ptr += num_cells.to(tl.int64) * (1 + 3 * NUM_FEATURES)
        row_real_ptr += num_cells.to(tl.int64) * (1 + 3 * NUM_FEATURES)


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
    part, sample, channel = place(num_programs, num_channels, ACTIVATION)
    channel64 = channel.to(tl.int64)
    start = part * (most_blocks * BLOCK)
    logits_ptr += sample * logits_stride_b + channel64 * logits_stride_c + start
    cells_ptr += sample * cells_stride_b + channel64 * cells_stride_c + start
    target_ptr += sample * target_stride_b + channel64 * target_stride_c + start
    first = _HEAD + (sample * num_channels + channel64) * num_cells * (1 + 3 * NUM_FEATURES)
    row_ptr = table_ptr + first
    row_real_ptr = real_ptr + first
    if start + most_blocks * BLOCK <= num_voxels:
        if ACTIVATION == "softmax":
            _sum_block_of_softmax(
                logits_ptr, cells_ptr, target_ptr, row_ptr, row_real_ptr, real_ptr, invalid_ptr, BLOCK, num_channels,
                num_cells, largest, logits_stride_c, cells_stride_c, target_stride_c, CODES, NUM_FEATURES, ACTIVATION,
                GAMMA, TARGET, CHANNEL0, BLOCK, PART, False
            )
        else:
            _sum_blocks(
                logits_ptr, cells_ptr, target_ptr, row_ptr, row_real_ptr, real_ptr, invalid_ptr, most_blocks * BLOCK,
                most_blocks, channel, num_channels, num_cells, largest, CODES, NUM_FEATURES, ACTIVATION, GAMMA, TARGET,
                CHANNEL0, BLOCK, PART, False
            )
    else:
        remaining = (num_voxels - start).to(tl.int32)
        if ACTIVATION == "softmax":
            _sum_block_of_softmax(
                logits_ptr, cells_ptr, target_ptr, row_ptr, row_real_ptr, real_ptr, invalid_ptr, remaining,
                num_channels, num_cells, largest, logits_stride_c, cells_stride_c, target_stride_c, CODES,
                NUM_FEATURES, ACTIVATION, GAMMA, TARGET, CHANNEL0, BLOCK, PART, True
            )
        else:
            _sum_blocks(
                logits_ptr, cells_ptr, target_ptr, row_ptr, row_real_ptr, real_ptr, invalid_ptr, remaining,
                (remaining + BLOCK - 1) // BLOCK, channel, num_channels, num_cells, largest, CODES, NUM_FEATURES,
                ACTIVATION, GAMMA, TARGET, CHANNEL0, BLOCK, PART, True
            )
