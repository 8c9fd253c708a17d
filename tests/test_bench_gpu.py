"""The benchmark of the GPU, on a CPU and tiny volumes: every row is made, and nothing wrong is timed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from bench import gpu, gpu_comparisons, gpu_contestants, gpu_labels, gpu_rows, gpu_tools
from bench.gpu_rows import MEASUREMENTS, Bench, Scale
from bench.gpu_timing import Clock
from bench.workloads import synthetic

TINY = Scale(large=14, middle=12, extremes=14, few=4, many=8, runs=4, rounds=2)
STAGES = ("checks", "passes", "losses", "labels")
HAS_MONAI = importlib.util.find_spec("monai") is not None
ONLY_ON_A_GPU = {
    "synchronisations of a step, ids given",
    "synchronisations of a step, from a mask",
    "launches, forward",
    "launches, backward",
    "peak memory beyond the gradient, of the logits",
}


def cpu_bench(clock: Clock | None = None) -> Bench:
    return Bench(clock or gpu.CLOCKS["cpu"](), TINY)


def rows_of(function: Any, bench: Bench) -> dict[str, gpu_rows.Row]:
    """The rows of the measurement that this function is, by name."""
    (measurement,) = (m for m in MEASUREMENTS if m.function is function)
    return {found["name"]: found for found in measurement.rows(bench)}


@pytest.fixture(autouse=True)
def small_lesions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_comparisons, "real", lambda: dataclasses.replace(synthetic(10, 3), name="real lesions"))


@pytest.fixture(scope="module")
def every_row() -> dict[str, list[gpu_rows.Row]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_comparisons, "real", lambda: dataclasses.replace(synthetic(10, 3), name="real lesions"))
        bench = cpu_bench()
        return {stage: list(gpu.stage_rows(stage, bench)) for stage in STAGES}


# -------------------------------------------------------------------------------------------------------------- rows


def test_every_bar_has_one_row(every_row: dict[str, list[gpu_rows.Row]]) -> None:
    assert {measurement.stage for measurement in MEASUREMENTS} == set(STAGES)
    assert set(gpu.BUDGET) == {*STAGES, *gpu.TOOLS} - {"quick tests"}
    assert set(gpu.QUICK_BUDGET) == {*STAGES, *gpu.TOOLS} - {"tests"}
    assert max(sum(budget.values()) for budget in (gpu.BUDGET, gpu.QUICK_BUDGET)) < 480
    names = [found["name"] for rows in every_row.values() for found in rows]
    assert len(names) == len(set(names))
    bars = {bar.name: bar for stage in STAGES for bar in gpu.bars_of(stage)}
    assert len(bars) == sum(len(gpu.bars_of(stage)) for stage in STAGES) == 25
    rows = {found["name"]: found for rows in every_row.values() for found in rows}
    assert {name for name, found in rows.items() if found["bar"] is not None} == set(bars)
    for name, bar in bars.items():
        found = rows[name]
        assert set(found) == {"name", "value", "unit", "bar", "holds", "note"}
        assert found["bar"] == f"{bar.operator} {bar.bound:g}" and found["unit"] == bar.unit and found["note"]
        if name in ONLY_ON_A_GPU or (not HAS_MONAI and "MONAI" in name):
            assert found["value"] is None and found["holds"] is None and ("CPU" in found["note"] or not HAS_MONAI)
        else:
            held = {">=": found["value"] >= bar.bound, "<=": found["value"] <= bar.bound}[bar.operator]
            assert found["holds"] == held
    extras = [own for stage in STAGES for own in gpu.announced(stage) if isinstance(own, gpu_rows.Extra)]
    assert len(extras) == 12
    for extra in extras:
        found = rows[extra.name]
        assert found["bar"] is found["holds"] is None and found["unit"] == extra.unit and found["note"]
        only_there = extra.name.startswith(("launches", "peak memory")) or (not HAS_MONAI and "MONAI" in extra.name)
        assert (found["value"] is None) == only_there


def test_ratios_are_those_of_their_times(every_row: dict[str, list[gpu_rows.Row]]) -> None:
    rows = {found["name"]: found for found in every_row["losses"]}
    volume, title = "2x1x12^3, 4 balls each", gpu_contestants.LOSSES["compiled"].title
    for how in ("eager", "replayed"):
        times = [rows[f"losses: {volume}, {how}: {name}"]["value"] for name in (title, "BlobLoss")]
        ratio = rows[f"plain Dice by torch.compile / BlobLoss, {how}"]["value"]
        assert ratio == pytest.approx(times[0] / times[1], rel=1e-3)
    loop = rows["losses: 12^3, 4 balls, eager: literal loop"]["value"]
    ratio = rows["literal loop / BlobLoss, eager"]["value"]
    assert ratio == pytest.approx(loop / rows["losses: 12^3, 4 balls, eager: BlobLoss"]["value"], rel=1e-3)


def test_shares_are_bytes_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = gpu.CLOCKS["cpu"]()
    seconds = {"forward": 2e-6, "backward": 4e-6, "step": 5e-6}
    monkeypatch.setattr(clock, "copy_bandwidth", lambda rounds: 100.0)
    monkeypatch.setattr(clock, "medians", lambda steps, rounds: {key: seconds[key] for key in steps})
    rows = rows_of(gpu_rows.shares, cpu_bench(clock))
    voxels = 2 * 14**3
    expected = voxels * 8 / 100e9 / 2e-6, voxels * 12 / 100e9 / 4e-6, 5e-6 / (voxels * 20 / 100e9)
    assert [found["value"] for found in rows.values()] == pytest.approx(expected, rel=1e-3)


def test_volumes_of_the_labels(every_row: dict[str, list[gpu_rows.Row]]) -> None:
    found = {tuple(row["name"].split(": ")): row for row in every_row["labels"] if row["name"].count(": ") == 2}
    noise = [f"12^3, noise, {density} %" for density in (1, 3, 30, 60)]
    volumes = {"components": ["12^3, 4 balls", "real lesions", *noise], "zones": ["12^3, 4 balls", "real lesions"]}
    contests = {part: contest.contestants for part, contest in gpu_labels.CONTESTS.items()}
    titles = {part: [*(c.title for c in of.values()), "ours, replayed"] for part, of in contests.items()}
    assert set(found) == {(part, v, title) for part in volumes for v in volumes[part] for title in titles[part]}
    for (_, _, title), row in found.items():
        assert (row["value"] is None) == (title.startswith("cu") and "not installed" in row["note"])


# ------------------------------------------------------------------------------------------------- what is not timed


@pytest.mark.parametrize("wrong", ["value", "gradient", "nan", "raises"])
def test_a_loss_that_disagrees_is_not_timed(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    right = gpu_contestants.LOSSES["compiled"]

    def prepare(workload: Any, clock: Clock) -> Any:
        loss = right.prepare(workload, clock)
        return {
            "value": lambda x: loss(x) + 1e-3,
            "gradient": lambda x: 1.01 * loss(x) - 0.01 * loss(x).detach(),
            "nan": lambda x: loss(x) * float("nan"),
            "raises": lambda x: loss(x) + torch.ones(2) @ torch.ones(3),
        }[wrong]

    monkeypatch.setitem(gpu_contestants.LOSSES, "compiled", dataclasses.replace(right, prepare=prepare))
    rows = rows_of(gpu_comparisons.eager_losses, cpu_bench())
    bad = [name for name, found in rows.items() if found["value"] is None and (HAS_MONAI or "MONAI" not in name)]
    assert bad == [
        "plain Dice by torch.compile / BlobLoss, eager",
        "losses: 2x1x12^3, 4 balls each, eager: plain Dice, torch.compile",
    ]
    reason = rows[bad[0]]["note"]
    assert rows[bad[0]]["holds"] is None and rows[bad[1]]["note"] == reason
    assert reason.startswith("RuntimeError: " if wrong == "raises" else "plain Dice, torch.compile, eager, DISAGREES")
    assert rows["losses: 2x1x12^3, 4 balls each, eager: BlobLoss"]["value"] > 0


def test_ours_that_disagrees_has_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_contestants.LOSSES["ours"]
    wrong = dataclasses.replace(right, prepare=lambda w, c: lambda x: 1.001 * right.prepare(w, c)(x))
    monkeypatch.setitem(gpu_contestants.LOSSES, "ours", wrong)
    for function in (gpu_rows.shares, gpu_rows.numbers_of_instances):
        for found in rows_of(function, cpu_bench()).values():
            assert found["value"] is None and "BlobLoss, replayed, DISAGREES" in found["note"]


class ForgetfulClock(Clock):
    """Its replays give the results of what was captured, whatever the input is now."""

    def capture(self, *functions: Any) -> Any:
        for function in functions:
            function()
        return tuple(lambda: None for _ in functions)


def test_a_replay_that_ignores_its_input_is_found() -> None:
    rows = rows_of(gpu_rows.replays, cpu_bench(ForgetfulClock(limit_s=0.01)))
    assert [found["value"] for found in rows.values()] == [3, 3]
    assert not any(found["holds"] for found in rows.values())
    assert [found["value"] for found in rows_of(gpu_rows.replays, cpu_bench()).values()] == [0, 0]


def test_a_bit_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class Unsteady(gpu_rows.BlobLoss):
        def forward(self, *args: Any, **keywords: Any) -> Any:
            calls.append(1)
            value = super().forward(*args, **keywords)
            return value * (1 + 2**-23) if len(calls) == 3 else value

    monkeypatch.setattr(gpu_rows, "BlobLoss", Unsteady)
    assert [found["value"] for found in rows_of(gpu_rows.determinism, cpu_bench()).values()] == [1, 0]
    zero = torch.zeros(2)
    assert not gpu_rows.same_bits((zero,), (-zero,))
    assert gpu_rows.same_bits((zero / 0,), (zero / 0,))


def test_a_wait_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = gpu.CLOCKS["cpu"]()
    monkeypatch.setattr(clock, "wait_of", lambda function: "called a synchronizing CUDA operation")
    for found in rows_of(gpu_rows.synchronisations, cpu_bench(clock)).values():
        assert found["value"] == 1 and found["holds"] is False and "synchronizing" in found["note"]


@pytest.mark.parametrize("part", ["components", "zones"])
def test_wrong_labels_are_not_timed(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    contestants = gpu_labels.CONTESTS[part].contestants
    ours, scipys = contestants["ours"], contestants["scipy"]

    def rolled(volume: Any) -> Any:
        return lambda: torch.roll(ours.prepare(volume)(), 1, -1)

    def merged(volume: Any) -> Any:
        return lambda: [found.clip(max=2) for found in scipys.prepare(volume)()]

    monkeypatch.setitem(contestants, "ours", dataclasses.replace(ours, prepare=rolled))
    monkeypatch.setitem(contestants, "scipy", dataclasses.replace(scipys, prepare=merged))
    bench = cpu_bench()
    middle = {"components": gpu_comparisons.components_middle, "zones": gpu_comparisons.zones_middle}[part]
    (found,) = rows_of(middle, bench).values()
    assert found["value"] is None and f"its {part} are NOT" in found["note"]
    others = {"components": gpu_comparisons.other_components, "zones": gpu_comparisons.other_zones}[part]
    rows = rows_of(others, bench)
    assert [row["value"] for name, row in rows.items() if ": ours" in name] == [None] * (len(rows) // len(contestants))
    wrong = rows[f"{part}: 12^3, 4 balls: {scipys.title}"]
    assert wrong["value"] is None and f"its {part} are NOT" in wrong["note"]


def test_a_measurement_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nand more")

    bench = cpu_bench()
    monkeypatch.setattr(gpu_rows, "giant_pair", fails)
    rows = {found["name"]: found for found in gpu.stage_rows("passes", bench)}
    assert rows["one giant instance / 50"]["value"] is None
    assert rows["one giant instance / 50"]["note"] == "RuntimeError: CUDA error: an illegal memory access"
    assert rows["forward, share of the copy bandwidth"]["value"] > 0


def test_all_that_find_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NumPy and scipy in the place of CuPy and cuCIM, whose interface is theirs."""

    def label(mask: np.ndarray, connectivity: int) -> np.ndarray:
        labels, count = ndimage.label(mask, ndimage.generate_binary_structure(3, connectivity))
        return np.where(labels > 0, count + 1 - labels, 0)

    def module(name: str, **content: Any) -> None:
        made = ModuleType(name)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)

    module("cupy", from_dlpack=np.from_dlpack, ones=np.ones)
    module("cupyx")
    module("cupyx.scipy", ndimage=ndimage)
    module("cucim")
    module("cucim.skimage", measure=SimpleNamespace(label=label))
    monkeypatch.setattr(gpu_comparisons, "missing", lambda package: None)
    for function in (gpu_comparisons.other_components, gpu_comparisons.other_zones):
        rows = rows_of(function, cpu_bench())
        assert all(found["value"] > 0 for found in rows.values())
    assert rows["zones: real lesions: cupyx.scipy.ndimage.distance_transform_edt"]["note"] == "up to ties"
    monkeypatch.setitem(sys.modules, "cupyx.scipy", ModuleType("cupyx.scipy"))
    sys.modules["cupyx.scipy"].ndimage = SimpleNamespace()  # type: ignore[attr-defined]
    found = rows_of(gpu_comparisons.other_zones, cpu_bench())
    assert found["zones: real lesions: cupyx.scipy.ndimage.distance_transform_edt"]["note"] == (
        "this CuPy has no distance_transform_edt"
    )


