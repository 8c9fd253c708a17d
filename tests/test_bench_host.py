"""The benchmark of the host's part of a step runs, judges it, and leaves everything as it was."""

from __future__ import annotations

import time

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("monai", reason="the machine stamp is that of the benchmarks")

from bench import host
from blobloss_fast import BlobLoss, _checks, _ops
from blobloss_fast.kernels import triton_segment_stats

PARTS = {
    "a step of an empty autograd function",
    "BlobLoss without gradient",
    "validation",
    "dispatch, forward",
    "dispatch, backward",
    "tables and launches, forward",
    "tables and launches, backward",
}


def test_a_table_of_parts(monkeypatch, capsys):
    kernel, backend, run = triton_segment_stats.segment_stats_fwd_kernel, _ops._for_cpu, _ops.run_blob_loss
    monkeypatch.setattr(host, "STEP", host.STEP._replace(bound=1e9))
    host.main(["--rounds", "3"])
    printed = capsys.readouterr().out
    for part in (host.STEP.name, *PARTS):
        assert f"\n| {part} | " in printed
    assert triton_segment_stats.segment_stats_fwd_kernel is kernel
    assert _ops._for_cpu is backend and _ops.run_blob_loss is run


def test_the_whole_step_contains_its_parts():
    found = host.measure(30)
    step = found.pop(host.STEP.name)
    assert set(found) == PARTS
    assert all(0 < us < step for us in found.values())
    assert step < 10_000  # it waits for nothing: a loose bound, for a machine that is busy


@pytest.mark.parametrize(("us", "status", "verdict"), [(119.9, 0, "yes"), (120.0, 0, "yes"), (120.2, 1, "**no**")])
def test_a_step_that_takes_too_long_fails(monkeypatch, capsys, us, status, verdict):
    monkeypatch.setattr(host, "microseconds", lambda function, rounds: us)
    if status:
        with pytest.raises(SystemExit) as stop:
            host.main([])
        assert stop.value.code == status
    else:
        host.main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == f"| a step of BlobLoss | 120 | <= 120 | {verdict} |"
    assert lines[3] == "| a step of an empty autograd function | 120 |  |  |"  # nothing else is judged
    assert lines[-1].endswith(".") and "torch" in lines[-1]


def test_the_time_is_the_median_after_warm_runs(monkeypatch):
    ticks = iter([0.0] * 20 + [1, 1 + 1e-6, 2, 2 + 2e-6, 3, 3 + 6e-6])
    monkeypatch.setattr(host.time, "perf_counter", lambda: next(ticks))
    calls = []
    assert host.microseconds(lambda: calls.append(1), 3) == pytest.approx(2, abs=1e-3)
    assert len(calls) == 20 + 3 and not list(ticks)


@pytest.mark.parametrize(
    ("module", "name", "where"),
    [
        (_checks, "logits", {"BlobLoss without gradient", "validation"}),
        (_ops, "decode", {"BlobLoss without gradient", "dispatch, forward", "dispatch, backward"}),
        (triton_segment_stats, "blob_loss", {"BlobLoss without gradient", "tables and launches, forward"}),
        (triton_segment_stats, "blob_loss_backward", {"tables and launches, backward"}),
    ],
)
def test_what_is_slow_is_seen_in_its_part(monkeypatch, module, name, where):
    function = getattr(module, name)

    def slow(*args):
        time.sleep(0.02)
        return function(*args)

    monkeypatch.setattr(module, name, slow)
    found = host.measure(5)
    assert {part for part, us in found.items() if us > 20_000} == {host.STEP.name, *where}


def test_no_kernel_is_launched_or_compiled(monkeypatch):
    def launched(*args, **options):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(type(triton_segment_stats.segment_stats_fwd_kernel), "run", launched)
    logits = torch.zeros(1, 1, 4, requires_grad=True)
    with host.stubbed():
        value = BlobLoss(max_instances=2)(logits, instances=torch.zeros(1, 1, 4, dtype=torch.int32))
        value.backward()
    assert value.shape == () and logits.grad.shape == logits.shape
