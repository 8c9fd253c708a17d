"""CC loss, BiCC, instance weights and terms of empty samples against literal loops in fp64: values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from blobloss_fast import BlobLoss, CCLoss, blob_loss, cc_loss, compute, criteria, nearest_instance

from . import oracle_zones, scenes
from .blob_loss_checks import COMPOUND, CRITERIA, DICE, random_grad, translated, value_and_gradient
from .tolerances import assert_fp64

pytestmark = pytest.mark.usefixtures("cpu_backend")

DICE_BCE = CRITERIA["dice+bce"]
BOTH_WAYS = ("dice", "compound")
WEIGHTS = {
    "inverse_size": "inverse_size",
    "min_size": lambda sizes: sizes >= 3,
    "root": lambda sizes: sizes**-0.5,
    "none_left": lambda sizes: 0 * sizes,
}


def check(loss: str, scene: scenes.Scene, **options) -> None:
    """Compare the value and the gradient of one call with the oracle's."""
    options = {"criterion": DICE_BCE, **scene.options, **options}
    module = {"cc": CCLoss, "blob": BlobLoss}[loss](**translated(options))
    truth = {"cc": oracle_zones.cc_loss, "blob": oracle_zones.blob_loss}[loss]
    ours = value_and_gradient(lambda x: module(x, scene.target, scene.instances), scene.logits)
    expected = value_and_gradient(lambda x: truth(x, scene.target, scene.instances, **options), scene.logits)
    assert_fp64(ours[0], expected[0], f"value of {scene.name} {options}")
    assert_fp64(ours[1], expected[1], f"gradient of {scene.name} {options}")


def part(every: list[scenes.Scene], names, name: str, parts: int) -> list[scenes.Scene]:
    """A part of the scenes, another one for each name: the oracle takes its time."""
    return every[list(names).index(name) % parts :: parts]


# ---------------------------------------------------------------------------------- CC loss


@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
@pytest.mark.parametrize("name", CRITERIA)
def test_value_and_gradient(name, activation):
    for scene in part(scenes.telling_scenes(activation), CRITERIA, name, 4):
        if name == "cross_entropy" and activation == "softmax" and scene.logits.shape[1] > 2:
            continue
        check("cc", scene, criterion=CRITERIA[name])


@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_a_compound(activation):
    for scene in part(scenes.every_scene(activation), scenes.ACTIVATIONS, activation, 3):
        check("cc", scene, criterion=COMPOUND, main_criterion=DICE_BCE)


def test_softmax_with_the_background_class():
    for scene in scenes.telling_scenes("softmax"):
        check("cc", scene, include_background=True)


