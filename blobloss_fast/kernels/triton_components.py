"""Connected components in Triton: runs of a line are joined by a union-find over all voxels, in five small kernels.

A volume (one sample and channel) is labelled alone, in the int32 labels themselves; besides those, two numbers per tile
of 1024 voxels are kept, and the parents of more than 2^31 voxels. A slot of the labels holds, one kernel after another:

    start   0 background, IGNORED, INVALID, or 1 + the voxel where the run begins, which is a parent: a voxel before or
            itself. A run ends with its tile. Tiles with foreground put themselves on a list; only those are read again.
    join    Where a run first touches one of the lines before it, the larger of the two roots becomes a child of the
            smaller one: a root is a voxel that is its own parent, in the end the first voxel of its component.
    rank    1 + the root of the component; in a root, FIRST_RANK - r if it is the r-th (0, 1, ...) root of its tile.
    scan    (reads and writes the number of roots before each tile, and the number of components)
    number  1 + the number of roots before this one: the id, in the raster order of the first voxels, as scipy counts.

The order of the list is left to chance, and nothing depends on it. Launches and memory depend on shapes alone.

Bytes, for a mask of m bytes per voxel and a share t of tiles with foreground: start m + 4 per voxel; join, rank and
number 4 t each to read the tiles on the list; some 64 per run for each of what they write and of what they look up in
other lines. Scan: 8 per tile. Predictions for an H100 (3.35 TB/s; 2 to 3 us per kernel at least), nothing measured:
bool masks, 3 % foreground in balls of radius 6, 0.0036 runs per voxel:
    2x1x128^3  t = 0.55: 12.3 bytes per voxel, 52 MB (most of it in the L2 cache), 20-35 us
    2x1x256^3  t = 0.70: 14.1 bytes per voxel, 473 MB, 150-190 us
Noise costs more, 3 % of single voxels, 0.029 runs per voxel:
    2x1x128^3  t = 1: 22.6 bytes per voxel, 95 MB, 30-55 us
    2x1x256^3  t = 1: 22.6 bytes per voxel, 758 MB, 240-310 us
Lesions cost less: real masks of 0.05 to 1.9 % foreground have t = 0.07 to 0.41.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import Invalid, rows
from .triton_union_find import (
    HEAD,
    IGNORED,
    INVALID,
    components_join_kernel,
    components_number_kernel,
    components_rank_kernel,
    components_scan_kernel,
)
from .triton_voxel import load

TILE = 1024  # 16 voxels per thread: one 16-byte load of a bool mask
BLOCK = 128  # of the join, whose lanes wait for the slowest of their program: one warp
CHUNK = 4096  # of the scan over the tiles of a volume
WARPS = 2  # per tile
SCAN_WARPS = 4
# By the type of a parent. Left alone, the assembler spills two so that one program more fits on a multiprocessor.
MAX_REGISTERS = {torch.int32: 128, torch.int64: 168}
_NARROW = 2**31 - 2**12  # up to as many voxels, the index of a voxel is an int32, also that of a tile's end
_WARPS_PER_PROCESSOR = 32  # of the programs that share the list of tiles

# Argument lists this long fill lines instead of making columns.
# fmt: off
# ---------------------------------------------------------------- start


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def _comparable(values):
    """As wide as any class and any ignored value, which would be wrapped otherwise."""
    if values.dtype.is_floating():
        if values.dtype != tl.float64:
            values = values.to(tl.float32)
    else:
        if (values.dtype == tl.uint32) | (values.dtype == tl.uint64):
            values = values.to(tl.int64)
        if values.dtype != tl.int64:
            values = values.to(tl.int32)
    return values


@triton.jit
def _is_known(values, num_classes, CLASS_MAP: tl.constexpr):
    if CLASS_MAP:
        known = (values >= 0) & (values < num_classes)  # False for NaN
        if values.dtype.is_floating():
            known = known & (tl.floor(values) == values)
    else:
        known = (values == 0) | (values == 1)
    return known


@triton.jit
def _start_tile(
    mask_ptr, labels_ptr, work_ptr, invalid_ptr, tile, start, remaining, channel, num_classes, width, ignore,
    stride_c, CLASS_MAP: tl.constexpr, ONE_HOT: tl.constexpr, HAS_IGNORE: tl.constexpr, TILE: tl.constexpr,
    TAIL: tl.constexpr
):
    """Pointers stand at the tile's first voxel."""
    lanes = tl.arange(0, TILE)
    values = _comparable(load(mask_ptr, lanes, remaining, TAIL))
    known = _is_known(values, num_classes, CLASS_MAP)
    if CLASS_MAP:
        hot = values == channel
    else:
        hot = values == 1
    if CLASS_MAP | ONE_HOT:  # the class of channel 0 is the background
        hot = hot & (channel > 0)
    label = tl.where(known, 0, INVALID)
    if HAS_IGNORE:
        ignored = values == ignore.to(values.dtype)
        hot = hot & (ignored == 0)
        label = tl.where(ignored, IGNORED, label)
    if ONE_HOT:  # noqa: SIM102 - a constant and a value
        # The loss may leave channel 0 unread, and where there are two it has no labels: channel 1 speaks for both.
        if channel == 1:
            values = _comparable(load(mask_ptr - stride_c, lanes, remaining, TAIL))
            known = _is_known(values, num_classes, CLASS_MAP)
            if HAS_IGNORE:
                known = known | (values == ignore.to(values.dtype))
            hot = hot & known
            label = tl.where(known, label, INVALID)
    found = tl.sum(tl.where(label == INVALID, 2 * TILE, hot.to(tl.int32)), 0)
    if found >= 2 * TILE:
        tl.store(invalid_ptr, 1)
    label = label.to(labels_ptr.dtype.element_ty)
    if found > 0:
        position = tl.atomic_add(work_ptr, 1, sem="relaxed")
        tl.store(work_ptr + HEAD + position, tile)
        # Where a run begins: after the last voxel that has none, at the last begin of a line, or with the tile.
        goes_on = hot & ((start + lanes) % width > 0) & (lanes > 0)
        begin = tl.where(goes_on, 0, tl.where(hot, lanes, lanes + 1))
        begin = tl.associative_scan(begin, 0, _later)
        label = tl.where(hot, start + begin + 1, label)
    if TAIL:
        tl.store(labels_ptr + lanes, label, mask=lanes < remaining)
    else:
        tl.store(labels_ptr + lanes, label)


