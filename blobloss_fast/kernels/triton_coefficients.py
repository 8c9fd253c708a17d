"""The coefficients of a criterion as the finish in Triton reads them: numbers on the device, not a part of its code."""

import functools
from array import array

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


class Coefficients:
    """What the kernel needs of a criterion, on the device, and the number of rows of every part.

    First what a masked voxel of the others adds to every stat; then the rows: their head, and the coefficients of the
    positive and of the negative side above, and below. The copy to the device does not wait, but whoever uses it does,
    on whichever stream. Nothing is ever given up: a captured graph may read it.
    """

    def __init__(self, numbers: list[float], rows: tuple[int, ...], device: torch.device) -> None:
        self.rows = rows
        on_cuda = device.type == "cuda"
        with torch.inference_mode(False):
            self._on_host = torch.tensor(numbers, dtype=torch.float64, pin_memory=on_cuda)
            self._on_device = self._on_host.to(device, non_blocking=True)
        self._copied = torch.cuda.current_stream(device).record_event() if on_cuda else None

    def tensor(self) -> Tensor:
        if self._copied is not None and not torch.cuda.is_current_stream_capturing():  # capture begins with a wait
            if self._copied.query():
                self._copied = None
            else:
                self._copied.wait(torch.cuda.current_stream(self._on_device.device))
        return self._on_device


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
    return Coefficients(numbers, tuple(map(len, rows)), device)