# ----------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    row = gpu_tools.TESTS.row(0, "20 passed, 1 skipped")
    monkeypatch.setitem(gpu.TOOLS, "tests", (gpu_tools.TESTS, lambda seconds: row))


def readme(folder: Path) -> Path:
    file = folder / "README.md"
    file.write_text(f"before\n{gpu.START}\nold\n{gpu.END}\nafter\n", encoding="utf-8")
    return file


def test_command_writes_file_and_table(tmp_path: Path, tools: None, capsys: pytest.CaptureFixture[str]) -> None:
    """The checks in a process of their own, as on a GPU; the passes are out of time before they start."""
    file = readme(tmp_path)
    plan = gpu.Plan(TINY, {"checks": 100, "passes": -100, "tests": 5}, "cpu")
    gpu.main(["--out", str(tmp_path / "new"), "--readme", str(file)], plan)
    results = json.loads((tmp_path / "new" / "no_gpu.json").read_text(encoding="utf-8"))
    assert {*results} == {"machine", "copy_gb_per_s", "quick", "seconds", "rows"}
    keys = {"gpu", "driver", "capability", "memory", "L2", "torch", "cuda", "triton", "python", "monai", "cupy"}
    assert {*results["machine"]} == {*keys, "blobloss_fast", "date"}
    assert results["machine"]["torch"] == torch.__version__ and results["quick"] is False
    rows = {found["name"]: found for found in results["rows"]}
    assert next(iter(rows)) == "GPU tests"
    assert {bar.name for stage in plan.budget for bar in gpu.announced(stage)} <= set(rows)
    assert rows["graph replays on new input unlike eager, ids given"]["value"] == 0
    assert rows["host time of a step, ids given"]["value"] > 0
    cut = rows["forward, share of the copy bandwidth"]
    assert cut["value"] is None and cut["note"].startswith("cut: the stage of passes was not done")
    text, printed = file.read_text(encoding="utf-8"), capsys.readouterr()
    assert text == f"before\n{gpu.START}\n{gpu.as_markdown(results)}\n{gpu.END}\nafter\n"
    assert printed.out.strip() == gpu.as_markdown(results)
    assert "forward, share of the copy bandwidth: not measured: cut" in printed.err
    assert "| GPU tests | 20 passed, 1 skipped | 0 failures | <= 0 | yes |" in text
    assert "| launches, forward | a CPU has no launches | not measured | <= 4 |  |" in text


