"""The ratios that the package promises, each with its bar, and where the time of one training step goes.

    python -m bench.ratios        measures them anew, into bench/results/cpu.json and the README

Both sides of a ratio are measured in turns, with two threads and fp32 where nothing else is said. A ratio that misses
its bar is printed like the others and marked.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from bench.contestants import CONTESTANTS, check_agreement, why_not
from bench.timing import Report, copy_bandwidth, interleaved, milliseconds
from bench.workloads import Workload, real, scene, synthetic, two_channels, with_own_target
from blobloss_fast import BlobLoss, connected_components

# What the two passes have to move at fp32 logits and int32 ids: forward reads both; backward reads the logits and
# writes, and of the ids it needs only those of blocks of voxels that lie in several cells.
FORWARD_BYTES, BACKWARD_BYTES = 8, 8
BYTES_PER_VOXEL = FORWARD_BYTES + BACKWARD_BYTES

FEW, MANY = 50, 10_000
PART_ROUNDS = 31


class Scale(NamedTuple):
    """The edge lengths, and the number of instances that is "many"."""

    large: int = 128
    small: int = 64
    many: int = MANY


class Side(NamedTuple):
    """A contestant, by its key in CONTESTANTS, on a volume, by its key in VOLUMES."""

    contestant: str
    volume: str


VOLUMES: dict[str, Callable[[Scale], Workload]] = {
    "one": lambda s: synthetic(s.large, 1),
    "few": lambda s: synthetic(s.large, FEW),
    "many": lambda s: synthetic(s.large, s.many),
    "many as one": lambda s: _as_one(synthetic(s.large, s.many)),
    "two samples": lambda s: synthetic(s.large, FEW, batch=2),
    "two small samples": lambda s: synthetic(s.small, FEW, batch=2),
    "giant": lambda s: scene(s.large, "giant"),
    "salt and pepper": lambda s: scene(s.large, "salt and pepper"),
    "bf16": lambda s: _in_bf16(synthetic(s.large, FEW)),
    "own target": lambda s: with_own_target(synthetic(s.large, FEW)),
    "two channels": lambda s: two_channels(synthetic(s.large, FEW)),
}


def _as_one(workload: Workload) -> Workload:
    name = f"{workload.name}, all under one id"
    return replace(workload, name=name, instances=(workload.instances > 0).to(torch.int32), num_instances=1)


def _in_bf16(workload: Workload) -> Workload:
    return replace(workload.to(torch.bfloat16), name=f"{workload.name}, bfloat16")


@dataclass(frozen=True)
class Promise:
    """A ratio of two times and its bar: at least `bar` where `at_least`, at most `bar` otherwise."""

    top: Side
    bottom: Side
    bar: float
    at_least: bool = False
    malloc: str = "raised"
    rounds: int = 41


PROMISES = (
    Promise(Side("monai_dice", "few"), Side("ours", "few"), 2.0, at_least=True),
    Promise(Side("monai_dice", "two samples"), Side("ours", "two samples"), 2.0, at_least=True),
    Promise(Side("monai_dice", "two small samples"), Side("ours", "two small samples"), 1.1, at_least=True),
    Promise(Side("monai_softmax", "two channels"), Side("ours_softmax", "two channels"), 2.5, at_least=True),
    Promise(Side("loop", "few"), Side("ours", "few"), 1500, at_least=True, rounds=15),
    Promise(Side("ours", "many"), Side("ours", "one"), 1.2),
    Promise(Side("ours", "giant"), Side("ours", "few"), 1.2),
    Promise(Side("ours", "salt and pepper"), Side("ours", "few"), 4.0),
    Promise(Side("ours", "bf16"), Side("ours", "few"), 1.1),
    Promise(Side("ours_ce", "few"), Side("ours", "few"), 1.6),
    Promise(Side("ours_target", "own target"), Side("ours", "few"), 1.4),
    Promise(Side("ours_float_target", "own target"), Side("ours", "few"), 1.4),
    # The loop again: its time depends most on malloc.
    Promise(Side("loop", "few"), Side("ours", "few"), 1500, at_least=True, malloc="default", rounds=15),
    Promise(Side("loop", "few"), Side("reference", "few"), 60, at_least=True, malloc="default", rounds=15),
    Promise(Side("reference", "many"), Side("reference", "one"), 1.3, malloc="default", rounds=15),
    Promise(Side("reference", "many"), Side("reference", "many as one"), 1.3, malloc="default", rounds=15),
)


def is_met(ratio: float, bar: float, at_least: bool) -> bool:
    return ratio >= bar if at_least else ratio <= bar


# --------------------------------------------------------------------------------------------------------- measuring


def measure_promises(
    promises: Sequence[Promise], scale: Scale, most_rounds: int, report: Report
) -> tuple[list[dict[str, Any]], float]:
    """Every ratio with what it is made of, and the copy bandwidth in GB/s."""
    volume = lru_cache(maxsize=4)(lambda key: VOLUMES[key](scale))
    checked: set[Side] = set()
    results = []
    for promise in promises:
        sides = (promise.top, promise.bottom)
        workloads = {side: volume(side.volume) for side in sides}
        rounds = min(promise.rounds, most_rounds)
        what = f"{promise.top.contestant} / {promise.bottom.contestant}"
        report(0, what)
        entry: dict[str, Any] = {
            "sides": [[CONTESTANTS[side.contestant].title, workloads[side].name] for side in sides],
            "bar": promise.bar,
            "at_least": promise.at_least,
            "rounds": rounds,
        }
        results.append(entry)
        reasons = [reason for side in sides if (reason := why_not(side.contestant, workloads[side])) is not None]
        if reasons:
            entry["not_run"] = reasons[0]
            report(rounds, what)
            continue
        for side in sides:
            if side not in checked:
                check_agreement(workloads[side], [side.contestant])
                checked.add(side)
        times = interleaved(
            {side: CONTESTANTS[side.contestant].step(workloads[side]) for side in sides},
            dict.fromkeys(sides, rounds),
            after_each=partial(report, 0, what),
        )
        report(rounds, what)
        medians = [milliseconds(times[side]) for side in sides]
        ratio = medians[0] / medians[1]
        met = is_met(ratio, promise.bar, promise.at_least)
        entry.update(median_ms=medians, ratio=ratio, met=met)
    return results, copy_bandwidth()


def measure_parts(workload: Workload, rounds: int, report: Report) -> dict[str, Any]:
    """Where the time of `BlobLoss()(logits, mask)` goes, which finds the instances itself."""
    loss_of = BlobLoss()
    logits, mask = workload.logits.clone().requires_grad_(), workload.mask
    watch = _Stopwatch()
    for r in range(rounds + 1):  # the first round warms up
        watch.times = watch.times if r > 1 else {}
        ids, _ = watch("labels", partial(connected_components, mask))
        logits.grad = None
        loss = watch("forward", partial(loss_of, logits, instances=ids))
        watch("backward", loss.backward)
        logits.grad = None
        watch("whole", lambda: loss_of(logits, mask).backward())
        report(min(r, 1), "labels, forward, backward")
    return {
        "name": workload.name,
        "voxels": workload.instances.numel(),
        "median_ms": {name: milliseconds(times) for name, times in watch.times.items()},
        "rounds": rounds,
    }


class _Stopwatch:
    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def __call__(self, name: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = function()
        self.times.setdefault(name, []).append(time.perf_counter() - start)
        return result


def number_of_rounds(most_rounds: int) -> int:
    """Of all promises and parts together, which is what the progress bar counts."""
    return sum(min(promise.rounds, most_rounds) for promise in PROMISES) + 2 * min(PART_ROUNDS, most_rounds)


def measure(scale: Scale, malloc: str, most_rounds: int, report: Report) -> dict[str, Any]:
    """All that is measured with one malloc setting; runs in a process of its own."""
    promises = [promise for promise in PROMISES if promise.malloc == malloc]
    ratios, bandwidth = measure_promises(promises, scale, most_rounds, report)
    results = {"malloc": malloc, "threads": torch.get_num_threads(), "copy_gb_per_s": bandwidth, "ratios": ratios}
    if malloc == "raised":
        rounds = min(PART_ROUNDS, most_rounds)
        results["parts"] = [measure_parts(workload, rounds, report) for workload in (VOLUMES["few"](scale), real())]
    return results


if __name__ == "__main__":
    from bench.table import main

    main([*sys.argv[1:], "--only", "ratios"])
