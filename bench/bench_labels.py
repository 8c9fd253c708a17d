"""Components, zones and losses from a bare mask, as pytest-benchmark groups.

    pytest --benchmark-only bench/bench_labels.py -k "128 and 2-threads"     minutes
    pytest --benchmark-only bench/bench_labels.py -k tiny                    24^3, some seconds: the tests run this
    pytest --benchmark-only bench/bench_labels.py --data DIR                 also crops of the masks in a folder

Results are compared before anything is timed. `python -m bench.labels` interleaves the contestants and is what ratios
are quoted from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from bench.contestants import CONTESTANTS, check_agreement, why_not
from bench.labels import (
    COMPONENTS,
    LOSSES,
    MOST_TRANSFORMS,
    ZONES,
    Volume,
    check_components,
    check_zones,
    labelled,
    masks,
)
from bench.timing import Setting, current_malloc
from bench.workloads import synthetic

SIZES = {"tiny": 24, "64": 64, "128": 128}
THREADS = {"1-thread": 1, "2-threads": 2}


@pytest.fixture(params=THREADS)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before, count = torch.get_num_threads(), THREADS[request.param]
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)


@lru_cache(maxsize=1)
def once(build: Callable[..., list[Volume]], size: int, data: Any) -> list[Volume]:
    return build(size, data)


def run(benchmark: Any, step: Callable[[], Any], group: str, threads: int, rounds: int = 15) -> None:
    benchmark.group = f"{group}; {Setting(threads, current_malloc())}"
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=min(rounds - 1, 3))


@pytest.mark.parametrize("key", COMPONENTS)
@pytest.mark.parametrize("size", SIZES)
def test_components(benchmark: Any, pytestconfig: pytest.Config, size: str, key: str, threads: int) -> None:
    """All masks after one another; `python -m bench.labels` has them one by one."""
    volumes = once(masks, SIZES[size], pytestconfig.getoption("--data", default=None))
    for name, mask in volumes:
        check_components(name, mask)
    steps = [COMPONENTS[key](mask) for _, mask in volumes]
    run(benchmark, lambda: [step() for step in steps], f"components of {len(volumes)} masks, {size}", threads)


@pytest.mark.parametrize("key", ZONES)
@pytest.mark.parametrize("size", SIZES)
def test_zones(benchmark: Any, pytestconfig: pytest.Config, size: str, key: str, threads: int) -> None:
    volumes = once(labelled, SIZES[size], pytestconfig.getoption("--data", default=None))
    few = [(name, ids) for name, ids in volumes if len(np.unique(ids)) <= MOST_TRANSFORMS]
    for name, ids in few:
        check_zones(name, ids)
    steps = [ZONES[key](ids) for _, ids in few]
    rounds = 1 if key == "each" else 15
    run(benchmark, lambda: [step() for step in steps], f"zones of {len(few)} volumes, {size}", threads, rounds)


@pytest.mark.parametrize("key", LOSSES)
@pytest.mark.parametrize("size", SIZES)
def test_losses_from_a_mask(benchmark: Any, size: str, key: str, threads: int) -> None:
    workload = synthetic(SIZES[size], 50)
    reason = why_not(key, workload) or check_agreement(workload, [key])[key].reason
    if reason is not None:
        pytest.skip(reason)
    run(benchmark, CONTESTANTS[key].step(workload).run, f"losses from the mask of {workload.name}", threads)
