"""The nearest instance of every voxel in Triton: one kernel along rows, one for every further axis.

All of it is integer arithmetic on (squared distance, id), smallest first, so that ties are decided as on every other
backend. Along a row the nearest instance voxel is the last one at or before a voxel or the first one at or after it:
two scans. Along another axis the candidates of a voxel are what the pass before found on the rows of its line. They are
tried from the voxel outward until even an instance on the next row would be too far. A program (one warp) owns TILE
rows of LINES adjacent lines, one line to a thread: it loads a row once, coalesced, and tries it for TILE voxels in
registers; a row that can improve no voxel of the tile costs a load and a vote of the warp.

Memory: what a pass hands on is not a distance but *where* the instance voxel is, packed into 32 bits; distances and ids
are computed again from there. In 3D the pass along x writes into the output, the one along y into a scratch volume. So
beyond input and output there are 4 bytes per voxel in 2D and 3D (8 where the rows of a plane number more than 2^15 or
are longer than 2^16) and none in 1D, besides the copy of an input whose spatial axes are not dense.

Cost in 3D, int32 ids: 32 bytes per voxel (x 4 + 4, y 4 + 4 + 4, z 4 + 4 + 4 and at most 4 for what it looks up), mostly
from cache at 128^3. Instructions decide: per voxel, a row that is tried takes 7 along y and 6 along z, one that is
only looked at 2 to 3. Counted on 50 balls of 2 to 8 voxels radius at 128^3 (4 to 16 at 256^3), a tile tries 14 rows
along y and 31 along z (21 and 38) and steps outward 48 and 26 times (84 and 42). *Predicted, not measured*, for an
H100 that always issues: 0.07 ms at 128^3 and 0.9 ms at 256^3; with stalls and partly filled waves up to twice that. The
bars are 0.3 ms and 4 ms. A volume without instances takes about as long: every row is looked at, none is tried.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import Invalid, rows
from .zones import checked_weights

LINES = 32  # one line to a thread of a warp, so that maxima over a line's voxels never leave the thread
TILE = 16  # voxels of a line in a thread's registers: a row is loaded and decoded once for all of them
ROW_VOXELS = 512  # voxels of a program along rows
ROW_BLOCKS = (32, 128, 512)  # voxels of a row at a time, each compiled once; longer rows loop
# False: rows of one block, distances of 32 bits; True: longer rows, distances of 64 bits. Left alone, the assembler may
# spill a few registers so that one program more fits; with more of them than these, fewer programs fit.
ROW_REGISTERS = {False: 128, True: 255}
LINE_REGISTERS = {False: 104, True: 255}
LARGE = 2**31  # voxels of a sample and channel from which on offsets take 64 bits
SHORT_Y, SHORT_X = 2**15, 2**16  # the largest axes whose two coordinates fit 32 bits

_INT32_MAX = tl.constexpr(2**31 - 1)
_NOWHERE = tl.constexpr(-1)  # in place of the position of an instance voxel
# In place of the distance to none; real ones are smaller. Twice as much does not overflow.
_FAR32 = tl.constexpr(2**30)
_FAR64 = tl.constexpr(2**62)

# Argument lists this long fill lines instead of making columns.
# fmt: off
# ---------------------------------------------------------------- along rows


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _to_id(values):
    """int32, whatever integers the ids are; what lies beyond becomes the largest id (and has set the flag)."""
    if values.dtype == tl.int64:
        values = tl.where(values > _INT32_MAX, _INT32_MAX, tl.where(values < 0, -1, values))
    return values.to(tl.int32)


@triton.jit
def _beyond_int32(ids):
    """1 if one of a program's ids does not fit int32."""
    if ids.dtype == tl.int64:
        found = tl.max(tl.max((ids > _INT32_MAX).to(tl.int32), 1), 0)
    else:
        found = 0
    return found


@triton.jit
def _nearer(left, right, x, row_ptrs):
    """The nearer one of the instance voxels at or before x (or NOWHERE) and at or after it (or INT32_MAX)."""
    to_left = tl.where(left >= 0, x - left, _INT32_MAX)
    to_right = tl.where(right < _INT32_MAX, right - x, _INT32_MAX)
    tie = ((to_left == to_right) & (to_left > 0) & (left >= 0)).to(tl.int1)
    left_id = _to_id(tl.load(row_ptrs + left, mask=tie, other=0))
    right_id = _to_id(tl.load(row_ptrs + right, mask=tie, other=0))
    return tl.where((to_right < to_left) | (tie & (right_id < left_id)), right, left)


