"""The bars of the package on a GPU, each beside what measures it; rows are made one after the other, by stages."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.contestants import Loss
from bench.gpu_contestants import (
    CAPACITY,
    LOSSES,
    Pass,
    Truth,
    classes,
    end_to_end,
    four_channels,
    giant_pair,
    mistaken_pair,
    on,
    pair,
    pair_of_two_channels,
)
from bench.gpu_timing import Clock, UnmeasuredError, reason_of
from bench.workloads import Workload
from blobloss_fast import BlobLoss

Row = dict[str, Any]

OPERATORS = {">=": operator.ge, "<=": operator.le, "<": operator.lt}
COPY = "copy bandwidth"
# Per voxel: fp32 logits and int32 ids, read in both passes, and the gradient.
FORWARD_BYTES, BACKWARD_BYTES = 8, 12
STEP_BYTES = FORWARD_BYTES + BACKWARD_BYTES
# Per id that the workload holds: two logits in fp32 and an int32 id; four logits and, but for class 0, ids.
SOFTMAX_FORWARD_BYTES = {"softmax": 12, "softmax_classes": 7}


class Scale(NamedTuple):
    """Edge lengths, numbers of instances, and how often what is done."""

    large: int = 256
    middle: int = 128
    extremes: int = 256  # of the volumes with many instances and with one giant
    few: int = 50
    many: int = 10_000
    runs: int = 100
    rounds: int = 50


FULL, QUICK = Scale(), Scale(extremes=128, rounds=15)


class Bar(NamedTuple):
    """What a row's value must be, in its unit."""

    name: str
    unit: str
    operator: str
    bound: float

    def __str__(self) -> str:
        return f"{self.operator} {self.bound:g}"

    def row(self, value: float, note: str) -> Row:
        holds = bool(OPERATORS[self.operator](value, self.bound))
        return {**row(self.name, self.unit, value, note), "bar": str(self), "holds": holds}

    def unmeasured(self, reason: str) -> Row:
        return {**unmeasured(self.name, self.unit, reason), "bar": str(self)}


class Extra(NamedTuple):
    """A row without a bar that is announced like one with, so that it says why if it has no value."""

    name: str
    unit: str = ""

    def row(self, value: float, note: str) -> Row:
        return row(self.name, self.unit, value, note)

    def unmeasured(self, reason: str) -> Row:
        return unmeasured(self.name, self.unit, reason)


def one_of(part: str, volume: str, title: str) -> str:
    """The name of a row that is one of many volumes and contestants; `split(": ")` gives the three back."""
    return f"{part}: {volume}: {title}"


def row(name: str, unit: str, value: float, note: str) -> Row:
    """One without a bar."""
    return {"name": name, "value": value, "unit": unit, "bar": None, "holds": None, "note": note}


def unmeasured(name: str, unit: str, reason: str) -> Row:
    return {"name": name, "value": None, "unit": unit, "bar": None, "holds": None, "note": reason}


class Bench:
    """What the measurements of a stage share: the clock, the scale, volumes and their truths."""

    def __init__(self, clock: Clock, scale: Scale) -> None:
        self.clock = clock
        self.scale = scale
        self.volume = lru_cache(maxsize=4)(self._volume)
        self.truth = lru_cache(maxsize=4)(lambda make, *arguments: Truth(self.volume(make, *arguments)))

    def _volume(self, make: Callable[..., Workload], *arguments: int) -> Workload:
        return on(self.clock.device, make(*arguments))

    @cached_property
    def gb_per_s(self) -> float:
        return self.clock.copy_bandwidth(self.scale.rounds)

    def floor_s(self, workload: Workload, bytes_per_voxel: int) -> float:
        return workload.instances.numel() * bytes_per_voxel / self.gb_per_s / 1e9


