"""What bench.gpu measures against others, by the rules of bench.gpu_rows: losses, components and zones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu_contestants import (
    CAPACITY,
    LOSSES,
    Pass,
    four_channels,
    missing,
    mistaken_pair,
    pair,
    pair_in_bf16,
    pair_of_two_channels,
)
from bench.gpu_labels import CONTESTS, as_tensor, noise
from bench.gpu_rows import Bar, Bench, Extra, Row, measures, one_of, row, unmeasured
from bench.gpu_timing import Function, reason_of
from bench.workloads import balls, real, synthetic

DENSITIES = (1, 3, 30, 60)  # per cent


# --------------------------------------------------------------------------------------- losses: against other losses


class Timed(NamedTuple):
    """Medians in seconds, and why others have none; by contestant."""

    seconds: dict[str, float]
    reasons: dict[str, str]

    def ratio(self, bar: Bar | Extra, top: str, bottom: str, name: str) -> Row:
        for key in (top, bottom):
            if key in self.reasons:
                return bar.unmeasured(self.reasons[key])
        made_of = f"{1e6 * self.seconds[top]:.1f} us / {1e6 * self.seconds[bottom]:.1f} us"
        return bar.row(self.seconds[top] / self.seconds[bottom], f"{made_of}, {name}")


def time_losses(bench: Bench, keys: tuple[str, ...], *volume: Any, replayed: bool) -> Timed:
    """All that agree with their formulas, in turns."""
    workload, truth = bench.volume(*volume), bench.truth(*volume)
    steps: dict[str, Function] = {}
    reasons: dict[str, str] = {}
    for key in keys:
        contestant = LOSSES[key]
        reason = missing(contestant.package)
        if replayed and not contestant.replayed:
            reason = "it cannot be captured: it reads ids on the host"
        if reason is None:
            try:
                loss = contestant.prepare(workload, bench.clock)
                step = Pass(loss, workload.logits)
                step()
                truth.check(contestant, step, "eager")
                steps[key] = step
                if replayed:
                    captured = Pass(loss, workload.logits)  # whose leaf no other stream has seen
                    (steps[key],) = bench.clock.capture(captured)
                    steps[key]()
                    truth.check(contestant, captured, "replayed")
            except Exception as error:
                reason = reason_of(error)
        if reason is not None:
            reasons[key] = reason
            steps.pop(key, None)
    return Timed(bench.clock.medians(steps, bench.scale.rounds) if steps else {}, reasons)


def _times(timed: Timed, how: str, name: str, part: str = "losses") -> Iterator[Row]:
    for key, reason in timed.reasons.items():
        yield unmeasured(one_of(part, f"{name}, {how}", LOSSES[key].title), "us", reason)
    for key, seconds in timed.seconds.items():
        yield row(one_of(part, f"{name}, {how}", LOSSES[key].title), "us", 1e6 * seconds, "forward and backward")


COMPARED = ("ours", "ours_ce", "mask", "mask_ce", "monai", "monai_ce", "compiled", "scatter_add", "tio")


def _compare(bench: Bench, how: str, of_monai: Bar, of_compiled: Bar, of_mask: Bar, of_mask_ce: Extra) -> Iterator[Row]:
    volume = (pair, bench.scale.middle, bench.scale.few)
    timed, name = time_losses(bench, COMPARED, *volume, replayed=how == "replayed"), bench.volume(*volume).name
    yield timed.ratio(of_monai, "monai", "ours", name)
    yield timed.ratio(of_compiled, "compiled", "ours", name)
    yield timed.ratio(of_mask, "mask", "monai", f"max_instances={CAPACITY}, {name}")
    yield timed.ratio(of_mask_ce, "mask_ce", "monai_ce", f"max_instances={CAPACITY}, {name}")
    yield from _times(timed, how, name)


@measures(
    "losses",
    Bar("MONAI DiceLoss / BlobLoss, eager", "", ">=", 1.5),
    Bar("plain Dice by torch.compile / BlobLoss, eager", "", ">=", 1),
    Bar("BlobLoss from a mask / MONAI DiceLoss, eager", "", "<=", 1),
    Extra("BlobLoss Dice+CE from a mask / MONAI DiceCELoss, eager"),
)
def eager_losses(bench: Bench, *bars: Any) -> Iterator[Row]:
    yield from _compare(bench, "eager", *bars)


@measures(
    "losses",
    Bar("MONAI DiceLoss / BlobLoss, replayed", "", ">=", 3),
    Bar("plain Dice by torch.compile / BlobLoss, replayed", "", ">=", 1),
    Bar("BlobLoss from a mask / MONAI DiceLoss, replayed", "", "<=", 1),
    Extra("BlobLoss Dice+CE from a mask / MONAI DiceCELoss, replayed"),
)
def replayed_losses(bench: Bench, *bars: Any) -> Iterator[Row]:
    yield from _compare(bench, "replayed", *bars)


@measures("losses", Bar("literal loop / BlobLoss, eager", "", ">=", 500))
def the_loop(bench: Bench, bar: Bar) -> Iterator[Row]:
    volume = (synthetic, bench.scale.middle, bench.scale.few)
    timed, name = time_losses(bench, ("loop", "ours"), *volume, replayed=False), bench.volume(*volume).name
    yield timed.ratio(bar, "loop", "ours", name)
    yield from _times(timed, "eager", name)


OTHERS = {
    mistaken_pair: ("cc", "bicc"),
    pair_of_two_channels: ("softmax",),
    four_channels: ("softmax_classes",),
    pair_in_bf16: ("ours",),
}


@measures("losses")
def other_losses(bench: Bench) -> Iterator[Row]:
    for make, keys in OTHERS.items():
        volume = (make, bench.scale.middle, bench.scale.few)
        for how in ("eager", "replayed"):
            timed = time_losses(bench, keys, *volume, replayed=how == "replayed")
            yield from _times(timed, how, bench.volume(*volume).name, "other losses")


# ----------------------------------------------------------------------------------------- labels: components and zones


def time_labels(bench: Bench, part: str, name: str, volume: Tensor) -> Iterator[Row]:
    """Ours from a graph and eager, and the others, in ms, on one volume, each after its labels were found right."""
    contestants, truth_of = CONTESTS[part]
    check = truth_of(volume)
    steps: dict[str, Function] = {}
    notes: dict[str, str] = {}
    for key, contestant in contestants.items():
        title = one_of(part, name, contestant.title)
        notes[title] = (
            "bit for bit" if contestant.exact else {"components": "up to numbering", "zones": "up to ties"}[part]
        )
        reason = missing(contestant.package)
        if reason is None:
            try:
                function = contestant.prepare(volume)
                check(as_tensor(function(), volume), contestant.exact)
                if contestant.on_device:
                    steps[title] = function
                else:
                    seconds = bench.clock.host_seconds(function, bench.scale.rounds)[1]
                    yield row(title, "ms", 1e3 * seconds, notes[title])
                if key == "ours":
                    steps[f"{title}, replayed"] = _checked_replay(bench, function, volume, check)
            except Exception as error:
                reason = reason_of(error)
        if reason is not None:
            yield unmeasured(title, "ms", reason)
    for title, seconds in bench.clock.medians(steps, bench.scale.rounds).items():
        yield row(title, "ms", 1e3 * seconds, notes.get(title, "bit for bit"))


def _checked_replay(
    bench: Bench, function: Function, volume: Tensor, check: Callable[[Tensor, bool], None]
) -> Function:
    found: list[Any] = [None]

    def run() -> None:
        found[0] = function()

    (replay,) = bench.clock.capture(run)
    replay()
    check(as_tensor(found[0], volume), True)
    return replay


def _mask(bench: Bench, batch: int, size: int, per_cent: int) -> Tensor:
    return noise(batch, size, per_cent / 100).byte().to(bench.clock.device)


def _ids(bench: Bench, size: int, count: int) -> Tensor:
    return torch.from_numpy(balls(size, count))[None, None].to(bench.clock.device)


def _of_ours(bench: Bench, bar: Bar, part: str, name: str, volume: Tensor) -> Row:
    """The row of a bar from a replay of ours alone."""
    contestants, truth_of = CONTESTS[part]
    replay = _checked_replay(bench, contestants["ours"].prepare(volume), volume, truth_of(volume))
    seconds = bench.clock.medians({"ours": replay}, bench.scale.rounds)["ours"]
    return bar.row({"us": 1e6, "ms": 1e3}[bar.unit] * seconds, name)


COMPONENTS_NOTE = "26 neighbours, 2x1x{0}^3, noise, 3 % foreground"
ZONES_NOTE = "{0}^3, {1} balls"


@measures("labels", Bar("components, 2x1x128^3, replayed", "us", "<=", 60))
def components_middle(bench: Bench, bar: Bar) -> Iterator[Row]:
    size = bench.scale.middle
    yield _of_ours(bench, bar, "components", COMPONENTS_NOTE.format(size), _mask(bench, 2, size, 3))


@measures("labels", Bar("components, 2x1x256^3, replayed", "us", "<=", 250))
def components_large(bench: Bench, bar: Bar) -> Iterator[Row]:
    size = bench.scale.large
    yield _of_ours(bench, bar, "components", COMPONENTS_NOTE.format(size), _mask(bench, 2, size, 3))


@measures("labels", Bar("zones, 128^3, replayed", "ms", "<=", 0.3))
def zones_middle(bench: Bench, bar: Bar) -> Iterator[Row]:
    size, few = bench.scale.middle, bench.scale.few
    yield _of_ours(bench, bar, "zones", ZONES_NOTE.format(size, few), _ids(bench, size, few))


@measures("labels", Bar("zones, 256^3, replayed", "ms", "<=", 4))
def zones_large(bench: Bench, bar: Bar) -> Iterator[Row]:
    size, few = bench.scale.large, bench.scale.few
    yield _of_ours(bench, bar, "zones", ZONES_NOTE.format(size, few), _ids(bench, size, few))


@measures("labels")
def other_components(bench: Bench) -> Iterator[Row]:
    size, device, lesions = bench.scale.middle, bench.clock.device, real()
    few = bench.scale.few + bench.scale.few // 5
    volumes = {f"{size}^3, {few} balls": (_ids(bench, size, few) > 0).byte()}
    volumes[lesions.name] = lesions.mask.byte().to(device)
    volumes |= {f"{size}^3, noise, {density} %": _mask(bench, 1, size, density) for density in DENSITIES}
    for name, volume in volumes.items():
        yield from time_labels(bench, "components", name, volume)


@measures("labels")
def other_zones(bench: Bench) -> Iterator[Row]:
    size, few, lesions = bench.scale.middle, bench.scale.few, real()
    volumes = {ZONES_NOTE.format(size, few): _ids(bench, size, few)}
    volumes[lesions.name] = lesions.instances.to(bench.clock.device)
    for name, volume in volumes.items():
        yield from time_labels(bench, "zones", name, volume)
