"""The benchmarks run, on small volumes, and refuse to time what is wrong."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

import blobloss_fast
from bench import table, workloads
from bench.bench_blob_loss import INSTANCES

ROOT = Path(__file__).resolve().parents[1]
HAS_MONAI = importlib.util.find_spec("monai") is not None
AVAILABLE = [key for key in workloads.CONTESTANTS if key != "monai_dice" or HAS_MONAI]


@pytest.mark.parametrize(("size", "count"), [(24, 1), (24, 50), (24, 1000), (40, 50), (64, 10_000)])
def test_balls_are_numbered_components(size: int, count: int) -> None:
    ids = workloads.balls(size, count)
    expected, found = ndimage.label(ids > 0, np.ones((3, 3, 3)))
    assert found == count
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(ids, workloads.balls(size, count))
    if count < 1000:  # more are single voxels: only the places differ
        assert (ids != workloads.balls(size, count, seed=1)).any()


def test_balls_that_would_touch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1001 instances that do not touch do not fit into 10\^3"):
        workloads.balls(10, 1001)


def test_logits_follow_the_mask() -> None:
    volume = workloads.synthetic(40, 50)
    inside = volume.logits[volume.instances > 0].double()
    outside = volume.logits[volume.instances == 0].double()
    assert float(inside.mean()) == pytest.approx(3.0, abs=0.1)
    assert float(outside.mean()) == pytest.approx(-3.0, abs=0.1)
    assert float(outside.std()) == pytest.approx(1.5, abs=0.05)


def test_loop_by_hand() -> None:
    """Two instances of one and two voxels among five, all probabilities 1/2."""
    instances = torch.tensor([[[0, 1, 0, 2, 2]]])
    logits = torch.zeros(1, 1, 5, dtype=torch.float64)
    main = 1 - 2 * 1.5 / (2.5 + 3)
    first = 1 - 2 * 0.5 / (1.5 + 1)  # the second instance is hidden: three voxels are left
    second = 1 - 2 * 1.0 / (2.0 + 2)
    expected = main + (first + second) / 2
    loss = workloads.loop_blob_loss(logits, (instances > 0).double(), instances)
    assert float(loss) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("count", INSTANCES)
def test_contestants_agree_in_double_precision(count: int) -> None:
    errors = workloads.check_agreement(workloads.synthetic(24, count).to(torch.float64), AVAILABLE)
    assert list(errors) == AVAILABLE
    assert max(errors.values()) <= 1e-11


@pytest.mark.parametrize("wrong", ["value", "gradient", "nan"])
def test_disagreement_stops_the_run(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    right = workloads.CONTESTANTS["ours"]

    def prepare(workload: workloads.Workload) -> workloads.Loss:
        loss = right.prepare(workload)
        if wrong == "value":
            return lambda logits: loss(logits) + 1e-3
        if wrong == "gradient":
            return lambda logits: 1.01 * loss(logits) - 0.01 * loss(logits).detach()
        return lambda logits: loss(logits) * float("nan")

    monkeypatch.setitem(workloads.CONTESTANTS, "ours", dataclasses.replace(right, prepare=prepare))
    with pytest.raises(workloads.DisagreementError, match=r"BlobLoss on 24\^3, 50 balls: relative error"):
        workloads.check_agreement(workloads.synthetic(24, 50), ["loop", "ours"])


def test_loop_is_left_out_where_its_graph_does_not_fit() -> None:
    large = dataclasses.replace(
        workloads.synthetic(24, 1), instances=torch.zeros(1, 1, 1, 1, 1).expand(1, 1, 128, 128, 128), num_instances=1000
    )
    assert workloads.why_not("loop", large) == "its graph would hold about 10 GiB"
    assert workloads.why_not("ours", large) is None
    assert workloads.why_not("loop", dataclasses.replace(large, num_instances=50)) is None


def test_real_lesions() -> None:
    volume = workloads.real()
    assert volume.num_instances == 43
    assert volume.instances.unique().tolist() == list(range(44))
    assert max(workloads.check_agreement(volume, ["ours", "dice"]).values()) <= 1e-5


def test_steps_take_turns() -> None:
    order: list[str] = []
    steps = {key: (lambda key=key: order.append(key)) for key in ("loop", "ours", "dice")}
    times = table.interleaved(steps, {"loop": 1, "ours": 3, "dice": 3}, warm_up=0)
    assert order == ["loop", "ours", "dice", "ours", "dice", "ours", "dice"]
    assert {key: len(t) for key, t in times.items()} == {"loop": 1, "ours": 3, "dice": 3}


def test_table_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, out = tmp_path / "README.md", tmp_path / "results" / "cpu.json"
    readme.write_text(f"# Numbers\n\n{table.START}\nan old table\n{table.END}\n\nThe rest.\n", encoding="utf-8")
    arguments = ["--sizes", "24", "--instances", "1", "50", "--many", "1000", "--rounds", "2", "--loop-rounds", "1"]
    table.main([*arguments, "--no-real", "--out", str(out), "--readme", str(readme)])

    results = json.loads(out.read_text(encoding="utf-8"))
    assert [workload["instances"] for workload in results["workloads"]] == [1, 50]
    for workload in results["workloads"]:
        assert workload["rounds"] == {key: 1 if key == "loop" else 2 for key in AVAILABLE}
        assert min(workload["min_ms"].values()) > 0
        assert all(workload["median_ms"][key] >= workload["min_ms"][key] for key in AVAILABLE)
    scaling = results["scaling"]["median_ms"]
    assert results["scaling"]["ratio"] == pytest.approx(scaling["many"] / scaling["one, same mask"], rel=1e-2)
    assert results["scaling"]["ratio_to_one_ball"] == pytest.approx(scaling["many"] / scaling["one ball"], rel=1e-2)
    assert results["copy_gb_per_s"] > 0
    assert results["machine"]["torch"] == torch.__version__

    text = readme.read_text(encoding="utf-8")
    shown = table.as_markdown(results)
    assert text == f"# Numbers\n\n{table.START}\n{shown}\n{table.END}\n\nThe rest.\n"
    assert shown in capsys.readouterr().out
    ms = results["workloads"][1]["median_ms"]
    assert f"| {ms['loop'] / ms['ours']:,.0f}x |" in shown.splitlines()[3]

    table.main(["--render", "--out", str(out), "--readme", str(readme)])  # a second table replaces the first
    assert readme.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    "text", ["no markers", table.START, f"{table.END} {table.START}", 2 * (table.START + table.END)]
)
def test_readme_without_its_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        table.main(["--readme", str(readme)])
    assert stop.value.code == 2
    assert "must hold the line <!-- bench:cpu:start --> once" in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == text


def test_pytest_benchmark_runs(tmp_path: Path) -> None:
    """The smallest volumes of bench_blob_loss.py, in their own process: pytest-benchmark is off under xdist."""
    report = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only", "-k", "tiny"]
    package_first = os.pathsep.join([str(Path(blobloss_fast.__file__).parents[1]), str(ROOT)])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(
        [
            *command,
            "-c",
            str(ROOT / "pyproject.toml"),
            f"--benchmark-json={report}",
            str(ROOT / "bench/bench_blob_loss.py"),
        ],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": package_first},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    seen = {(entry["params"]["num_instances"], entry["params"]["key"]) for entry in measured}
    assert seen == {(count, key) for count in INSTANCES for key in AVAILABLE}
    assert all(entry["stats"]["median"] > 0 for entry in measured)
    assert {entry["stats"]["rounds"] for entry in measured} == {3, 15}
