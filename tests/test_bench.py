"""The benchmarks run, on small volumes, and refuse to time what is wrong."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

import blobloss_fast
from bench import contestants, plot, ratios, report, table, timing, workloads
from blobloss_fast.kernels import reference
from tests import oracle

ROOT = Path(__file__).resolve().parents[1]
HAS_MONAI = importlib.util.find_spec("monai") is not None
AVAILABLE = [key for key in contestants.CONTESTANTS if HAS_MONAI or not key.startswith("monai")]
TIMED = [key for key in contestants.TABLE if key in AVAILABLE]
SIGMOID = [key for key in AVAILABLE if not key.endswith("softmax")]
SOFTMAX = [key for key in AVAILABLE if key.endswith("softmax")]

# -------------------------------------------------------------------------------------------------------- workloads


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


def test_extremes() -> None:
    giant = workloads.scene(40, "giant").instances[0, 0].numpy()
    assert set(np.unique(giant)) == {0, 1}
    assert giant.mean() == pytest.approx(math.pi / 6, abs=0.005)
    assert all(np.take(giant, face, axis).any() for axis in range(3) for face in (0, -1))
    pepper = workloads.scene(40, "salt and pepper").instances[0, 0].numpy()
    assert (pepper > 0).mean() == pytest.approx(0.5, abs=0.01)
    assert set(np.unique(pepper)) == set(range(1001))  # 32 voxels of each id on average
    assert (pepper[:-1] == pepper[1:]).mean() == pytest.approx(0.25, abs=0.01)  # both are background


def test_logits_follow_the_mask() -> None:
    volume = workloads.synthetic(40, 50)
    inside = volume.logits[volume.instances > 0].double()
    outside = volume.logits[volume.instances == 0].double()
    assert float(inside.mean()) == pytest.approx(3.0, abs=0.1)
    assert float(outside.mean()) == pytest.approx(-3.0, abs=0.1)
    assert float(outside.std()) == pytest.approx(1.5, abs=0.05)


def test_variants_of_a_volume() -> None:
    volume = workloads.synthetic(24, 50)
    pair = workloads.synthetic(24, 50, batch=2)
    assert pair.num_instances == 100 and pair.instances[1].max() == 50
    assert torch.equal(pair.instances[0], volume.instances[0]) and (pair.instances[0] != pair.instances[1]).any()
    moved = workloads.with_own_target(volume)
    assert torch.equal(moved.instances, volume.instances)
    assert (moved.mask & (moved.instances == 0)).any() and (~moved.mask & (moved.instances > 0)).any()
    both = workloads.two_channels(volume).logits
    torch.testing.assert_close(both[:, 1:] - both[:, :1], volume.logits, rtol=0, atol=1e-5)


def test_real_lesions() -> None:
    volume = workloads.real()
    assert volume.num_instances == 43
    assert volume.instances.unique().tolist() == list(range(44))
    assert max(a.error for a in contestants.check_agreement(volume, ["ours", "dice"]).values()) <= 1e-5


def test_volumes_of_a_folder(tmp_path: Path) -> None:
    label = np.zeros((5, 6, 7), np.uint8)
    label[0, 0, :2] = label[4, 5, 6] = 1
    np.savez(tmp_path / "b.npz", label=label)
    np.savez(tmp_path / "a.npz", label=label[0])
    np.savez(tmp_path / "c.npz", masks=label)
    assert [path.name for path in workloads.data_files(tmp_path)] == ["b.npz"]
    volumes = table.volumes_of([], [], False, tmp_path)
    volume = volumes[0][2]()
    assert len(volumes) == 1 and volume.name == "b, 5x6x7, 2 lesions"
    assert torch.equal(volume.instances > 0, torch.from_numpy(label[None, None] > 0))


# ------------------------------------------------------------------------------------------------------- contestants


def test_loop_by_hand() -> None:
    """Two instances of one and two voxels among five, all probabilities 1/2."""
    instances = torch.tensor([[[0, 1, 0, 2, 2]]])
    logits = torch.zeros(1, 1, 5, dtype=torch.float64)
    main = 1 - 2 * 1.5 / (2.5 + 3)
    first = 1 - 2 * 0.5 / (1.5 + 1)  # the second instance is hidden: three voxels are left
    second = 1 - 2 * 1.0 / (2.0 + 2)
    expected = main + (first + second) / 2
    loss = contestants.loop_blob_loss(logits, (instances > 0).double(), instances)
    assert float(loss) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("formula", "ce", "activation"),
    [
        (contestants.BLOB_DICE, False, "sigmoid"),
        (contestants.BLOB_DICE_CE, True, "sigmoid"),
        (contestants.TWO_CHANNEL_BLOB, True, "softmax"),
    ],
)
def test_formulas_are_masks_and_loops(formula: contestants.Formula, ce: bool, activation: str) -> None:
    volume = workloads.with_own_target(workloads.synthetic(12, 8, batch=2)).to(torch.float64)
    if activation == "softmax":
        volume = workloads.two_channels(volume)
    criterion = ((1.0, "dice", {}), (1.0, "bce", {}))[: 1 + ce]
    logits = volume.logits.clone().requires_grad_()
    truth = oracle.blob_loss(logits, volume.mask.long(), volume.instances, criterion=criterion, activation=activation)
    value = formula(logits, volume)
    torch.testing.assert_close(value, truth, rtol=1e-12, atol=0)
    (expected,), (gradient,) = (torch.autograd.grad(loss, logits) for loss in (truth, value))
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("kind", ["1", "50", "1000", "giant", "salt and pepper"])
def test_contestants_agree_in_double_precision(kind: str) -> None:
    volume = workloads.scene(24, kind).to(torch.float64)
    for workload, every in ((volume, SIGMOID), (workloads.two_channels(volume), SOFTMAX)):
        keys = [key for key in every if not key.startswith("mask") or contestants.why_not(key, workload) is None]
        assert (keys == every) == (kind != "salt and pepper" or every is SOFTMAX)  # whose ids are no components
        agreements = contestants.check_agreement(workload, keys)
        assert list(agreements) == keys
        assert max(agreement.error for agreement in agreements.values()) <= 1e-11


@pytest.mark.parametrize("wrong", ["value", "gradient", "nan"])
def test_disagreement_stops_the_run(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    right = contestants.CONTESTANTS["ours"]

    def prepare(workload: workloads.Workload) -> contestants.Loss:
        loss = right.prepare(workload)
        if wrong == "value":
            return lambda logits: loss(logits) + 1e-3
        if wrong == "gradient":
            return lambda logits: 1.01 * loss(logits) - 0.01 * loss(logits).detach()
        return lambda logits: loss(logits) * float("nan")

    monkeypatch.setitem(contestants.CONTESTANTS, "ours", dataclasses.replace(right, prepare=prepare))
    with pytest.raises(contestants.DisagreementError, match=r"BlobLoss on 24\^3, 50 balls: relative error"):
        contestants.check_agreement(workloads.synthetic(24, 50), ["loop", "ours"])


def test_what_is_known_to_be_inexact_is_not_timed() -> None:
    volume = (None, "giant", partial(workloads.scene, 80, "giant"))
    entry = table.measure(volume, 1, 0.0, lambda steps, what: None)
    assert entry["not_run"]["scatter_add"].startswith("its running sums in fp32 do not bear large instances, relative")
    assert set(entry["median_ms"]) == set(TIMED) - {"scatter_add"}


def test_loop_is_left_out_where_its_graph_does_not_fit() -> None:
    large = dataclasses.replace(
        workloads.synthetic(24, 1), instances=torch.zeros(1, 1, 1, 1, 1).expand(1, 1, 128, 128, 128), num_instances=1000
    )
    assert contestants.why_not("loop", large) == "its graph would hold about 10 GiB"
    assert contestants.why_not("ours", large) is None
    assert contestants.why_not("loop", dataclasses.replace(large, num_instances=50)) is None


def test_reference_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[str] = []

    def note(name: str) -> None:
        function = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *arguments: passes.append(name) or function(*arguments))

    both = ["segment_stats_forward", "segment_stats_backward"]
    for name in both:
        note(name)
    volume = workloads.synthetic(24, 1)
    native = blobloss_fast.backends()["cpu"].startswith("native")
    for key, expected in (("reference", both), ("ours", [] if native else both)):
        passes.clear()
        step = contestants.CONTESTANTS[key].step(volume)
        with step.backend():
            step.run()
        assert passes == expected


# ------------------------------------------------------------------------------------------------------------ timing


def test_steps_take_turns() -> None:
    order: list[str] = []
    warm = {"loop": 0.0, "ours": timing.ONE_RUN, "dice": timing.ONE_RUN}
    steps = {key: timing.Step(partial(order.append, key), warm=seconds) for key, seconds in warm.items()}
    times = timing.interleaved(steps, {"loop": 1, "ours": 2, "dice": 2})
    assert order == ["loop", *["ours"] * 2, *["dice"] * 2, *["ours"] * 2, *["dice"] * 2]
    assert {key: len(t) for key, t in times.items()} == {"loop": 1, "ours": 2, "dice": 2}


@pytest.mark.parametrize(("warm", "untimed"), [(0, 0), (timing.ONE_RUN, 1), (2, 1), (10, 5), (11, 6)])
def test_runs_are_untimed_until_a_step_is_warm(warm: float, untimed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which every run takes two seconds."""
    runs: list[None] = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 2.0 * len(runs))
    steps = {"step": timing.Step(partial(runs.append, None), warm=warm)}
    assert timing.interleaved(steps, {"step": 3}) == {"step": [2.0] * 3}
    assert len(runs) == 3 * (untimed + 1)