def test_what_there_is_is_saved_after_each_stage(tools: None) -> None:
    plan = gpu.Plan(TINY, {"passes": -100, "tests": 5, "memcheck": 5}, "cpu", skipped=("memcheck",))
    saved: list[dict[str, Any]] = []
    assert gpu.measure(plan, saved.append) is saved[-1] and len(saved) == 3
    names = [bar.name for stage in ("tests", "memcheck", "passes") for bar in gpu.announced(stage)]
    assert all([found["name"] for found in results["rows"]] == names for results in saved)
    notes = [[found["note"] for found in results["rows"][:2]] for results in saved]
    late = "the run did not get that far"
    assert notes == [[late, late], ["20 passed, 1 skipped", late], ["20 passed, 1 skipped", "left out"]]


def test_a_process_that_ends_early_says_so() -> None:
    shown: list[gpu_rows.Row] = []
    rows = gpu.rows_from_child("passes", gpu.Plan(TINY, clock="sundial"), 60, shown.append)
    assert shown == rows and [found["name"] for found in rows] == [bar.name for bar in gpu.announced("passes")]
    assert all(found["note"] == "the process of the stage of passes ended with status 1" for found in rows)


def test_tables_of_all_rows(every_row: dict[str, list[gpu_rows.Row]], tmp_path: Path) -> None:
    rows = [found for stage in STAGES for found in every_row[stage]]
    results = {"machine": gpu.machine() | {"gpu": "A GPU"}, "quick": True, "rows": rows}
    (tmp_path / "a_gpu.json").write_text(json.dumps(results), encoding="utf-8")
    (tmp_path / "cpu.json").write_text(json.dumps({"machine": {"cpu": "none", "date": "9999-01-01"}}))
    file = readme(tmp_path)
    gpu.main(["--render", "--out", str(tmp_path), "--readme", str(file)])
    text = file.read_text(encoding="utf-8")
    assert f"{gpu.START}\n{gpu.as_markdown(json.loads(json.dumps(results)))}\n{gpu.END}" in text
    for found in rows:
        if found["bar"] is not None:
            verdict = {True: "yes", False: "**no**", None: ""}[found["holds"]]
            line = f"| {found['name']} | {found['note']} | {gpu.shown_value(found)} | {found['bar']} | {verdict} |"
            assert line in text
    line = next(line for line in text.splitlines() if line.startswith("| 12^3, noise, 30 % |"))
    times = {found["name"]: found["value"] for found in rows}
    assert f" {gpu.number(times['components: 12^3, noise, 30 %: ours'])} |" in line
    if importlib.util.find_spec("cupyx") is None:
        assert "Not timed: cupyx.scipy.ndimage.label (CuPy is not installed)" in text
    assert "A quick run" in text and "A GPU, " in text
    with pytest.raises(SystemExit):
        gpu.main(["--render", "--no-readme", "--out", str(tmp_path / "none")])