@triton.jit(do_not_specialize=["width", "num_tiles", "num_channels", "first_channel", "ignore"])
def components_start_kernel(
    mask_ptr, labels_ptr, work_ptr, invalid_ptr, num_voxels, width, num_tiles, num_channels, first_channel, ignore,
    stride_b, stride_c, stride_row, CLASS_MAP: tl.constexpr, ONE_HOT: tl.constexpr, HAS_IGNORE: tl.constexpr,
    TILE: tl.constexpr
):
    """work: int32, the length of the list and padding (zeros), the list of tiles, their numbers of roots (zeros)."""
    tile = tl.program_id(0)
    row = tile // num_tiles
    sample = row // num_channels
    channel = row - sample * num_channels + first_channel
    start = (tile - row * num_tiles).to(labels_ptr.dtype.element_ty) * TILE
    mask_ptr += sample.to(tl.int64) * stride_b + channel.to(tl.int64) * stride_c + start
    labels_ptr += row.to(tl.int64) * stride_row + start
    num_classes = num_channels + first_channel
    if start + TILE <= num_voxels:
        _start_tile(
            mask_ptr, labels_ptr, work_ptr, invalid_ptr, tile, start, TILE, channel, num_classes, width, ignore,
            stride_c, CLASS_MAP, ONE_HOT, HAS_IGNORE, TILE, False
        )
    else:
        _start_tile(
            mask_ptr, labels_ptr, work_ptr, invalid_ptr, tile, start, (num_voxels - start).to(tl.int32), channel,
            num_classes, width, ignore, stride_c, CLASS_MAP, ONE_HOT, HAS_IGNORE, TILE, True
        )


# fmt: on
# ---------------------------------------------------------------- launchers


def connected_components(mask: Tensor, connectivity: int) -> tuple[Tensor, Tensor]:
    """Label every sample and channel of a binary mask alone, 1..N in raster order.

    Never waits for the device. The mask is read as it is; only spatial axes that are not dense in row-major order
    (channels_last_3d, crops) make a copy. A value but 0 and 1 has the label 2^31 - 1, and the next call after the
    device has got that far raises.

    Args:
        mask: ``[B, C, *spatial]`` bool, integer or floating point.

    Returns:
        labels int32 ``[B, C, *spatial]``, contiguous, and counts int64 ``[B, C]``.

    Raises:
        RuntimeError: for what an earlier call on this device was given.
    """
    return _find(mask, mask.shape[1], False, False, connectivity, None)