@pytest.mark.parametrize("weights", [(0.3, 1.7), (2.0, 0.0), (0.0, 2.0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_weights_and_reductions(bidirectional, reduction, weights):
    options = {"main_weight": weights[0], "blob_weight": weights[1], "reduction": reduction}
    for activation in scenes.ACTIVATIONS:
        for prop in ("plain", "ignored_sample", "all_ignored", "empty_sample", "no_instances", "disagree"):
            check("cc", scenes.scene(2, 2, prop, activation), bidirectional=bidirectional, **options)


@pytest.mark.parametrize("spacing", [(1, 1, 3), (0.5, 0.75, 2.0), (7.0, 1.0, 1.0)], ids=str)
def test_spacing_moves_the_borders_of_the_zones(spacing):
    scene = scenes.scene(3, 2, "plain")
    check("cc", scene, spacing=spacing)
    isotropic = cc_loss(scene.logits, instances=scene.instances)
    assert not torch.isclose(cc_loss(scene.logits, instances=scene.instances, spacing=spacing), isotropic)
    tenfold = cc_loss(scene.logits, instances=scene.instances, spacing=[10 * size for size in spacing])
    assert torch.equal(cc_loss(scene.logits, instances=scene.instances, spacing=spacing), tenfold)


@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_zones_of_ones_own_are_as_those_that_are_found(activation):
    for prop in ("plain", "ignored", "empty_sample", "disagree", "ignore_index", "gaps"):
        scene = scenes.scene(3, 1, prop, activation)
        module = CCLoss(**translated({"criterion": DICE_BCE, **scene.options}))
        zones = nearest_instance(module_ids(scene))
        expected = value_and_gradient(lambda x, s=scene, m=module: m(x, s.target, s.instances), scene.logits)
        found = value_and_gradient(lambda x, s=scene, m=module, z=zones: m(x, s.target, s.instances, z), scene.logits)
        assert_fp64(found[0], expected[0], scene.name)
        assert_fp64(found[1], expected[1], scene.name)
        if scene.target is not None and prop != "ignored":  # ids below 0 are not in the target
            alone = value_and_gradient(lambda x, s=scene, m=module, z=zones: m(x, s.target, zones=z), scene.logits)
            assert_fp64(alone[1], expected[1], f"{scene.name}: target and zones alone")


def module_ids(scene: scenes.Scene) -> Tensor:
    """The ids that the loss sees: ignored where the target is."""
    if scene.target is None or scene.ignore_index is None:
        return scene.instances
    return torch.where(scene.target == scene.ignore_index, -1, scene.instances)


def test_zones_of_every_integer_dtype_and_with_a_place_in_no_zone():
    scene = scenes.scene(3, 1, "plain")
    zones, mask = nearest_instance(scene.instances), scene.instances > 0
    zones[0, 0, 0] = 0
    outside = torch.where(zones == 0, -1, zones)
    expected = CCLoss(main_weight=0.0)(scene.logits, mask, zones=outside)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        assert torch.equal(CCLoss(main_weight=0.0)(scene.logits, mask, zones=zones.to(dtype)), expected)


@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_terms_and_losses_of_the_instances(activation):
    for prop in scenes.PROPERTIES:
        for dim, channels in ((1, 1), (2, 2), (3, 3)):
            scene = scenes.scene(dim, channels, prop, activation)
            spec = {"criterion": DICE_BCE, **scene.options}
            module = CCLoss(**translated(spec), main_weight=3.0, blob_weight=5.0)
            labels = (scene.target, scene.instances)
            ours = value_and_gradient(lambda x, m=module, t=labels: torch.stack(m.terms(x, *t)), scene.logits)
            truth = value_and_gradient(
                lambda x, s=spec, t=labels: oracle_zones.cc_loss(x, *t, reduction="terms", **s), scene.logits
            )
            assert_fp64(ours[0], truth[0], f"{scene.name}: terms")
            assert_fp64(ours[1], truth[1], f"{scene.name}: gradient of the terms")

            leaf, twin = (scene.logits.clone().requires_grad_() for _ in range(2))
            losses, ids = module.instance_losses(leaf, *labels)
            expected = oracle_zones.cc_terms(twin, *labels, **spec).instances
            found = {(b, c, int(ids[b, c, n])): losses[b, c, n] for b, c, n in ids.nonzero().tolist()}
            assert found.keys() == expected.keys(), scene.name
            grads = dict(zip(sorted(found), random_grad(len(found)), strict=True))
            (losses.sum() * 0 + sum(grads[key] * found[key] for key in found)).backward()
            (twin.sum() * 0 + sum(grads[key] * expected[key] for key in found)).backward()
            for key in found:
                assert_fp64(found[key].detach(), expected[key].detach(), f"{scene.name} {key}")
            assert_fp64(leaf.grad, twin.grad, f"{scene.name}: gradient of the instances")


def test_worked_out_by_hand():
    """Ids 1 . . 2 and p = 1/2: zones 1 1 2 2 with one voxel of two, so Dice is 1 - 2 (1/2) / (1 + 1) = 1/2."""
    logits, ids = torch.zeros(1, 1, 4, dtype=torch.float64), torch.tensor([[[1, 0, 0, 2]]])
    loss = CCLoss(criteria.dice(smooth_nr=0.0, smooth_dr=0.0), main_weight=0.0)
    assert float(loss(logits, instances=ids)) == 0.5
    # ids 1 . 2 2: the tie goes to id 1; zone 2 is 2 2, Dice 1 - 2 / (1 + 2) = 1/3
    tied = loss(logits, instances=torch.tensor([[[1, 0, 2, 2]]]))
    assert float(tied) == pytest.approx((1 / 2 + 1 / 3) / 2, abs=1e-15)
    # no instance: one zone without foreground, Dice 1, and it counts in the mean
    both = loss(logits.expand(2, 1, 4), instances=torch.tensor([[[1, 0, 0, 2]], [[0, 0, 0, 0]]]))
    assert float(both) == 0.75


# ---------------------------------------------------------------------------------- BiCC


@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_bidirectional(name, activation):
    for scene in part(scenes.telling_scenes(activation), BOTH_WAYS, name, 2):
        check("cc", scene, criterion=CRITERIA[name], bidirectional=True)


@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_terms_of_a_bidirectional_loss(activation):
    for prop in ("plain", "empty_sample", "disagree"):
        scene = scenes.scene(3, 2, prop, activation)
        spec = {"criterion": DICE_BCE, "bidirectional": True, "instance_weight": "inverse_size", **scene.options}
        module, labels = CCLoss(**translated(spec)), (scene.target, scene.instances)
        ours = value_and_gradient(lambda x, m=module, t=labels: torch.stack(m.terms(x, *t)), scene.logits)
        truth = value_and_gradient(
            lambda x, s=spec, t=labels: oracle_zones.cc_loss(x, *t, reduction="terms", **s), scene.logits
        )
        assert_fp64(ours[0], truth[0], prop)
        assert_fp64(ours[1], truth[1], prop)


@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_bidirectional_without_any_predicted_component(activation):
    for prop in ("plain", "empty_sample", "no_instances"):
        scene = scenes.scene(2, 1, prop, activation)
        if activation == "softmax":
            low = torch.stack([scene.logits[:, 0].abs() + 9, -scene.logits[:, 1].abs() - 9], 1)
        else:
            low = 0.4 * scene.logits if activation == "none" else -scene.logits.abs() - 9
        check("cc", scenes.replace(scene, logits=low), bidirectional=True)


def test_the_gradient_of_false_positives_is_that_of_frozen_weights():
    """Perturb the logits while what is stopped keeps its value; letting it move gives another number."""
    logits = scenes.random_logits((1, 1, 5, 6), seed=3)
    empty = torch.zeros(1, 1, 5, 6, dtype=torch.int64)
    module = CCLoss(bidirectional=True, main_weight=0.0, connectivity=4)
    _, gradient = value_and_gradient(lambda x: 2 * module(x, empty) / random_grad(()), logits)
    # The ground truth's half is one zone without foreground, whose Dice is 1 up to the smoothing.
    _, other_half = value_and_gradient(lambda x: CCLoss(main_weight=0.0)(x, empty) / random_grad(()), logits)
    zones = oracle_zones.zones_of(oracle_zones.oracle.connected_components(logits[0, 0] > 0, 4))
    frozen, step = torch.sigmoid(logits[0, 0]), 1e-6

    def mean_over_zones(p: Tensor, weights: Tensor) -> Tensor:
        ratios = [(p * weights)[zones == k].sum() / weights[zones == k].sum() for k in zones.unique()]
        return torch.stack(ratios).mean()

    for y, x in ((0, 0), (2, 3), (4, 5)):
        up, down = logits[0, 0].clone(), logits[0, 0].clone()
        up[y, x] += step
        down[y, x] -= step
        slope = (mean_over_zones(torch.sigmoid(up), frozen) - mean_over_zones(torch.sigmoid(down), frozen)) / (2 * step)
        moving = mean_over_zones(torch.sigmoid(up), torch.sigmoid(up))
        moving = (moving - mean_over_zones(torch.sigmoid(down), torch.sigmoid(down))) / (2 * step)
        found = float(gradient[0, 0, y, x] - other_half[0, 0, y, x])
        assert found == pytest.approx(float(slope), rel=1e-7)
        assert found != pytest.approx(float(moving), rel=1e-2)


def test_probabilities_of_exactly_0_in_a_predicted_zone_cost_nothing():
    logits = torch.full((1, 1, 4, 4), -float("inf"), dtype=torch.float64)
    value, gradient = value_and_gradient(
        lambda x: CCLoss(bidirectional=True, main_weight=0.0)(x, torch.zeros(1, 1, 4, 4)), logits
    )
    assert float(value) == pytest.approx(
        0, abs=1e-15
    )  # both halves: Dice of nothing predicted and nothing there is 1 - s / s
    assert (gradient == 0).all()


# ---------------------------------------------------------------------------------- weights and empty samples


@pytest.mark.parametrize("loss", ["cc", "blob"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_instance_weights(weight, loss):
    for activation in scenes.ACTIVATIONS:
        for scene in part(scenes.telling_scenes(activation), WEIGHTS, weight, 3):
            check(loss, scene, instance_weight=WEIGHTS[weight])
    for masking in scenes.MASKINGS if loss == "blob" else ():
        check(loss, scenes.scene(3, 2, "disagree"), instance_weight=WEIGHTS[weight], masking=masking)
    for reduction in ("none", "sum"):
        check(loss, scenes.scene(3, 2, "empty_sample"), instance_weight=WEIGHTS[weight], reduction=reduction)


@pytest.mark.parametrize("loss", ["cc", "blob"])
def test_empty_samples(loss):
    for activation in scenes.ACTIVATIONS:
        for scene in part(scenes.telling_scenes(activation), scenes.ACTIVATIONS, activation, 3):
            check(loss, scene, empty_sample=3.0)
            check(loss, scene, empty_sample=0.5, instance_weight="inverse_size", include_background=True)
    for prop in ("empty_sample", "no_instances", "all_ignored", "target_only"):
        for reduction in ("none", "sum"):
            check(loss, scenes.scene(2, 3, prop), empty_sample=10.0, reduction=reduction)
        for masking in scenes.MASKINGS if loss == "blob" else ():
            check(loss, scenes.scene(2, 3, prop), empty_sample=10.0, masking=masking)


@pytest.mark.parametrize("loss", ["cc", "blob"])
def test_terms_with_weights_and_empty_samples(loss):
    for prop in ("plain", "empty_sample", "disagree"):
        scene = scenes.scene(3, 2, prop)
        spec = {"criterion": DICE_BCE, "instance_weight": "inverse_size", "empty_sample": 2.0, **scene.options}
        module = {"cc": CCLoss, "blob": BlobLoss}[loss](**translated(spec))
        truth = {"cc": oracle_zones.cc_loss, "blob": oracle_zones.blob_loss}[loss]
        labels = (scene.target, scene.instances)
        ours = value_and_gradient(lambda x, m=module, t=labels: torch.stack(m.terms(x, *t)), scene.logits)
        expected = value_and_gradient(
            lambda x, f=truth, s=spec, t=labels: f(x, *t, reduction="terms", **s), scene.logits
        )
        assert_fp64(ours[0], expected[0], prop)
        assert_fp64(ours[1], expected[1], prop)


def test_weight_0_is_as_if_the_small_ones_had_no_term_but_stayed_instances():
    """With masking="exclude" and the main term off, small blobs are left out of every domain: as if ignored."""
    scene = scenes.scene(3, 1, "plain")
    sizes = torch.bincount(scene.instances[0].flatten())
    small = [k for k in range(1, len(sizes)) if sizes[k] < 3]
    assert small
    without = torch.where(torch.isin(scene.instances, torch.tensor(small)), -1, scene.instances)[:1]
    found = BlobLoss(main_weight=0.0, instance_weight=lambda n: n >= 3)(scene.logits[:1], instances=scene.instances[:1])
    assert_fp64(found, BlobLoss(main_weight=0.0)(scene.logits[:1], instances=without))


def test_many_instances_with_weights():
    """More than 255 ids, which are not expected, and more than a block and a span of the native finish step."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(2, 1, 30_000, dtype=torch.int64)
    ids[0, 0, ::3] = torch.arange(1, 10_001)
    ids[0, 0, 1::6] = torch.arange(1, 10_001, 2)  # every other one has two voxels
    logits = torch.randn(2, 1, 30_000, generator=generator, dtype=torch.float64)
    weights = (1.0 / (1 + torch.arange(1, 10_001) % 2)).double()
    losses, found = BlobLoss().instance_losses(logits, instances=ids)
    assert found[0, 0].tolist() == list(range(1, 10_001))
    expected = (losses[0, 0] * weights).sum() / weights.sum()
    value = blob_loss(logits, instances=ids, main_weight=0.0, instance_weight="inverse_size")
    assert_fp64(value, expected)
    with_empty = blob_loss(logits, instances=ids, main_weight=0.0, instance_weight="inverse_size", empty_sample=100.0)
    s = torch.sigmoid(logits[1]).sum()
    assert_fp64(with_empty, (expected + s / (s + 100)) / 2)


# ---------------------------------------------------------------------------------- options


def test_defaults_are_dice_with_a_sigmoid():
    scene = scenes.scene(3, 1, "disagree")
    truth = oracle_zones.cc_loss(scene.logits, scene.target, scene.instances, criterion=DICE)
    assert_fp64(CCLoss()(scene.logits, scene.target, scene.instances), truth)
    assert_fp64(cc_loss(scene.logits, scene.target, scene.instances), truth)


def test_ids_of_any_size():
    scene = scenes.scene(3, 2, "plain")
    large = torch.where(scene.instances == 2, 10**9, scene.instances)
    ours = value_and_gradient(lambda x: cc_loss(x, instances=large), scene.logits)
    expected = value_and_gradient(lambda x: oracle_zones.cc_loss(x, instances=large, criterion=DICE), scene.logits)
    assert_fp64(ours[0], expected[0])
    assert_fp64(ours[1], expected[1])
    losses, ids = CCLoss().instance_losses(scene.logits, instances=large)
    assert ids.max() == 10**9 and losses.shape == ids.shape


def test_a_spacing_of_any_kind():
    scene = scenes.scene(3, 1, "plain")
    expected = cc_loss(scene.logits, instances=scene.instances, spacing=(1.0, 1.0, 3.0))
    for spacing in ([1, 1, 3], np.array([1.0, 1.0, 3.0]), (1, 1.0, 3)):
        module = CCLoss(spacing=spacing)
        assert "spacing=(" in repr(module)
        assert torch.equal(module(scene.logits, instances=scene.instances), expected)


def test_options_are_attributes():
    module = CCLoss(bidirectional=True, spacing=(1, 1, 3))
    assert repr(module) == "CCLoss(dice(), spacing=(1, 1, 3), bidirectional=True)"
    scene = scenes.scene(3, 1, "plain")
    module.bidirectional, module.spacing = False, None
    expected = cc_loss(scene.logits, instances=scene.instances)
    assert torch.equal(module(scene.logits, instances=scene.instances), expected)
    assert repr(BlobLoss(empty_sample=5, instance_weight="inverse_size")) == (
        "BlobLoss(dice(), instance_weight='inverse_size', empty_sample=5)"
    )


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"instance_weight": "size"}, ValueError, "instance_weight must be one of 'uniform', 'inverse_size'"),
        ({"instance_weight": 3}, ValueError, "instance_weight must be one of"),
        ({"empty_sample": 0}, ValueError, "must be above 0"),
        ({"empty_sample": "a"}, TypeError, "must be a number"),
        ({"empty_sample": -1.0}, ValueError, "at least 0"),
        ({"instance_weight": lambda n: 1.0}, ValueError, r"a tensor \[2, 1, \d+\]; got float"),
        ({"instance_weight": lambda n: n.sum()}, ValueError, r"a tensor \[2, 1, \d+\]; got \[\]"),
        ({"instance_weight": lambda n: -1.0 * n}, ValueError, "finite weights of at least 0"),
        ({"instance_weight": lambda n: n / 0}, ValueError, "finite weights of at least 0"),
    ],
)
@pytest.mark.parametrize("loss", [BlobLoss, CCLoss])
def test_wrong_options(loss, options, error, match):
    scene = scenes.scene(3, 1, "plain")
    with pytest.raises(error, match=match):
        loss(**options)(scene.logits, instances=scene.instances)


@pytest.mark.parametrize("weight", [lambda n: -1.0 * n, lambda n: n / 0], ids=["negative", "infinite"])
@pytest.mark.parametrize("loss", [BlobLoss, CCLoss])
def test_wrong_weights_make_the_loss_nan_where_nothing_may_be_read(loss, weight, monkeypatch):
    """On a GPU, and in a compiled call."""
    monkeypatch.setattr(compute, "_may_be_read", lambda tensor: False)
    scene = scenes.scene(3, 1, "plain")
    assert loss(instance_weight=weight)(scene.logits, instances=scene.instances).isnan()
    assert loss(instance_weight=lambda n: 2.0 * n)(scene.logits, instances=scene.instances).isfinite()


def test_wrong_input_of_a_cc_loss():
    scene = scenes.scene(3, 1, "plain")
    with pytest.raises(TypeError, match="bidirectional must be True or False"):
        CCLoss(bidirectional=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'masking'"):
        CCLoss(masking="none")
    with pytest.raises(ValueError, match="target or instances must be given"):
        CCLoss()(scene.logits)
    mask = scene.instances > 0
    with pytest.raises(ValueError, match="zones must be"):
        CCLoss()(scene.logits, mask, zones=torch.ones(2, 1, 3, 4, 4, dtype=torch.int32))
    with pytest.raises(TypeError, match="zones must hold integer ids"):
        CCLoss()(scene.logits, mask, zones=mask.float())
    with pytest.raises(ValueError, match="spacing"):
        CCLoss(spacing=(1, 1))(scene.logits, mask)
