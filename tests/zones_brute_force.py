"""The nearest instance by brute force, and small volumes that make it hard: what tests of a backend compare with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

KINDS = (
    "points", "noise", "dense", "one giant", "empty planes", "two corners", "mirrored", "ignored around", "empty",
    "all ignored", "large ids", "one voxel"
)  # fmt: skip


def brute_force(instances: NDArray, weights: list[int]) -> NDArray[np.int32]:
    """All voxels x all instance voxels, in integers: int64, or Python's own where int64 cannot hold a distance."""
    zones = np.ones(instances.shape, np.int32)
    for sample in np.ndindex(instances.shape[:2]):
        volume = instances[sample]
        points = np.argwhere(volume > 0)
        if len(points):
            ids = volume[tuple(points.T)].astype(np.int64)
            voxels = np.indices(volume.shape).reshape(volume.ndim, -1).T
            squared = sum(w * (voxels[:, None, a] - points[None, :, a]) ** 2 for a, w in enumerate(weights))
            nearest = squared == squared.min(1, keepdims=True)
            zones[sample] = np.where(nearest, ids, np.iinfo(np.int64).max).min(1).reshape(volume.shape)
        zones[sample][volume < 0] = -1
    return zones


def volume(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.int64]:
    """One small volume of ids."""
    found = np.zeros(shape, np.int64)
    if kind == "empty":
        return found
    if kind == "all ignored":
        return found - 3
    if kind == "one voxel":
        found[tuple(rng.integers(0, shape))] = 7
        return found
    if kind == "two corners":  # the plane between them is equally far from both, and the larger id comes first
        found[(0,) * len(shape)] = 9
        found[(-1,) * len(shape)] = 4
        return found
    density = {"noise": 0.3, "dense": 0.9, "points": 0.03}.get(kind, 0.1)
    found = rng.integers(1, 6, shape) * (rng.random(shape) < density)
    if kind == "mirrored":  # ties everywhere, between ids in either order
        found = np.maximum(found, np.flip(found) % 5)
    if kind == "one giant":
        found = np.where(rng.random(shape) < 0.8, 3, found)
    if kind == "empty planes":
        for axis, size in enumerate(shape):
            np.moveaxis(found, axis, 0)[rng.random(size) < 0.5] = 0
    if kind == "ignored around":  # ignored voxels do not block distances
        found = np.where((found == 0) & (rng.random(shape) < 0.7), -rng.integers(1, 9, shape), found)
    if kind == "large ids":
        found = np.where(found > 0, 2**31 - found, found)
    return found


def batch(samples: int, channels: int, shape: tuple[int, ...], seed: int) -> NDArray[np.int64]:
    """``[samples, channels, *shape]`` of every kind in turn, from another one on for every seed."""
    rng = np.random.default_rng(seed)
    kinds = [KINDS[(seed + i) % len(KINDS)] for i in range(samples * channels)]
    return np.stack([volume(kind, shape, rng) for kind in kinds]).reshape(samples, channels, *shape)
