"""Volumes with instances: balls by the number, one giant, salt and pepper, real lesions."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blobloss_fast import connected_components

BALLS = (1, 50, 1000, 10_000)
SALT_AND_PEPPER_IDS = 1000
# What the instances of a volume look like: a number of balls, or one of the two extremes.
SCENES = (*(str(count) for count in BALLS), "giant", "salt and pepper")


@dataclass(frozen=True)
class Workload:
    """Volumes with labels.

    Attributes:
        name: as the tables print it.
        logits: floating point [B, C, *spatial]; two channels are for a softmax.
        instances: int32 [B, 1, *spatial], every sample numbered 1, 2, ...
        num_instances: of all samples together.
        own_target: bool [B, 1, *spatial], a target that the ids do not follow; None is a target that is ids > 0.
    """

    name: str
    logits: Tensor
    instances: Tensor
    num_instances: int
    own_target: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        return self.instances > 0 if self.own_target is None else self.own_target

    @property
    def target(self) -> Tensor:
        """The mask in the dtype of the logits, which is what MONAI's losses take without a conversion."""
        return self.mask.to(self.logits.dtype)

    def to(self, dtype: torch.dtype) -> Workload:
        return replace(self, logits=self.logits.to(dtype))


# ---------------------------------------------------------------------------------------------------------- volumes


def balls(size: int, num_instances: int, *, radius: tuple[float, float] = (1.0, 8.0), seed: int = 0) -> np.ndarray:
    """Instance ids int32 [size, size, size] of balls that do not touch, numbered in raster order of their first voxel.

    One ball lies in each of `num_instances` sites of a regular grid: its radius drawn log-uniformly from `radius`, as
    far as the site allows, its centre anywhere in the site that leaves the last planes free.
    """
    per_axis = math.ceil(round(num_instances ** (1 / 3), 9))
    pitch = size // per_axis
    if pitch < 2:
        raise ValueError(f"{num_instances} instances that do not touch do not fit into {size}^3")
    rng = np.random.default_rng([seed, size, num_instances])
    largest = (pitch - 2) // 2
    radii = np.exp(rng.uniform(*np.log(radius), num_instances)).clip(max=largest + 0.5)
    sites = rng.permutation(per_axis**3)[:num_instances]
    corners = np.stack(np.unravel_index(sites, (per_axis,) * 3), axis=1) * pitch

    volume = np.zeros((size,) * 3, dtype=np.int32)
    for index, (corner, r) in enumerate(zip(corners, radii, strict=True), start=1):
        reach = int(min(r, largest))
        low = corner + rng.integers(0, pitch - 1 - 2 * reach, 3)
        offset = np.arange(-reach, reach + 1)
        distance_sq = offset[:, None, None] ** 2 + offset[:, None] ** 2 + offset**2
        box = tuple(slice(start, start + 2 * reach + 1) for start in low)
        volume[box][distance_sq <= r * r] = index
    return _numbered_in_raster_order(volume)


def _numbered_in_raster_order(volume: np.ndarray) -> np.ndarray:
    ids, first = np.unique(volume[volume > 0], return_index=True)  # the foreground alone: np.unique sorts
    rank = np.zeros(ids.max() + 1, dtype=np.int32)
    rank[ids[np.argsort(first)]] = np.arange(1, len(ids) + 1)
    return rank[volume]


def giant_ball(size: int) -> np.ndarray:
    """One instance that touches all six faces of the volume: pi / 6 of it, 52 %."""
    offset = np.arange(size) - (size - 1) / 2
    distance_sq = offset[:, None, None] ** 2 + offset[:, None] ** 2 + offset**2
    return (distance_sq <= (size / 2) ** 2).astype(np.int32)


