"""The benchmark of components, zones and losses from a bare mask: runs on small volumes, and times nothing wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import blobloss_fast
from bench import contestants, labels, workloads
from tests import oracle_zones

ROOT = Path(__file__).resolve().parents[1]


def test_table_from_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, readme = tmp_path / "new" / "labels.json", tmp_path / "README.md"
    readme.write_text(f"before\n{labels.START}\nold\n{labels.END}\nafter\n")
    data = tmp_path / "data"
    data.mkdir()
    label = np.zeros((30, 9, 40), np.uint8)
    label[3:6, 2:4, 5:9] = label[20:25, 5:8, 30] = 1
    np.savez(data / "p19.npz", label=label)
    options = ["--size", "24", "--threads", "2", "--rounds", "2", "--data", str(data)]
    labels.main([*options, "--out", str(out), "--readme", str(readme)])
    results = json.loads(out.read_text())
    rows = results["rows"]
    assert {row["part"] for row in rows} == {"components", "zones", "losses"}
    assert [row["name"] for row in rows if row["part"] == "components"][1] == "p19, crop of 24^3"
    for row in rows:
        assert all(ms > 0 for ms in row["median_ms"].values())
        if "bar" in row:
            ours = row["median_ms"]["mask" if row["part"] == "losses" else "ours"]
            assert row["ratio"] == pytest.approx(row["median_ms"][row["against"]] / ours, rel=1e-3)
            assert row["met"] == (row["ratio"] >= row["bar"])
    assert sum("bar" in row for row in rows) >= 8
    text = readme.read_text()
    assert text == f"before\n{labels.START}\n{labels.as_markdown(results)}\n{labels.END}\nafter\n"
    assert capsys.readouterr().out.strip() == labels.as_markdown(results)


def test_a_hair_below_the_bar_is_below_it_in_the_file_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    row = labels._row("losses", "24^3, 50 balls", {"mask": [2.111e-4], "monai_dice": [2.533e-4]})
    assert row["bar"] == 1.2 and 1.1999 < row["ratio"] < 1.2 and row["met"] is False


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="the README is not beside the installed tests")
def test_numbers_of_the_readme_are_those_of_the_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "bench" / "results" / "cpu_labels.json").read_text(encoding="utf-8"))
    assert f"{labels.START}\n{labels.as_markdown(results)}\n{labels.END}" in text


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = (workloads.balls(24, 8) > 0).astype(np.uint8)
    ids = workloads.balls(24, 8)
    found, zones = labels.connected_components, labels.nearest_instance
    monkeypatch.setattr(labels, "connected_components", lambda x: (2 * found(x)[0], found(x)[1]))
    with pytest.raises(AssertionError, match="our components are not scipy's"):
        labels.check_components("a", mask)
    monkeypatch.setattr(labels, "nearest_instance", lambda x: torch.roll(zones(x), 1, -1))
    with pytest.raises(AssertionError, match="our zones are not those of one transform each"):
        labels.check_zones("a", ids)
    monkeypatch.setattr(labels, "MOST_TRANSFORMS", 0)
    with pytest.raises(AssertionError, match="nearer than ours"):
        labels.check_zones("a", ids)


def test_crop_is_around_the_middle(tmp_path: Path) -> None:
    label = np.zeros((40, 10, 60), np.uint8)
    label[30, 5, 50] = 1
    np.savez(tmp_path / "a.npz", label=label)
    crop = labels.crop(tmp_path / "a.npz", 16)
    assert crop.shape == (16, 10, 16) and crop[30 - 22, 5, 50 - 42]


def test_formula_of_the_cc_loss() -> None:
    volume = workloads.with_own_target(workloads.synthetic(12, 8, batch=2)).to(torch.float64)
    truth = oracle_zones.cc_loss(volume.logits, volume.mask.long(), volume.instances, criterion=((1.0, "dice", {}),))
    torch.testing.assert_close(contestants.CC_DICE(volume.logits, volume), truth, rtol=1e-12, atol=0)


def test_pytest_benchmark_runs(tmp_path: Path) -> None:
    """The smallest volumes of bench_labels.py, in their own process: pytest-benchmark is off under xdist."""
    output = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only", "-k", "tiny and 2"]
    command += ["-c", str(ROOT / "pyproject.toml"), f"--benchmark-json={output}"]
    command += [str(ROOT / "bench" / "bench_labels.py")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(blobloss_fast.__file__).parents[1]), str(ROOT)])
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads(output.read_text(encoding="utf-8"))["benchmarks"]
    seen = {(entry["name"].split("[")[0], entry["params"]["key"]) for entry in measured}
    losses = [k for k in labels.LOSSES if importlib.util.find_spec("monai") or not k.startswith("monai")]
    expected = {("test_components", key) for key in labels.COMPONENTS} | {("test_zones", key) for key in labels.ZONES}
    assert seen == expected | {("test_losses_from_a_mask", key) for key in losses}
    assert all(entry["stats"]["median"] > 0 for entry in measured)
