"""Sums of equal terms, which are all rounded the same way: the worst case of a sum in fp32."""

from __future__ import annotations

import pytest
import torch

from blobloss_fast import blob_loss, criteria, segment_stats
from blobloss_fast.kernels.layout import FEATURES

from . import oracle

pytestmark = pytest.mark.usefixtures("cpu_backend")


@pytest.mark.parametrize("cell", [0, 1])
@pytest.mark.parametrize("logit", [-8.0, -3.0, 0.0, 2.3])
def test_a_large_cell_of_equal_logits_is_summed_exactly(logit, cell):
    """Equal terms are all rounded the same way: the worst case, for the background and for a giant instance."""
    logits = torch.full((1, 1, 128, 128, 128), logit)
    ids = torch.full(logits.shape, cell, dtype=torch.int32)
    sums = segment_stats(logits, ids, 2, FEATURES)[1][0, 0, cell].double()
    prediction = oracle.predict(torch.full((1, 1), logit, dtype=torch.float64), 0, "sigmoid")
    expected = torch.cat([oracle.feature(name, prediction, 2.0).flatten() for name in FEATURES]) * 128**3
    assert ((sums - expected) / expected).abs().max() <= 1e-6


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_the_background_of_a_volume_of_256_cubed(spread):
    """16.8 million voxels: one fp32 accumulator would be off by 4 to 20 % here."""
    logits = torch.full((1, 1, 256, 256, 256), -2.3)
    if spread:
        logits += spread * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(logits.shape, dtype=torch.int32)
    ids[..., 40:50, 60:70, 80:90] = 1
    counts, sums = segment_stats(logits, ids, 2, ("prob", "nll_neg"))
    background = ids == 0
    assert counts.tolist() == [[[256**3 - 1000, 1000]]]
    for feature, found in zip((torch.sigmoid, torch.nn.functional.softplus), sums[0, 0, 0].tolist(), strict=True):
        expected = feature(logits.double())[background].sum().item()
        assert abs(found - expected) <= 1e-6 * expected


@pytest.mark.parametrize("criterion", [criteria.dice(), criteria.bce()], ids=str)
@pytest.mark.parametrize("logit", [-6.1, -3.3, 0.2])
@pytest.mark.parametrize(
    ("shape", "columns"),
    [((2048, 7), slice(1, 7)), ((42, 42, 14), slice(1, 7)), ((28, 28, 28), slice(8, 14)), ((56, 56, 56), slice(8, 14))],
    ids=str,
)
def test_equal_logits_in_a_block_of_columns(shape, columns, logit, criterion):
    """Equal terms are all rounded the same way, and a block of columns is what a strided sample would miss."""
    logits = torch.full((1, 1, *shape), logit)
    ids = torch.zeros(logits.shape, dtype=torch.int32)
    ids[..., columns] = 1
    p, y = logits.sigmoid(), (ids > 0).float()
    if criterion == criteria.bce():
        plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, y)
    else:
        plain = 1 - (2 * (p * y).sum() + 1e-5) / (p.sum() + y.sum() + 1e-5)
    truth = blob_loss(logits.double(), instances=ids, criterion=criterion)
    found = blob_loss(logits, instances=ids, criterion=criterion)
    assert abs(found.double() - truth) <= 2 * abs(2 * plain.double() - truth) + 1e-6