@pytest.mark.parametrize("arguments", [[], ["--quick", "--no-readme"]])
def test_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        gpu.main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs a CUDA device" in line


def test_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans: list[gpu.Plan] = []

    stamp = gpu.machine() | {"gpu": "NVIDIA H100 80GB HBM3"}

    def measure(plan: gpu.Plan, save: Any) -> dict[str, Any]:
        plans.append(plan)
        save({"machine": stamp, "quick": True, "rows": []})
        return {"machine": stamp, "quick": True, "rows": []}

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu.main(["--quick", "--no-readme", "--out", str(tmp_path)])
    gpu.main(["--skip-tests", "--no-readme", "--out", str(tmp_path)])
    assert (tmp_path / "nvidia_h100_80gb_hbm3.json").is_file()
    quick, full = plans
    assert (quick.scale, quick.budget, quick.skipped) == (gpu_rows.QUICK, gpu.QUICK_BUDGET, ())
    assert (full.scale, full.budget) == (gpu_rows.FULL, gpu.BUDGET) and "tests" in full.skipped
    assert quick.clock == full.clock == "cuda"
    assert gpu_rows.QUICK.extremes == 128 and gpu_rows.QUICK.rounds < 20 <= gpu_rows.FULL.rounds
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(SystemExit):
        gpu.main(["--readme", str(tmp_path / "README.md"), "--out", str(tmp_path)])
    assert "must hold the line <!-- bench:gpu:start --> once" in capsys.readouterr().err
    assert len(plans) == 2