def label_target(
    target: Tensor, channels: int, class_map: bool, softmax: bool, connectivity: int, ignore: int | None
) -> tuple[Tensor, Tensor]:
    """Find the instances of a target: int32 ids, -1 where it is ignored; arguments as in ``labels.label_target``.

    A value that is neither ignored nor known has the id 2^31 - 1 in every channel that reads it, a capacity that no
    table has: the loss becomes NaN, and the next call after the device has got that far raises.

    Returns:
        ids ``[B, C, *spatial]`` and their counts ``[B, C]``; of a softmax over two channels, the foreground's alone.
    """
    return _find(target, channels, class_map, softmax, connectivity, ignore)


def _find(
    target: Tensor, channels: int, class_map: bool, softmax: bool, connectivity: int, ignore: int | None
) -> tuple[Tensor, Tensor]:
    invalid = Invalid.on(target.device)
    invalid.raise_if_seen()
    returned = 1 if softmax and channels == 2 else channels
    spatial = target.shape[2:]
    device, voxels, volumes = target.device, spatial.numel(), target.shape[0] * returned
    labels = torch.empty((target.shape[0], returned, *spatial), dtype=torch.int32, device=device)
    counts = torch.empty((target.shape[0], returned), dtype=torch.int64, device=device)
    if labels.numel() == 0:
        return labels, counts.zero_()
    # A parent in a larger volume needs more bits than a label: those are made in another tensor.
    parents = labels if voxels <= _NARROW else torch.empty_like(labels, dtype=torch.int64)
    tiles = triton.cdiv(voxels, TILE)
    work = torch.zeros(HEAD.value + 2 * volumes * tiles, dtype=torch.int32, device=device)
    target, *strides = rows(target)
    if target.dtype == torch.bool:
        target = target.view(torch.uint8)
    has_ignore = ignore is not None and _can_hold(target.dtype, ignore)
    width, height = spatial[-1], spatial[-2] if len(spatial) > 1 else 1
    stride_row = 0 if volumes == 1 else voxels  # 0 hides no alignment
    reach = min({4: 1, 6: 1, 8: 2, 18: 2, 26: 3}[connectivity], len(spatial))
    # maxnreg is an option that only CUDA's backend knows.
    limit = {"enable_fp_fusion": False, **({} if torch.version.hip else {"maxnreg": MAX_REGISTERS[parents.dtype]})}
    listed = (parents, work, voxels, tiles, volumes * tiles, stride_row)
    with torch.cuda.device_of(target):  # does nothing for a CPU tensor, that is, in the interpreter
        components_start_kernel[(volumes * tiles,)](
            *(target, parents, work, invalid.flag, voxels, width, tiles, returned, channels - returned),
            *(ignore if has_ignore else 0, *strides, stride_row),
            CLASS_MAP=class_map,
            ONE_HOT=softmax and not class_map,
            HAS_IGNORE=has_ignore,
            TILE=TILE,
            num_warps=WARPS,
            **limit,
        )
        components_join_kernel[_share(device, volumes * tiles * (TILE // BLOCK), 1)](
            *(parents, work, voxels, width, height, width * height, tiles, stride_row),
            REACH=reach,
            PLANES=len(spatial) == 3,
            TILE=TILE,
            BLOCK=BLOCK,
            num_warps=1,
            **limit,
        )
        components_rank_kernel[_share(device, volumes * tiles, WARPS)](*listed, TILE=TILE, num_warps=WARPS, **limit)
        components_scan_kernel[(volumes,)](
            counts, work, tiles, volumes * tiles, CHUNK=CHUNK, num_warps=SCAN_WARPS, **limit
        )
        components_number_kernel[_share(device, volumes * tiles, WARPS)](*listed, TILE=TILE, num_warps=WARPS, **limit)
    if parents is not labels:
        labels.copy_(parents)
    return labels, counts


def _can_hold(dtype: torch.dtype, value: int) -> bool:
    return dtype.is_floating_point or torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max


def _share(device: torch.device, pieces: int, warps: int) -> tuple[int]:
    """A grid of as many programs as run at the same time, which share the pieces that a list on the device has."""
    return (min(pieces, _processors(device) * _WARPS_PER_PROCESSOR // warps),)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
