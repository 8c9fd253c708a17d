"""Gradients against finite differences, independent of the oracle; the second derivative is refused."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from blobloss_fast import BlobLoss, blob_loss, blob_loss_instances, blob_loss_terms, criteria, segment_stats
from blobloss_fast.kernels.layout import FEATURES

from . import scenes

pytestmark = pytest.mark.usefixtures("cpu_backend")

CRITERIA = {
    "dice": criteria.dice(),
    "squared_dice": criteria.dice(squared=True),
    "jaccard": criteria.jaccard(),
    "tversky": criteria.tversky(alpha=0.3, beta=0.7),
    "bce": criteria.bce(),
    "focal": criteria.focal(gamma=1.5, alpha=0.25),
    "compound": 0.3 * criteria.dice() + 2 * criteria.focal(gamma=2.0) + criteria.bce(),
}


def leaf(scene: scenes.Scene) -> torch.Tensor:
    return scene.logits.clone().requires_grad_()


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_segment_stats(activation, feature):
    for channels, prop in ((1, "ignored"), (3, "ignored_sample")):
        scene = scenes.scene(1, channels, prop, activation)
        for gamma in (0.0, 1.5, 2.0) if feature.startswith("focal") else (2.0,):
            assert gradcheck(
                lambda x, s=scene, g=gamma: segment_stats(x, s.instances, 5, (feature,), activation, gamma=g)[1],
                leaf(scene),
            )


@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_segment_stats_with_all_features(activation):
    scene = scenes.scene(2, 2, "ignored", activation)
    assert gradcheck(lambda x: segment_stats(x, scene.instances, 5, FEATURES, activation)[1], leaf(scene))


@pytest.mark.parametrize("masking", scenes.MASKINGS)
@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
@pytest.mark.parametrize("name", CRITERIA)
def test_blob_loss(name, activation, masking):
    for channels, prop in ((3, "disagree"), (1, "ignored")) if name == "compound" else ((2, "disagree"),):
        scene = scenes.scene(1, channels, prop, activation)
        module = BlobLoss(CRITERIA[name], main_weight=0.5, masking=masking, **scene.options)
        assert gradcheck(lambda x, m=module, s=scene: m(x, s.target, s.instances), leaf(scene))


@pytest.mark.parametrize("masking", ["exclude", "none"])
@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_every_output(activation, masking):
    scene = scenes.scene(1, 2, "disagree", activation)
    labels = (scene.target, scene.instances)
    options = {"criterion": CRITERIA["compound"], "masking": masking, **scene.options}
    assert gradcheck(lambda x: blob_loss(x, *labels, reduction="none", **options), leaf(scene))
    assert gradcheck(lambda x: blob_loss(x, *labels, reduction="sum", **options), leaf(scene))
    assert gradcheck(lambda x: blob_loss_terms(x, *labels, **options), leaf(scene))
    assert gradcheck(lambda x: blob_loss_instances(x, *labels, **options)[0], leaf(scene))


@pytest.mark.parametrize("include_background", [False, True])
def test_softmax_of_two_channels_with_one_map(include_background):
    scene = scenes.scene(2, 1, "ignore_index", "softmax")
    module = BlobLoss(CRITERIA["compound"], include_background=include_background, **scene.options)
    assert gradcheck(lambda x: module(x, scene.target, scene.instances), leaf(scene))


def test_a_second_derivative_is_refused():
    scene = scenes.scene(1, 2, "plain")
    functions = {
        "blob_loss": lambda x: blob_loss(x, instances=scene.instances),
        "terms": lambda x: blob_loss_terms(x, instances=scene.instances)[1],
        "instances": lambda x: blob_loss_instances(x, instances=scene.instances)[0].sum(),
        "segment_stats": lambda x: segment_stats(x, scene.instances, 5)[1].sum(),
    }
    for function in functions.values():
        logits = leaf(scene)
        (gradient,) = torch.autograd.grad(function(logits), logits, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            gradient.square().sum().backward()
