"""Zones on the CPU: the same bits with any number of threads, and how much memory is taken besides the result.

The memory is what malloc is asked for, counted in a child process (tests/test_native_memory.py), in bytes per voxel of
one sample and channel. Measured on x86-64 with PyTorch 2.13 and two threads: native 0.3 at 128^2 x 64 where a key
has 32 bits, 8.6 and 17 where it has more; the fallback 56, and 96 where squared distances need more than 31 bits.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import blobloss_fast
from blobloss_fast.kernels import native, native_zones
from tests.test_native_memory import counter  # noqa: F401  # a fixture
from tests.test_nearest_instance import all_pairs, batch_of, same, volume

needs_native = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_native
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("own", [False, True], ids=["pool", "own threads"])
@pytest.mark.parametrize("weight", [1, 2**20, 2**40])
def test_any_number_of_threads(monkeypatch: pytest.MonkeyPatch, own: bool, weight: int) -> None:
    monkeypatch.setattr(native, "_forked", own)
    rng = np.random.default_rng(0)
    for shape in ((13, 9, 140), (90, 50)):
        ids = batch_of(*(volume(kind, shape, rng) for kind in ("few voxels", "balls", "ignored", "gaps")), channels=2)
        weights = [weight, 2, 3][: len(shape)]
        found = []
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            found.append(native_zones.nearest_instance(ids, weights))
        assert all(torch.equal(other, found[0]) for other in found[1:])
        same(found[0][1, 1], all_pairs(ids[1, 1].numpy(), weights))


MEASURE = """
import ctypes, sys, torch
from importlib import import_module
from tests.test_native_memory import allocated
backend = import_module("blobloss_fast.kernels." + sys.argv[1])
shape = tuple(map(int, sys.argv[2:]))
torch.set_num_threads(2)
ids = torch.zeros(shape, dtype=torch.int32)
some = ids[..., ::9, ::30]
some.copy_(torch.arange(some.numel()).view_as(some))
for weight in (1, 2**12, 2**40):
    call = lambda: backend.nearest_instance(ids, (weight,) * (ids.ndim - 2))
    call()
    peak = allocated(call) - 4 * ids.numel()
    before = ctypes.CDLL(None).counter_live()
    for _ in range(4):
        call()
    print(peak / ids[0, 0].numel(), ctypes.CDLL(None).counter_live() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts what glibc allocates")
@pytest.mark.parametrize(
    ("backend", "shape", "bounds"),
    [
        pytest.param("native_zones", (3, 2, 64, 128, 128), (1, 9, 18), marks=needs_native),
        pytest.param("native_zones", (4, 1, 1024, 1024), (13, 13, 26), marks=needs_native),
        ("zones", (3, 2, 20, 40, 40), (60, 60, 110)),
        ("zones", (4, 1, 150, 200), (60, 60, 110)),
    ],
)
def test_memory(
    backend: str,
    shape: tuple[int, ...],
    bounds: tuple[float, ...],
    counter: Path,  # noqa: F811
) -> None:
    """Bounded by one sample and channel, whatever the batch; and nothing stays."""
    roots = (Path(blobloss_fast.__file__).parents[1], Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, roots)), "LD_PRELOAD": str(counter)}
    command = [sys.executable, "-W", "error", "-c", MEASURE, backend, *map(str, shape)]
    # Not in the checkout, whose package would come before the installed one.
    done = subprocess.run(command, cwd=counter.parent, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    assert len(lines) == len(bounds)
    for (peak, stays), bound in zip(lines, bounds, strict=True):
        assert 0 < peak < bound
        assert stays < 4096
