"""Blob loss against the literal oracle in fp64: values, gradients, and the parts of the loss."""

from __future__ import annotations

import math

import pytest
import torch

from blobloss_fast import BlobLoss, blob_loss, blob_loss_instances, blob_loss_terms, criteria

from . import oracle, scenes
from .blob_loss_checks import (
    BCE,
    COMPOUND,
    CRITERIA,
    DICE,
    check,
    check_all,
    pair,
    random_grad,
    translated,
    value_and_gradient,
)
from .tolerances import assert_fp64

pytestmark = pytest.mark.usefixtures("cpu_backend")

# ---------------- the matrix


@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
@pytest.mark.parametrize("masking", scenes.MASKINGS)
@pytest.mark.parametrize("name", CRITERIA)
def test_value_and_gradient(name, masking, activation):
    """Every dimension with every property (ignored voxels, empty samples, gaps, ...), C = 1, 2, 3 at each property."""
    every = scenes.telling_scenes(activation)
    if name == "cross_entropy" and activation == "softmax":
        every = [s for s in every if s.logits.shape[1] == 2]
        assert every
    check_all(every, criterion=CRITERIA[name], masking=masking)


@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
@pytest.mark.parametrize("masking", scenes.MASKINGS)
def test_value_and_gradient_of_a_compound_on_every_scene(masking, activation):
    check_all(scenes.every_scene(activation), criterion=COMPOUND, masking=masking)


@pytest.mark.parametrize("masking", scenes.MASKINGS)
def test_softmax_with_the_background_class(masking):
    check_all(scenes.every_scene("softmax"), criterion=CRITERIA["dice+bce"], masking=masking, include_background=True)


@pytest.mark.parametrize("include_background", [False, True])
@pytest.mark.parametrize("prop", scenes.PROPERTIES)
def test_one_hot_and_class_map_are_the_same(prop, include_background):
    for channels in (2, 3):
        for dim in (1, 3):
            scene = scenes.scene(dim, channels, prop, "softmax")
            if scene.target is None:
                continue
            hot = scenes.replace(scene, target=scenes.one_hot(scene.target, channels))
            options = {"criterion": COMPOUND, "include_background": include_background}
            assert_fp64(pair(hot, **options)[0][1], pair(scene, **options)[0][1], scene.name)
            check(hot, **options)


# ---------------- worked out by hand


@pytest.mark.parametrize("masking", scenes.MASKINGS)
def test_halves(masking):
    dice = criteria.dice(smooth_nr=0.0, smooth_dr=0.0)
    logits, ids = scenes.HALVES.logits.clone().requires_grad_(), scenes.HALVES.instances
    main, blob = blob_loss_terms(logits, instances=ids, criterion=dice, masking=masking)
    assert main.item() == pytest.approx(scenes.HALVES_MAIN_DICE, abs=1e-15)
    assert blob.item() == pytest.approx(scenes.HALVES_DICE[masking], abs=1e-15)
    (gradient,) = torch.autograd.grad(main, logits)
    assert gradient.flatten().tolist() == pytest.approx(scenes.HALVES_MAIN_DICE_GRADIENT, abs=1e-15)
    main, blob = blob_loss_terms(logits, instances=ids, criterion=criteria.bce(), masking=masking)
    assert main.item() == pytest.approx(math.log(2), abs=1e-15)
    assert blob.item() == pytest.approx(scenes.HALVES_BCE_IN_LOG2[masking] * math.log(2), abs=1e-15)


def test_quarters():
    scene, none = scenes.QUARTERS, {"smooth_nr": 0.0, "smooth_dr": 0.0}
    labels = (scene.logits, scene.target, scene.instances)
    main, blob = blob_loss_terms(*labels, criterion=criteria.dice(**none))
    assert float(main) == pytest.approx(scenes.QUARTERS_MAIN_DICE, abs=1e-15)
    assert float(blob) == pytest.approx(scenes.QUARTERS_BLOB_DICE, abs=1e-15)
    assert float(blob_loss(*labels, criterion=criteria.dice(**none))) == pytest.approx(100 / 99, abs=1e-15)
    _, blob = blob_loss_terms(*labels, criterion=criteria.jaccard(**none))
    assert float(blob) == pytest.approx(scenes.QUARTERS_BLOB_JACCARD, abs=1e-15)
    _, blob = blob_loss_terms(*labels, criterion=criteria.tversky(0.3, 0.7, **none))
    assert float(blob) == pytest.approx(scenes.QUARTERS_BLOB_TVERSKY, abs=1e-15)
    main, blob = blob_loss_terms(*labels, criterion=criteria.bce())
    assert float(blob) == pytest.approx((3 * math.log(4 / 3) + math.log(2)) / 4, abs=1e-15)
    assert float(main) == pytest.approx((2 * math.log(4 / 3) + 2 * math.log(4) + math.log(2)) / 5, abs=1e-15)
    losses, ids = blob_loss_instances(*labels, criterion=criteria.dice(**none))
    assert ids.tolist() == [[[1, 2]]]
    assert losses.flatten().tolist() == pytest.approx([scenes.QUARTERS_BLOB_DICE] * 2, abs=1e-15)


# ---------------- options


