"""What the host does in a step of the loss on a GPU: `python -m bench.host`, on any machine.

CPU tensors are sent the way of CUDA tensors, and the kernels are replaced by nothing: what is left is validation,
dispatch, autograd, allocation and the preparation of the launches. Triton's own launch, and the driver's, come on top.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.report import machine_stamp, number, table
from bench.timing import machine
from blobloss_fast import BlobLoss, _ops
from blobloss_fast.kernels import triton_finish, triton_segment_stats
from blobloss_fast.kernels.finish import decode

MOST = 120.0  # microseconds of a step, promised


class Nothing:
    """A kernel that is launched nowhere."""

    def __getitem__(self, grid: tuple[int, ...]) -> Nothing:
        return self

    def __call__(self, *args: Any, **options: Any) -> None:
        pass


def _triton() -> ModuleType:  # a mock in its place would take some 10 us at every call
    return triton_segment_stats


@contextmanager
def stubbed() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(_ops, "_for_cpu", _triton))
        for module in (triton_segment_stats, triton_finish):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                stack.enter_context(mock.patch.object(module, name, Nothing()))
        yield


class _Floor(torch.autograd.Function):
    """The least that a function of one's own costs."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, instances: Tensor) -> Tensor:
        ctx.save_for_backward(logits, instances)
        return torch.empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, _ = ctx.saved_tensors
        return torch.empty_like(logits), None


def microseconds(function: Callable[[], Any], rounds: int) -> float:
    times = []
    for r in range(rounds + 20):
        start = time.perf_counter()
        function()
        if r >= 20:
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def measure(rounds: int) -> dict[str, float]:
    """Median microseconds: a whole step, and parts of it, each alone and warm, which is less than within a step."""
    shape = (2, 1, 8, 8, 8)
    logits, instances = torch.zeros(shape, requires_grad=True), torch.zeros(shape, dtype=torch.int32)
    loss = BlobLoss(max_instances=64)

    def step(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            logits.grad = None
            function(logits, instances).backward()

        return run

    with stubbed():
        node = loss(logits, instances=instances).grad_fn
        spec, features = decode(*node.options)
        saved, x, one = node.saved_tensors, logits.detach(), torch.ones(())
        forward = lambda: triton_segment_stats.blob_loss(x, instances, None, None, 65, features, spec)  # noqa: E731
        backward = lambda: triton_segment_stats.blob_loss_backward(one, *saved, features, spec)  # noqa: E731
        with torch.no_grad():
            parts = {
                "tables and launches, forward": microseconds(forward, rounds),
                "tables and launches, backward": microseconds(backward, rounds),
            }
        return {
            "a step of BlobLoss": microseconds(step(lambda x, ids: loss(x, instances=ids)), rounds),
            "a step of an empty autograd function": microseconds(step(_Floor.apply), rounds),
            "BlobLoss without gradient": microseconds(lambda: loss(x, instances=instances), rounds),
            **parts,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2000, metavar="N")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = measure(options.rounds)
    rows = [[name, number(us), f"<= {MOST:g}" if name == "a step of BlobLoss" else ""] for name, us in found.items()]
    print(table(["host, launches left out", "us", "promised"], rows))
    print(f"\n{machine_stamp(machine())}.")


if __name__ == "__main__":
    main()
