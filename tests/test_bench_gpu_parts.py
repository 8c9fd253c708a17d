"""What the benchmark of the GPU is made of: contestants and truths, the clocks, and the programs that it starts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench import gpu, gpu_contestants, gpu_labels, gpu_rows, gpu_sanitize, gpu_timing, gpu_tools
from bench.gpu_timing import Clock, CudaClock, UnmeasuredError
from bench.workloads import balls, logits_for, synthetic, two_channels

from .zones_brute_force import brute_force


def test_bars_are_those_that_are_promised() -> None:
    promised = {
        "forward, share of the copy bandwidth": ">= 0.85",
        "backward, share of the copy bandwidth": ">= 0.88",
        "replayed step / its bytes at copy bandwidth": "<= 1.3",
        "10,000 instances / 50": "<= 1.15",
        "one giant instance / 50": "<= 1.15",
        "MONAI DiceLoss / BlobLoss, eager": ">= 1.5",
        "MONAI DiceLoss / BlobLoss, replayed": ">= 3",
        "plain Dice by torch.compile / BlobLoss, eager": ">= 1",
        "plain Dice by torch.compile / BlobLoss, replayed": ">= 1",
        "literal loop / BlobLoss, eager": ">= 500",
        "launches, forward": "<= 4",
        "launches, backward": "<= 1",
        "peak memory beyond the gradient, of the logits": "< 1",
        "components, 2x1x128^3, replayed": "<= 60",
        "components, 2x1x256^3, replayed": "<= 250",
        "zones, 128^3, replayed": "<= 0.3",
        "zones, 256^3, replayed": "<= 4",
        "BlobLoss from a mask / MONAI DiceLoss, eager": "<= 1",
        "BlobLoss from a mask / MONAI DiceLoss, replayed": "<= 1",
    }
    bars = {bar.name: str(bar) for stage in gpu.BUDGET for bar in gpu.bars_of(stage)}
    assert {name: bars[name] for name in promised} == promised
    assert {bar for name, bar in bars.items() if name not in promised} == {"<= 0"}


# ------------------------------------------------------------------------------------------- contestants and truths


def test_a_hair_below_the_bar_is_below_it_in_the_file_as_well() -> None:
    found = gpu_rows.Bar("a", "ratio", ">=", 1.2).row(1.199999, "")
    assert found["value"] == 1.199999 and found["holds"] is False


def test_volumes_of_the_bars() -> None:
    giant = gpu_contestants.giant_pair(8)
    assert giant.logits.shape == (2, 1, 8, 8, 8) and giant.instances.amax((1, 2, 3, 4)).tolist() == [1, 1]
    assert torch.equal(giant.logits, logits_for(giant.instances))
    assert gpu_contestants.pair(12, 4).instances.amax((1, 2, 3, 4)).tolist() == [4, 4]
    mask = gpu_labels.noise(2, 24, 0.03)
    assert mask.shape == (2, 1, 24, 24, 24) and float(mask.float().mean()) == pytest.approx(0.03, abs=0.005)
    assert (mask[0] != mask[1]).any() and balls(12, 4).max() == 4


@pytest.mark.parametrize("key", list(gpu_contestants.LOSSES))
def test_losses_agree_in_double_precision(key: str) -> None:
    contestant = gpu_contestants.LOSSES[key]
    if gpu_contestants.missing(contestant.package):
        pytest.skip("MONAI is not installed")
    workload = dataclasses.replace(synthetic(13, 7, batch=2), name="odd").to(torch.float64)
    workload.instances[1][workload.instances[1] > 5] = 0  # fewer in one sample than in the other
    if key == "softmax":
        workload = two_channels(workload)
    if key == "softmax_classes":
        workload = gpu_contestants.four_channels(7, 3).to(torch.float64)
    step = gpu_contestants.Pass(contestant.prepare(workload, Clock()), workload.logits)
    step()
    assert gpu_contestants.Truth(workload).check(contestant, step, "eager") <= 1e-11
    if key == "compiled":
        return  # its backward runs once
    together = step.results()
    step.forward()
    step.backward()
    step.backward()
    assert all(torch.equal(a, b) for a, b in zip(together, step.results(), strict=True))


def test_zones_by_definition() -> None:
    generator = np.random.default_rng(0)
    ids = np.where(generator.random((2, 1, 7, 9, 5)) < 0.05, generator.integers(1, 6, (2, 1, 7, 9, 5)), 0)
    ids[1] = 0
    zones, nearest = gpu_labels.zones_by_definition(torch.from_numpy(ids))
    np.testing.assert_array_equal(zones.numpy(), brute_force(ids, [1, 1, 1]))
    own = np.argwhere(ids[0, 0] > 0)
    apart = ((np.argwhere(np.ones((7, 9, 5)))[:, None] - own) ** 2).sum(-1).min(1)
    np.testing.assert_array_equal(nearest[0, 0].numpy().ravel(), apart)


def test_components_up_to_their_numbers() -> None:
    truth = torch.tensor([[[0, 1, 1, 0, 2, 0, 3]]])
    renumbered = torch.tensor([0, 7, 1, 4])[truth]
    gpu_labels.check_components(renumbered, truth, exact=False)
    for wrong in (truth.clamp(max=2), truth + (truth > 0) * torch.arange(7), torch.ones_like(truth)):
        with pytest.raises(UnmeasuredError, match="NOT scipy's, whatever"):
            gpu_labels.check_components(wrong, truth, exact=False)
    with pytest.raises(UnmeasuredError, match="bit for bit"):
        gpu_labels.check_components(renumbered, truth, exact=True)


def test_zones_up_to_ties() -> None:
    ids = torch.tensor([[[1, 0, 0, 2, 0, 3]]])
    truth = gpu_labels.zones_by_definition(ids)
    tie = torch.tensor([[[1, 1, 2, 2, 3, 3]]])
    gpu_labels.check_zones(tie, ids, truth, exact=False)
    with pytest.raises(UnmeasuredError, match="bit for bit"):
        gpu_labels.check_zones(tie, ids, truth, exact=True)
    for wrong in ([1, 2, 2, 2, 2, 3], [1, 1, 2, 2, 9, 3]):
        with pytest.raises(UnmeasuredError, match="but for ties"):
            gpu_labels.check_zones(torch.tensor([[wrong]]), ids, truth, exact=False)


# -------------------------------------------------------------------------------------------------------- the clocks


class FakeEvent:
    made = 0

    def __init__(self, enable_timing: bool) -> None:
        FakeEvent.made += enable_timing
        self.place = FakeEvent.made

    def record(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end.place == self.place + 1
        return 1.5


class FakeGraph:
    pools: list[Any] = []  # noqa: RUF012

    def pool(self) -> str:
        return "the pool of the first"

    def replay(self) -> None:
        self.pools.append("replayed")


@pytest.fixture
def cuda_clock(monkeypatch: pytest.MonkeyPatch) -> CudaClock:
    """A CudaClock whose device is the CPU, with a torch.cuda that does nothing."""
    stream = SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def graph(graph: FakeGraph, pool: Any, stream: Any) -> Any:
        FakeGraph.pools.append(pool)
        yield

    fakes = {
        "Event": FakeEvent,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": FakeGraph,
        "graph": graph,
        "synchronize": lambda device=None: None,
        "set_sync_debug_mode": lambda mode: None,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=3 * 2**25),
        "memory_allocated": lambda device: 100,
        "max_memory_allocated": lambda device: 175,
        "reset_peak_memory_stats": lambda device: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(FakeGraph, "pools", [])
    monkeypatch.setattr(gpu_timing, "LEAST_FLUSH", 2**26)
    return CudaClock(limit_s=1.0, copy_bytes=2**20, device=torch.device("cpu"))


def test_runs_take_turns_each_after_a_flush(cuda_clock: CudaClock, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda_clock._written.numel() * 4 == cuda_clock._read.numel() * 4 == 3 * 2**26
    order: list[str] = []
    steps = {key: partial(order.append, key) for key in ("many", "few")}
    monkeypatch.setattr(cuda_clock, "_flush", partial(order.append, "flush"))
    monkeypatch.setattr(cuda_clock, "_rounds", lambda step, rounds: rounds if step is steps["many"] else 2)
    assert cuda_clock.seconds(steps, 3) == {"many": [1.5e-3] * 3, "few": [1.5e-3] * 2}
    assert order == ["flush", "many", "flush", "few"] * 2 + ["flush", "many"]


def test_what_is_slow_has_fewer_rounds() -> None:
    clock, calls = Clock(limit_s=0.05), []
    slow = lambda: (calls.append(1), time.sleep(0.02))  # noqa: E731
    assert len(clock.seconds({"slow": slow}, 9)["slow"]) == 3 and len(calls) in (1 + 6, 2 + 6)
    assert len(clock.seconds({"quick": lambda: None}, 9)["quick"]) == 9
    assert clock.seconds({"slow": slow}, 2)["slow"][1] > 0.02
    returned, done = clock.host_seconds(slow, 4)
    assert 0.02 < returned <= done


def test_flush_and_disturbance_run(cuda_clock: CudaClock) -> None:
    cuda_clock._written.fill_(1)
    cuda_clock._flush()
    assert not cuda_clock._written.any() and cuda_clock._sink == 0
    cuda_clock._matrices = tuple(torch.randn(8, 8) for _ in range(3))
    cuda_clock.disturb(1)
    first, second, out = cuda_clock._matrices
    assert torch.equal(out, first @ second) and torch.equal(cuda_clock._written[:64], out.view(-1))
    assert cuda_clock.copy_bandwidth(2) == pytest.approx(2 * 2**20 / 1.5e-3 / 1e9)


def test_captures_share_a_pool(cuda_clock: CudaClock) -> None:
    calls: list[str] = []
    replays = cuda_clock.capture(partial(calls.append, "a"), partial(calls.append, "b"))
    assert calls == ["a", "b"] * 3 + ["a", "b"] and FakeGraph.pools == [None, "the pool of the first"]
    replays[1]()
    assert FakeGraph.pools[-1] == "replayed" and len(calls) == 8


def test_memory_and_waits(cuda_clock: CudaClock, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    assert cuda_clock.peak_bytes(lambda: None) == 75
    assert cuda_clock.wait_of(lambda: None) is None

    def waits() -> None:
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nsomewhere")

    assert cuda_clock.wait_of(waits) == "called a synchronizing CUDA operation"
    assert modes == ["error", "default"] * 2

    def fails() -> None:
        if modes[-1] == "error":
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        cuda_clock.wait_of(fails)
    assert modes[-1] == "default"


def test_launches_of_a_trace(cuda_clock: CudaClock, monkeypatch: pytest.MonkeyPatch) -> None:
    events = [
        {"name": "fwd_kernel", "cat": "kernel"},
        {"name": "Memset (Device)", "cat": "gpu_memset"},
        {"name": "Memcpy DtoH", "cat": "gpu_memcpy"},
        {"name": "cudaLaunchKernel", "cat": "cuda_runtime"},
        {"name": "step", "cat": "gpu_user_annotation"},
        {"name": "process_name", "ph": "M"},
    ]

    class FakeProfile(contextlib.nullcontext):
        def __init__(self, activities: Any, acc_events: bool) -> None:
            super().__init__(self)

        def export_chrome_trace(self, file: str) -> None:
            Path(file).write_text(json.dumps({"traceEvents": events}))

    monkeypatch.setattr(gpu_timing, "profile", FakeProfile)
    calls: list[int] = []
    assert cuda_clock.launches(partial(calls.append, 1)) == 3 and len(calls) == 3
    events.clear()
    with pytest.raises(UnmeasuredError, match="saw nothing"):
        cuda_clock.launches(lambda: None)


def test_the_profiler_writes_such_a_trace(tmp_path: Path) -> None:
    with gpu_timing.profile(activities=[gpu_timing.ProfilerActivity.CPU], acc_events=True) as found:
        torch.ones(3).sum()
    found.export_chrome_trace(str(tmp_path / "t.json"))
    trace = json.loads((tmp_path / "t.json").read_text())
    assert any(event.get("cat") == "cpu_op" for event in trace["traceEvents"])
    assert gpu_timing.device_activities(trace) == []


# ------------------------------------------------------------------------------------------------------ other programs


def test_counts_of_pytest(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\n"
        "@pytest.fixture\ndef broken():\n    raise ValueError\n"
        "def test_good(): pass\ndef test_bad(): assert 0, 'no - reason'\ndef test_error(broken): pass\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
    )
    found = gpu_tools.gpu_tests(60, ["-c", "/dev/null", str(file)])
    assert found["value"] == 2 and found["holds"] is False
    assert found["note"].startswith("1 passed, 1 skipped; ") and "::test_bad" in found["note"]
    found = gpu_tools.gpu_tests(60, ["-c", "/dev/null", f"{file}::test_good"])
    assert (found["value"], found["holds"], found["note"]) == (0, True, "1 passed, 0 skipped")


@pytest.mark.parametrize(("mark", "value"), [("F.s", 1), ("..s", None)])
def test_tests_that_take_too_long(monkeypatch: pytest.MonkeyPatch, mark: str, value: int | None) -> None:
    def run(command: Any, seconds: float) -> None:
        raise gpu_tools.StoppedError(seconds, f"{'.' * 9}s{mark} [ 50%]\n..")

    monkeypatch.setattr(gpu_tools, "run", run)
    found = gpu_tools.gpu_tests(7)
    assert found["value"] == value and found["holds"] is (None if value is None else False)
    passed = 11 + mark.count(".")
    assert found["note"] == f"stopped: it was not done after 7 s, {passed} passed by then"


@pytest.mark.parametrize(
    ("status", "line", "reason"),
    [
        (5, "3 deselected in 0.10s", "status 5"),
        (0, "12 skipped, 3 deselected in 0.10s", "no test ran"),
        (-11, "", "status -11"),
        (1, "/usr/bin/python3: No module named pytest", "no test ran: /usr/bin/python3: No module named pytest"),
    ],
)
def test_no_test_is_no_measurement(status: int, line: str, reason: str) -> None:
    found = gpu_tools.row_of_tests(status, line)
    assert found["value"] is None and found["holds"] is None and reason in found["note"]


def test_what_takes_too_long_is_stopped_with_all_it_started() -> None:
    start = time.monotonic()
    with pytest.raises(UnmeasuredError, match="not done after 1 s"):
        gpu_tools.run(["bash", "-c", "sleep 60 & sleep 60"], 1)
    assert time.monotonic() - start < 20


def test_counts_of_the_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\necho "========= COMPUTE-SANITIZER"\nshift 4\n"$@"\n'
        'test "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 && echo "========= ERROR SUMMARY: 0 errors"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = gpu_tools.sanitized(gpu_tools.INITCHECK, 60, ["-c", "print('67 cases')"])
    assert (found["value"], found["holds"], found["note"]) == (0, True, "67 cases")
    found = gpu_tools.sanitized(gpu_tools.INITCHECK, 60, ["-c", "raise SystemExit('no GPU')"])
    assert found["value"] is None and "not done" in found["note"]
    found = gpu_tools.sanitized(gpu_tools.MEMCHECK, 0.5, ["-c", "import time; time.sleep(60)"])
    assert found["value"] is None and found["note"].startswith("stopped")
    first = "Invalid __global__ read of size 4 bytes"
    output = f"========= {first}\n=========     at x\n67 cases\n========= ERROR SUMMARY: 2 errors"
    found = gpu_tools.row_of_sanitizer(gpu_tools.MEMCHECK, 1, output)
    assert found["value"] == 2 and found["holds"] is False
    assert found["note"] == f"67 cases; {first}"


def test_without_the_sanitizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tools.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_tools, "CUDA_FOLDERS", Path("/nowhere"))
    found = gpu_tools.sanitized(gpu_tools.MEMCHECK, 1)
    assert found["value"] is None and "neither on the PATH" in found["note"]


def test_cases_of_the_sanitizer(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_sanitize.main(["--device", "cpu"])
    assert int(capsys.readouterr().out.split()[0]) >= 25