def state_of_the_child(report: timing.Report) -> tuple[int, str, dict[str, str], int]:
    import resource

    torch.ones(2**21)  # glibc learns the size of large blocks when the first one is freed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(25):  # 32 MiB, taken and given back
        [torch.ones(2**21) for _ in range(4)]
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return torch.get_num_threads(), timing.current_malloc(), dict(os.environ), faults


def fails(what: str, report: timing.Report) -> None:
    if what == "dies":
        os._exit(7)
    raise ValueError("no such volume")


@pytest.mark.skipif(platform.system() == "Windows", reason="it has no count of page faults")
def test_settings_of_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    kept = dict(os.environ)
    for threads, malloc in ((1, "raised"), (2, "default")):
        setting = timing.Setting(threads, malloc)
        count, name, environment, faults = timing.in_child(setting, state_of_the_child)
        assert (count, name) == (threads, malloc)
        assert {key: value for key, value in environment.items() if key.startswith("MALLOC_")} == timing.MALLOC[malloc]
        if malloc == "raised" and platform.libc_ver()[0] == "glibc":  # 25 * 32 MiB went through memory taken once
            assert faults * os.sysconf("SC_PAGE_SIZE") < 3 * 2**25
    assert dict(os.environ) == kept


@pytest.mark.parametrize(
    ("what", "message"), [("raises", r"(?s)2 threads, raised malloc failed.*no such volume"), ("dies", "with status 7")]
)
def test_failure_of_a_child(what: str, message: str) -> None:
    with pytest.raises(timing.ChildError, match=message):
        timing.in_child(timing.Setting(2, "raised"), fails, what)