def salt_and_pepper(size: int, *, num_ids: int = SALT_AND_PEPPER_IDS, seed: int = 0) -> np.ndarray:
    """Every voxel foreground with probability 1/2, under any of `num_ids` ids: neighbours hardly ever agree."""
    rng = np.random.default_rng([seed, size, num_ids])
    shape = (size,) * 3
    return np.where(rng.random(shape) < 0.5, rng.integers(1, num_ids + 1, shape), 0).astype(np.int32)


def logits_for(instances: Tensor, *, margin: float = 3.0, noise: float = 1.5, seed: int = 0) -> Tensor:
    """fp32 logits of a fair prediction: +-`margin` by the mask, plus Gaussian noise."""
    generator = torch.Generator().manual_seed(seed)
    sign = (instances > 0).float().mul_(2).sub_(1)
    return sign * margin + noise * torch.randn(instances.shape, generator=generator)


# -------------------------------------------------------------------------------------------------------- workloads


def synthetic(size: int, num_instances: int, *, batch: int = 1, seed: int = 0) -> Workload:
    """`batch` samples with `num_instances` balls each."""
    volumes = [balls(size, num_instances, seed=seed + sample) for sample in range(batch)]
    instances = torch.from_numpy(np.stack(volumes)[:, None])
    shape = f"{size}^3" if batch == 1 else f"{batch}x1x{size}^3"
    each = "" if batch == 1 else " each"
    noun = "ball" if num_instances == 1 else "balls"
    name = f"{shape}, {num_instances:,} {noun}{each}"
    return Workload(name, logits_for(instances, seed=seed), instances, batch * num_instances)


def scene(size: int, kind: str) -> Workload:
    """A volume of one of the `SCENES`; any number of balls will do."""
    if kind == "giant":
        volume, name = giant_ball(size), f"{size}^3, one giant ball"
    elif kind == "salt and pepper":
        volume, name = salt_and_pepper(size), f"{size}^3, salt and pepper, {SALT_AND_PEPPER_IDS:,} ids"
    else:
        return synthetic(size, int(kind))
    instances = torch.from_numpy(volume)[None, None]
    return Workload(name, logits_for(instances), instances, int(instances.max()))


def with_own_target(workload: Workload) -> Workload:
    """The same ids beside a target in which every instance has moved by one voxel: the two disagree at the rims."""
    moved = torch.roll(workload.instances > 0, 1, dims=-1)
    return replace(workload, name=f"{workload.name}, own target", own_target=moved)


def two_channels(workload: Workload, *, seed: int = 1) -> Workload:
    """The same volume for a softmax: channel 0 is the background, the difference of the two means what it did."""
    generator = torch.Generator().manual_seed(seed)
    background = torch.randn(workload.logits.shape, generator=generator)
    logits = torch.cat([background, background + workload.logits], 1)
    return replace(workload, name=f"{workload.name}, two channels", logits=logits)


def _real(name: str, arrays: Mapping[str, Any]) -> Workload:
    mask = torch.from_numpy(arrays["label"] > 0)[None, None]
    instances, counts = connected_components(mask)
    shape, count = "x".join(str(n) for n in instances.shape[2:]), int(counts)
    return Workload(f"{name}, {shape}, {count} lesions", logits_for(instances), instances, count)


def real() -> Workload:
    """The multiple sclerosis lesions that come with the package (CC-BY; see blobloss_fast/data/README.md)."""
    with (
        (importlib.resources.files("blobloss_fast") / "data" / "ms_lesions.npz").open("rb") as file,
        np.load(file) as arrays,
    ):
        return _real("real lesions", arrays)


def data_files(folder: Path) -> list[Path]:
    """The npz files of a folder that hold a binary 3D `label`, sorted by name."""

    def has_label(path: Path) -> bool:
        with np.load(path) as arrays:
            return "label" in arrays.files and arrays["label"].ndim == 3

    return [path for path in sorted(folder.glob("*.npz")) if has_label(path)]


def from_file(path: Path) -> Workload:
    with np.load(path) as arrays:
        return _real(path.stem, arrays)
