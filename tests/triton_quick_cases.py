"""The interpreter of the other files computes what Triton's own does, bit for bit.

Run by test_triton_interpreter.py in a process of its own, like triton_interpreter_cases.py.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import triton.language as tl
from torch import Tensor

from blobloss_fast import BlobLoss, _ops, criteria
from blobloss_fast.kernels import triton_components, triton_zones
from blobloss_fast.kernels import triton_segment_stats as kernels
from blobloss_fast.kernels.layout import FEATURES

from .interpreter_checks import MARKS
from .quick_interpreter import quick
from .scenes import random_logits
from .triton_interpreter_cases import nothing_invalid_left_behind, random_ids, run  # noqa: F401

pytestmark = MARKS
SHAPE = (1, 3, 5, 11, 13)  # a full block and a tail


@pytest.fixture(autouse=True)
def losses_on_this_backend(monkeypatch):
    monkeypatch.setattr(_ops, "_for_cpu", lambda: kernels)


def sums_and_gradient(activation: str, dtype: torch.dtype) -> list[Tensor]:
    logits = random_logits(SHAPE, activation=activation).to(dtype)
    return list(run(kernels, logits, random_ids(SHAPE, -1, 20), None, 20, FEATURES, activation))


def loss_and_gradient() -> list[Tensor]:
    logits = random_logits(SHAPE).float().requires_grad_()
    loss = BlobLoss(criteria.dice() + criteria.focal(), max_instances=4)
    value = loss(logits, instances=random_ids(SHAPE, 0, 5))
    return [value.detach(), *torch.autograd.grad(value, logits)]


def labels_and_zones() -> list[Tensor]:
    labels, counts = triton_components.connected_components(random_ids(SHAPE, 0, 2), 26)
    return [labels, counts, triton_zones.nearest_instance(labels, (4, 9, 1))]


JOBS = {
    "sigmoid": partial(sums_and_gradient, "sigmoid", torch.float32),
    "softmax": partial(sums_and_gradient, "softmax", torch.float64),
    "none": partial(sums_and_gradient, "none", torch.bfloat16),
    "loss": loss_and_gradient,
    "labels and zones": labels_and_zones,
}


@pytest.mark.parametrize("job", JOBS)
def test_the_same_bits(job):
    own = tl.tensor.__init__
    plain = JOBS[job]()
    with quick():
        assert tl.tensor.__init__ is not own
        found = JOBS[job]()
    assert tl.tensor.__init__ is own
    assert len(found) == len(plain) >= 2
    for one, other in zip(found, plain, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