@dataclass(frozen=True)
class Measurement:
    """A function that yields the rows that it announces, and others; and the stage in whose time it runs."""

    stage: str
    bars: tuple[Bar | Extra, ...]
    function: Callable[..., Iterator[Row]]

    def rows(self, bench: Bench) -> Iterator[Row]:
        """Its rows; if it fails, what is left of those that it announces says why, or else one of its own."""
        left = {bar.name: bar for bar in self.bars}
        reason = "its measurement ended without it"
        try:
            for found in self.function(bench, *self.bars):
                left.pop(found["name"], None)
                yield found
        except Exception as error:
            reason = reason_of(error)
            left = left or {"": Extra(f"what is left of {self.function.__name__}")}
        for bar in left.values():
            yield bar.unmeasured(reason)


MEASUREMENTS: list[Measurement] = []


def measures(stage: str, *bars: Bar | Extra) -> Callable[[Callable[..., Iterator[Row]]], Callable[..., Iterator[Row]]]:
    """Register a function (bench, *bars) -> rows."""

    def register(function: Callable[..., Iterator[Row]]) -> Callable[..., Iterator[Row]]:
        MEASUREMENTS.append(Measurement(stage, bars, function))
        return function

    return register


# ------------------------------------------------------------------------------------- checks: a step, ids and a mask


def _steps(bench: Bench) -> dict[str, tuple[Pass, Tensor, Workload]]:
    """A step from ids and one from a mask, each with the labels that it reads and may be given others in place."""
    workload = bench.volume(pair, bench.scale.middle, bench.scale.few)
    ids, mask = workload.instances.clone(), workload.mask
    losses: dict[str, tuple[Loss, Tensor]] = {
        "ids": (partial(BlobLoss(max_instances=int(ids.max())), instances=ids), ids),
        "mask": (partial(BlobLoss(max_instances=CAPACITY), target=mask), mask),
    }
    return {key: (Pass(loss, workload.logits), labels, workload) for key, (loss, labels) in losses.items()}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same_bits(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(_bits(a), _bits(b)) for a, b in zip(first, second, strict=True))


@measures(
    "checks",
    Bar("synchronisations of a step, ids given", "", "<=", 0),
    Bar("synchronisations of a step, from a mask", "", "<=", 0),
)
def synchronisations(bench: Bench, *bars: Bar) -> Iterator[Row]:
    for bar, (step, _, workload) in zip(bars, _steps(bench).values(), strict=True):
        try:
            wait = bench.clock.wait_of(step)
        except UnmeasuredError as error:
            yield bar.unmeasured(str(error))
        else:
            yield bar.row(int(wait is not None), wait or f"{workload.name}, forward and backward")


@measures(
    "checks",
    Bar("graph replays on new input unlike eager, ids given", "", "<=", 0),
    Bar("graph replays on new input unlike eager, from a mask", "", "<=", 0),
)
def replays(bench: Bench, *bars: Bar) -> Iterator[Row]:
    for bar, (step, labels, workload) in zip(bars, _steps(bench).values(), strict=True):
        eager = Pass(step.loss, step.logits)
        (replay,) = bench.clock.capture(step)
        wrong = 0
        for run in range(1, 4):
            labels.copy_(labels.roll(5 * run, -1).flip(-2))
            with torch.no_grad():
                step.logits.copy_(step.logits.roll(run, 0) * 0.9)
                eager.logits.copy_(step.logits)
            replay()
            results = tuple(result.clone() for result in step.results())
            eager()
            wrong += not same_bits(results, eager.results())
        yield bar.row(wrong, f"of 3, bit for bit, forward and backward in one graph, {workload.name}")


@measures(
    "checks",
    Bar("runs of 100 whose bits differ, ids given", "", "<=", 0),
    Bar("runs of 100 whose bits differ, from a mask", "", "<=", 0),
)
def determinism(bench: Bench, *bars: Bar) -> Iterator[Row]:
    for bar, (step, _, workload) in zip(bars, _steps(bench).values(), strict=True):
        step()
        first = tuple(result.clone() for result in step.results())
        wrong = 0
        for run in range(bench.scale.runs):
            bench.clock.disturb(run)
            step()
            wrong += not same_bits(first, step.results())
        yield bar.row(wrong, f"of {bench.scale.runs}, beside a second stream busy with others' work, {workload.name}")


