"""The benchmark of the host's part of a step runs, and leaves everything as it was."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("monai", reason="the machine stamp is that of the benchmarks")

from bench import host
from blobloss_fast import BlobLoss, _ops
from blobloss_fast.kernels import triton_segment_stats


def test_a_table_of_parts(capsys):
    kernel, backend = triton_segment_stats.segment_stats_fwd_kernel, _ops._for_cpu
    host.main(["--rounds", "3"])
    printed = capsys.readouterr().out
    for part in ("a step of BlobLoss", "an empty autograd function", "forward", "backward"):
        assert part in printed
    assert triton_segment_stats.segment_stats_fwd_kernel is kernel
    assert _ops._for_cpu is backend


def test_the_whole_step_contains_its_parts():
    found = host.measure(30)
    step = found.pop("a step of BlobLoss")
    assert all(0 < us < step for us in found.values())
    assert step < 10_000  # it waits for nothing: a loose bound, for a machine that is busy


def test_no_kernel_is_launched_or_compiled(monkeypatch):
    def launched(*args, **options):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(type(triton_segment_stats.segment_stats_fwd_kernel), "run", launched)
    logits = torch.zeros(1, 1, 4, requires_grad=True)
    with host.stubbed():
        value = BlobLoss(max_instances=2)(logits, instances=torch.zeros(1, 1, 4, dtype=torch.int32))
        value.backward()
    assert value.shape == () and logits.grad.shape == logits.shape
