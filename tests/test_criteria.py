"""Criteria: hand-computed values, MONAI's and PyTorch's losses through the main term, identities."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blobloss_fast import blob_loss, blob_loss_instances, blob_loss_terms, criteria

from .tolerances import FLOOR, FP64, assert_fp64, error, relative_to_largest

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        import monai.losses as monai_losses
except ImportError:  # an extra; PyTorch's own losses and the hand-computed values are still compared
    monai_losses = None

needs_monai = pytest.mark.skipif(
    monai_losses is None, reason="MONAI is not installed: not compared with MONAI's losses"
)

SPATIAL = {1: (23,), 2: (7, 9), 3: (5, 4, 6)}


def noise(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_mask(*shape: int, seed: int = 1, density: float = 0.3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def main_term(criterion: criteria.Criterion, target: Tensor, **options) -> Callable[[Tensor], Tensor]:
    return lambda x: blob_loss(x, target, criterion=criterion, blob_weight=0.0, **options)


def value_and_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def check(ours: Callable[[Tensor], Tensor], truth: Callable[[Tensor], Tensor], logits: Tensor, bound=FP64) -> None:
    (value, gradient), (true_value, true_gradient) = (value_and_gradient(f, logits) for f in (ours, truth))
    assert error(value, true_value) <= bound, (value, true_value)
    assert true_gradient.abs().max() > 0, "a comparison with a gradient of 0 shows nothing"
    assert relative_to_largest(gradient, true_gradient) <= bound


# -------------------------------------------------------------------------------------- values by hand

# Four voxels, the first two positive: p = 1/2, 1/4 | 1/2, 0 -> TP 3/4, FP 1/2, FN 5/4, sum p^2 = 1/4 + 1/16 + 1/4.
PROBABILITIES = torch.tensor([[[0.5, 0.25, 0.5, 0.0]]], dtype=torch.float64)
POSITIVE = torch.tensor([[[1, 1, 0, 0]]])
LN2 = math.log(2.0)


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        (criteria.dice(smooth_nr=0, smooth_dr=0), 1 - 1.5 / 3.25),
        (criteria.dice(smooth_nr=0.5, smooth_dr=0.75), 1 - 2.0 / 4.0),
        (criteria.dice(squared=True, smooth_nr=0, smooth_dr=0), 1 - 1.5 / (0.5625 + 2)),
        (criteria.dice(squared=True, smooth_nr=1, smooth_dr=2), 1 - 2.5 / (0.5625 + 4)),
        (criteria.jaccard(smooth_nr=0, smooth_dr=0), 1 - 0.75 / 2.5),
        (criteria.jaccard(smooth_nr=1, smooth_dr=2), 1 - (1.5 + 1) / (5 + 2)),
        (criteria.tversky(smooth_nr=0, smooth_dr=0), 1 - 0.75 / (0.75 + 0.25 + 0.625)),
        # alpha weighs false positives, beta false negatives
        (criteria.tversky(1, 0, smooth_nr=0, smooth_dr=0), 1 - 0.75 / 1.25),
        (criteria.tversky(0, 1, smooth_nr=0, smooth_dr=0), 1 - 0.75 / 2.0),
        (criteria.tversky(0.25, 2, smooth_nr=1, smooth_dr=3), 1 - 1.75 / (0.75 + 0.125 + 2.5 + 3)),
        (criteria.bce(), (LN2 + 2 * LN2 + LN2) / 4),
        (criteria.cross_entropy(), LN2),
        (criteria.focal(), (0.25 * LN2 + 0.5625 * 2 * LN2 + 0.25 * LN2) / 4),
        (criteria.focal(0.0), LN2),
        (criteria.focal(1.0, 0.25), (0.25 * (0.5 * LN2 + 0.75 * 2 * LN2) + 0.75 * 0.5 * LN2) / 4),
        (criteria.focal(1.0, 1.0), (0.5 * LN2 + 0.75 * 2 * LN2) / 4),
        (criteria.focal(1.0, 0.0), 0.5 * LN2 / 4),
    ],
    ids=lambda value: repr(value) if isinstance(value, criteria.Criterion) else "",
)
def test_value_by_hand(criterion, expected):
    """As the main term, and as the blob term of the one instance there is, whose domain is the whole volume."""
    main, blob = blob_loss_terms(PROBABILITIES, POSITIVE, criterion=criterion, activation="none")
    assert_fp64(main, torch.tensor(expected, dtype=torch.float64))
    assert_fp64(blob, main)


def test_blob_terms_by_hand():
    """Two instances, p = 1/2 everywhere, six voxels: each instance sees itself and the three background voxels."""
    logits, ids = torch.zeros(1, 1, 6, dtype=torch.float64), torch.tensor([[[1, 1, 0, 0, 0, 2]]])
    losses, _ = blob_loss_instances(logits, instances=ids, criterion=criteria.dice(smooth_nr=0, smooth_dr=0))
    assert_fp64(losses[0, 0], torch.tensor([1 - 2.0 / (2.5 + 2), 1 - 1.0 / (2.0 + 1)], dtype=torch.float64))
    losses, _ = blob_loss_instances(logits, instances=ids, criterion=criteria.focal(1.0, 0.75))
    expected = [(2 * 0.75 + 3 * 0.25) * 0.5 * LN2 / 5, (0.75 + 3 * 0.25) * 0.5 * LN2 / 4]
    assert_fp64(losses[0, 0], torch.tensor(expected, dtype=torch.float64))


# -------------------------------------------------------------------------------------- MONAI's losses

OVERLAP = {
    "dice": (criteria.dice(), "DiceLoss", {}),
    "dice_smooth": (
        criteria.dice(smooth_nr=0.7, smooth_dr=1.3),
        "DiceLoss",
        {"smooth_nr": 0.7, "smooth_dr": 1.3},
    ),
    "dice_unsmoothed_numerator": (criteria.dice(smooth_nr=0.0), "DiceLoss", {"smooth_nr": 0.0}),
    "dice_squared": (criteria.dice(squared=True), "DiceLoss", {"squared_pred": True}),
    "dice_squared_smooth": (
        criteria.dice(True, 0.2, 0.4),
        "DiceLoss",
        {"squared_pred": True, "smooth_nr": 0.2, "smooth_dr": 0.4},
    ),
    "jaccard": (criteria.jaccard(), "DiceLoss", {"jaccard": True}),
    "jaccard_smooth": (
        criteria.jaccard(0.7, 1.3),
        "DiceLoss",
        {"jaccard": True, "smooth_nr": 0.7, "smooth_dr": 1.3},
    ),
    "tversky": (criteria.tversky(), "TverskyLoss", {}),
    "tversky_asymmetric": (criteria.tversky(0.3, 0.7), "TverskyLoss", {"alpha": 0.3, "beta": 0.7}),
    "tversky_smooth": (
        criteria.tversky(1.5, 0.2, 0.7, 1.3),
        "TverskyLoss",
        {"alpha": 1.5, "beta": 0.2, "smooth_nr": 0.7, "smooth_dr": 1.3},
    ),
}


@needs_monai
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OVERLAP)
def test_overlap_is_monais(name, channels, dims):
    criterion, theirs, options = OVERLAP[name]
    target = random_mask(2, channels, *SPATIAL[dims])
    target[1, 0] = False  # an empty sample: only the smoothing is left of the numerator
    truth = getattr(monai_losses, theirs)(sigmoid=True, **options)
    check(main_term(criterion, target), lambda x: truth(x, target.double()), noise(2, channels, *SPATIAL[dims]))


@needs_monai
@pytest.mark.parametrize("include_background", [False, True])
@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("name", ["dice_smooth", "dice_squared", "jaccard", "tversky_asymmetric"])
def test_overlap_with_softmax_is_monais(name, channels, include_background):
    criterion, theirs, options = OVERLAP[name]
    classes = torch.randint(0, channels, (2, 1, 5, 4, 6), generator=torch.Generator().manual_seed(2))
    truth = getattr(monai_losses, theirs)(softmax=True, include_background=include_background, **options)
    one_hot = F.one_hot(classes[:, 0], channels).movedim(-1, 1).double()  # MONAI's own one-hot is fp32, and rounds
    ours = main_term(criterion, classes, activation="softmax", include_background=include_background)
    check(ours, lambda x: truth(x, one_hot), noise(2, channels, 5, 4, 6))


@needs_monai
@pytest.mark.parametrize("name", ["dice", "dice_squared", "jaccard", "tversky_asymmetric"])
def test_overlap_of_probabilities_is_monais(name):
    criterion, theirs, options = OVERLAP[name]
    target, p = random_mask(2, 2, 5, 4, 6), torch.sigmoid(noise(2, 2, 5, 4, 6))
    truth = getattr(monai_losses, theirs)(**options)
    check(main_term(criterion, target, activation="none"), lambda x: truth(x, target.double()), p)


@needs_monai
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("gamma", "alpha"), [(2.0, None), (0.0, None), (0.5, None), (3.0, 0.25), (1.0, 1.0), (2.0, 0.0)]
)
def test_focal_is_monais(gamma, alpha, channels):
    """MONAI's FocalLoss computes in fp32 whatever it is given, so fp32's floor is the bound."""
    target, truth = random_mask(2, channels, 5, 4, 6), monai_losses.FocalLoss(gamma=gamma, alpha=alpha)
    ours = main_term(criteria.focal(gamma, alpha), target)
    check(ours, lambda x: truth(x, target.double()), noise(2, channels, 5, 4, 6), bound=FLOOR)


@needs_monai
def test_compounds_are_monais():
    logits, target = noise(2, 1, 5, 4, 6), random_mask(2, 1, 5, 4, 6)
    truth = monai_losses.DiceCELoss(sigmoid=True, lambda_dice=0.3, lambda_ce=0.7)
    check(main_term(0.3 * criteria.dice() + 0.7 * criteria.bce(), target), lambda x: truth(x, target.double()), logits)
    truth = monai_losses.DiceFocalLoss(sigmoid=True, gamma=1.5, alpha=0.25, lambda_focal=0.5)
    ours = main_term(criteria.dice() + 0.5 * criteria.focal(1.5, 0.25), target)
    check(ours, lambda x: truth(x, target.double()), logits, bound=FLOOR)


# ------------------------------------------------------------------------------------ PyTorch's losses


@pytest.mark.parametrize("scale", [3.0, 30.0, 300.0])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("criterion", [criteria.bce(), criteria.cross_entropy(), criteria.focal(0.0)], ids=repr)
def test_bce_is_pytorchs(criterion, channels, scale):
    target = random_mask(2, channels, 5, 4, 6)
    truth = torch.nn.BCEWithLogitsLoss()
    logits = noise(2, channels, 5, 4, 6, scale=scale)
    check(main_term(criterion, target), lambda x: truth(x, target.double()), logits)


@pytest.mark.parametrize("include_background", [False, True])
def test_cross_entropy_of_two_channels_is_pytorchs(include_background):
    """Of the voxel's own class: the same number from either channel's row, so the background changes nothing."""
    classes = random_mask(2, 1, 5, 4, 6).long()
    for criterion in (criteria.cross_entropy(), criteria.bce()):
        ours = main_term(criterion, classes, activation="softmax", include_background=include_background)
        check(ours, lambda x: F.cross_entropy(x, classes[:, 0]), noise(2, 2, 5, 4, 6))


def test_bce_with_softmax_is_one_vs_rest():
    classes = torch.randint(0, 4, (2, 1, 5, 4, 6), generator=torch.Generator().manual_seed(2))
    one_hot = F.one_hot(classes[:, 0], 4).movedim(-1, 1).double()

    def truth(x: Tensor) -> Tensor:
        log_p = F.log_softmax(x, 1)
        log_q = torch.stack([torch.logsumexp(log_p[:, [j for j in range(4) if j != c]], 1) for c in range(4)], 1)
        return -torch.where(one_hot > 0, log_p, log_q)[:, 1:].mean()

    check(main_term(criteria.bce(), classes, activation="softmax"), truth, noise(2, 4, 5, 4, 6))


def test_bce_of_probabilities_is_pytorchs():
    """Also where p is exactly 0 or 1: the logarithm is clamped at -100, and the gradient is PyTorch's own there."""
    target, p = random_mask(2, 1, 5, 4, 6), torch.sigmoid(noise(2, 1, 5, 4, 6))
    p[0, 0, 0, 0, :4] = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    target[0, 0, 0, 0, :4] = torch.tensor([False, False, True, True])
    value, gradient = value_and_gradient(main_term(criteria.bce(), target, activation="none"), p)
    true_value, true_gradient = value_and_gradient(lambda x: F.binary_cross_entropy(x, target.double()), p)
    assert_fp64(value, true_value)
    inside = (p > 0) & (p < 1)
    assert relative_to_largest(gradient[inside], true_gradient[inside]) <= FP64
    # PyTorch divides by the fp32 number next to 1e-12 there, so its own gradient is off by 4e-9
    assert (gradient[~inside] / true_gradient[~inside].where(gradient[~inside] != 0, 1)).tolist() == pytest.approx(
        [0.0, 1.0, 1.0, 0.0], abs=1e-8
    )
    assert true_gradient[0, 0, 0, 0, [0, 3]].tolist() == [0.0, 0.0]


