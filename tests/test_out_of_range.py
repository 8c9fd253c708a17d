"""Logits far out, infinite and NaN in a large volume: on no backend does a wrong finite number come out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

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
