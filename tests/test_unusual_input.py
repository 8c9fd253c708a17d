"""Unusual calls that are right, and the plain call each equals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from blobloss_fast import (
    BlobLoss,
    blob_loss,
    blob_loss_instances,
    blob_loss_terms,
    connected_components,
    criteria,
    segment_stats,
)

from .test_errors import CLASSES, IDS, IDS3, INF, LOGITS, LOGITS3, MASK, NAN

pytestmark = pytest.mark.usefixtures("cpu_backend")


def result(logits: Tensor, *labels: Tensor | None, **options: Any) -> list[Tensor]:
    """Loss, terms, instance losses that exist, and gradient."""
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = BlobLoss(criteria.dice() + 0.5 * criteria.bce(), **options)
    value = loss(leaf, *labels)
    losses, ids = loss.instance_losses(leaf, *labels)
    (gradient,) = torch.autograd.grad(value, leaf)
    return [t.detach() for t in (value, *loss.terms(leaf, *labels), losses[ids > 0], gradient)]


def assert_equal_results(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert e.isfinite().all()
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    assert expected[-1].abs().max() > 1e-3, "a gradient of 0 shows nothing"


UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *UNSIGNED)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IGNORED = torch.zeros_like(MASK, dtype=torch.bool)
IGNORED[0, 0, 0, 1:3] = IGNORED[1, 0, 3] = True
IGNORED_IDS = IDS.masked_fill(IGNORED, -1)


@pytest.mark.parametrize("dtype", [torch.bool, *INTEGERS, *FLOATS], ids=str)
def test_target_of_every_dtype(dtype):
    for ids in (None, IDS):
        assert_equal_results(result(LOGITS, MASK.to(dtype), ids), result(LOGITS, MASK, ids))
    if dtype != torch.bool:
        for ids in (None, IDS3):
            expected = result(LOGITS3, CLASSES, ids, activation="softmax")
            assert_equal_results(result(LOGITS3, CLASSES.to(dtype), ids, activation="softmax"), expected)
    two = result(LOGITS3[:, :2], MASK, activation="softmax")
    assert_equal_results(result(LOGITS3[:, :2], MASK.to(dtype), activation="softmax"), two)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_ids_of_every_dtype(dtype):
    expected = result(LOGITS, MASK, IDS)
    assert_equal_results(result(LOGITS, None, IDS.to(dtype)), expected)
    assert_equal_results(result(LOGITS, MASK, IDS.to(dtype), max_instances=2), expected)
    counts, sums = segment_stats(LOGITS, IDS.to(dtype), 3)
    expected_counts, expected_sums = segment_stats(LOGITS, IDS, 3)
    assert torch.equal(counts, expected_counts) and torch.equal(sums, expected_sums)


@pytest.mark.parametrize(
    ("stretch", "dtype"),
    [
        *((3, d) for d in INTEGERS),
        *((63, d) for d in INTEGERS),  # 126 is beyond the 16 voxels, so the ids are renumbered
        *((127, d) for d in INTEGERS if d != torch.int8),
        *((2**29, d) for d in (torch.int32, torch.int64, torch.uint32, torch.uint64)),
        *((s, torch.int64) for s in (2**31, 2**40, 2**62 - 1)),
    ],
    ids=str,
)
def test_ids_with_gaps(stretch, dtype):
    expected, labels = result(LOGITS, MASK), (IDS * stretch).to(dtype)
    assert_equal_results(result(LOGITS, None, labels), expected)
    assert_equal_results(result(LOGITS, MASK, labels), expected)
    ids = blob_loss_instances(LOGITS, instances=labels)[1]
    assert ids[ids > 0].tolist() == [stretch, 2 * stretch, stretch]
    if dtype not in (torch.uint8, *UNSIGNED):
        ignored = result(LOGITS, None, IGNORED_IDS)
        assert_equal_results(result(LOGITS, None, (IGNORED_IDS * stretch).to(dtype)), ignored)


def test_the_room_is_exactly_enough():
    for target, ids, room in ((MASK, None, 2), (None, IDS, 2), (MASK, IDS, 2), (None, IDS * 7, 14), (MASK, IDS, 900)):
        assert_equal_results(result(LOGITS, target, ids, max_instances=room), result(LOGITS, MASK))
    nothing = result(LOGITS, 0 * MASK)
    assert_equal_results(result(LOGITS, 0 * MASK, max_instances=0), nothing)
    assert_equal_results(
        result(LOGITS, None, 0 * IDS - (IDS == 1).long(), max_instances=0),
        result(LOGITS, None, 0 * IDS - (IDS == 1).long()),
    )
    _, ids = blob_loss_instances(LOGITS, instances=IDS, max_instances=2)
    assert ids.tolist() == [[[1, 2]], [[1, 0]]]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        *((d, 255) for d in (torch.uint8, torch.int16, torch.int64, *UNSIGNED, *FLOATS)),
        *((d, -1) for d in (torch.int8, torch.int64, torch.float16, torch.float32)),
        (torch.int64, -(2**40)),
        (torch.int64, 2),
    ],
    ids=str,
)
def test_ignore_index(dtype, value):
    target = MASK.masked_fill(IGNORED, value).to(dtype)
    labels = connected_components(MASK * ~IGNORED)[0].masked_fill(IGNORED, -1)
    assert_equal_results(result(LOGITS, target, ignore_index=value), result(LOGITS, None, labels))
    given = result(LOGITS, MASK * ~IGNORED, IGNORED_IDS)
    assert_equal_results(result(LOGITS, target, IDS, ignore_index=value), given)
    assert (given[-1][IGNORED] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bool, *INTEGERS, *FLOATS], ids=str)
def test_an_ignore_index_that_does_not_occur(dtype):
    """Also one that the target's dtype cannot hold: cast to it, 256 or 2^40 would be 0, the background."""
    expected = result(LOGITS, MASK)
    for value in (255, 256, 257, -1, -255, -256, 300, 2**16, 2**32, 2**40):
        for ids in (None, IDS):
            assert_equal_results(result(LOGITS, MASK.to(dtype), ids, ignore_index=value), expected)