@pytest.mark.parametrize("weights", [(0.3, 1.7), (2.0, 0.0), (0.0, 2.0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_weights_and_reductions(activation, reduction, weights):
    options = {"main_weight": weights[0], "blob_weight": weights[1], "reduction": reduction}
    for prop in ("plain", "ignored_sample", "all_ignored", "empty_sample", "no_instances", "disagree"):
        for channels in scenes.CHANNELS:
            scene = scenes.scene(2, channels, prop, activation)
            check(scene, criterion=CRITERIA["dice+bce"], **options)
            if activation == "softmax":
                check(scene, criterion=CRITERIA["dice+bce"], include_background=True, **options)


@pytest.mark.parametrize("masking", scenes.MASKINGS)
@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_a_main_criterion_of_its_own(activation, masking):
    pairs = [("dice", "bce"), ("bce", "dice"), ("squared_dice", "tversky"), ("focal", "jaccard"), ("dice+bce", "focal")]
    for blob, main in pairs:
        for scene in (scenes.scene(3, 2, "disagree", activation), scenes.scene(2, 1, "plain", activation)):
            options = {"criterion": CRITERIA[blob], "main_criterion": CRITERIA[main], "masking": masking}
            check(scene, main_weight=0.7, **options)


def test_one_loss_has_one_gamma():
    two = {"criterion": criteria.focal(gamma=2.0), "main_criterion": criteria.focal(gamma=1.0)}
    scene = scenes.scene(1, 1, "plain")
    with pytest.raises(ValueError, match="gamma"):
        blob_loss(scene.logits, instances=scene.instances, **two)
    with pytest.raises(ValueError, match="gamma"):
        criteria.focal(gamma=2.0) + criteria.focal(gamma=1.0)


def test_cross_entropy_of_three_channels_is_refused():
    scene = scenes.scene(1, 3, "plain", "softmax")
    for options in ({"criterion": criteria.cross_entropy()}, {"main_criterion": criteria.cross_entropy()}):
        with pytest.raises(ValueError, match="cross_entropy"):
            blob_loss(scene.logits, instances=scene.instances, activation="softmax", **options)


@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
@pytest.mark.parametrize("prop", scenes.PROPERTIES)
def test_terms_are_the_two_unweighted_means(prop, activation):
    for dim, channels in ((1, 1), (2, 2), (3, 3)):
        scene = scenes.scene(dim, channels, prop, activation)
        spec = {"criterion": CRITERIA["dice+bce"], "main_criterion": BCE, **scene.options}
        module = BlobLoss(**translated(spec), main_weight=3.0, blob_weight=5.0)

        def found(x, scene=scene, spec=spec):
            return oracle.losses(x, scene.target, scene.instances, **spec)

        both = value_and_gradient(
            lambda x, m=module, s=scene: torch.stack(m.terms(x, s.target, s.instances)), scene.logits
        )
        truth = value_and_gradient(lambda x, f=found: torch.stack([f(x).main_mean(), f(x).blob_mean()]), scene.logits)
        assert_fp64(both[0], truth[0], f"{scene.name}: terms")
        assert_fp64(both[1], truth[1], f"{scene.name}: gradient of the terms")
        for i in (0, 1):  # and each alone
            one = value_and_gradient(
                lambda x, m=module, s=scene, i=i: m.terms(x, s.target, s.instances)[i], scene.logits
            )
            alone = value_and_gradient(
                lambda x, f=found, i=i: f(x).main_mean() if i == 0 else f(x).blob_mean(), scene.logits
            )
            assert_fp64(one[1], alone[1], f"{scene.name}: gradient of term {i}")
        function = torch.stack(blob_loss_terms(scene.logits, scene.target, scene.instances, **translated(spec)))
        assert torch.equal(function, both[0])


@pytest.mark.parametrize("masking", scenes.MASKINGS)
@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_losses_of_the_instances(activation, masking):
    for prop in scenes.PROPERTIES:
        for dim, channels in ((1, 3), (2, 1), (3, 2)):
            scene = scenes.scene(dim, channels, prop, activation)
            spec = {"criterion": COMPOUND, "masking": masking, **scene.options}
            leaf, twin = (scene.logits.clone().requires_grad_() for _ in range(2))
            losses, ids = BlobLoss(**translated(spec)).instance_losses(leaf, scene.target, scene.instances)
            truth = oracle.losses(twin, scene.target, scene.instances, **spec).instances
            assert losses.shape == ids.shape
            assert ids.dtype == torch.int64
            found = {(b, c, int(ids[b, c, n])): losses[b, c, n] for b, c, n in ids.nonzero().tolist()}
            assert found.keys() == truth.keys(), scene.name
            assert (losses[ids == 0] == 0).all()
            # Each loss gets a gradient of its own, so that a mixed-up gradient shows.
            grads = dict(zip(sorted(found), random_grad(len(found)), strict=True))
            assert losses.requires_grad
            (losses.sum() * 0 + sum(grads[key] * found[key] for key in found)).backward()
            (twin.sum() * 0 + sum(grads[key] * truth[key] for key in found)).backward()
            for key in found:
                assert_fp64(found[key].detach(), truth[key].detach(), f"{scene.name} {key}")
            assert_fp64(leaf.grad, twin.grad, f"{scene.name}: gradient")
            again, _ = blob_loss_instances(scene.logits, scene.target, scene.instances, **translated(spec))
            assert torch.equal(again, losses.detach())


def test_defaults_are_dice_with_a_sigmoid_and_exclude():
    scene = scenes.scene(3, 1, "disagree")
    expected = pair(scene, criterion=DICE, masking="exclude", activation="sigmoid")[1]
    for loss in (BlobLoss(), blob_loss):
        ours = value_and_gradient(lambda x, loss=loss: loss(x, scene.target, scene.instances), scene.logits)
        assert_fp64(ours[0], expected[0])
        assert_fp64(ours[1], expected[1])