# ---------------------------------------------------------------------------------------------------------- commands

TINY = ["--sizes", "24", "--scenes", "1", "50", "--rounds", "2", "--loop-seconds", "1e-9", "--no-real"]
TINY += ["--threads", "1", "--ratio-rounds", "2", "--ratio-scale", "24", "20", "1000"]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of the whole command on small volumes."""
    folder = tmp_path_factory.mktemp("bench")
    text = f"# Numbers\n\n{report.START}\nold\n{report.END}\n\nThe rest.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    table.main([*TINY, "--out", str(folder / "results" / "cpu.json"), "--readme", str(folder / "README.md")])
    return folder


def test_table_command(tiny_run: Path) -> None:
    results = json.loads((tiny_run / "results" / "cpu.json").read_text(encoding="utf-8"))
    assert results["machine"]["torch"] == torch.__version__
    assert results["machine"]["backend"] == blobloss_fast.backends()["cpu"]
    settings = results["settings"]
    assert [(setting["threads"], setting["malloc"]) for setting in settings] == [(1, "raised"), (1, "default")]
    assert [[volume["scene"] for volume in setting["volumes"]] for setting in settings] == [["1", "50"], ["50"]]
    assert min(setting["copy_gb_per_s"] for setting in settings) > 0
    for volume in settings[0]["volumes"]:
        assert volume["rounds"] == {key: 1 if key == "loop" else 2 for key in TIMED}
        assert min(volume["min_ms"].values()) > 0
        assert all(volume["median_ms"][key] >= volume["min_ms"][key] for key in TIMED)

    text = (tiny_run / "README.md").read_text(encoding="utf-8")
    shown = report.as_markdown(results)
    assert text == f"# Numbers\n\n{report.START}\n{shown}\n{report.END}\n\nThe rest.\n"
    ms = settings[0]["volumes"][1]["median_ms"]
    row = next(line for line in shown.splitlines() if line.startswith("| 24^3, 50 balls |"))
    gb_per_s = 24**3 * 16 / ms["ours"] / 1e6
    assert f"| {report.number(ms['ours'])} ({report.number(gb_per_s, 2)}) |" in row
    assert row.endswith(f"| {report.number(ms['loop'] / ms['ours'])}x |")
    other = settings[1]["volumes"][0]["median_ms"]["loop"]
    assert f"| 1 thread, default malloc | {report.number(other)} (" in shown


def test_a_hair_above_the_bar_is_above_it_in_the_file_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    promise = ratios.Promise(ratios.Side("ours", "few"), ratios.Side("ours", "one"), 1.2)
    seconds = {promise.top: [1.20001], promise.bottom: [1.0]}
    monkeypatch.setattr(ratios, "interleaved", lambda *_, **__: seconds)
    [entry], _ = ratios.measure_promises([promise], ratios.Scale(16, 12, 4), 1, lambda steps, what: None)
    assert 1.2 < entry["ratio"] < 1.2001 and entry["met"] is False


def test_ratios_of_the_table(tiny_run: Path) -> None:
    results = json.loads((tiny_run / "results" / "cpu.json").read_text(encoding="utf-8"))
    raised, default = results["ratios"]["settings"]
    assert [(s["threads"], s["malloc"]) for s in (raised, default)] == [(2, "raised"), (2, "default")]
    entries = [*raised["ratios"], *default["ratios"]]
    assert [(e["bar"], e["at_least"]) for e in entries] == [(p.bar, p.at_least) for p in ratios.PROMISES]
    shown = report.as_markdown(results)
    for entry in entries:
        if "not_run" in entry:
            assert not HAS_MONAI and "MONAI" in entry["not_run"]
            continue
        top, bottom = entry["median_ms"]
        assert entry["ratio"] == pytest.approx(top / bottom, rel=1e-3)
        assert entry["met"] == (entry["ratio"] >= entry["bar"] if entry["at_least"] else entry["ratio"] <= entry["bar"])
        verdict = "yes" if entry["met"] else "**no**"
        bar = f"{'>=' if entry['at_least'] else '<='} {entry['bar']:,g}"
        assert f"| {report.number(entry['ratio'], 4)} | {bar} | {verdict} |" in shown
    for part in raised["parts"]:
        assert set(part["median_ms"]) == {"labels", "forward", "backward", "whole"}
        floor = 8 * part["voxels"] / raised["copy_gb_per_s"] / 1e6
        assert f"| {report.number(part['median_ms']['forward'])} | {report.number(floor)} |" in shown


def test_render_and_only(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, readme = tmp_path / "cpu.json", tmp_path / "README.md"
    results = json.loads((tiny_run / "results" / "cpu.json").read_text(encoding="utf-8"))
    out.write_text(json.dumps(results), encoding="utf-8")
    readme.write_text(f"{report.START}{report.END}", encoding="utf-8")
    table.main(["--render", "--out", str(out), "--readme", str(readme)])
    assert readme.read_text(encoding="utf-8") == f"{report.START}\n{report.as_markdown(results)}\n{report.END}"
    table.main([*TINY, "--malloc", "raised", "--only", "volumes", "--out", str(out), "--no-readme"])
    again = json.loads(out.read_text(encoding="utf-8"))
    assert again["ratios"] == results["ratios"] and len(again["settings"]) == 1
    assert report.as_markdown(again) in capsys.readouterr().out
    with pytest.raises(SystemExit):
        table.main(["--render", "--out", str(tmp_path / "none.json"), "--no-readme"])
    assert "need the results of an earlier run" in capsys.readouterr().err


def test_picture(tiny_run: Path, tmp_path: Path) -> None:
    results = json.loads((tiny_run / "results" / "cpu.json").read_text(encoding="utf-8"))
    volumes = results["settings"][0]["volumes"]
    counts, ms = plot.curves(results["settings"][0], 24)["ours"]
    assert counts == [1, 50] and ms == [volume["median_ms"]["ours"] for volume in volumes]
    plot.main(["--results", str(tiny_run / "results" / "cpu.json"), "--size", "24", "--out", str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert np.diff(sorted(plot.spread([0.5, 0.1, 0.52, 0.5], 0.1))).min() >= 0.1 - 1e-6


@pytest.mark.parametrize(
    "text", ["no markers", report.START, f"{report.END} {report.START}", 2 * (report.START + report.END)]
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
    output = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only", "-k", "tiny"]
    command += ["-c", str(ROOT / "pyproject.toml"), f"--benchmark-json={output}"]
    command += [str(ROOT / "bench" / "bench_blob_loss.py")]
    package_first = os.pathsep.join([str(Path(blobloss_fast.__file__).parents[1]), str(ROOT)])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTHONPATH"] = package_first
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads(output.read_text(encoding="utf-8"))["benchmarks"]
    seen = {tuple(entry["params"][name] for name in ("kind", "threads", "key")) for entry in measured}
    kinds = [kind for kind in workloads.SCENES if kind != "10000"]
    assert seen == {(kind, f"{n}-thread{'s' * (n > 1)}", key) for kind in kinds for n in (1, 2) for key in TIMED}
    for entry in measured:
        gb_per_s = 24**3 * 16 / entry["stats"]["median"] / 1e9
        assert entry["extra_info"]["gb_per_s"] == pytest.approx(gb_per_s, abs=1e-3)
        assert entry["stats"]["rounds"] == (3 if entry["params"]["key"] == "loop" else 15)
    setting = timing.Setting(2, timing.current_malloc())
    assert f"24^3, 50 balls; {setting}" in {entry["group"] for entry in measured}
