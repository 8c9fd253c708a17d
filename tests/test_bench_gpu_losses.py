"""What the benchmark of the GPU says without a bar of other losses, launches, and what settles a guess, on a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import gpu, gpu_comparisons, gpu_contestants, gpu_rows
from bench.gpu_contestants import (
    LOSSES,
    Pass,
    Truth,
    classes,
    end_to_end,
    four_channels,
    mistaken_pair,
    pair,
)
from bench.gpu_rows import MEASUREMENTS, Bench, Extra, Measurement, Row
from bench.gpu_timing import Clock, UnmeasuredError
from blobloss_fast import connected_components

from .test_bench_gpu import HAS_MONAI, TINY, cpu_bench, rows_of

SOFTMAX_SHARE = "forward with a softmax over {} channels, share of the copy bandwidth"
PAIRS = "8 samples with 4 classes / the same voxels as one"


def timed_by(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> Bench:
    """A bench whose clock finds these medians, and a bandwidth of 100 GB/s."""
    clock = gpu.CLOCKS["cpu"]()
    monkeypatch.setattr(clock, "copy_bandwidth", lambda rounds: 100.0)
    monkeypatch.setattr(clock, "medians", lambda steps, rounds: {key: seconds[key] for key in steps})
    return cpu_bench(clock)


# ----------------------------------------------------------------------------------------------------------- volumes


def test_others_are_predicted() -> None:
    truth, mistaken = pair(24, 4), mistaken_pair(24, 4)
    assert torch.equal(mistaken.instances, truth.instances)
    assert torch.equal(connected_components(mistaken.logits > 0)[0], truth.instances.flip(0))


def test_the_same_voxels_end_to_end() -> None:
    apart, together = classes(6, 3), end_to_end(6, 3)
    assert apart.logits.shape == apart.instances.shape == (8, 4, 6, 6, 6)
    assert together.logits.shape == together.instances.shape == (1, 1, 32 * 6, 6, 6)
    assert torch.equal(apart.logits.flatten(), together.logits.flatten())
    assert torch.equal(apart.mask.flatten(), together.mask.flatten())
    assert apart.instances.amax((2, 3, 4)).eq(3).all() and apart.num_instances == together.num_instances == 96
    assert together.instances.unique().tolist() == list(range(97))
    assert "8x4x6^3, 3 balls each" in apart.name and "1x1x192x6x6, 96 balls" in together.name


def test_every_class_has_a_term() -> None:
    workload = classes(6, 3).to(torch.float64)
    workload.instances[0, 1] = 0
    workload.instances[5][workload.instances[5] > 1] = 0
    step = Pass(LOSSES["classes"].prepare(workload, Clock()), workload.logits)
    step()
    assert Truth(workload).check(LOSSES["classes"], step, "eager") <= 1e-11


def test_a_softmax_over_several_classes() -> None:
    """And that neither the ids of class 0 count nor the sigmoid of every logit would do."""
    workload = four_channels(6, 3).to(torch.float64)
    workload.instances[1, 2] = 0
    step = Pass(LOSSES["softmax_classes"].prepare(workload, Clock()), workload.logits)
    step()
    value = step.results()[0]
    assert Truth(workload).check(LOSSES["softmax_classes"], step, "eager") <= 1e-11
    with pytest.raises(UnmeasuredError, match="DISAGREES"):
        Truth(workload).check(LOSSES["classes"], step, "eager")
    workload.instances[:, 0] = 0
    step()
    assert torch.equal(step.results()[0], value)


def test_both_directions_count() -> None:
    """BiCC on wrong predictions, and that neither CC loss nor the formula of the other would do."""
    workload = mistaken_pair(13, 7).to(torch.float64)
    truth = Truth(workload)
    steps = {key: Pass(LOSSES[key].prepare(workload, Clock()), workload.logits) for key in ("cc", "bicc")}
    for key, step in steps.items():
        step()
        assert truth.check(LOSSES[key], step, "eager") <= 1e-11
    with pytest.raises(UnmeasuredError, match="DISAGREES"):
        truth.check(LOSSES["bicc"], steps["cc"], "eager")
    with pytest.raises(UnmeasuredError, match="DISAGREES"):
        truth.check(LOSSES["cc"], steps["bicc"], "eager")


# ---------------------------------------------------------------------------------------------------------- launches


class CountingClock(Clock):
    """Its launches are the calls of the package's operators."""

    def launches(self, function: Any) -> int:
        names: list[str] = []

        class Counter(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                names.append(func.namespace)
                return func(*args, **(kwargs or {}))

        with Counter():
            function()
        return names.count("blobloss_fast")


def test_launches_of_all_losses() -> None:
    rows = rows_of(gpu_rows.launches, cpu_bench(CountingClock(limit_s=0.01)))
    found = {name: row["value"] for name, row in rows.items()}
    assert found == {
        "launches, forward": 1,
        "launches, backward": 1,
        "launches, forward, BlobLoss from a mask": 2,  # labels
        "launches, backward, BlobLoss from a mask": 1,
        "launches, forward, CCLoss from a mask": 3,  # and zones
        "launches, backward, CCLoss from a mask": 1,
        "launches, forward, BiCC from a mask": 6,  # each for the prediction as well
        "launches, backward, BiCC from a mask": 2,
    }
    assert rows["launches, backward"]["holds"] is True
    assert all("as many others predicted" in row["note"] for name, row in rows.items() if "CC" in name)


# ---------------------------------------------------------------------------------------------------------- guesses


def test_share_of_a_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    two, four = rows_of(gpu_rows.softmax, timed_by(monkeypatch, {"forward": 5e-6})).values()
    assert two["name"] == SOFTMAX_SHARE.format(2) and two["value"] == pytest.approx(2 * 14**3 * 12 / 100e9 / 5e-6)
    assert four["name"] == SOFTMAX_SHARE.format(4)
    assert four["value"] == pytest.approx(2 * 14**3 * (4 * 4 + 3 * 4) / 100e9 / 5e-6)
    assert "two channels" in two["note"] and "Dice+CE" in two["note"]
    assert "2x4x14^3" in four["note"] and "arithmetic" in four["note"]


def test_pairs_over_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = rows_of(gpu_rows.numbers_of_pairs, timed_by(monkeypatch, {"pairs": 6e-6, "one": 4e-6})).values()
    assert found["name"] == PAIRS and found["value"] == pytest.approx(1.5)
    made_of = "6.0 us / 4.0 us, replayed steps, 8x4x6^3, 4 balls each / 1x1x192x6x6, 128 balls; "
    assert found["note"].startswith(made_of) and "visits every (sample, class) pair" in found["note"]


@pytest.mark.parametrize(
    ("function", "key", "left"),
    [(gpu_rows.softmax, "softmax_classes", 1), (gpu_rows.numbers_of_pairs, "classes", 0)],
)
def test_what_disagrees_settles_nothing(monkeypatch: pytest.MonkeyPatch, function: Any, key: str, left: int) -> None:
    right = LOSSES[key]
    wrong = dataclasses.replace(right, prepare=lambda w, c: lambda x: 1.001 * right.prepare(w, c)(x))
    monkeypatch.setitem(LOSSES, key, wrong)
    *others, found = rows_of(function, cpu_bench()).values()
    assert len(others) == left and all(row["value"] > 0 for row in others)
    assert found["value"] is None and found["bar"] is None
    assert found["note"].startswith(f"{right.title}, replayed, DISAGREES with its formula")


# -------------------------------------------------------------------------------------------------------- other losses


@pytest.mark.skipif(not HAS_MONAI, reason="MONAI is not installed")
@pytest.mark.parametrize("how", ["eager", "replayed"])
def test_a_mask_against_both_of_monai(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    seconds = dict.fromkeys(LOSSES, 1e-6) | {"mask": 2e-6, "monai": 4e-6, "mask_ce": 3e-6, "monai_ce": 12e-6}
    function = {"eager": gpu_comparisons.eager_losses, "replayed": gpu_comparisons.replayed_losses}[how]
    rows = rows_of(function, timed_by(monkeypatch, seconds))
    barred, free = (rows[f"{ours}, {how}"] for ours in (
        "BlobLoss from a mask / MONAI DiceLoss", "BlobLoss Dice+CE from a mask / MONAI DiceCELoss"
    ))  # fmt: skip
    assert barred["value"] == pytest.approx(0.5) and barred["holds"] is True
    assert free["value"] == pytest.approx(0.25) and free["bar"] is free["holds"] is None
    assert free["note"].startswith("3.0 us / 12.0 us, max_instances=256, ")
    for key in ("mask_ce", "monai_ce", "ours_ce"):
        found = rows[f"losses: 2x1x12^3, 4 balls each, {how}: {LOSSES[key].title}"]
        assert found["value"] == pytest.approx(1e6 * seconds[key])


def test_without_monai_a_ratio_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_comparisons, "missing", lambda package: package and "MONAI is not installed")
    found = rows_of(gpu_comparisons.eager_losses, cpu_bench())["BlobLoss Dice+CE from a mask / MONAI DiceCELoss, eager"]
    assert found["value"] is None and found["note"] == "MONAI is not installed"


def test_times_of_other_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"cc": 1e-6, "bicc": 2e-6, "softmax": 3e-6, "softmax_classes": 5e-6, "ours": 4e-6}
    rows = rows_of(gpu_comparisons.other_losses, timed_by(monkeypatch, seconds))
    volumes = {
        "2x1x12^3, 4 balls each, as many others predicted": {"CCLoss from a mask": 1, "BiCC from a mask": 2},
        "2x1x12^3, 4 balls each, two channels": {"BlobLoss Dice+CE, softmax": 3},
        "2x4x12^3, 4 balls each": {"BlobLoss of several classes, softmax": 5},
        "2x1x12^3, 4 balls each, bfloat16": {"BlobLoss": 4},
    }
    assert {name: found["value"] for name, found in rows.items()} == {
        f"other losses: {volume}, {how}: {title}": pytest.approx(us)
        for volume, losses in volumes.items()
        for how in ("eager", "replayed")
        for title, us in losses.items()
    }
    assert all(found["bar"] is None for found in rows.values())


