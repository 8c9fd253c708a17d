"""Loss and gradient have the same bits with any number of threads, in any run, and beside other work.

Through the public loss; what every function of the library returns is compared in test_native_threads.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from blobloss_fast import BlobLoss, criteria
from blobloss_fast.kernels import native, reference

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))

LOSSES = {
    "dice": BlobLoss(),
    "softmax": BlobLoss(criteria.dice() + criteria.focal(), activation="softmax"),
    "others stay": BlobLoss(criteria.bce() + criteria.jaccard(), masking="none"),
}
DTYPES = {"dice": torch.float32, "softmax": torch.bfloat16, "others stay": torch.float64}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(name: str) -> tuple[Tensor, Tensor]:
    """Logits, and ids of which half are background and some ignored; work for several threads in both passes."""
    generator = torch.Generator().manual_seed(len(name))
    logits = 3 * torch.randn(2, 3, 41, 43, 40, generator=generator, dtype=torch.float64)
    ids = torch.randint(-2, 40, (2, 3, 41, 43, 5), generator=generator).repeat_interleave(8, 4)
    return logits.to(DTYPES[name]).requires_grad_(), torch.where(ids > 20, 0, ids).int()


def run(name: str, logits: Tensor, ids: Tensor) -> tuple[bytes, bytes]:
    """The bits of the loss and of its gradient."""
    loss = LOSSES[name](logits, instances=ids)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert (grad != 0).float().mean() > 0.8
    return loss.detach().numpy().tobytes(), grad.view(torch.uint8).numpy().tobytes()


def expected(name: str, logits: Tensor, ids: Tensor) -> tuple[bytes, bytes]:
    """What one thread computes."""
    torch.set_num_threads(1)
    return run(name, logits, ids)


@pytest.mark.parametrize("own", [False, True], ids=["pool", "own threads"])
@pytest.mark.parametrize("name", LOSSES)
def test_any_number_of_threads(name: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_forked", own)  # a forked child does not use PyTorch's pool
    problem = make(name)
    bits = expected(name, *problem)
    for count in (2, 3, 16):
        torch.set_num_threads(count)
        assert run(name, *problem) == bits, f"{count} threads"


@pytest.mark.parametrize("name", LOSSES)
def test_two_callers_at_once(name: str) -> None:
    problem = make(name)
    bits = expected(name, *problem)
    torch.set_num_threads(2)
    with ThreadPoolExecutor(2) as callers:
        assert list(callers.map(lambda _: run(name, *problem), range(6))) == 6 * [bits]


def test_tables_that_several_threads_add_up() -> None:
    """Six groups of 700 cells in two slabs each, cut among threads wherever that may be."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 2, 60_000, generator=generator)
    ids = torch.randint(-50, 700, logits.shape, generator=generator, dtype=torch.int32)
    options = (None, 700, ("prob", "nll_pos"), "sigmoid", 0.0, "class")
    counts, sums = reference.segment_stats_forward(logits.double(), ids, *options)
    found = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        found.append(native.segment_stats_forward(logits, ids, *options))
        assert torch.equal(found[-1][0], counts)
        torch.testing.assert_close(found[-1][1].double(), sums, rtol=1e-6, atol=1e-6)
        assert torch.equal(found[-1][1], found[0][1]), f"{count} threads"


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True], ids=["pool", "own threads"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_hundred_runs_beside_busy_processes(name: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_forked", own)
    problem = make(name)
    bits = expected(name, *problem)
    torch.set_num_threads(3)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        for i in range(100):
            assert run(name, *problem) == bits, f"run {i}"
    finally:
        for process in busy:
            process.kill()
            process.wait()
