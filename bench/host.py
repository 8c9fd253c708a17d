"""What the host does in a step of the loss on a GPU: `python -m bench.host`, on any machine.

CPU tensors are sent the way of CUDA tensors, and the kernels are replaced by nothing: what is left is validation,
dispatch, autograd, allocation and the preparation of the launches. Triton's own launch, and the driver's, come on top.
The exit status is 1 if a step takes longer than promised.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.gpu_rows import Bar
from bench.report import machine_stamp, number, table
from bench.timing import machine
from blobloss_fast import BlobLoss, _ops
from blobloss_fast.kernels import triton_finish, triton_segment_stats
from blobloss_fast.kernels.finish import decode

STEP = Bar("a step of BlobLoss", "us", "<=", 120)


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
    """Median microseconds: a whole step, and parts of it, each alone and warm, which is less than within a step.

    Validation is all that happens before the operator is called; dispatch is an operator whose backend does nothing.
    """
    shape = (2, 1, 8, 8, 8)
    logits, instances = torch.zeros(shape, requires_grad=True), torch.zeros(shape, dtype=torch.int32)
    loss = BlobLoss(max_instances=64)

    def step(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            logits.grad = None
            function(logits, instances).backward()

        return run

    with stubbed():
        result = loss(logits, instances=instances)  # kept, for what its node has saved is given up with it
        node = result.grad_fn
        spec, features = decode(*node.options)
        saved, x, one = node.saved_tensors, logits.detach(), torch.ones(())
        value = lambda: loss(x, instances=instances)  # noqa: E731
        forward = lambda: triton_segment_stats.blob_loss(x, instances, None, None, 65, features, spec)  # noqa: E731
        backward = lambda: triton_segment_stats.blob_loss_backward(one, *saved, features, spec)  # noqa: E731
        call = lambda: _ops.blob_loss(x, instances, None, None, 64, *node.options)  # noqa: E731
        call_backward = lambda: _ops.blob_loss_backward(one, *saved, *node.options)  # noqa: E731
        with torch.no_grad():
            results, gradient = forward(), backward()
        operator, derivative = (lambda *_: results), (lambda *_: gradient)
        idle = SimpleNamespace(blob_loss=operator, blob_loss_backward=derivative)
        backend = lambda: idle  # noqa: E731

        found = {
            STEP.name: microseconds(step(lambda x, ids: loss(x, instances=ids)), rounds),
            "a step of an empty autograd function": microseconds(step(_Floor.apply), rounds),
            "BlobLoss without gradient": microseconds(value, rounds),
        }
        with mock.patch.object(_ops, "run_blob_loss", operator):
            found["validation"] = microseconds(value, rounds)
        with mock.patch.object(_ops, "_for_cpu", backend), torch._C._AutoDispatchBelowAutograd():
            found["dispatch, forward"] = microseconds(call, rounds)
            found["dispatch, backward"] = microseconds(call_backward, rounds)
        with torch.no_grad():
            found["tables and launches, forward"] = microseconds(forward, rounds)
            found["tables and launches, backward"] = microseconds(backward, rounds)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2000, metavar="N")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = measure(options.rounds)
    holds = STEP.row(found[STEP.name], "")["holds"]
    promised = {STEP.name: [str(STEP), "yes" if holds else "**no**"]}
    rows = [[name, number(us), *promised.get(name, ["", ""])] for name, us in found.items()]
    print(table(["host, launches left out", "us", "promised", "holds"], rows))
    print(f"\n{machine_stamp(machine())}.")
    if not holds:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