def test_a_gradient_that_bfloat16_does_not_excuse_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LOSSES["ours"]

    def prepare(workload: Any, clock: Clock) -> Any:
        loss = right.prepare(workload, clock)
        return lambda x: 1.02 * loss(x) - 0.02 * loss(x).detach()

    monkeypatch.setitem(LOSSES, "ours", dataclasses.replace(right, prepare=prepare))
    rows = rows_of(gpu_comparisons.other_losses, cpu_bench())
    bad = {name.split(", ")[2]: found["note"] for name, found in rows.items() if found["value"] is None}
    assert set(bad) == {"bfloat16"} and "DISAGREES" in bad["bfloat16"]


def test_a_measurement_that_announces_nothing_says_why_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def two(bench: Bench, *bars: Extra) -> Iterator[Row]:
        yield gpu_rows.row("first", "us", 1.0, "")
        raise RuntimeError("CUDA error: out of memory\nand more")

    bench = cpu_bench()
    rows = list(Measurement("losses", (), two).rows(bench))
    assert [found["value"] for found in rows] == [1.0, None]
    assert rows[1]["name"] == "what is left of two" and rows[1]["note"] == "RuntimeError: CUDA error: out of memory"
    rows = list(Measurement("losses", (Extra("second", "us"),), two).rows(bench))
    assert [(found["name"], found["value"], found["unit"]) for found in rows] == [
        ("first", 1.0, "us"),
        ("second", None, "us"),
    ]
    monkeypatch.setattr(gpu_comparisons, "OTHERS", {gpu_contestants.pair: ("no such loss",)})
    (found,) = rows_of(gpu_comparisons.other_losses, bench).values()
    assert found["name"] == "what is left of other_losses" and found["note"] == "KeyError: 'no such loss'"


def test_announced_rows_have_names_of_their_own() -> None:
    names = [own.name for measurement in MEASUREMENTS for own in measurement.bars]
    assert len(names) == len(set(names)) and {PAIRS, *map(SOFTMAX_SHARE.format, (2, 4))} <= set(names)
    assert TINY.middle // 2 >= 2  # the smallest volume of the rehearsal
    for stage in gpu.BUDGET:
        bars = [own for own in gpu.announced(stage) if not isinstance(own, Extra)]
        assert gpu.bars_of(stage) == bars
