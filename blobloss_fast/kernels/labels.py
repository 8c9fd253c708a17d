"""Connected components through connected-components-3d: the fallback on every device, and the truth of the others.

cc3d keeps Python's lock while it works, so two threads label two samples no faster than one: the samples come one after
the other. What is done around it is kept small: comparisons that make one byte of a voxel, and of the volume no more
than the box that holds the foreground.
"""

from __future__ import annotations

from typing import Any

import cc3d
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .layout import NOT_A_CLASS, NOT_BINARY

# by the 3D name: "all neighbours" is 26 whatever the number of axes; one axis is labelled as a plane of one line
_CC3D: dict[int, dict[int, Any]] = {1: {26: 8}, 2: {4: 4, 8: 8, 26: 8}, 3: {6: 6, 18: 18, 26: 26}}


def connected_components(mask: Tensor, connectivity: int) -> tuple[Tensor, Tensor]:
    """Label every sample and channel of a binary mask alone, 1..N in raster order.

    Args:
        mask: ``[B, C, *spatial]``, non-zero is foreground; any device (copied to the CPU and back).

    Returns:
        labels int32 ``[B, C, *spatial]`` and counts int64 ``[B, C]``.
    """
    return _find(mask, mask.shape[1], False, False, connectivity, None)


def is_ignored(target: Tensor, ignore: int) -> Tensor:
    """Where the target has its ignored value, which its dtype need not be able to hold."""
    if target.is_floating_point() or target.dtype == torch.bool:
        return target == float(ignore)
    bounds = torch.iinfo(target.dtype)
    return target == ignore if bounds.min <= ignore <= bounds.max else torch.zeros_like(target, dtype=torch.bool)


def label_target(
    target: Tensor, channels: int, class_map: bool, softmax: bool, connectivity: int, ignore: int | None
) -> tuple[Tensor, Tensor]:
    """Find the instances of a target: int32 ids, -1 where the target is ignored, and how many there are.

    Args:
        target: ``[B, 1, *spatial]`` class map (of a softmax) or ``[B, C, *spatial]`` binary.
        channels: C, the channels of the logits.
        softmax: channel 0 is the background class and has no instances.
        ignore: the ignored value of the target.

    Returns:
        ids ``[B, C, *spatial]`` and counts int64 ``[B, C]``; one channel, the only one with instances, for a softmax of
        two channels.
    """
    return _find(target, channels, class_map, softmax, connectivity, ignore)


def _find(
    target: Tensor, channels: int, class_map: bool, softmax: bool, connectivity: int, ignore: int | None
) -> tuple[Tensor, Tensor]:
    returned = 1 if softmax and channels == 2 else channels
    labels = np.zeros((target.shape[0], returned, *target.shape[2:]), np.int32)
    counts = np.zeros(labels.shape[:2], np.int64)
    classes = [value for value in range(1, channels if class_map else 2) if value != ignore]
    for values, ids, count in zip(_comparable(target), labels, counts, strict=True):
        known = values == 0
        if ignore is not None:
            ignored = values == ignore
            known |= ignored
        for value in classes:
            hot = values == value
            known |= hot
            for channel, volume in enumerate(_as_bytes(hot), start=value if class_map else 0):
                if channel or not softmax:
                    last = channel - channels  # from the end: a softmax of two returns one channel
                    count[last] = _label(volume, ids[last], connectivity)
        if not known.all():
            raise ValueError(NOT_A_CLASS if class_map else NOT_BINARY)
        if ignore is not None:
            ids -= _as_bytes(ignored)[-returned:]  # no id is there: 0 becomes -1
    return torch.from_numpy(labels).to(target.device), torch.from_numpy(counts).to(target.device)


def _comparable(target: Tensor) -> Any:
    """Return an array that compares fast: NumPy's on the CPU (up to ten times PyTorch's), the tensor on a device.

    A tensor is made wide enough for any class and any ignored value, which would be wrapped otherwise.
    """
    if target.dtype == torch.bool:
        target = target.view(torch.uint8)
    if _on_host(target):
        return target.numpy(force=True)
    return target.to(torch.promote_types(target.dtype, torch.int64))


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _as_bytes(found: Any) -> NDArray[np.uint8]:
    """Bring the result of a comparison to the CPU."""
    return torch.as_tensor(found).cpu().numpy().view(np.uint8)


def _label(volume: NDArray[np.uint8], ids: NDArray[np.int32], connectivity: int) -> int:
    """Write the ids of one volume into zeros; return how many there are.

    cc3d numbers like scipy if it gets C-contiguous integers and is not told that they are binary: what it does for
    binary images (its default for bool) numbers planes in another order, and refuses some volumes, as any long line.
    """
    box = _box(volume)
    inside = np.ascontiguousarray(volume[box])
    if not inside.size:
        return 0
    found, count = cc3d.connected_components(
        inside if inside.ndim > 1 else inside[None], connectivity=_CC3D[inside.ndim][connectivity], return_N=True
    )
    ids[box] = found.reshape(inside.shape)
    return int(count)


def _box(volume: NDArray[np.uint8]) -> tuple[slice, ...]:
    """The smallest box that holds what is not zero: raster order and neighbours are the same in it."""
    box = []
    while volume.ndim:
        occupied = np.flatnonzero(volume.reshape(len(volume), -1).max(1))
        box.append(slice(occupied[0], occupied[-1] + 1) if occupied.size else slice(0))
        volume = volume.max(0)
    return tuple(box)
