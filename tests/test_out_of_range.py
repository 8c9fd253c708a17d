"""Logits far out, infinite and NaN in a large volume: on no backend does a wrong finite number come out."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from blobloss_fast import criteria
from blobloss_fast.kernels import finish, native, reference
from blobloss_fast.kernels.layout import ZONES

from .test_native_finish import spec_of
from .test_segment_stats import backend  # noqa: F401  a fixture

FEATURES = ("prob", "prob_sq", "nll_pos", "nll_neg", "focal_pos", "focal_neg")
VOXELS = 2**20
# By instance, a few voxels of each among thousands of ordinary ones; the last instance has none.
FAR_OUT = (1e4, -1e4, 1e9, -1e9, 3e38, -3e38, math.inf, -math.inf, math.nan)


def volume() -> tuple[torch.Tensor, torch.Tensor]:
    """Background of +-1e4 and of ordinary logits, and an instance of 4096 voxels for every kind of far out."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(VOXELS, generator=generator)
    logits[::3] = 1e4
    logits[1::7] = -1e4
    ids = torch.zeros(VOXELS, dtype=torch.int16)
    for k, value in enumerate((*FAR_OUT, None), 1):
        start = 90_001 * k
        ids[start : start + 4096] = k
        logits[start : start + 4096] = 3 * torch.randn(4096, generator=generator)
        if value is not None:
            logits[start + 5 : start + 4096 : 1000] = value
    return logits.view(1, 1, 64, 128, 128), ids.view(1, 1, 64, 128, 128)


