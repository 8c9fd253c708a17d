"""The nearest instance of every voxel in pure PyTorch, for any device: the fallback, and what every backend computes.

Squared distances are sums of integer weights times squared numbers of voxels, so that what is as near is exactly as
near, and of instances that are as near the one with the smallest id is taken. The minimum over all voxels of pairs
(squared distance, id) is taken along one axis after the other, which gives the same: of two voxels that lie on one line
along an axis, the nearer, or the one with the smaller id, stays so for every voxel that is reached past that line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

IDS_TOO_LARGE = (
    "instances must be ids below 2**31, which is what the int32 zones can hold; got a larger one: renumber them"
)
MOST_DISTANCE = 2**62 - 1  # squared, and weighted
_LARGEST_ID = 2**31 - 1
_ID_BITS = 31
_AT_ONCE = {True: 1 << 15, False: 1 << 22}  # elements: on the CPU what one thread does alone, so that none waits


def checked_weights(weights: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    """Require one positive weight per axis, small enough for 64 bits; return them as a tuple."""
    weights = tuple(weights)
    largest = _largest_distance(weights, sizes) if len(weights) == len(sizes) else 0
    if len(weights) != len(sizes) or min(weights) < 1 or max(*weights, largest) > MOST_DISTANCE:
        raise ValueError(
            f"weights must be {len(sizes)} positive integers with squared distances below 2**62 in {list(sizes)}; "
            f"got {list(weights)}"
        )
    return weights


def nearest_instance(instances: Tensor, weights: Sequence[int]) -> Tensor:
    """Return the id of the nearest instance of every voxel of its own sample and channel.

    Beside the result it takes 60 bytes per voxel, or 110 where squared distances need more than 31 bits: of a sample
    and channel, or of as many as are worked on at once; and a copy of instances whose axes do not lie dense.

    Args:
        instances: integer ids ``[B, C, *spatial]``, above 0 an instance, below 0 ignored (but no obstacle).
        weights: squared spacings as positive integers, one per spatial axis.

    Returns:
        int32 like the instances: an id; 1 in a sample and channel without instances; -1 where it is ignored.

    Raises:
        ValueError: on the CPU, for an id beyond int32; elsewhere the result is then undefined.

    Synchronises:
        Never.
    """
    sizes = instances.shape[2:]
    weights = checked_weights(weights, sizes)
    if _on_host(instances) and instances.dtype == torch.int64 and int(instances.max()) > _LARGEST_ID:
        raise ValueError(IDS_TOO_LARGE)
    zones = torch.empty(instances.shape, dtype=torch.int32, device=instances.device)
    largest = _largest_distance(weights, sizes)
    find = _packed if largest < 2**_ID_BITS - 1 else _apart
    groups, results = instances.reshape(-1, *sizes), zones.view(-1, *sizes)
    together = max(1, _AT_ONCE[_on_host(instances)] // math.prod(sizes))
    for begin in range(0, len(groups), together):
        ids = groups[begin : begin + together].long().contiguous()
        found = find(ids, weights, largest).clamp_(min=1)  # 0 is nowhere but where there is no instance
        results[begin : begin + together] = found.masked_fill_(ids < 0, -1)
    return zones


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _largest_distance(weights: Sequence[int], sizes: Sequence[int]) -> int:
    return sum(weight * (size - 1) ** 2 for weight, size in zip(weights, sizes, strict=True))


def _packed(ids: Tensor, weights: Sequence[int], largest: int) -> Tensor:
    """With distance and id in one number, the distance in front."""
    keys = torch.where(ids > 0, ids, (largest + 1) << _ID_BITS)  # where there is none yet, it is farther than any
    for axis, weight in enumerate(weights, start=1):
        for (view,) in _lines(axis, keys):
            lines = view.contiguous()
            best = lines.clone()
            for k in range(1, len(lines)):
                step = weight * k * k << _ID_BITS
                if _on_host(lines) and k & 7 == 0 and step > int(best.max()):
                    break  # whatever lies farther away loses
                farther = lines + step
                torch.minimum(best[k:], farther[:-k], out=best[k:])
                torch.minimum(best[:-k], farther[k:], out=best[:-k])
            view.copy_(best)
    return keys.bitwise_and_(_LARGEST_ID)


def _apart(ids: Tensor, weights: Sequence[int], largest: int) -> Tensor:
    """With distances and ids apart."""
    distances, nearest = torch.where(ids > 0, 0, largest + 1), ids.clamp(min=0)
    for axis, weight in enumerate(weights, start=1):
        for views in _lines(axis, distances, nearest):
            lines = [view.contiguous() for view in views]
            best = [line.clone() for line in lines]
            for k in range(1, len(lines[0])):
                farther = lines[0] + weight * k * k
                for to, source in ((slice(k, None), slice(-k)), (slice(-k), slice(k, None))):
                    distance, place = farther[source], lines[1][source]
                    nearer = (distance < best[0][to]) | ((distance == best[0][to]) & (place < best[1][to]))
                    best[0][to] = torch.where(nearer, distance, best[0][to])
                    best[1][to] = torch.where(nearer, place, best[1][to])
            for view, found in zip(views, best, strict=True):
                view.copy_(found)
    return nearest


def _lines(axis: int, *volumes: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of the volumes, the axis in front, so many lines at a time as are worked on at once."""
    shape = volumes[0].shape
    size, inner = shape[axis], math.prod(shape[axis + 1 :])
    at_once = _AT_ONCE[_on_host(volumes[0])]
    width = min(inner, max(1, at_once // size))
    height = max(1, at_once // (size * width))
    split = [volume.view(-1, size, inner).transpose(0, 1) for volume in volumes]
    for y in range(0, split[0].shape[1], height):
        for x in range(0, inner, width):
            yield tuple(volume[:, y : y + height, x : x + width] for volume in split)
