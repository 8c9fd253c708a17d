"""The coefficients of a criterion as the finish in Triton reads them: numbers, not a part of its code."""

import functools
from array import array
from typing import NamedTuple

import torch
from torch import Tensor

from .finish import at_zero_logit
from .layout import COLUMNS, COUNT, ROW_HEAD, SIDES, ZONES, rows_of
from .triton_launch import padded_stats


@functools.lru_cache
def in_two(weight: float) -> tuple[float, float]:
    """A number in two float32, which is how floats are handed to a kernel: together, 48 bits of it."""
    (single,) = array("f", [weight])
    return single, weight - single


class Coefficients(NamedTuple):
    """What the finish needs of a criterion: numbers in pinned memory, and the number of rows of every part.

    First what a masked voxel of the others adds to every stat; then the rows: their head, and the coefficients of the
    positive and of the negative side above, and below. The forward kernel brings them to the device, over the bus, so
    that there is nothing on the device to be made, kept, or waited for. They are never given up, a few
    hundred bytes for every criterion that was ever used: a captured graph reads them whenever it is replayed.
    """

    numbers: Tensor
    rows: tuple[int, ...]


@functools.cache
def coefficients(
    activation: str,
    gamma: float,
    parts: tuple[tuple[float, ...], ...],
    masking: str,
    channels: int,
    features: tuple[str, ...],
    device: torch.device,
) -> Coefficients:
    """Return those of a criterion, made once; parts: flat main, blob and empty rows."""
    stats = (COUNT, *features)
    padding = [0.0] * (padded_stats(len(features)) - len(stats))
    per_voxel = {} if masking in ("exclude", ZONES) else {COUNT: 1.0}
    if masking == "zero_logit":
        per_voxel |= at_zero_logit(activation, channels, gamma)
    numbers = [*(per_voxel.get(stat, 0.0) for stat in stats), *padding]
    rows = [rows_of(part) for part in parts]
    for row in (row for part in rows for row in part):
        numbers += row[:ROW_HEAD]
        for half in (row[ROW_HEAD : ROW_HEAD + len(COLUMNS)], row[ROW_HEAD + len(COLUMNS) :]):
            by_column = dict(zip(COLUMNS, half, strict=True))
            for side in SIDES:
                numbers += [*(by_column[side, stat] for stat in stats), *padding]
    with torch.inference_mode(False):
        pinned = torch.tensor(numbers, dtype=torch.float64, device="cpu", pin_memory=device.type == "cuda")
    return Coefficients(pinned, tuple(map(len, rows)))
