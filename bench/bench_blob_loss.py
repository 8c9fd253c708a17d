"""Forward and backward of every contestant, as pytest-benchmark groups.

    pytest --benchmark-only bench/bench_blob_loss.py                 everything, long: choose with -k
    pytest --benchmark-only bench/bench_blob_loss.py -k "128 and 2-threads and not loop"
    pytest --benchmark-only bench/bench_blob_loss.py -k tiny         24^3, some seconds: the tests run this
    pytest --benchmark-only bench/bench_blob_loss.py --data DIR      also the npz files there that hold a 3D `label`

Malloc is as the environment has set it (`bench.timing.MALLOC` has the values that the tables use) and is part of the
name of each group. Every contestant's value and gradient are checked before it is timed, and GB/s stand beside every
time, with what a copy reaches. The rounds of one contestant follow each other here; `python -m bench.table` interleaves
the contestants and is what ratios are quoted from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch

from bench.contestants import CONTESTANTS, TABLE, check_agreement, why_not
from bench.ratios import BYTES_PER_VOXEL
from bench.timing import Setting, copy_bandwidth, current_malloc
from bench.workloads import SCENES, Workload, data_files, from_file, real, scene

SIZES = {"tiny": 24, "64": 64, "128": 128, "192": 192}
THREADS = {"1-thread": 1, "2-threads": 2}


@lru_cache(maxsize=1)  # parameters vary fastest over the contestants, so one volume is alive at a time
def once(build: Callable[[], Workload], *arguments: Any) -> Workload:
    return build(*arguments)


@lru_cache
def copy_speed(threads: int) -> float:
    return copy_bandwidth(megabytes=64, rounds=5)


@pytest.fixture(params=THREADS)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before, count = torch.get_num_threads(), THREADS[request.param]
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "data_volume" in metafunc.fixturenames:
        folder = metafunc.config.getoption("--data", default=None)
        files = [] if folder is None else data_files(folder)
        metafunc.parametrize("data_volume", files, ids=[path.stem for path in files])


def measure(benchmark: Any, key: str, workload: Workload, threads: int) -> None:
    reason = why_not(key, workload) or check_agreement(workload, [key])[key].reason
    if reason is not None:
        pytest.skip(reason)
    step = CONTESTANTS[key].step(workload)
    benchmark.group = f"{workload.name}; {Setting(threads, current_malloc())}"
    rounds, warm_up = (3, 0) if key == "loop" else (15, 3)
    with step.backend():
        benchmark.pedantic(step.run, rounds=rounds, warmup_rounds=warm_up)
    moved = workload.instances.numel() * BYTES_PER_VOXEL
    benchmark.extra_info["gb_per_s"] = round(moved / benchmark.stats.stats.median / 1e9, 3)
    benchmark.extra_info["copy_gb_per_s"] = copy_speed(threads)


@pytest.mark.parametrize("key", TABLE)
@pytest.mark.parametrize("kind", SCENES)
@pytest.mark.parametrize("size", SIZES)
def test_synthetic(benchmark: Any, size: str, kind: str, key: str, threads: int) -> None:
    if size == "tiny" and kind == "10000":
        pytest.skip("10,000 instances that do not touch do not fit into 24^3")
    measure(benchmark, key, once(scene, SIZES[size], kind), threads)


@pytest.mark.parametrize("key", TABLE)
def test_real(benchmark: Any, key: str, threads: int) -> None:
    measure(benchmark, key, once(real), threads)


@pytest.mark.parametrize("key", TABLE)
def test_data(benchmark: Any, data_volume: Any, key: str, threads: int) -> None:
    measure(benchmark, key, once(from_file, data_volume), threads)
