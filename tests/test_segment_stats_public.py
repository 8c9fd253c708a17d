"""The public `segment_stats` against the oracle, and the properties that define the table of sums."""

from __future__ import annotations

import pytest
import torch

from blobloss_fast import segment_stats
from blobloss_fast.kernels.layout import FEATURES

from . import scenes
from .test_segment_stats import check, random_grad, truth
from .tolerances import assert_fp64

pytestmark = pytest.mark.usefixtures("cpu_backend")


@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_public_function_against_the_oracle(activation):
    for scene in scenes.every_scene(activation):
        ids = scene.instances if scene.instances is not None else (scene.target == 1).long()
        num_cells = int(ids.max().clamp(min=0)) + 2
        logits = scene.logits.clone().requires_grad_()
        counts, sums = segment_stats(logits, ids, num_cells, FEATURES, activation, gamma=1.5)
        assert not counts.requires_grad
        (grad,) = torch.autograd.grad(sums, logits, random_grad(*sums.shape))
        expected = truth(scene.logits, ids, None, num_cells, FEATURES, activation, 1.5)
        check((counts, sums.detach(), grad), expected, scene.name)


def test_public_defaults():
    scene = scenes.scene(2, 2, "ignored")
    logits = scene.logits.clone().requires_grad_()
    counts, sums = segment_stats(logits, scene.instances, 5)
    expected = truth(scene.logits, scene.instances, None, 5, ("prob",), "sigmoid")
    (grad,) = torch.autograd.grad(sums, logits, random_grad(*sums.shape))
    check((counts, sums.detach(), grad), expected, "defaults")


def test_strided_leaf_gets_its_gradient():
    scene = scenes.scene(3, 2, "plain")
    leaf = scene.logits.transpose(1, 4).contiguous().requires_grad_()
    _, sums = segment_stats(leaf.transpose(1, 4), scene.instances, 5, FEATURES)
    sums.backward(random_grad(*sums.shape))
    assert_fp64(leaf.grad.transpose(1, 4), truth(scene.logits, scene.instances, None, 5)[2])
    expanded = scene.logits[:1].clone().requires_grad_()
    _, sums = segment_stats(expanded.expand(2, -1, -1, -1, -1), scene.instances, 5, FEATURES)
    sums.backward(random_grad(*sums.shape))
    expected = truth(scene.logits[:1].expand_as(scene.logits), scene.instances, None, 5)[2]
    assert_fp64(expanded.grad, expected.sum(0, keepdim=True))


def table(scene, ids, num_cells):
    return segment_stats(scene.logits, ids, num_cells, FEATURES, scene.activation)


@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
class TestProperties:
    def test_relabelling_permutes_the_table(self, activation):
        scene = scenes.scene(2, 3, "plain", activation)
        permutation = torch.tensor([3, 0, 4, 1, 2])
        counts, sums = table(scene, scene.instances, 5)
        moved_counts, moved_sums = table(scene, permutation[scene.instances], 5)
        assert torch.equal(moved_counts[:, :, permutation], counts)
        assert_fp64(moved_sums[:, :, permutation], sums)

    def test_splitting_a_cell_adds_up(self, activation):
        scene = scenes.scene(3, 2, "plain", activation)
        half = torch.zeros_like(scene.instances)
        half[..., ::2] = 5
        counts, sums = table(scene, scene.instances, 5)
        split_counts, split_sums = table(scene, scene.instances + half, 10)
        assert torch.equal(split_counts[:, :, :5] + split_counts[:, :, 5:], counts)
        assert_fp64(split_sums[:, :, :5] + split_sums[:, :, 5:], sums)

    def test_splitting_the_volume_adds_up(self, activation):
        scene = scenes.scene(2, 3, "plain", activation)
        whole = table(scene, scene.instances, 5)
        parts = [
            segment_stats(scene.logits[:, :, rows], scene.instances[:, :, rows], 5, FEATURES, activation)
            for rows in (slice(None, 2), slice(2, None))
        ]
        assert torch.equal(parts[0][0] + parts[1][0], whole[0])
        assert_fp64(parts[0][1] + parts[1][1], whole[1])

    def test_an_empty_cell_changes_nothing(self, activation):
        scene = scenes.scene(1, 2, "plain", activation)
        counts, sums = table(scene, scene.instances, 5)
        more_counts, more_sums = table(scene, scene.instances, 50)
        assert torch.equal(more_counts[:, :, :5], counts)
        assert (more_counts[:, :, 5:] == 0).all()
        assert_fp64(more_sums[:, :, :5], sums)
        assert (more_sums[:, :, 5:] == 0).all()

    def test_samples_do_not_see_each_other(self, activation):
        scene = scenes.scene(2, 2, "plain", activation)
        both = table(scene, scene.instances, 5)
        for b in (0, 1):
            alone = segment_stats(scene.logits[b : b + 1], scene.instances[b : b + 1], 5, FEATURES, activation)
            assert torch.equal(alone[0][0], both[0][b])
            assert_fp64(alone[1][0], both[1][b])

    def test_counts_are_all_voxels_that_are_not_ignored(self, activation):
        scene = scenes.scene(3, 3, "ignored", activation)
        counts, _ = table(scene, scene.instances, 5)
        assert torch.equal(counts.sum(2), (scene.instances >= 0).flatten(2).sum(2))
