"""The properties that define blob loss, without an oracle: what may be changed and leave every number as it is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from blobloss_fast import BlobLoss, blob_loss, blob_loss_instances, blob_loss_terms

from . import scenes
from .blob_loss_checks import COMPOUND, criterion_of, value_and_gradient
from .tolerances import assert_fp64

pytestmark = pytest.mark.usefixtures("cpu_backend")


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