COUNTED = {"ours": pair, "mask": pair, "cc": mistaken_pair, "bicc": mistaken_pair}


@measures(
    "checks",
    Bar("launches, forward", "", "<=", 4),
    Bar("launches, backward", "", "<=", 1),
    *(
        Extra(f"launches, {way}, {LOSSES[key].title}")
        for key in ("mask", "cc", "bicc")
        for way in ("forward", "backward")
    ),
)
def launches(bench: Bench, *bars: Any) -> Iterator[Row]:
    left = iter(bars)
    for key, volume in COUNTED.items():
        workload = bench.volume(volume, bench.scale.middle, bench.scale.few)
        step = Pass(LOSSES[key].prepare(workload, bench.clock), workload.logits)
        step.forward()
        note = f"kernels, fills and copies on the device, {workload.name}"
        yield next(left).row(bench.clock.launches(step.forward), note)
        found = bench.clock.launches(step.backward)
        yield next(left).row(found, f"{note}; the 1 that a backward pass starts from is there")


@measures(
    "checks",
    Bar("peak memory beyond the gradient, of the logits", "%", "<", 1),
    Extra("peak memory beyond the gradient, from a mask", "%"),
)
def memory(bench: Bench, *bars: Any) -> Iterator[Row]:
    for bar, (step, _, workload) in zip(bars, _steps(bench).values(), strict=True):
        step()
        step.clear()
        size = workload.logits.numel() * workload.logits.element_size()
        beyond = bench.clock.peak_bytes(step) - size
        yield bar.row(100 * beyond / size, f"{beyond / 2**10:,.1f} KiB, {workload.name}")


@measures("checks")
def host_time(bench: Bench) -> Iterator[Row]:
    for key, (step, _, workload) in _steps(bench).items():
        returned, done = bench.clock.host_seconds(step, 3 * bench.scale.rounds)
        given = "ids given" if key == "ids" else "from a mask"
        note = f"wall-clock, eager, from an idle device, {workload.name}"
        yield row(f"host time of a step, {given}", "us", 1e6 * returned, f"until it returns; {note}")
        yield row(f"time of a lone step, {given}", "us", 1e6 * done, f"until the device is done; {note}")


# -------------------------------------------------------------------------------------- passes: against the bandwidth


def _pass_of(bench: Bench, key: str, *volume: Any) -> tuple[Pass, Workload, Callable[[Pass, str], float]]:
    workload, contestant = bench.volume(*volume), LOSSES[key]
    check = partial(bench.truth(*volume).check, contestant)
    return Pass(contestant.prepare(workload, bench.clock), workload.logits), workload, check


@measures("passes")
def bandwidth(bench: Bench) -> Iterator[Row]:
    yield row(COPY, "GB/s", bench.gb_per_s, f"read and write, a buffer of {bench.clock.copy_bytes / 2**30:g} GiB")


@measures(
    "passes",
    Bar("forward, share of the copy bandwidth", "", ">=", 0.85),
    Bar("backward, share of the copy bandwidth", "", ">=", 0.88),
    Bar("replayed step / its bytes at copy bandwidth", "", "<=", 1.3),
)
def shares(bench: Bench, of_forward: Bar, of_backward: Bar, of_step: Bar) -> Iterator[Row]:
    volume = (pair, bench.scale.large, bench.scale.few)
    (apart, workload, check), (whole, _, _) = _pass_of(bench, "ours", *volume), _pass_of(bench, "ours", *volume)
    forward, backward = bench.clock.capture(apart.forward, apart.backward)
    (step,) = bench.clock.capture(whole)
    for replay, done in ((forward, None), (backward, apart), (step, whole)):
        replay()
        if done is not None:
            check(done, "replayed")
    functions = {"forward": forward, "backward": backward, "step": step}
    s = bench.clock.medians(functions, bench.scale.rounds)
    for bar, key, count in ((of_forward, "forward", FORWARD_BYTES), (of_backward, "backward", BACKWARD_BYTES)):
        share = bench.floor_s(workload, count) / s[key]
        yield bar.row(share, f"{count} bytes a voxel, {1e6 * s[key]:.1f} us, replayed, {workload.name}")
    over = s["step"] / bench.floor_s(workload, STEP_BYTES)
    yield of_step.row(over, f"{STEP_BYTES} bytes a voxel, {1e6 * s['step']:.1f} us, {workload.name}")


