"""The oracle against values worked out by hand, against torch, scipy and MONAI: it is trusted by every other test."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from . import oracle, scenes
from .tolerances import assert_fp64

LOG2 = math.log(2.0)
EXACT_DICE = ((1.0, "dice", {"smooth_nr": 0.0, "smooth_dr": 0.0}),)
EXACT_JACCARD = ((1.0, "jaccard", {"smooth_nr": 0.0, "smooth_dr": 0.0}),)
EXACT_TVERSKY = ((1.0, "tversky", {"alpha": 0.3, "beta": 0.7, "smooth_nr": 0.0, "smooth_dr": 0.0}),)
BCE = ((1.0, "bce", {}),)


def losses(scene: scenes.Scene, criterion, **options):
    return oracle.losses(scene.logits, scene.target, scene.instances, criterion=criterion, **scene.options, **options)


@pytest.mark.parametrize("masking", scenes.MASKINGS)
def test_halves(masking):
    dice, bce = losses(scenes.HALVES, EXACT_DICE, masking=masking), losses(scenes.HALVES, BCE, masking=masking)
    assert float(dice.main_mean()) == pytest.approx(scenes.HALVES_MAIN_DICE, abs=1e-15)
    assert float(dice.blob_mean()) == pytest.approx(scenes.HALVES_DICE[masking], abs=1e-15)
    assert float(bce.main_mean()) == pytest.approx(LOG2, abs=1e-15)
    assert float(bce.blob_mean()) == pytest.approx(scenes.HALVES_BCE_IN_LOG2[masking] * LOG2, abs=1e-15)


def test_halves_gradient():
    logits = scenes.HALVES.logits.clone().requires_grad_()
    oracle.losses(logits, None, scenes.HALVES.instances, criterion=EXACT_DICE).main_mean().backward()
    assert logits.grad.flatten().tolist() == pytest.approx(scenes.HALVES_MAIN_DICE_GRADIENT, abs=1e-15)


def test_quarters():
    dice = losses(scenes.QUARTERS, EXACT_DICE)
    assert float(dice.main_mean()) == pytest.approx(scenes.QUARTERS_MAIN_DICE, abs=1e-15)
    assert {key: float(v) for key, v in dice.instances.items()} == {
        (0, 0, 1): pytest.approx(scenes.QUARTERS_BLOB_DICE, abs=1e-15),
        (0, 0, 2): pytest.approx(scenes.QUARTERS_BLOB_DICE, abs=1e-15),
    }
    jaccard, tversky, bce = (losses(scenes.QUARTERS, c) for c in (EXACT_JACCARD, EXACT_TVERSKY, BCE))
    assert float(jaccard.blob_mean()) == pytest.approx(scenes.QUARTERS_BLOB_JACCARD, abs=1e-15)
    assert float(tversky.blob_mean()) == pytest.approx(scenes.QUARTERS_BLOB_TVERSKY, abs=1e-15)
    assert float(bce.blob_mean()) == pytest.approx((3 * math.log(4 / 3) + LOG2) / 4, abs=1e-15)
    assert float(bce.main_mean()) == pytest.approx((2 * math.log(4 / 3) + 2 * math.log(4) + LOG2) / 5, abs=1e-15)


def test_pairs_without_blobs_are_skipped_in_the_blob_term_and_kept_in_the_main_term():
    scene = scenes.scene(1, 2, "empty_sample")
    found = losses(scene, EXACT_DICE)
    assert set(found.blob()) == {(0, 0), (0, 1)}
    assert set(found.main) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    blob = [torch.stack([v for (_, c, _), v in found.instances.items() if c == channel]).mean() for channel in (0, 1)]
    assert_fp64(found.blob_mean(), (blob[0] + blob[1]) / 2)


def test_bce_is_torchs():
    x, y = scenes.random_logits((1, 50), scale=8.0), scenes.random_logits((50,), seed=1) > 0
    prediction = oracle.predict(x, 0, "sigmoid")
    assert_fp64(oracle.bce(prediction, y), F.binary_cross_entropy_with_logits(x[0], y.double()))
    prediction = oracle.predict(torch.sigmoid(x), 0, "none")
    assert_fp64(oracle.bce(prediction, y), F.binary_cross_entropy(torch.sigmoid(x[0]), y.double()))


def test_cross_entropy_of_two_channels_is_torchs():
    x, y = scenes.random_logits((2, 50), scale=8.0), scenes.random_logits((50,), seed=1) > 0
    expected = F.cross_entropy(x.T, y.long())
    assert_fp64(oracle.PLAIN_FORMULAS["cross_entropy"](oracle.predict(x, 1, "softmax"), y), expected)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_the_logarithms_are_those_of_the_probabilities(activation):
    x = scenes.random_logits((3, 200))
    for c in range(3):
        prediction = oracle.predict(x, c, activation)
        assert_fp64(prediction.p + prediction.q, torch.ones(200, dtype=torch.float64))
        assert_fp64(prediction.log_p.exp(), prediction.p)
        assert_fp64(prediction.log_q.exp(), prediction.q)


def test_criteria_are_monais():
    losses = import_module("monai.losses")
    x, y = scenes.random_logits((1, 1, 60)), (scenes.random_logits((1, 1, 60), seed=1) > 0).double()
    cases = [
        (losses.DiceLoss(sigmoid=True), "dice", {}),
        (losses.DiceLoss(sigmoid=True, squared_pred=True), "dice", {"squared": True}),
        (losses.DiceLoss(sigmoid=True, jaccard=True), "jaccard", {}),
        (losses.TverskyLoss(sigmoid=True, alpha=0.3, beta=0.7), "tversky", {"alpha": 0.3, "beta": 0.7}),
    ]
    for theirs, name, options in cases:
        ours = oracle.PLAIN_FORMULAS[name](oracle.predict(x[0], 0, "sigmoid"), y.flatten() == 1, **options)
        assert_fp64(ours, theirs(x, y), f"{name} {options}")
    # MONAI's FocalLoss computes in fp32.
    for gamma, alpha in ((2.0, None), (1.5, 0.25)):
        ours = oracle.focal(oracle.predict(x[0], 0, "sigmoid"), y.flatten() == 1, gamma, alpha)
        assert float(ours) == pytest.approx(float(losses.FocalLoss(gamma=gamma, alpha=alpha)(x, y)), rel=1e-6)


@pytest.mark.parametrize(("dim", "connectivity"), [(1, 26), (2, 4), (2, 8), (2, 26), (3, 6), (3, 18), (3, 26)])
def test_components_are_scipys(dim, connectivity):
    order = {4: 1, 6: 1, 8: 2, 18: 2, 26: dim}[connectivity]
    shape = {1: (40,), 2: (9, 11), 3: (5, 6, 7)}[dim]
    for seed in range(5):
        mask = scenes.random_logits(shape, seed) > 1.0
        theirs, _ = ndimage.label(mask.numpy(), ndimage.generate_binary_structure(dim, order))
        assert torch.equal(oracle.connected_components(mask, connectivity), torch.from_numpy(theirs).long())


def test_drawings():
    assert scenes.draw("1.-?").tolist() == [1, 0, -1, scenes.IGNORE]
    assert scenes.draw("1. .a").tolist() == [[1, 0], [0, 10]]
    assert scenes.draw("1. / .2").tolist() == [[[1, 0]], [[0, 2]]]
    assert [scenes.draw(scenes.DRAWINGS[d][0]).shape for d in scenes.DIMS] == [(13,), (5, 7), (3, 4, 5)]
    for dim in scenes.DIMS:
        assert len({scenes.draw(text).shape for text in scenes.DRAWINGS[dim]}) == 1


def test_scenes_have_the_property_they_are_named_for():
    for dim in scenes.DIMS:
        for channels in scenes.CHANNELS:
            drawn = {p: scenes.paint(dim, channels, p) for p in scenes.PROPERTIES}
            ids = {p: instances for p, (_, instances) in drawn.items() if instances is not None}
            target = {p: t for p, (t, _) in drawn.items() if t is not None}
            assert (ids["ignored"][1] < 0).any() and (ids["ignored"][0] > 0).any()
            assert (ids["ignored_sample"][1] < 0).all() and (ids["all_ignored"] < 0).all()
            assert (ids["empty_sample"][1] == 0).all() and (ids["no_instances"] == 0).all()
            assert all((ids["one_voxel"][0, 0] == k).sum() == 1 for k in (1, 2))
            assert 9 in ids["gaps"] and 1 not in ids["gaps"]
            assert ((ids["disagree"] > 0) & (target["disagree"] == 0)).any()
            assert ((ids["disagree"] == 0) & (target["disagree"] == 1)).any()
            assert (ids["giant"][0] == 1).all()
            assert ids["salt_and_pepper"].max() >= 5
            assert (target["ignore_index"] == scenes.IGNORE).any() and (ids["ignore_index"] >= 0).all()


def test_table_of_sums_by_hand():
    logits = torch.tensor([[[0.0, 0.0, math.log(3.0), -math.log(3.0), 5.0]]], dtype=torch.float64)
    cells = torch.tensor([[[0, 2, 2, 0, -1]]])
    counts, sums = oracle.segment_stats(logits, cells, 3, ("prob", "prob_sq", "nll_pos", "nll_neg"))
    assert counts.tolist() == [[[2, 0, 2]]]
    log4, log43 = math.log(4.0), math.log(4 / 3)
    expected = [
        [0.5 + 0.25, 0.25 + 0.0625, LOG2 + log4, LOG2 + log43],
        [0.0, 0.0, 0.0, 0.0],
        [0.5 + 0.75, 0.25 + 0.5625, LOG2 + log43, LOG2 + log4],
    ]
    assert_fp64(sums, torch.tensor([[expected]], dtype=torch.float64))


def test_final_cells_by_hand():
    logits = torch.zeros(1, 2, 4)
    ids, classes = torch.tensor([[[0, 3, 1, -1]]]), torch.tensor([[[0, 1, 0, 1]]])
    assert oracle.cells_of(logits, ids, None).tolist() == [[[0, 3, 1, -1]] * 2]
    assert oracle.cells_of(logits, ids, classes).tolist() == [[[1, 6, 3, -1], [0, 7, 2, -1]]]
    assert oracle.cells_of(logits, ids, classes, "background").tolist() == [[[1, 0, 1, -1], [0, 7, 2, -1]]]
    assert oracle.cells_of(logits, ids, classes, "unused").tolist() == [[[-1, -1, -1, -1], [0, 7, 2, -1]]]
    hot = scenes.one_hot(classes, 2)
    assert oracle.cells_of(logits, ids, hot).tolist() == [[[1, 6, 3, -1], [0, 7, 2, -1]]]
