"""Criteria as values: sums and multiples, one focal gamma in all of a loss, repr, and equality."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from blobloss_fast import BlobLoss, blob_loss, blob_loss_instances, blob_loss_terms, criteria

from .test_criteria import noise, random_mask
from .tolerances import assert_fp64

ALL = {
    "dice": criteria.dice(),
    "dice_squared": criteria.dice(squared=True),
    "jaccard": criteria.jaccard(),
    "tversky": criteria.tversky(0.3, 0.7),
    "bce": criteria.bce(),
    "cross_entropy": criteria.cross_entropy(),
    "focal": criteria.focal(2.0),
    "focal_alpha": criteria.focal(2.0, 0.25),
}


# ---------------------------------------------------------------------------------- sums and multiples


def losses_of(criterion: criteria.Criterion, logits: Tensor, target: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Both terms and every instance's loss in one vector, and its gradient under a weight that tells them apart."""
    leaf = logits.detach().clone().requires_grad_()
    terms = blob_loss_terms(leaf, target, criterion=criterion, **options)
    instances = blob_loss_instances(leaf, target, criterion=criterion, **options)[0]
    vector = torch.cat([torch.stack(terms), instances.flatten()])
    weights = torch.linspace(0.5, 1.5, vector.numel(), dtype=vector.dtype)
    (gradient,) = torch.autograd.grad((vector * weights).sum(), leaf)
    return vector.detach(), gradient


def assert_same_loss(criterion: criteria.Criterion, parts: list[tuple[float, criteria.Criterion]], **options) -> None:
    channels = 3 if options.get("activation") == "softmax" else 2
    logits, target = noise(2, channels, 7, 9), random_mask(2, channels, 7, 9)
    if channels == 3:
        target = torch.randint(0, 3, (2, 1, 7, 9), generator=torch.Generator().manual_seed(2))
    vector, gradient = losses_of(criterion, logits, target, **options)
    expected = [losses_of(part, logits, target, **options) for _, part in parts]
    assert_fp64(vector, sum(w * v for (w, _), (v, _) in zip(parts, expected, strict=True)))
    assert_fp64(gradient, sum(w * g for (w, _), (_, g) in zip(parts, expected, strict=True)))
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("masking", ["exclude", "zero_prob", "zero_logit", "none"])
def test_compound_is_the_sum_of_its_parts(masking, activation):
    dice, bce, focal = criteria.dice(), criteria.bce(), criteria.focal(1.5, 0.25)
    options = {"masking": masking, "activation": activation}
    assert_same_loss(dice + 0.5 * bce, [(1.0, dice), (0.5, bce)], **options)
    assert_same_loss(
        0.25 * focal + criteria.tversky(0.3, 0.7) + 3 * dice,
        [(0.25, focal), (1.0, criteria.tversky(0.3, 0.7)), (3.0, dice)],
        **options,
    )


@pytest.mark.parametrize("name", ALL)
def test_multiples(name):
    criterion = ALL[name]
    assert_same_loss(2 * criterion, [(2.0, criterion)])
    assert_same_loss(criterion * 0.125, [(0.125, criterion)])
    assert_same_loss(4 * (0.5 * criterion), [(2.0, criterion)])
    assert_same_loss(criterion + criterion, [(2.0, criterion)])
    assert_same_loss(0 * criterion + criteria.dice(), [(1.0, criteria.dice())])


def test_multiple_of_a_sum_and_order():
    dice, bce, jaccard = criteria.dice(), criteria.bce(), criteria.jaccard()
    assert_same_loss(2 * (dice + bce), [(2.0, dice), (2.0, bce)])
    assert_same_loss((dice + 0.5 * bce) * 3 + jaccard, [(3.0, dice), (1.5, bce), (1.0, jaccard)])
    assert_same_loss(bce + dice, [(1.0, dice + bce)])
    assert_same_loss(dice + (bce + jaccard), [(1.0, (dice + bce) + jaccard)])


def test_main_and_blob_criterion_are_independent():
    logits, target = noise(2, 2, 7, 9), random_mask(2, 2, 7, 9)
    both = BlobLoss(criteria.dice() + criteria.bce(), main_criterion=criteria.tversky(0.2, 0.8)).terms(logits, target)
    assert_fp64(both[0], blob_loss_terms(logits, target, criterion=criteria.tversky(0.2, 0.8))[0])
    assert_fp64(both[1], blob_loss_terms(logits, target, criterion=criteria.dice() + criteria.bce())[1])
    alone = BlobLoss(criteria.dice() + criteria.bce()).terms(logits, target)  # None: the same criterion
    assert_fp64(alone[0], blob_loss_terms(logits, target, criterion=criteria.dice() + criteria.bce())[0])