def expected(logits: torch.Tensor, ids: torch.Tensor, num_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts ``[K]`` and sums ``[K, F]`` in long double."""
    x, k = logits.numpy().astype(np.longdouble).ravel(), ids.numpy().ravel()
    with np.errstate(all="ignore"):
        p, q = 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(x))
        pos = np.maximum(-x, 0) + np.log1p(np.exp(-np.abs(x)))
        neg = np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
        # Infinity times a power of 0 is meant as infinity or 0, whichever of the two the limit is.
        focal_pos = np.where(pos == np.inf, np.inf, q * q * np.where(q == 0, 0, pos))
        focal_neg = np.where(neg == np.inf, np.inf, p * p * np.where(p == 0, 0, neg))
        values = np.stack([p, p * p, pos, neg, focal_pos, focal_neg], -1)
        sums = np.stack([values[k == cell].sum(0) for cell in range(num_cells)])
    return np.bincount(k, minlength=num_cells), sums


def test_far_out_logits_of_a_large_volume(backend):  # noqa: F811
    logits, ids = volume()
    num_cells = len(FAR_OUT) + 2
    counts, sums = backend.segment_stats_forward(logits, ids, None, num_cells, FEATURES, "sigmoid", 2.0, "class")
    true_counts, true_sums = expected(logits, ids, num_cells)
    assert counts[0, 0].tolist() == true_counts.tolist()
    for cell in range(num_cells):
        for name, value, truth in zip(FEATURES, sums[0, 0, cell].tolist(), true_sums[cell], strict=True):
            what = f"{name} of cell {cell}: {value}, truth {truth}"
            if np.isnan(truth):
                assert math.isnan(value), what
            elif abs(truth) > np.finfo(np.float32).max:
                assert value == math.inf, what
            else:
                assert math.isclose(value, truth, rel_tol=1e-6, abs_tol=1e-9), what


def test_far_out_gradients_are_no_wrong_numbers(backend):  # noqa: F811
    """Slopes are bounded: 0 or 1 times the coefficient out there, NaN for NaN, and nowhere anything else."""
    logits, ids = volume()
    num_cells = len(FAR_OUT) + 2
    features = ("prob", "nll_pos", "nll_neg")
    grad_sums = torch.linspace(0.5, 1.5, num_cells * 3).view(1, 1, num_cells, 3)
    grad = backend.segment_stats_backward(grad_sums, logits, ids, None, features, "sigmoid", 2.0, "class")
    x, g = logits.double(), grad_sums.double()[0, 0][ids.long()]
    p = torch.sigmoid(x)
    truth = g[..., 0] * p * torch.sigmoid(-x) - g[..., 1] * torch.sigmoid(-x) + g[..., 2] * p
    assert torch.equal(grad.isnan(), truth.isnan())
    assert float((grad - truth).nan_to_num().abs().max()) < 1e-6


@pytest.mark.parametrize("value", [1e4, -1e4, math.inf, -math.inf, math.nan])
def test_a_whole_volume_of_one_such_logit(backend, value):  # noqa: F811
    logits, ids = torch.full((1, 1, 32, 32, 64), value), torch.zeros(1, 1, 32, 32, 64, dtype=torch.int8)
    features = ("prob", "nll_pos", "nll_neg")
    _, sums = backend.segment_stats_forward(logits, ids, None, 1, features, "sigmoid", 2.0, "class")
    _, truth = expected(logits, ids, 1)
    for actual, exact in zip(sums.flatten().tolist(), truth[0, [0, 2, 3]].tolist(), strict=True):
        assert (math.isnan(actual) and math.isnan(exact)) or math.isclose(actual, exact, rel_tol=1e-6)


# -------------------------------------------------------------------------------------- more voxels than int32 counts

needs_native = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))


def like_2_31_voxels_of_1e4(module: ModuleType, dtype: torch.dtype) -> tuple[float, float, int]:
    """Sums of 2^24 voxels of 128 times as much, in many slabs, and of a lone millionth; and the truth of the first.

    In float64 a sum of multiples of `each` is exact up to 2^53. What is added up in float32 is rounded: the number of
    blocks is odd, and their sums have more than ten bits.
    """
    voxels, each = 2**24 - 512 * 3 - 77, 128 * 9999
    logits, ids = torch.full((1, 1, voxels), -each, dtype=dtype), torch.zeros(1, 1, voxels, dtype=torch.int8)
    logits[..., -1], ids[..., -1] = math.log(1e6 - 1), 1
    arguments = (None, 2, ("prob", "nll_pos"), "sigmoid", 2.0, "class")
    counts, sums = module.segment_stats_forward(logits, ids, *arguments)
    assert counts.tolist() == [[[voxels - 1, 1]]]
    total = (voxels - 1) * each
    assert total > 0.99 * 2**31 * 9999
    return sums[0, 0, 0, 1].item(), sums[0, 0, 1, 1].item(), total


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_native_table_adds_what_2_31_voxels_of_1e4_would_give(dtype):
    """To the last bit: above a block of 512 voxels all sums are in float64. Any other 2^22 blocks are off by 2^22 times
    2^-53 at most, 5e-10.
    """
    found, alone, total = like_2_31_voxels_of_1e4(native, dtype)
    assert found == torch.tensor(total, dtype=torch.float64).to(dtype).item()
    assert alone == pytest.approx(1e-6, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_reference_adds_what_2_31_voxels_of_1e4_would_give(dtype):
    found, alone, total = like_2_31_voxels_of_1e4(reference, dtype)
    assert found == pytest.approx(total, rel=1e-6)
    assert alone == pytest.approx(1e-6, rel=1e-6)


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="pages that nobody has written must not take memory")
def test_the_native_table_counts_more_voxels_than_int32():
    """They are really there, but for their memory: zeros of which only the last ones are written."""
    voxels = 2**31 + 12_345
    try:
        logits = torch.from_numpy(np.zeros(voxels, np.int16)).view(torch.bfloat16).view(1, 1, voxels)
        ids = torch.from_numpy(np.zeros(voxels, np.int8)).view(1, 1, voxels)
    except MemoryError:
        pytest.skip("no address space for 6 GB")
    logits[..., -3:], ids[..., -3:] = 16.0, 1
    counts, sums = native.segment_stats_forward(logits, ids, None, 2, ("prob", "nll_pos"), "sigmoid", 2.0, "class")
    assert counts.tolist() == [[[voxels - 3, 3]]]
    truth = [0.5 * (voxels - 3), math.log(2) * (voxels - 3), 3 / (1 + math.exp(-16)), 3 * math.log1p(math.exp(-16))]
    assert sums.flatten().tolist() == pytest.approx(truth, rel=1e-6, abs=0)


# The finish. Cells have (count, prob, nll_pos, nll_neg): a background and a giant of 2^31 voxels each, a blob of one
# voxel, and one that is spoiled.
MANY = 2**31 + 5
RIGHT, WRONG = (MANY, 1e-20 * MANY, 46.0 * MANY, 1e-20 * MANY), (MANY, 1.0 * MANY, 0.0, 1e4 * MANY)
GIANT, LONE, EMPTY = (MANY, 1e-20 * MANY, 1e4 * MANY, 1e-20 * MANY), (1, 1 - 1e-6, 1e-6, 13.8), (0, 0.0, 0.0, 0.0)
SPOILED = {
    "nothing": (1, 0.25, 1.4, 0.3), "infinity": (1, 0.0, math.inf, 0.0), "nan": (1, math.nan, math.nan, math.nan)
}  # fmt: skip
IN_ZONES = (EMPTY, EMPTY, WRONG, GIANT, (3, 3e-20, 138.0, 3e-20), LONE, RIGHT)  # cells are 2 * zone + bit


def literal(cells: np.ndarray, criterion: str, pos: list[int], neg: list[int]) -> tuple[np.longdouble, np.ndarray]:
    """The criterion on the cells of a domain, and its derivatives with respect to their sums, in long double."""
    slopes = np.zeros((len(cells), 3), np.longdouble)
    voxels, inside = cells[pos + neg, 0].sum(), cells[pos, 0].sum()
    if criterion == "bce":
        slopes[pos, 1] = slopes[neg, 2] = 1 / voxels
        return (cells[pos, 2].sum() + cells[neg, 3].sum()) / voxels, slopes
    above = 2 * cells[pos, 1].sum() + np.longdouble(1e-5)
    below = cells[pos + neg, 1].sum() + inside + np.longdouble(1e-5)
    slopes[pos, 0] = (above - 2 * below) / below**2
    slopes[neg, 0] = above / below**2
    return 1 - above / below, slopes


def sides(masking: str) -> tuple[list[tuple[list[int], list[int]]], tuple[list[int], list[int]]]:
    """Positive and negative cells of each of three instances, and of the main term."""
    if masking == ZONES:
        return [([3], [2]), ([5], [4]), ([7], [6])], ([1, 3, 5, 7], [0, 2, 4, 6])
    blobs = (1, 2, 3)
    others = {k: [j for j in blobs if j != k and masking == "none"] for k in blobs}
    return [([k], [0, *others[k]]) for k in blobs], ([*blobs], [0])


@pytest.mark.parametrize("spoiled", SPOILED)
@pytest.mark.parametrize("background", [RIGHT, WRONG], ids=["right", "wrong"])
@pytest.mark.parametrize("masking", ["exclude", "none", ZONES])
@pytest.mark.parametrize("criterion", ["bce", "dice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("module", [finish, pytest.param(native, marks=needs_native)], ids=["reference", "native"])
def test_the_finish_of_2_31_voxels(module: ModuleType, dtype, criterion, masking, background, spoiled):
    """A millionth is neither lost beside 2e13 nor is anything spoiled but what reads the spoiled cell."""
    check_finish_of_2_31_voxels(module, dtype, criterion, masking, background, spoiled)


def check_finish_of_2_31_voxels(
    module: Any, dtype: torch.dtype, criterion: str, masking: str, background: tuple, spoiled: str, unit: float = 0.0
) -> None:
    """``unit``: what the sums are multiples of, where their table is made of integers."""
    has_target = masking == ZONES
    table = [*IN_ZONES, SPOILED[spoiled]] if has_target else [background, GIANT, LONE, SPOILED[spoiled]]
    counts = torch.tensor([[[int(cell[0]) for cell in table]]])
    sums = torch.tensor([[[cell[1:] for cell in table]]], dtype=dtype)
    if unit:
        sums = torch.where(sums < 1e6, (sums / unit).round() * unit, sums)
    cells = np.concatenate([counts[0, 0, :, None].numpy(), sums[0, 0].double().numpy()], 1).astype(np.longdouble)
    instances, whole = sides(masking)
    form = getattr(criteria, criterion)()
    features = ("prob", "nll_pos", "nll_neg")

    def check(actual: Tensor, truth: list, what: str, absolute: float = 0.0) -> None:
        relative = 1e-12 if dtype == torch.float64 else 1e-6
        for number, exact in zip(actual.flatten().tolist(), truth, strict=True):
            same = math.isnan(number) and np.isnan(exact)
            assert same or math.isclose(number, exact, rel_tol=relative, abs_tol=absolute), f"{what}: {number}, {exact}"

    with np.errstate(invalid="ignore"):
        parts = [literal(cells, criterion, *domain) for domain in instances]
        main = literal(cells, criterion, *whole)
        weights = (0.5, 0.75, 1.0)
        of_instances = sum(weight * part[1] for weight, part in zip(weights, parts, strict=True))
        mean = np.longdouble(0.7) * main[0] + np.longdouble(1.3) * sum(part[0] for part in parts) / 3
        of_mean = np.longdouble(0.7) * main[1] + np.longdouble(1.3) * sum(part[1] for part in parts) / 3
    rounding = 4 * torch.finfo(dtype).eps if criterion == "dice" else 0.0  # of 1 - ratio
    spec = spec_of(0.0 * form, form, "instances", masking)  # as it is asked for
    value, saved = module.finish(counts, sums, features, has_target, spec)
    check(value, [part[0] for part in parts], "losses of instances", rounding)
    grad = torch.tensor([[weights]], dtype=dtype)
    gradient = module.finish_backward(grad, counts, saved, features, has_target, spec)
    check(gradient, list(of_instances.flatten()), "their gradient")
    spec = spec_of(form, form, "mean", masking)
    value, saved = module.finish(counts, sums, features, has_target, spec)
    check(value, [mean], "loss", rounding)
    gradient = module.finish_backward(torch.ones((), dtype=dtype), counts, saved, features, has_target, spec)
    check(gradient, list(of_mean.flatten()), "its gradient")
