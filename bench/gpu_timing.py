"""The clock of bench.gpu: times, graphs, launches and memory on a CUDA device, and what stands for them on a CPU."""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.timing import ONE_RUN, Step, interleaved

Function = Callable[[], Any]

WARM_RUNS = 3
LEAST_FLUSH = 64 * 2**20  # bytes, where the size of the L2 cache is not known
COPY_BYTES = 2**30
# The categories of a trace of the profiler that are work on the device.
DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")


class UnmeasuredError(RuntimeError):
    """Why there is no number."""


def reason_of(error: Exception) -> str:
    """What a row says that has no value because of this."""
    if isinstance(error, UnmeasuredError):
        return str(error)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def device_activities(trace: Mapping[str, Any]) -> list[str]:
    """The names of the kernels, copies and fills in a trace of the profiler."""
    return [event["name"] for event in trace["traceEvents"] if event.get("cat") in DEVICE_CATEGORIES]


class Clock:
    """A CPU, on which the benchmark is tested: what only a GPU has is plain calls or an `UnmeasuredError`.

    Args:
        limit_s: about how long one contestant may be timed; it has fewer rounds if it is slow, at least 3.
        copy_bytes: size of the buffer whose copy gives the bandwidth.
    """

    device = torch.device("cpu")
    compiler = "aot_eager"

    def __init__(self, limit_s: float = 1.0, copy_bytes: int = COPY_BYTES) -> None:
        self.limit_s = limit_s
        self.copy_bytes = copy_bytes

    def seconds(self, steps: Mapping[str, Function], rounds: int) -> dict[str, list[float]]:
        """Every timed run of every step. They take turns, after warm runs, and find no cache filled by another run."""
        counts = {key: self._rounds(step, rounds) for key, step in steps.items()}
        return interleaved({key: Step(step, warm=ONE_RUN) for key, step in steps.items()}, counts)

    def medians(self, steps: Mapping[str, Function], rounds: int) -> dict[str, float]:
        return {key: statistics.median(times) for key, times in self.seconds(steps, rounds).items()}

    def host_seconds(self, function: Function, rounds: int) -> tuple[float, float]:
        """Medians of the wall-clock time from an idle device until the call returns, and until all of it is done."""
        rounds = self._rounds(function, rounds)
        returned, done = [], []
        for _ in range(rounds):
            self.synchronize()
            start = time.perf_counter()
            function()
            returned.append(time.perf_counter() - start)
            self.synchronize()
            done.append(time.perf_counter() - start)
        return statistics.median(returned), statistics.median(done)

    def copy_bandwidth(self, rounds: int) -> float:
        """GB/s, read plus write, of copying a buffer that no cache holds."""
        source = torch.ones(self.copy_bytes // 4, device=self.device)
        sink = torch.empty_like(source)
        median = self.medians({"copy": lambda: sink.copy_(source)}, rounds)["copy"]
        return 2 * source.numel() * 4 / median / 1e9

    def capture(self, *functions: Function) -> tuple[Function, ...]:
        """One replay for each function; a later function may use what an earlier one has left."""
        return functions

    def launches(self, function: Function) -> int:
        """How many kernels, fills and copies the function starts on the device."""
        function()
        raise UnmeasuredError("a CPU has no launches")

    def peak_bytes(self, function: Function) -> int:
        """The most memory that the function held beyond what was there before."""
        function()
        raise UnmeasuredError("the memory of a CPU is not counted")

    def wait_of(self, function: Function) -> str | None:
        """What in the function makes the host wait for the device; None if nothing does."""
        function()
        raise UnmeasuredError("a CPU does not wait for itself")

    def disturb(self, run: int) -> None:
        """Keep the device busy beside what comes next, differently in every run."""

    def synchronize(self) -> None:
        pass

    def _rounds(self, function: Function, rounds: int) -> int:
        """How many runs the limit allows; warms up."""
        for _ in range(WARM_RUNS):
            self.synchronize()
            start = time.perf_counter()
            function()
            self.synchronize()
            once = time.perf_counter() - start
            if once * WARM_RUNS > self.limit_s:
                break
        return max(min(rounds, int(self.limit_s / max(once, 1e-9))), min(rounds, 3))


class CudaClock(Clock):
    """The current CUDA device, timed with events, each run after its L2 cache was flushed.

    The flush writes a buffer of twice the cache, which leaves nothing of the run before, and then reads another one,
    which leaves nothing to be written back in the measured time. Runs are queued without a wait between them, as in
    training: the flush gives the host a head start, and a step whose launches take longer still waits for them.
    """

    compiler = "inductor"

    def __init__(self, limit_s: float = 1.0, copy_bytes: int = COPY_BYTES, device: torch.device | None = None) -> None:
        super().__init__(limit_s, copy_bytes)
        self.device = device or torch.device("cuda", torch.cuda.current_device())
        size = max(2 * l2_bytes(self.device), LEAST_FLUSH) // 4
        self._written, self._read = (torch.zeros(size, device=self.device) for _ in range(2))
        self._sink = torch.zeros((), device=self.device)
        self._side = torch.cuda.Stream()
        self._matrices = tuple(torch.randn(2048, 2048, device=self.device) for _ in range(3))

    def _flush(self) -> None:
        self._written.zero_()
        torch.sum(self._read, 0, out=self._sink)

    def seconds(self, steps: Mapping[str, Function], rounds: int) -> dict[str, list[float]]:
        counts = {key: self._rounds(step, rounds) for key, step in steps.items()}
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {key: [] for key in steps}
        gc.collect()
        gc.disable()
        try:
            for r in range(max(counts.values())):
                for key, step in steps.items():
                    if r < counts[key]:
                        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                        self._flush()
                        start.record()
                        step()
                        end.record()
                        events[key].append((start, end))
        finally:
            gc.enable()
        self.synchronize()
        return {key: [start.elapsed_time(end) * 1e-3 for start, end in pairs] for key, pairs in events.items()}

    def capture(self, *functions: Function) -> tuple[Function, ...]:
        gc.collect()  # what is left of a backward pass on another stream would be waited for
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # backward runs on the stream of its forward, so both warm up on this one
            for _ in range(WARM_RUNS):
                for function in functions:
                    function()
        torch.cuda.current_stream().wait_stream(stream)
        graphs: list[_Graph] = []
        for function in functions:
            graph = torch.cuda.CUDAGraph()
            pool = graphs[0].graph.pool() if graphs else None
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                function()
            graphs.append(_Graph(graph, functions))
        return tuple(graphs)

    def launches(self, function: Function) -> int:
        function()
        activities: list[str] = []
        for _ in range(2):  # the first trace of a process starts the tracer and may miss what comes first
            self.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as found:
                function()
                self.synchronize()
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "trace.json"
                found.export_chrome_trace(str(file))
                activities = device_activities(json.loads(file.read_text(encoding="utf-8")))
        if not activities:
            raise UnmeasuredError("the profiler saw nothing on the device")
        return len(activities)

    def peak_bytes(self, function: Function) -> int:
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        function()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def wait_of(self, function: Function) -> str | None:
        function()  # compiles
        self.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            function()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return str(error).partition("\n")[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return None

    def disturb(self, run: int) -> None:
        first, second, out = self._matrices
        with torch.cuda.stream(self._side):
            for _ in range(1 + run % 4):
                torch.mm(first, second, out=out)
                self._written[: out.numel()].copy_(out.view(-1))

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


class _Graph:
    """A captured function; keeps what it reads and writes alive."""

    def __init__(self, graph: torch.cuda.CUDAGraph, functions: tuple[Function, ...]) -> None:
        self.graph = graph
        self._functions = functions

    def __call__(self) -> None:
        self.graph.replay()


def l2_bytes(device: torch.device) -> int:
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
