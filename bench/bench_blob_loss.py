"""Forward and backward of the loss: the authors' loop, a scatter_add, plain Dice, MONAI's Dice and ours.

    pytest --benchmark-only bench/bench_blob_loss.py              everything, a few minutes
    pytest --benchmark-only bench/bench_blob_loss.py -k tiny      24^3, some seconds: the tests run this

Every contestant's value and gradient are checked before it is timed. The rounds of one contestant follow each other
here; `python -m bench.table` interleaves the contestants and is what ratios are quoted from.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest

from bench.workloads import (
    CONTESTANTS,
    Workload,
    check_agreement,
    real,
    synthetic,
    why_not,
)

SIZES = {"tiny": 24, "64": 64, "128": 128}
INSTANCES = (1, 50, 1000)


@lru_cache(maxsize=1)  # parameters vary fastest over the contestants, so one volume is alive at a time
def synthetic_once(size: int, num_instances: int) -> Workload:
    return synthetic(size, num_instances)


@lru_cache(maxsize=1)
def real_once() -> Workload:
    return real()


def measure(benchmark: Any, key: str, workload: Workload) -> None:
    reason = why_not(key, workload)
    if reason is not None:
        pytest.skip(reason)
    errors = check_agreement(workload, [key])
    benchmark.group = workload.name
    benchmark.extra_info.update(voxels=workload.instances.numel(), relative_error=errors[key])
    rounds, warm_up = (3, 0) if key == "loop" else (15, 3)
    benchmark.pedantic(CONTESTANTS[key].step(workload), rounds=rounds, warmup_rounds=warm_up)


@pytest.mark.parametrize("key", CONTESTANTS)
@pytest.mark.parametrize("num_instances", INSTANCES)
@pytest.mark.parametrize("size", SIZES)
def test_synthetic(benchmark: Any, size: str, num_instances: int, key: str) -> None:
    measure(benchmark, key, synthetic_once(SIZES[size], num_instances))


@pytest.mark.parametrize("key", CONTESTANTS)
def test_real(benchmark: Any, key: str) -> None:
    measure(benchmark, key, real_once())
