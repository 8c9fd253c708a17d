"""Blob loss against the literal oracle in fp64: values, gradients, parts, and the properties that define it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from blobloss_fast import BlobLoss, blob_loss, blob_loss_instances, blob_loss_terms, connected_components, criteria

from . import oracle, scenes
from .tolerances import FP64, assert_fp64, error

CRITERIA: dict[str, oracle.Criterion] = {
    "dice": ((1.0, "dice", {}),),
    "dice_unsmoothed": ((1.0, "dice", {"smooth_nr": 0.0, "smooth_dr": 1e-3}),),
    "squared_dice": ((1.0, "dice", {"squared": True, "smooth_nr": 0.1, "smooth_dr": 0.2}),),
    "jaccard": ((1.0, "jaccard", {"smooth_nr": 0.1, "smooth_dr": 0.2}),),
    "tversky": ((1.0, "tversky", {"alpha": 0.3, "beta": 0.7}),),
    "bce": ((1.0, "bce", {}),),
    "cross_entropy": ((1.0, "cross_entropy", {}),),
    "focal": ((1.0, "focal", {}),),
    "focal_alpha": ((1.0, "focal", {"gamma": 1.5, "alpha": 0.25}),),
    "focal_gamma0": ((1.0, "focal", {"gamma": 0.0}),),
    "dice+bce": ((1.0, "dice", {}), (0.5, "bce", {})),
    "compound": (
        (2.0, "dice", {"squared": True}),
        (0.7, "focal", {"gamma": 3.0, "alpha": 0.6}),
        (1.5, "tversky", {"alpha": 0.2, "beta": 0.4, "smooth_nr": 0.5, "smooth_dr": 0.25}),
        (0.1, "bce", {}),
    ),
}
DICE, BCE, COMPOUND = CRITERIA["dice"], CRITERIA["bce"], CRITERIA["compound"]
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
TARGETS = (torch.bool, *INTEGERS, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def criterion_of(spec: oracle.Criterion) -> criteria.Criterion:
    """The package's criterion for the oracle's description of it."""
    parts = [weight * getattr(criteria, name)(**options) for weight, name, options in spec]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def translated(options: dict) -> dict:
    return {k: criterion_of(v) if k in ("criterion", "main_criterion") else v for k, v in options.items()}


def random_grad(shape) -> Tensor:
    """A gradient that comes in from above: no element is 1, no two are alike."""
    return 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def value_and_gradient(function, logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = function(leaf)
    value.backward(random_grad(value.shape).to(value.dtype))
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def pair(scene: scenes.Scene, max_instances: int | None = None, **options):
    """(ours, truth): value and gradient of the loss with these options (criteria as the oracle describes them)."""
    options = {"criterion": DICE, **scene.options, **options}
    module = BlobLoss(**translated(options), max_instances=max_instances)
    ours = value_and_gradient(lambda x: module(x, scene.target, scene.instances), scene.logits)
    truth = value_and_gradient(lambda x: oracle.blob_loss(x, scene.target, scene.instances, **options), scene.logits)
    return ours, truth


def check(scene: scenes.Scene, **options) -> None:
    ours, truth = pair(scene, **options)
    what = f"{scene.name} {options}"
    assert_fp64(ours[0], truth[0], f"value of {what}")
    assert_fp64(ours[1], truth[1], f"gradient of {what}")


def check_all(every: list[scenes.Scene], **options) -> None:
    """As `check`, over many scenes; reports every scene that is off, not only the first."""
    wrong = []
    for scene in every:
        try:
            check(scene, **options)
        except (AssertionError, RuntimeError, ValueError, TypeError) as problem:
            wrong.append(f"{type(problem).__name__}: {str(problem).splitlines()[0]}")
    assert not wrong, f"{len(wrong)} of {len(every)} scenes:\n" + "\n".join(wrong)


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


@pytest.mark.parametrize("given", ["target", "instances", "both"])
@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_either_label_or_both(activation, given):
    for dim, channels in ((1, 1), (2, 2), (3, 3)):
        scene = scenes.scene(dim, channels, "disagree", activation)
        target = None if given == "instances" else scene.target
        instances = None if given == "target" else scene.instances
        check(scenes.replace(scene, target=target, instances=instances), criterion=CRITERIA["dice+bce"])


@pytest.mark.parametrize(("dim", "connectivity"), [(1, 26), (2, 4), (2, 8), (2, 26), (3, 6), (3, 18), (3, 26)], ids=str)
def test_instances_are_found_with_the_connectivity_asked_for(dim, connectivity):
    shape = {1: (31,), 2: (7, 9), 3: (4, 5, 6)}[dim]
    mask = (scenes.random_logits((2, 2, *shape), 5) > 1.0).long()
    scene = scenes.Scene("blocks", "sigmoid", scenes.random_logits(mask.shape), mask, None)
    check(scene, criterion=CRITERIA["dice+bce"], connectivity=connectivity)
    labels, counts = connected_components(mask, connectivity)
    for b in range(2):
        for c in range(2):
            expected = oracle.connected_components(mask[b, c] == 1, connectivity)
            assert torch.equal(labels[b, c].long(), expected)
            assert int(counts[b, c]) == int(expected.max())


@pytest.mark.parametrize("value", [-1, 2, 7, 255])
@pytest.mark.parametrize("given", ["target", "both"])
@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_ignore_index(activation, given, value):
    for dim, channels in ((1, 1), (2, 2), (3, 2)):
        scene = scenes.scene(dim, channels, "ignore_index", activation)
        target = torch.where(scene.target == scenes.IGNORE, value, scene.target)
        instances = scene.instances if given == "both" else None
        scene = scenes.replace(scene, target=target, instances=instances, ignore_index=value)
        check(scene, criterion=CRITERIA["dice+bce"])
        check(scenes.replace(scene, target=target.float()), criterion=CRITERIA["dice+bce"])


def test_a_class_can_be_ignored():
    """ignore_index is a value of the target, also one that would be a class."""
    for instances in (True, False):
        scene = scenes.scene(3, 3, "disagree", "softmax")
        scene = scenes.replace(scene, ignore_index=2, instances=scene.instances if instances else None)
        assert (scene.target == 2).any()
        for include_background in (False, True):
            check(scene, criterion=CRITERIA["dice+bce"], include_background=include_background)


# ---------------- inputs


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integer_dtypes_of_ids(dtype):
    for activation in scenes.ACTIVATIONS:
        for prop in ("plain", "ignored", "gaps", "disagree", "ignore_index"):
            if dtype == torch.uint8 and prop == "ignored":
                continue
            scene = scenes.scene(2, 2, prop, activation)
            check(scenes.replace(scene, instances=scene.instances.to(dtype)), criterion=DICE)


@pytest.mark.parametrize("dtype", TARGETS, ids=str)
def test_dtypes_of_targets(dtype):
    for activation in scenes.ACTIVATIONS:
        for instances in (True, False):
            scene = scenes.scene(2, 1, "disagree", activation)
            scene = scenes.replace(scene, instances=scene.instances if instances else None)
            expected = pair(scene)[1]
            ours = pair(scenes.replace(scene, target=scene.target.to(dtype)))[0]
            assert_fp64(ours[0], expected[0])
            assert_fp64(ours[1], expected[1])


@pytest.mark.parametrize("dim", scenes.DIMS)
@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_strided_input(activation, dim):
    scene = scenes.scene(dim, 2, "disagree", activation)

    def spread(volume: Tensor) -> Tensor:
        return volume.repeat_interleave(2, -1)[..., ::2]

    def turned(volume: Tensor) -> Tensor:
        return volume.transpose(0, -1).contiguous().transpose(0, -1)

    def channels_last(volume: Tensor) -> Tensor:
        return volume.movedim(1, -1).contiguous().movedim(-1, 1)

    truth = pair(scene, criterion=COMPOUND)[1]
    for layout in (spread, turned, channels_last):
        strided = [layout(v) for v in (scene.logits, scene.target, scene.instances)]
        assert not strided[0].is_contiguous()
        leaf = strided[0].detach().requires_grad_()
        value = BlobLoss(criterion_of(COMPOUND), activation=activation)(leaf, *strided[1:])
        value.backward(random_grad(value.shape))
        assert_fp64(value.detach(), truth[0], layout.__name__)
        assert_fp64(leaf.grad, truth[1], layout.__name__)


def test_expanded_input():
    scene = scenes.scene(2, 1, "plain")
    base, ids = scene.logits[:1].clone().requires_grad_(), scene.instances[:1].expand(3, -1, -1, -1)
    target = (scene.instances[:1] > 0).expand(3, -1, -1, -1)
    loss = BlobLoss()(base.expand(3, -1, -1, -1), target, ids)
    loss.backward()
    twin = scene.logits[:1].clone().requires_grad_()
    expected = oracle.blob_loss(twin, target[:1].long(), ids[:1], criterion=DICE)
    expected.backward()
    assert_fp64(loss.detach(), expected.detach())
    assert_fp64(base.grad, twin.grad)


@pytest.mark.parametrize("masking", scenes.MASKINGS)
def test_max_instances_given(masking):
    for activation in scenes.ACTIVATIONS:
        for prop in ("plain", "gaps", "disagree", "ignored", "no_instances", "target_only", "salt_and_pepper"):
            scene = scenes.scene(3, 2, prop, activation)
            largest = 31 if scene.instances is None else int(scene.instances.max().clamp(min=0))
            for room in (largest, largest + 7):
                check(scene, criterion=CRITERIA["dice+bce"], masking=masking, max_instances=room)


def test_ids_beyond_max_instances_are_refused():
    scene = scenes.scene(2, 2, "gaps")
    module = BlobLoss(max_instances=30)
    with pytest.raises(ValueError, match="max_instances"):
        module(scene.logits, instances=scene.instances)
    assert BlobLoss(max_instances=31)(scene.logits, instances=scene.instances).isfinite()


@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_huge_ids(activation):
    """An id of 10^9 is not a table of 10^9 rows."""
    names = torch.tensor([0, 10**9, 5, 2**31 - 1, 2**40])
    for prop in ("plain", "disagree"):
        scene = scenes.scene(2, 2, prop, activation)
        scene = scenes.replace(scene, instances=names[scene.instances])
        check(scene, criterion=COMPOUND)
        check(scene, criterion=COMPOUND, masking="none")
        losses, ids = blob_loss_instances(scene.logits, scene.target, scene.instances, **scene.options)
        truth = oracle.losses(scene.logits, scene.target, scene.instances, criterion=DICE, **scene.options).instances
        found = {(b, c, int(ids[b, c, n])): losses[b, c, n] for b, c, n in ids.nonzero().tolist()}
        assert found.keys() == truth.keys()
        assert max(error(found[key], truth[key]) for key in truth) <= FP64


# ---------------- properties


@pytest.mark.parametrize("masking", scenes.MASKINGS)
@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
class TestProperties:
    @staticmethod
    def ours(scene: scenes.Scene, masking: str, **options) -> tuple[Tensor, Tensor]:
        module = BlobLoss(criterion_of(COMPOUND), masking=masking, **scene.options, **options)
        return value_and_gradient(lambda x: module(x, scene.target, scene.instances), scene.logits)

    def test_names_of_instances_do_not_matter(self, activation, masking):
        for names in ([0, 4, 1, 3, 2], [0, 17, 2, 33, 1], [0, 10**9, 3, 7, 10**6]):
            for prop in ("plain", "disagree"):
                scene = scenes.scene(3, 2, prop, activation)
                renamed = scenes.replace(scene, instances=torch.tensor(names)[scene.instances])
                for a, b in zip(self.ours(renamed, masking), self.ours(scene, masking), strict=True):
                    assert_fp64(a, b, scene.name)

    def test_a_whole_batch_is_the_mean_of_its_samples(self, activation, masking):
        """With as many blobs' pairs in each sample, both means are means of the samples' losses."""
        scene = scenes.scene(2, 3, "plain", activation)
        whole = self.ours(scene, masking)[0]
        each = [
            self.ours(
                scenes.replace(scene, logits=scene.logits[b : b + 1], instances=scene.instances[b : b + 1]), masking
            )[0]
            for b in (0, 1)
        ]
        # `value_and_gradient` returns the value itself: no upstream factor is in it.
        assert_fp64(whole, (each[0] + each[1]) / 2)

    def test_room_for_more_instances_changes_nothing(self, activation, masking):
        scene = scenes.scene(1, 2, "plain", activation)
        for a, b in zip(self.ours(scene, masking, max_instances=40), self.ours(scene, masking), strict=True):
            assert_fp64(a, b)

    def test_order_of_voxels_does_not_matter(self, activation, masking):
        scene = scenes.scene(2, 2, "disagree", activation)
        target = scene.target
        flipped = scenes.replace(
            scene, logits=scene.logits.flip(2, 3), instances=scene.instances.flip(2, 3), target=target.flip(2, 3)
        )
        (value, gradient), (expected, expected_gradient) = self.ours(flipped, masking), self.ours(scene, masking)
        assert_fp64(value, expected)
        assert_fp64(gradient.flip(2, 3), expected_gradient)

    def test_ignored_voxels_are_as_if_they_were_not_there(self, activation, masking):
        scene = scenes.scene(1, 2, "plain", activation)
        odd = scene.instances.clone()
        odd[:, :, -4:] = -1
        cut = scenes.replace(scene, logits=scene.logits[..., :-4], instances=scene.instances[..., :-4])
        value, gradient = self.ours(scenes.replace(scene, instances=odd), masking)
        expected, expected_gradient = self.ours(cut, masking)
        assert_fp64(value, expected)
        assert_fp64(gradient[..., :-4], expected_gradient)
        assert (gradient[..., -4:] == 0).all()

    def test_nan_in_an_ignored_voxel_is_harmless(self, activation, masking):
        for prop in ("ignored", "ignored_sample", "ignore_index", "target_only"):
            for channels in (1, 3):
                scene = scenes.scene(2, channels, prop, activation)
                where = torch.zeros(scene.logits.shape, dtype=torch.bool)
                if scene.instances is not None:
                    where = where | (scene.instances < 0)
                if scene.target is not None:
                    where = where | (scene.target == scenes.IGNORE)
                if activation == "softmax":  # a class without a row (channel 0) needs no voxel of its own
                    where = where[:, 1:].all(1, keepdim=True).expand_as(scene.logits)
                assert where.any()
                clean = self.ours(scene, masking)
                for poison in (math.nan, math.inf, -math.inf):
                    dirty = scenes.replace(scene, logits=torch.where(where, poison, scene.logits))
                    value, gradient = self.ours(dirty, masking)
                    assert torch.equal(value, clean[0]), scene.name
                    assert torch.equal(gradient, clean[1]), scene.name
                    assert (gradient[where] == 0).all(), scene.name


def test_without_instances_the_loss_is_connected_to_the_graph():
    for activation in scenes.ACTIVATIONS:
        for prop in ("no_instances", "all_ignored"):
            scene = scenes.scene(2, 2, prop, activation)
            logits = scene.logits.clone().requires_grad_()
            loss = blob_loss(logits, scene.target, scene.instances, main_weight=0.0, **scene.options)
            assert loss.requires_grad
            loss.backward()
            assert loss.item() == 0.0
            assert torch.equal(logits.grad, torch.zeros_like(logits))
            _, blob = blob_loss_terms(scene.logits.clone().requires_grad_(), scene.target, scene.instances)
            assert blob.requires_grad


def test_a_blob_is_blind_to_the_others():
    """The point of the paper: with `exclude`, what happens in blob 2 is nothing to blob 1."""
    scene = scenes.scene(2, 1, "plain")
    moved = torch.where(scene.instances == 2, 9.0, scene.logits)
    before, ids = blob_loss_instances(scene.logits, instances=scene.instances)
    after, _ = blob_loss_instances(moved, instances=scene.instances)
    others = (ids > 0) & (ids != 2)
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[ids == 2], after[ids == 2])
