"""How things are timed: contestants take turns, in a process for each number of threads and each malloc setting."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import blobloss_fast

# By default glibc gives large blocks that are freed back to the system and takes their pages anew, zeroed, at the next
# allocation: a loss in plain PyTorch, full of large temporaries, can spend most of its time there. With thresholds like
# these it keeps them. Both are found in practice, so both are measured.
MALLOC = {
    "default": {},
    "raised": {
        "MALLOC_MMAP_THRESHOLD_": "33554432",
        "MALLOC_TRIM_THRESHOLD_": "4294967296",
        "MALLOC_TOP_PAD_": "268435456",
    },
}

WARM = 0.005  # seconds
ONE_RUN = 1e-9  # in which no second one begins

Report = Callable[[int, str], None]  # how many steps were done, and at what the work is


# ------------------------------------------------------------------------------------------------------------ turns


@dataclass(frozen=True)
class Step:
    """What is timed.

    Attributes:
        run: one forward and one backward pass.
        backend: what it must run in; entered and left outside the measured time.
        warm: seconds of untimed runs, at least one, before each timed one, so that its caches and its memory are its
            own and not what the contestant before it left. For a step shorter than a millisecond one run is not enough:
            it gets faster for several. What takes seconds needs none.
    """

    run: Callable[[], Any]
    backend: Callable[[], AbstractContextManager[Any]] = nullcontext
    warm: float = WARM


def interleaved(
    steps: Mapping[str, Step], rounds: Mapping[str, int], *, after_each: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of every timed run of every step: in round r, each step that has more than r rounds has its turn.

    Neighbours in time are compared, so that a machine that slows down for a while slows down all of them.
    """
    times: dict[str, list[float]] = {key: [] for key in steps}
    gc.collect()
    gc.disable()
    try:
        for r in range(max(rounds.values())):
            for key, step in steps.items():
                if r < rounds[key]:
                    with step.backend():
                        until = time.perf_counter() + step.warm
                        if step.warm:
                            step.run()
                            while time.perf_counter() < until:
                                step.run()
                        start = time.perf_counter()
                        step.run()
                        times[key].append(time.perf_counter() - start)
                    after_each()
    finally:
        gc.enable()
    return times


def milliseconds(times: Sequence[float]) -> float:
    """Their median."""
    return round(statistics.median(times) * 1e3, 4)


def copy_bandwidth(megabytes: int = 256, rounds: int = 9) -> float:
    """GB/s, read plus write, of copying a buffer that no cache holds."""
    source = torch.ones(megabytes * 2**18)
    sink = torch.empty_like(source)
    times = interleaved({"copy": Step(lambda: sink.copy_(source))}, {"copy": rounds})["copy"]
    return round(2 * source.numel() * source.element_size() / statistics.median(times) / 1e9, 2)


# -------------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Setting:
    """What all contestants share: the number of threads, and how malloc treats large blocks."""

    threads: int
    malloc: str

    def __str__(self) -> str:
        return f"{self.threads} thread{'s' * (self.threads > 1)}, {self.malloc} malloc"


class ChildError(RuntimeError):
    """The measuring process failed."""


def current_malloc() -> str:
    """The key of MALLOC that this process was started with, or "other"."""
    names = MALLOC["raised"]
    found = {name: os.environ[name] for name in names if name in os.environ}
    return next((key for key, values in MALLOC.items() if values == found), "other")


def in_child(setting: Setting, job: Callable[..., Any], *arguments: Any, report: Report = lambda n, what: None) -> Any:
    """Return `job(*arguments, report)` from a new process: malloc reads its thresholds when a process starts.

    The number of threads is pinned before anything runs. `job` must be found by name in its module.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, setting.threads, job, arguments), daemon=True)
    kept = {name: value for name, value in os.environ.items() if name not in MALLOC["raised"]}
    wanted = kept | MALLOC[setting.malloc] | {"OMP_NUM_THREADS": str(setting.threads)}
    with mock.patch.dict(os.environ, wanted, clear=True):
        process.start()
    sender.close()
    try:
        while True:
            kind, *content = receiver.recv()
            if kind == "progress":
                report(*content)
            elif kind == "result":
                return content[0]
            else:
                raise ChildError(f"measuring with {setting} failed:\n{content[0]}")
    except EOFError:
        process.join()
        raise ChildError(f"the process measuring with {setting} ended with status {process.exitcode}") from None
    finally:
        process.terminate()  # has no effect on one that is done
        process.join()


def _child(sender: Connection, threads: int, job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    done, last = 0, time.monotonic()

    def report(steps: int, what: str) -> None:
        nonlocal done, last
        done += steps
        if time.monotonic() - last > 0.3:  # the parent wakes up for each, on a core that is being measured
            sender.send(("progress", done, what))
            done, last = 0, time.monotonic()

    try:
        torch.set_num_threads(threads)
        result = job(*arguments, report)
        sender.send(("progress", done, ""))
        sender.send(("result", result))
    except Exception:
        sender.send(("error", traceback.format_exc()))


# ---------------------------------------------------------------------------------------------------------- machine


def machine() -> dict[str, Any]:
    """What the numbers belong to."""

    def version(distribution: str) -> str | None:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": " ".join(filter(None, (platform.system(), platform.machine(), *platform.libc_ver()))),
        "backend": blobloss_fast.backends()["cpu"],
        "blobloss_fast": blobloss_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": version("monai"),
        "date": datetime.date.today().isoformat(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