def test_an_ignore_index_is_never_cast_to_the_target():
    """300 is 44 and -1 is 255 in 8 bits: such a target is wrong, not ignored."""
    for found, index in ((44, 300), (255, -1), (0, 256), (1, 257)):
        target = MASK.to(torch.uint8)
        target[0, 0, 1, 1] = found
        for ids in (None, IDS):
            if found > 1:
                with pytest.raises(ValueError, match=r"^target .*must be 0 or 1"):
                    result(LOGITS, target, ids, ignore_index=index)
            else:
                assert_equal_results(result(LOGITS, target, ids, ignore_index=index), result(LOGITS, target, ids))


def test_all_ignored():
    leaf = LOGITS.clone().requires_grad_()
    for target, ids, options in (
        (None, 0 * IDS - 1, {}),
        (None, -1 - IDS * 5, {}),
        (MASK * 0 + 255, None, {"ignore_index": 255}),
        (MASK.float() * 0 + 255, IDS, {"ignore_index": 255}),
        (MASK * 0 + 7, 0 * IDS - 1, {}),  # the target of an ignored voxel is not read
    ):
        for activation in ("sigmoid", "none"):
            loss = blob_loss(leaf * NAN, target, ids, activation=activation, **options)
            (gradient,) = torch.autograd.grad(loss, leaf)
            assert loss.item() == 0
            assert gradient.isnan().all()  # NaN times an exact 0: what came out of the loss is the 0
        plain = LOGITS.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(blob_loss(plain, target, ids, **options), plain)
        assert (gradient == 0).all()


def test_what_is_ignored_is_not_read():
    expected = result(LOGITS, MASK, IGNORED_IDS)
    for poison in (NAN, INF, -INF, 1e300):
        assert_equal_results(result(LOGITS.masked_fill(IGNORED, poison), MASK, IGNORED_IDS), expected)
    for label in (2, -5, 10**9):
        assert_equal_results(result(LOGITS, MASK.masked_fill(IGNORED, label), IGNORED_IDS), expected)
    assert_equal_results(result(LOGITS, MASK.double().masked_fill(IGNORED, NAN), IGNORED_IDS), expected)
    p = LOGITS.sigmoid()
    expected = result(p, MASK, IGNORED_IDS, activation="none")
    assert_equal_results(result(p.masked_fill(IGNORED, 7.0), MASK, IGNORED_IDS, activation="none"), expected)


def test_memory_layouts():
    expected = result(LOGITS3, IDS3 > 0)
    for strange in (
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
        lambda t: torch.stack([t, t + 1], -1)[..., 0],
        lambda t: t.flip(0, 3).flip(0, 3),
        lambda t: torch.cat([t + 1, t], 0)[2:],
    ):
        assert_equal_results(result(strange(LOGITS3), strange((IDS3 > 0).long())), expected)
        assert_equal_results(result(strange(LOGITS3), None, strange(IDS3)), expected)
    assert_equal_results(
        result(LOGITS.expand(2, 3, 4, 4), MASK.expand(2, 3, 4, 4)),
        result(LOGITS.repeat(1, 3, 1, 1), MASK.repeat(1, 3, 1, 1)),
    )