# ----------------------------------------------------------------------------- one gamma, repr, values


def test_two_gammas_are_refused():
    sharp, flat = criteria.focal(2.0), criteria.focal(1.0, 0.25)
    for conflict in (
        lambda: sharp + flat,
        lambda: (criteria.dice() + sharp) + 0.5 * flat,
        lambda: BlobLoss(sharp, main_criterion=flat),
        lambda: BlobLoss(criteria.dice() + sharp, main_criterion=criteria.bce() + flat),
        lambda: blob_loss(noise(1, 1, 4), random_mask(1, 1, 4), criterion=sharp, main_criterion=flat),
    ):
        with pytest.raises(ValueError, match=r"one focal gamma; got \[1\.0, 2\.0\]"):
            conflict()


def test_one_gamma_on_both_sides():
    """A gamma that only one side has, or both have, is that side's: the other, which is not focal, is not changed."""
    logits, target = noise(2, 1, 7, 9), random_mask(2, 1, 7, 9)
    focal, bce = criteria.focal(3.0, 0.25), criteria.bce()
    alone = {c: blob_loss_terms(logits, target, criterion=c) for c in (focal, bce)}
    for main, blob in ((focal, bce), (bce, focal), (focal, focal)):
        terms = blob_loss_terms(logits, target, criterion=blob, main_criterion=main)
        assert_fp64(terms[0], alone[main][0])
        assert_fp64(terms[1], alone[blob][1])


@pytest.mark.parametrize(
    ("criterion", "text"),
    [
        (criteria.dice(), "dice()"),
        (criteria.dice(squared=True), "dice(squared=True)"),
        (criteria.jaccard(), "jaccard()"),
        (criteria.tversky(0.3, 0.7), "tversky(0.3, 0.7)"),
        (criteria.bce(), "bce()"),
        (criteria.cross_entropy(), "cross_entropy()"),
        (criteria.focal(), "focal(2)"),
        (criteria.focal(1.5, 0.25), "focal(1.5, 0.25)"),
        (criteria.dice() + 0.5 * criteria.bce(), "dice() + 0.5 * bce()"),
        (2 * (criteria.dice() + criteria.bce()), "2 * (dice() + bce())"),
        (criteria.bce() * 2 + criteria.dice(), "2 * bce() + dice()"),
        (criteria.dice(smooth_nr=0, smooth_dr=1.5), "dice(smooth_nr=0, smooth_dr=1.5)"),
        (criteria.tversky(0.3, 0.7, smooth_nr=1), "tversky(0.3, 0.7, smooth_nr=1)"),
        (sum([criteria.dice(), criteria.bce()]), "dice() + bce()"),
    ],
    ids=str,
)
def test_repr_is_what_one_would_write(criterion, text):
    assert repr(criterion) == text
    assert eval(repr(criterion), vars(criteria)) == criterion


def test_nothing_times_a_criterion_is_nothing_also_where_it_is_infinite():
    wrong = torch.tensor([[[-torch.inf, 1.0, 0.5]]])
    mask = torch.tensor([[[1, 0, 0]]])
    assert torch.isinf(blob_loss(wrong, mask, criterion=criteria.dice() + criteria.bce()))
    dice = blob_loss(wrong, mask, criterion=criteria.dice())
    assert torch.isfinite(dice)
    assert blob_loss(wrong, mask, criterion=criteria.dice() + 0 * criteria.bce()) == dice


def test_criterion_is_an_immutable_value():
    dice, bce = criteria.dice(), criteria.bce()
    before = (dice.rows, bce.rows, repr(dice), repr(bce))
    _ = 2 * (dice + 0.5 * bce) + bce * 3
    assert (dice.rows, bce.rows, repr(dice), repr(bce)) == before
    for field in dataclasses.fields(dice):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(dice, field.name, None)
    assert dice == criteria.dice() and hash(dice) == hash(criteria.dice())
    assert len({*ALL.values(), criteria.dice(smooth_nr=1), criteria.focal(1.0), 2 * dice}) == len(ALL) + 3
