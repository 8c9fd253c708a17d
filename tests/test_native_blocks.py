"""The blocks of 512 voxels that the native kernels look at: of one cell, of a few, of many; on each instruction set."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from blobloss_fast.kernels import native, reference
from blobloss_fast.kernels.layout import FEATURES, NOT_A_PROBABILITY

from .tolerances import error

BLOCK = 512
BOUNDS = {torch.float32: 2e-6, torch.float64: 1e-13}
GAMMA = 2.0

pytestmark = pytest.mark.usefixtures("library")


def check(logits: Tensor, ids: Tensor, target: Tensor | None, num_cells: int, features: tuple[str, ...]) -> None:
    """Compare with the reference in double, which sees 0 in place of what is ignored."""
    options = (features, "sigmoid", GAMMA, "class")
    exact = torch.where(ids < 0, 0, logits).double()
    counts, sums = native.segment_stats_forward(logits, ids, target, num_cells, *options)
    expected_counts, expected_sums = reference.segment_stats_forward(exact, ids, target, num_cells, *options)
    assert torch.equal(counts, expected_counts)
    assert error(sums, expected_sums) <= BOUNDS[logits.dtype]

    coefficients = torch.randn(sums.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grad = native.segment_stats_backward(coefficients, logits, ids, target, *options)
    expected = reference.segment_stats_backward(coefficients, exact, ids, target, *options)
    assert (grad[ids < 0] == 0).all()
    assert error(grad, expected) <= BOUNDS[logits.dtype]


@pytest.mark.parametrize("features", [("prob",), FEATURES], ids=["prob", "all"])
@pytest.mark.parametrize("others", [0, 3])
@pytest.mark.parametrize("own", ["instance", "ignored", "target"])
def test_a_voxel_that_differs_is_noticed_wherever_it_lies(own: str, others: int, features: tuple[str, ...]) -> None:
    """Block k differs at voxel k alone."""
    logits = torch.randn(1, 1, BLOCK, BLOCK, generator=torch.Generator().manual_seed(1))
    ids = torch.full(logits.shape, others, dtype=torch.int32)
    where = torch.eye(BLOCK, dtype=torch.bool)[None, None]
    if own == "instance":
        ids[where] = 2
    elif own == "ignored":
        ids[where] = -1
        logits[where] = torch.nan
    target = where if own == "target" else None
    check(logits, ids, target, 4 if target is None else 8, features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("features", [("prob",), ("prob", "nll_pos"), FEATURES], ids=["prob", "two", "all"])
@pytest.mark.parametrize("ignored", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("length", [1, 3, 60, 200])
def test_runs_of_any_length(length: int, ignored: float, features: tuple[str, ...], dtype: torch.dtype) -> None:
    """Cells that go on for `length` voxels on average, half of them background; what is ignored is NaN."""
    generator = torch.Generator().manual_seed(length)
    shape = (1, 1, 40 * BLOCK + 77)

    def runs(values: Tensor) -> Tensor:
        begins = torch.rand(shape, generator=generator) * length < 1
        return values[begins.flatten().cumsum(0)].view(shape)

    ids = runs(torch.randint(-9, 10, (shape[-1] + 1,), generator=generator).clamp(min=0)).int()
    target = runs(torch.rand(shape[-1] + 1, generator=generator) < 0.5)
    outside = torch.rand(shape, generator=generator) < ignored
    ids[outside] = -1
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    logits[outside] = torch.nan
    check(logits, ids, None, 10, features)
    check(logits, ids, target, 20, features)


@pytest.mark.parametrize("activation", ["softmax", "none"])
def test_a_block_of_one_cell_owes_nothing_to_the_one_before(activation: str) -> None:
    """Of the first block nearly all is ignored; the second lies in one cell, of which one voxel may stand for all."""
    logits = torch.rand(1, 3, 2 * BLOCK, generator=torch.Generator().manual_seed(0))
    ids = torch.ones(1, 3, 2 * BLOCK, dtype=torch.int32)
    ids[..., 1:BLOCK] = -1
    target = torch.ones_like(ids, dtype=torch.bool)
    options = (("prob",), activation, GAMMA, "class")
    coefficients = torch.randn(1, 3, 4, 1, generator=torch.Generator().manual_seed(1))
    grad = native.segment_stats_backward(coefficients, logits, ids, target, *options)
    expected = reference.segment_stats_backward(coefficients.double(), logits.double(), ids, target, *options)
    assert (grad[..., BLOCK:] != 0).all()
    assert error(grad, expected) <= BOUNDS[logits.dtype]
    if activation == "none":
        logits[..., -1] = 2
        with pytest.raises(ValueError, match=re.escape(NOT_A_PROBABILITY)):
            native.segment_stats_forward(logits, ids, target, 4, *options)
