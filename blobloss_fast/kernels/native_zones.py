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
    arguments = ZONES.pack(
        *volume, *shape[:2], *_three_axes(shape[2:]), *_three_axes(weights), zones.data_ptr(), *native._threads()
    )
    status = native._library().nearest_instance(arguments)
    if status:
        if status & _TOO_LARGE:
            raise ValueError(IDS_TOO_LARGE)
        native._raise(status)
    return zones


def _three_axes(sizes: Sequence[int]) -> tuple[int, int, int]:
    """Return sizes or weights as z, y, x: the rows of an image are planes of their own, which makes them tasks."""
    first, *rest = sizes
    return {0: (1, 1, first), 1: (first, 1, *rest), 2: (first, *rest)}[len(rest)]  # type: ignore[return-value]