# ------------------------------------------------------------------------------------------ identities


@pytest.mark.parametrize("masking", ["exclude", "zero_prob", "zero_logit", "none"])
@pytest.mark.parametrize(
    ("left", "right"),
    [
        (criteria.dice(smooth_nr=0.2, smooth_dr=0.6), criteria.tversky(0.5, 0.5, 0.1, 0.3)),
        (criteria.jaccard(smooth_nr=0.2, smooth_dr=0.6), criteria.tversky(1, 1, 0.1, 0.3)),
        (criteria.focal(0.0), criteria.bce()),
        (2 * criteria.focal(0.0, 0.5), criteria.bce()),
        (criteria.focal(1.5, 0.3) + criteria.focal(1.5, 0.7), criteria.focal(1.5)),
        (criteria.cross_entropy(), criteria.bce()),
    ],
    ids=repr,
)
def test_two_names_of_one_loss(left, right, masking):
    logits, target = noise(2, 2, 7, 9), random_mask(2, 2, 7, 9)
    check(*(lambda x, c=c: blob_loss(x, target, criterion=c, masking=masking) for c in (left, right)), logits)


def test_squared_dice_of_hard_probabilities_is_dice():
    target, hard = random_mask(2, 2, 7, 9), random_mask(2, 2, 7, 9, seed=5).double()
    plain, squared = (
        blob_loss(hard, target, criterion=c, activation="none") for c in (criteria.dice(), criteria.dice(squared=True))
    )
    assert_fp64(squared, plain)


@pytest.mark.parametrize(("smooth_nr", "smooth_dr"), [(0.0, 1e-5), (1e-5, 1e-5), (1.0, 1.0), (1.0, 50.0)])
@pytest.mark.parametrize(
    ("make", "options", "predicted"),
    [(criteria.dice, {}, 2.0), (criteria.dice, {"squared": True}, 1.0), (criteria.jaccard, {}, 4.0)],
)
def test_smoothing_of_an_empty_target(make, options, predicted, smooth_nr, smooth_dr):
    """Nothing to find: 1 - smooth_nr / (what is predicted + smooth_dr), the union counting twice in Jaccard."""
    p, criterion = torch.full((1, 1, 4), 0.5).double(), make(**options, smooth_nr=smooth_nr, smooth_dr=smooth_dr)
    loss = blob_loss(p, torch.zeros(1, 1, 4), criterion=criterion, activation="none")
    assert_fp64(loss, torch.tensor(1 - smooth_nr / (predicted + smooth_dr), dtype=torch.float64))
