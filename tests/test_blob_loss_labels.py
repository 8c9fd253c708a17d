"""The labels of a blob loss: target and instances in every dtype and layout, what is ignored, and room for ids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blobloss_fast import BlobLoss, blob_loss, blob_loss_instances, connected_components
from blobloss_fast.kernels import native

from . import oracle, scenes
from .blob_loss_checks import COMPOUND, CRITERIA, DICE, check, criterion_of, pair, random_grad
from .tolerances import FP64, assert_fp64, error

pytestmark = pytest.mark.usefixtures("cpu_backend")

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
TARGETS = (torch.bool, *INTEGERS, torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


@pytest.mark.parametrize("largest", [1, 255, 256, 4000])
def test_any_number_of_instances_without_being_told(largest):
    """Where ids are not read beforehand, room is made for the usual number first, and for all of them if need be."""
    generator = torch.Generator().manual_seed(largest)
    logits = torch.randn(2, 1, 30, 40, 50, generator=generator, dtype=torch.float64)
    ids = torch.randint(-1, largest + 1, logits.shape, generator=generator)
    ids[1] = ids[1].clamp(max=1)
    ids[0, 0, -1, -1, -1] = largest
    results = []
    for max_instances in (None, largest):
        leaf = logits.clone().requires_grad_()
        value = blob_loss(leaf, instances=ids, max_instances=max_instances)
        value.backward()
        results.append((value.detach(), leaf.grad))
    for found, told in zip(*results, strict=True):
        torch.testing.assert_close(found, told, rtol=1e-12, atol=0)
    losses, found = blob_loss_instances(logits, instances=ids)
    assert losses.shape == found.shape == (2, 1, largest)


@pytest.mark.parametrize(
    ("case", "capacities"),
    {
        "as usual": [255],
        "many": [1250],  # one pass: 1,000 and a quarter
        "unseen": [255, 1000],
        "more than bytes hold": [255],
        "more than voxels": [2],  # renumbered
    }.items(),
)
def test_room_is_made_for_what_a_few_voxels_of_a_large_volume_show(case, capacities, cpu_backend, monkeypatch):
    """Room for too few costs a second pass, and reading all ids; never another result."""
    if cpu_backend == "reference":
        pytest.skip("reads the largest id first, since it cannot stop early")
    ids = torch.zeros(1, 1, 64, 64, 64, dtype=torch.int64)
    ids[..., 10, 17, 1:6] = 100  # of these, one voxel is looked at
    if case == "many":
        ids[..., 17, 24, 8:15] = 1000
    elif case == "unseen":
        ids[..., 1, 1, 1] = 1000
    elif case == "more than bytes hold":
        ids[..., 17, 24, 8:15] = 255
        ids = ids.to(torch.uint8)
    elif case == "more than voxels":
        ids[..., 17, 24, 8:15] = 10**9
    logits = scenes.random_logits(ids.shape)
    tried = []
    loss = native.blob_loss
    monkeypatch.setattr(native, "blob_loss", lambda *args: tried.append(args[4] - 1) or loss(*args))
    values = [blob_loss(logits, instances=ids)]
    assert tried == capacities
    told = torch.unique(ids, return_inverse=True)[1]
    values.append(blob_loss(logits, instances=told, max_instances=int(told.max())))
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)