@measures(
    "passes",
    Bar("10,000 instances / 50", "", "<=", 1.15),
    Bar("one giant instance / 50", "", "<=", 1.15),
)
def numbers_of_instances(bench: Bench, of_many: Bar, of_giant: Bar) -> Iterator[Row]:
    size, few, many = bench.scale.extremes, bench.scale.few, bench.scale.many
    volumes = {"few": (pair, size, few), "many": (pair, size, many), "giant": (giant_pair, size)}
    s, names = _replayed(bench, {key: ("ours", *volume) for key, volume in volumes.items()})
    for bar, key in ((of_many, "many"), (of_giant, "giant")):
        made_of = f"{1e6 * s[key]:.1f} us / {1e6 * s['few']:.1f} us"
        yield bar.row(s[key] / s["few"], f"{made_of}, replayed steps, {names[key]} / {names['few']}")


def _replayed(bench: Bench, contests: Mapping[str, tuple[Any, ...]]) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of replayed steps, each a contestant on a volume, and the names of the volumes."""
    steps, names = {}, {}
    for title, contest in contests.items():
        step, workload, check = _pass_of(bench, *contest)
        (steps[title],) = bench.clock.capture(step)
        steps[title]()
        check(step, "replayed")
        names[title] = workload.name
    return bench.clock.medians(steps, bench.scale.rounds), names


# Three that settle what reading the kernels cannot tell.


@measures(
    "passes",
    Extra("forward with a softmax over 2 channels, share of the copy bandwidth"),
    Extra("forward with a softmax over 4 channels, share of the copy bandwidth"),
)
def softmax(bench: Bench, of_two: Extra, of_four: Extra) -> Iterator[Row]:
    """Hardly any voxel is foreground."""
    shown = {
        "softmax": "Dice+CE; shows what its arithmetic costs",
        "softmax_classes": "Dice; shows what its arithmetic costs, and that the next block is not loaded meanwhile",
    }
    for of_forward, key, make in (
        (of_two, "softmax", pair_of_two_channels), (of_four, "softmax_classes", four_channels)
    ):  # fmt: skip
        step, workload, check = _pass_of(bench, key, make, bench.scale.extremes, bench.scale.few)
        forward, backward = bench.clock.capture(step.forward, step.backward)
        forward()
        backward()
        check(step, "replayed")
        seconds = bench.clock.medians({"forward": forward}, bench.scale.rounds)["forward"]
        share = bench.floor_s(workload, SOFTMAX_FORWARD_BYTES[key]) / seconds
        made_of = f"{SOFTMAX_FORWARD_BYTES[key]} bytes a voxel, {1e6 * seconds:.1f} us, replayed, {workload.name}"
        yield of_forward.row(share, f"{made_of}; {shown[key]}")


@measures("passes", Extra("8 samples with 4 classes / the same voxels as one"))
def numbers_of_pairs(bench: Bench, of_pairs: Extra) -> Iterator[Row]:
    volume = (bench.scale.middle // 2, bench.scale.few)
    s, names = _replayed(bench, {"pairs": ("classes", classes, *volume), "one": ("classes", end_to_end, *volume)})
    made_of = f"{1e6 * s['pairs']:.1f} us / {1e6 * s['one']:.1f} us, replayed steps, {names['pairs']} / {names['one']}"
    shown = "shows what it costs that every program of the finish visits every (sample, class) pair, and of short rows"
    yield of_pairs.row(s["pairs"] / s["one"], f"{made_of}; {shown}")
