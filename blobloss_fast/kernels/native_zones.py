"""The nearest instance of every voxel in the native library (csrc/nearest_instance.cpp), called through ctypes."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from . import native, structs
from .zones import IDS_TOO_LARGE, checked_weights

ZONES = struct.Struct("@PqqiiqqqqqqqqPqP")  # bl_zones
_TOO_LARGE = 1


def nearest_instance(instances: Tensor, weights: Sequence[int]) -> Tensor:
    """Return the id of the nearest instance of every voxel; see ``zones.nearest_instance``."""
    shape = instances.shape
    weights = checked_weights(weights, shape[2:])
    zones = torch.empty(shape, dtype=torch.int32)
    voxels = instances[0, 0].numel()
    instances, volume = structs.volume("instances", instances, structs.INTEGERS, shape[0], shape[1], voxels)
    arguments = ZONES.pack(*volume, *shape[:2], *_three_axes(shape[2:], weights), zones.data_ptr(), *native._threads())
    status = native._library().nearest_instance(arguments)
    if status:
        if status & _TOO_LARGE:
            raise ValueError(IDS_TOO_LARGE)
        native._raise(status)
    return zones


def _three_axes(sizes: Sequence[int], weights: Sequence[int]) -> list[int]:
    """Return three sizes and three weights: z, y, x without axes of one voxel, whose place does not matter.

    Where an image is left, its rows are planes of one row, which are tasks of their own.
    """
    axes = [(size, weight) for size, weight in zip(sizes, weights, strict=True) if size > 1]
    while len(axes) < 3:
        axes.insert(len(axes) - 1 if axes else 0, (1, 1))
    return [size for size, _ in axes] + [weight for _, weight in axes]