@triton.jit
def _store_nearest(nearest, ids, row_ptrs, out_ptrs, inside, ONLY: tl.constexpr):
    """Where the nearest instance voxel of the row is; with ONLY, in 1D, its id."""
    if ONLY:
        found = _to_id(tl.load(row_ptrs + nearest, mask=(inside & (nearest >= 0)).to(tl.int1), other=1))
        nearest = tl.where(ids < 0, -1, found)
    tl.store(out_ptrs, nearest.to(out_ptrs.dtype.element_ty), mask=inside)


# Bytes per voxel: the ids and 4, and 8 more where rows are longer than a tile.
@triton.jit(do_not_specialize=["num_rows", "num_blocks", "num_channels"])
def nearest_in_row_kernel(
    instances_ptr, out_ptr, invalid_ptr, num_rows, length, num_blocks, num_channels, stride_b, stride_c,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LONG: tl.constexpr, ONLY: tl.constexpr, LARGE: tl.constexpr
):
    """out: [B, C, rows, length], the position in its row of the nearest instance voxel, NOWHERE if there is none."""
    sample = tl.program_id(0) // num_blocks
    block = tl.program_id(0) - sample * num_blocks
    batch = sample // num_channels
    instances_ptr += batch.to(tl.int64) * stride_b + (sample - batch * num_channels).to(tl.int64) * stride_c
    if LARGE:
        block = block.to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    out_ptr += sample.to(tl.int64) * num_rows * length
    row_ptrs = instances_ptr + (row * length)[:, None]
    out_row_ptrs = out_ptr + (row * length)[:, None]
    row_inside = (row < num_rows)[:, None]
    lanes = tl.arange(0, BLOCK)[None, :]
    if LONG:
        left_carry = tl.full([ROWS], _NOWHERE, tl.int32)
        right_carry = tl.full([ROWS], _INT32_MAX, tl.int32)
        too_large = 0
        num_tiles = (length - 1) // BLOCK + 1  # never more than int32
        for tile in range(num_tiles):
            x = tile * BLOCK + lanes
            inside = (row_inside & (x < length)).to(tl.int1)
            ids = tl.load(row_ptrs + x, mask=inside, other=0)
            too_large = tl.maximum(too_large, _beyond_int32(ids))
            left = tl.associative_scan(tl.where(ids > 0, x, _NOWHERE), 1, _larger)
            left = tl.maximum(left, left_carry[:, None])
            left_carry = tl.max(left, 1)
            tl.store(out_row_ptrs + x, left.to(out_ptr.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # what one thread has stored another one may load
        for step in range(num_tiles):
            x = (num_tiles - 1 - step) * BLOCK + lanes
            inside = (row_inside & (x < length)).to(tl.int1)
            ids = tl.load(row_ptrs + x, mask=inside, other=0)
            left = tl.load(out_row_ptrs + x, mask=inside, other=_NOWHERE).to(tl.int32)
            right = tl.associative_scan(tl.where(ids > 0, x, _INT32_MAX), 1, _smaller, reverse=True)
            right = tl.minimum(right, right_carry[:, None])
            right_carry = tl.min(right, 1)
            _store_nearest(_nearer(left, right, x, row_ptrs), ids, row_ptrs, out_row_ptrs + x, inside, ONLY)
        if too_large > 0:
            tl.store(invalid_ptr, 1)
    else:
        inside = (row_inside & (lanes < length)).to(tl.int1)
        ids = tl.load(row_ptrs + lanes, mask=inside, other=0)
        if _beyond_int32(ids) > 0:
            tl.store(invalid_ptr, 1)
        left = tl.associative_scan(tl.where(ids > 0, lanes, _NOWHERE), 1, _larger)
        right = tl.associative_scan(tl.where(ids > 0, lanes, _INT32_MAX), 1, _smaller, reverse=True)
        _store_nearest(_nearer(left, right, lanes, row_ptrs), ids, row_ptrs, out_row_ptrs + lanes, inside, ONLY)


# ---------------------------------------------------------------- along another axis


@triton.jit
def _load_row(positions_ptr, line, row, step, length, lanes, num_lanes):
    """What the pass before found on one row of a tile's lines; NOWHERE beyond the ends."""
    num_lanes = tl.where((row >= 0) & (row < length), num_lanes, 0)
    return tl.load(positions_ptr + line + row * step, mask=lanes < num_lanes, other=_NOWHERE)


@triton.jit
def _wide(value, WIDE: tl.constexpr):
    if WIDE:
        value = value.to(tl.int64)
    return value


@triton.jit
def _distance(at, x, y, weight_y, weight_x, PLANE: tl.constexpr, WIDE: tl.constexpr, SHIFT: tl.constexpr):
    """The squared distance from (y, x), or x alone, to where ``at`` points; garbage for NOWHERE."""
    if PLANE:
        across = _wide(x - (at & ((1 << SHIFT) - 1)).to(tl.int32), WIDE)
        down = _wide(y - (at >> SHIFT).to(tl.int32), WIDE)
        squared = across * across * weight_x + down * down * weight_y
    else:
        across = _wide(x - at.to(tl.int32), WIDE)
        squared = across * across * weight_x
    return squared


@triton.jit
def _try_row(
    best, best_id, best_at, useful, distance, at, row, first, x, instances_ptr, line, step, width, weight,
    TILE: tl.constexpr, PLANE: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, FAR: tl.constexpr,
    SHIFT: tl.constexpr
):
    """Improve a tile by one row, unless it is of no use to any line.

    With k = row - first the axis adds w (j - k)^2 = w k^2 - 2 w j k + w j^2 to the distance of voxel j of a line. The
    last term is the same for every candidate: ``best`` lacks it, and a candidate costs one multiplication.
    """
    if tl.max(useful.to(tl.int32), 0) > 0:
        if PLANE:
            at_x = (at & ((1 << SHIFT) - 1)).to(tl.int32)
            source = row * step + (at >> SHIFT).to(line.dtype) * width + at_x
        else:
            at_x = at.to(tl.int32)
            source = row * step + line + (at_x - x)
        found = _to_id(tl.load(instances_ptr + source, mask=useful, other=0))[None, :]
        k = _wide(row - first, WIDE)
        j = _wide(tl.arange(0, TILE), WIDE)
        distance = tl.where(useful, distance, FAR) + k * k * weight
        candidate = distance[None, :] - (j * (2 * k * weight))[:, None]
        better = (candidate < best) | ((candidate == best) & (found < best_id))
        best = tl.where(better, candidate, best)
        best_id = tl.where(better, found, best_id)
        if not LAST:
            # A line without any instance yet may take NOWHERE here: all ones, whatever row is packed onto them.
            packed = (row.to(best_at.dtype) << SHIFT) | at_x.to(best_at.dtype)
            best_at = tl.where(better, packed[None, :], best_at)
    return best, best_id, best_at


# Bytes per voxel: the positions and the output, and of the ids only what is found; the last pass reads them all once
# more, to see which voxels are ignored.
@triton.jit(do_not_specialize=[
    "num_lines", "length", "num_tiles", "num_blocks", "num_channels", "step", "width", "weight", "weight_y", "weight_x"
])
def nearest_on_line_kernel(
    instances_ptr, positions_ptr, out_ptr, num_lines, length, num_tiles, num_blocks, num_channels, step, width, weight,
    weight_y, weight_x, stride_b, stride_c,
    TILE: tl.constexpr, LINES: tl.constexpr, PLANE: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr,
    LARGE: tl.constexpr, SHIFT: tl.constexpr
):
    """Along y, or with PLANE along z: positions hold x, or y and x packed; out gets y and x, or with LAST the id.

    ``step``: voxels from one row of a line to the next; ``width``: voxels along x. WIDE: distances take 64 bits.
    """
    block = tl.program_id(0) // num_tiles
    tile = tl.program_id(0) - block * num_tiles
    sample = block // num_blocks
    block = block - sample * num_blocks
    batch = sample // num_channels
    instances_ptr += batch.to(tl.int64) * stride_b + (sample - batch * num_channels).to(tl.int64) * stride_c
    start = sample.to(tl.int64) * num_lines * length
    positions_ptr += start
    out_ptr += start
    if LARGE:
        block = block.to(tl.int64)
        step = step.to(tl.int64)
    weight = _wide(weight, WIDE)
    weight_y = _wide(weight_y, WIDE)
    weight_x = _wide(weight_x, WIDE)
    FAR: tl.constexpr = _FAR64 if WIDE else _FAR32

    lanes = tl.arange(0, LINES)
    num_lanes = tl.minimum(num_lines - block * LINES, LINES).to(tl.int32)
    line = block * LINES + lanes
    y = (line // width).to(tl.int32)
    x = (line - y.to(line.dtype) * width).to(tl.int32)
    if not PLANE:  # lines of all planes side by side: y counts the planes
        line = y.to(line.dtype) * (step * length) + x
    first = tile * TILE
    last = first + (TILE - 1)
    j = tl.arange(0, TILE)
    square = (_wide(j, WIDE) * _wide(j, WIDE))[:, None]

    best = tl.full([TILE, LINES], FAR, tl.int64 if WIDE else tl.int32)
    best_id = tl.full([TILE, LINES], 0, tl.int32)
    best_at = tl.full([TILE, LINES], _NOWHERE, out_ptr.dtype.element_ty)
    at0 = _load_row(positions_ptr, line, first, step, length, lanes, num_lanes)
    at1 = _load_row(positions_ptr, line, first + 1, step, length, lanes, num_lanes)
    for i in range(0, tl.minimum(length - first, TILE), 2):
        row = first + i
        next0 = _load_row(positions_ptr, line, row + 2, step, length, lanes, num_lanes)
        next1 = _load_row(positions_ptr, line, row + 3, step, length, lanes, num_lanes)
        distance = _distance(at0, x, y, weight_y, weight_x, PLANE, WIDE, SHIFT)
        best, best_id, best_at = _try_row(
            best, best_id, best_at, at0 >= 0, distance, at0, row, first, x, instances_ptr, line, step, width, weight,
            TILE, PLANE, LAST, WIDE, FAR, SHIFT
        )
        distance = _distance(at1, x, y, weight_y, weight_x, PLANE, WIDE, SHIFT)
        best, best_id, best_at = _try_row(
            best, best_id, best_at, at1 >= 0, distance, at1, row + 1, first, x, instances_ptr, line, step, width,
            weight, TILE, PLANE, LAST, WIDE, FAR, SHIFT
        )
        at0 = next0
        at1 = next1
    # Outward, both ways at once. An instance as far as the best so far may still have the smaller id: <=, not <.
    limit = tl.where(lanes < num_lanes, tl.max(best + square * weight, 0), -1)
    farthest = tl.max(limit, 0)
    reach = tl.maximum(first, length - 1 - last)
    away = tile * 0 + 1
    up = _load_row(positions_ptr, line, first - 1, step, length, lanes, num_lanes)
    down = _load_row(positions_ptr, line, last + 1, step, length, lanes, num_lanes)
    beyond = _wide(away, WIDE) * weight  # what the axis adds to the distance from the tile's outermost voxels
    while (away <= reach) & (beyond <= farthest):
        next_up = _load_row(positions_ptr, line, first - away - 1, step, length, lanes, num_lanes)
        next_down = _load_row(positions_ptr, line, last + away + 1, step, length, lanes, num_lanes)
        up_distance = _distance(up, x, y, weight_y, weight_x, PLANE, WIDE, SHIFT)
        down_distance = _distance(down, x, y, weight_y, weight_x, PLANE, WIDE, SHIFT)
        use_up = ((up >= 0) & (up_distance + beyond <= limit)).to(tl.int1)
        use_down = ((down >= 0) & (down_distance + beyond <= limit)).to(tl.int1)
        if tl.max((use_up | use_down).to(tl.int32), 0) > 0:
            best, best_id, best_at = _try_row(
                best, best_id, best_at, use_up, up_distance, up, first - away, first, x, instances_ptr, line, step,
                width, weight, TILE, PLANE, LAST, WIDE, FAR, SHIFT
            )
            best, best_id, best_at = _try_row(
                best, best_id, best_at, use_down, down_distance, down, last + away, first, x, instances_ptr, line,
                step, width, weight, TILE, PLANE, LAST, WIDE, FAR, SHIFT
            )
            limit = tl.where(lanes < num_lanes, tl.max(best + square * weight, 0), -1)
            farthest = tl.max(limit, 0)
        up = next_up
        down = next_down
        away += 1
        beyond = _wide(away, WIDE) * _wide(away, WIDE) * weight

    inside = ((j < length - first)[:, None] & (lanes < num_lanes)[None, :]).to(tl.int1)
    target = line[None, :] + ((first + j) * step)[:, None]
    if LAST:
        ids = tl.load(instances_ptr + target, mask=inside, other=0)
        zone = tl.where(ids < 0, -1, tl.where(best_id > 0, best_id, 1))
        tl.store(out_ptr + target, zone, mask=inside)
    else:
        tl.store(out_ptr + target, best_at, mask=inside)


# ---------------------------------------------------------------- launcher


def nearest_instance(instances: Tensor, weights: Sequence[int]) -> Tensor:
    """The id of the nearest instance voxel; arguments as of the operator.

    A tensor whose spatial axes are not dense in row-major order (channels_last_3d, crops) is copied; channel slices and
    expanded axes are read where they lie. One launch for every axis longer than one.

    Never waits for the device. An id beyond int32, which only int64 can hold, counts as 2^31 - 1, and the next call
    after the device has got that far raises.

    Returns:
        int32, contiguous: -1 where the id is negative, 1 everywhere else where there is no instance.

    Raises:
        RuntimeError: for what an earlier call on this device was given.
        ValueError: weights that are not positive or too large, or an axis of 2^31 voxels.
    """
    sizes = list(instances.shape[2:])
    weights = checked_weights(weights, sizes)
    if max(sizes) >= 2**31:
        raise ValueError(f"spatial axes must be shorter than 2147483648 (2^31); got {sizes}: split the volume")
    out = torch.empty(instances.shape, dtype=torch.int32, device=instances.device)
    axes = [(n, w) for n, w in zip(sizes, weights, strict=True) if n != 1] or [(1, 1)]
    invalid = Invalid.on(instances.device) if instances.dtype == torch.int64 else None
    if invalid is not None:
        invalid.raise_if_seen()
    if out.numel() > 0:
        with torch.cuda.device_of(instances):  # does nothing for a CPU tensor, that is, in the interpreter
            _launch(instances, out, axes, out if invalid is None else invalid.flag)
    return out


def _launch(instances: Tensor, out: Tensor, axes: list[tuple[int, int]], flag: Tensor) -> None:
    instances, *strides = rows(instances)
    samples, channels = out.shape[0] * out.shape[1], out.shape[1]
    width, weight_x = axes[-1]
    voxels = out.numel() // samples
    large = voxels >= LARGE
    wide = sum(w * (n - 1) ** 2 for n, w in axes) >= _FAR32.value
    scratch = out
    if len(axes) > 1:
        short = len(axes) == 2 or (axes[1][0] <= SHORT_Y and width <= SHORT_X)
        scratch = torch.empty(voxels * samples, dtype=torch.int32 if short else torch.int64, device=out.device)

    num_rows = voxels // width
    block = next((size for size in ROW_BLOCKS if width <= size), ROW_BLOCKS[-1])
    num_blocks = triton.cdiv(num_rows, ROW_VOXELS // block)
    long, only = width > block, len(axes) == 1
    nearest_in_row_kernel[(num_blocks * samples,)](
        instances, scratch if len(axes) == 2 else out, flag, num_rows, width, num_blocks, channels, *strides,
        ROWS=ROW_VOXELS // block, BLOCK=block, LONG=long, ONLY=only, LARGE=large, **_options(ROW_REGISTERS[long])
    )
    for axis in range(len(axes) - 2, -1, -1):
        length, weight = axes[axis]
        plane = len(axes) == 3 and axis == 0
        num_lines = voxels // length
        num_tiles, num_blocks = triton.cdiv(length, TILE), triton.cdiv(num_lines, LINES)
        source, target = (out, scratch) if len(axes) == 3 and axis == 1 else (scratch, out)
        nearest_on_line_kernel[(num_tiles * num_blocks * samples,)](
            instances, source, target, num_lines, length, num_tiles, num_blocks, channels,
            width * axes[1][0] if plane else width, width, weight, axes[1][1] if plane else 1, weight_x, *strides,
            TILE=TILE, LINES=LINES, PLANE=plane, LAST=axis == 0, WIDE=wide, LARGE=large,
            SHIFT=8 * scratch.element_size() // 2, **_options(LINE_REGISTERS[wide])
        )


def _options(registers: int) -> dict[str, int]:
    limit = {} if torch.version.hip else {"maxnreg": registers}  # an option that only CUDA's backend knows
    return {"num_warps": 1, "enable_fp_fusion": False, **limit}  # no floats here; Triton 3.9 warns if that is left open