@pytest.mark.parametrize("channels", [2, 3])
def test_background_is_not_where_every_other_class_is_ignored(channels):
    """Ids alone say nothing of the background there, whatever channel 0 of the ids holds."""
    logits = torch.linspace(-2, 2, 6 * channels, dtype=torch.float64).view(1, channels, 6).requires_grad_()
    ids = torch.zeros(1, channels, 6, dtype=torch.int64)
    ids[:, 1:, 2] = -1
    ids[:, 1, 4] = 1
    loss = blob_loss(logits, instances=ids, activation="softmax", include_background=True)
    (grad,) = torch.autograd.grad(loss, logits)
    ids[:, 0, 2] = -1
    same = blob_loss(logits, instances=ids, activation="softmax", include_background=True)
    assert torch.equal(loss, same) and not grad[:, :, 2].any() and grad[:, :, 3].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_class_maps_of_many_classes(dtype):
    logits = torch.randn(1, 260, 8, generator=torch.Generator().manual_seed(0))
    class_map = torch.tensor([[[0, 1, 256, 256, 0, 0, 2, 0]]])
    expected = result(logits, class_map, activation="softmax")
    assert_equal_results(result(logits, class_map.to(dtype), activation="softmax"), expected)


@pytest.mark.parametrize(("dtype", "channels"), [(torch.int8, 130), (torch.uint8, 260)], ids=str)
def test_class_maps_in_a_dtype_that_does_not_hold_the_number_of_channels(dtype, channels):
    logits = torch.randn(1, channels, 8, generator=torch.Generator().manual_seed(0))
    class_map = torch.tensor([[[0, 1, 120, 120, 0, 0, 2, 0]]])
    expected = result(logits, class_map, activation="softmax", include_background=True)
    assert_equal_results(result(logits, class_map.to(dtype), activation="softmax", include_background=True), expected)


def test_an_ignore_index_is_compared_exactly():
    target = torch.tensor([[[0, 1, 2**24 + 1]]])
    with pytest.raises(ValueError, match="target"):
        blob_loss(torch.zeros(1, 1, 3), target, ignore_index=2**24)
    with pytest.raises(ValueError, match="target"):
        blob_loss(torch.zeros(1, 1, 3), target, torch.zeros_like(target), ignore_index=2**24)


def test_huge_unsigned_targets_do_not_wrap():
    target = torch.tensor([[[0, 1, 2**64 - 1]]], dtype=torch.uint64)
    with pytest.raises(ValueError, match="target must be below"):
        blob_loss(torch.zeros(1, 1, 3), target, ignore_index=-1)


def test_softmax_labels():
    """Two channels: one channel of ids or two, whatever the first of the two holds; a class map or one-hot."""
    two = LOGITS3[:, :2]
    expected = result(two, MASK, activation="softmax")
    for target, ids in (
        (MASK.float(), None),
        (MASK.bool(), None),
        (torch.cat([1 - MASK, MASK], 1), None),
        (None, IDS),
        (None, torch.cat([0 * IDS, IDS], 1)),
        (None, torch.cat([IDS + 5, IDS], 1)),
        (None, torch.cat([IDS * 2**40, IDS], 1)),
        (MASK, torch.cat([IDS + 5, IDS], 1)),
    ):
        assert_equal_results(result(two, target, ids, activation="softmax"), expected)


def test_options_of_unusual_types():
    expected = result(LOGITS, MASK, main_weight=2.0, blob_weight=0.5)
    assert_equal_results(result(LOGITS, MASK, main_weight=2, blob_weight=np.float32(0.5)), expected)
    for features in (["nll_pos", "prob"], ("nll_pos", "prob"), iter(["nll_pos", "prob"])):
        _, sums = segment_stats(LOGITS, IDS, 3, features)
        assert sums.shape == (2, 1, 3, 2)
        assert torch.equal(sums[..., 0], segment_stats(LOGITS, IDS, 3, ("nll_pos",))[1][..., 0])
        assert torch.equal(sums[..., 1], segment_stats(LOGITS, IDS, 3)[1][..., 0])
    counts, sums = segment_stats(LOGITS, IDS, 40)
    assert (
        torch.equal(counts[..., :3], segment_stats(LOGITS, IDS, 3)[0])
        and counts[..., 3:].sum() == sums[..., 3:].sum() == 0
    )


def test_a_volume_of_one_voxel():
    for axes in (1, 2, 3):
        one = [1] * axes
        p, y = torch.full((1, 1, *one), 0.25, dtype=torch.float64), torch.ones(1, 1, *one)
        main, blob = blob_loss_terms(p, y, activation="none", criterion=criteria.bce())
        assert main.item() == blob.item() == pytest.approx(np.log(4.0), rel=1e-12)


def test_certain_probabilities():
    """0 and 1 are probabilities; with everything right Dice is 0."""
    main, blob = blob_loss_terms(MASK.double(), MASK, activation="none")
    assert main.item() == pytest.approx(0, abs=1e-12) and blob.item() == pytest.approx(0, abs=1e-12)
