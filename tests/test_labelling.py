"""Instance labels from masks: bit for bit scipy's, and the labels that the loss finds in a target of its own."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from blobloss_fast import BlobLoss, _ops, blob_loss_instances, connected_components, criteria
from blobloss_fast.kernels import labels as kernel
from blobloss_fast.kernels import native, native_labels

from .tolerances import assert_fp64

ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is not installed: it is the truth of the labels")
pytestmark = pytest.mark.usefixtures("cpu_backend")

# (spatial axes, connectivity) -> how many axes two neighbours may differ in
ORDER = {(1, 26): 1, (2, 4): 1, (2, 8): 2, (2, 26): 2, (3, 6): 1, (3, 18): 2, (3, 26): 3}
CASES = pytest.mark.parametrize(("axes", "connectivity"), ORDER, ids=lambda value: str(value))
SHAPES = {
    1: [(1,), (2,), (37,), (256,)],
    2: [(1, 1), (1, 17), (17, 1), (2, 2), (13, 7), (32, 33)],
    3: [(1, 1, 1), (1, 1, 19), (1, 19, 1), (19, 1, 1), (1, 9, 11), (9, 1, 11), (9, 11, 1), (7, 8, 9), (16, 17, 5)],
}
DENSITIES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)


@pytest.fixture(params=["native", "cc3d"], autouse=True)
def labelling(request, monkeypatch):
    """Run every test on the labels of the native library and on cc3d's, under the same backend of the loss."""
    if request.param == "native" and not native.available():
        pytest.skip(native.why_not() or "")
    monkeypatch.setattr(_ops, "_labels_for_cpu", lambda: {"native": native_labels, "cc3d": kernel}[request.param])


def scipy_labels(mask: Tensor, connectivity: int) -> tuple[Tensor, Tensor]:
    """scipy's labels of every sample and channel alone: int32 like the mask, and int64 counts ``[B, C]``."""
    axes = mask.ndim - 2
    structure = ndimage.generate_binary_structure(axes, ORDER[axes, connectivity])
    labels, counts = np.zeros(mask.shape, np.int32), np.zeros(mask.shape[:2], np.int64)
    foreground = (mask != 0).numpy()
    for b, c in np.ndindex(*counts.shape):
        labels[b, c], counts[b, c] = ndimage.label(foreground[b, c], structure)
    return torch.from_numpy(labels), torch.from_numpy(counts)


def random_mask(*shape: int, density: float = 0.3, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def assert_scipys(mask: Tensor, connectivity: int, truth: Tensor | None = None) -> None:
    labels, counts = connected_components(mask, connectivity)
    expected, expected_counts = scipy_labels(mask if truth is None else truth, connectivity)
    assert labels.dtype == torch.int32 and counts.dtype == torch.int64
    assert labels.is_contiguous()
    assert torch.equal(counts, expected_counts), f"{tuple(mask.shape)}: {counts.tolist()}, {expected_counts.tolist()}"
    assert torch.equal(labels, expected), f"{tuple(mask.shape)} at {connectivity}"


# ---------------------------------------------------------------------------------- scipy, bit for bit


@CASES
def test_every_small_mask(axes, connectivity):
    """All masks there are of a small shape: 1,024 lines of 10, 4,096 planes of 3 x 4, 4,096 volumes of 2 x 2 x 3."""
    shape = {1: (10,), 2: (3, 4), 3: (2, 2, 3)}[axes]
    voxels = int(np.prod(shape))
    masks = (torch.arange(2**voxels)[:, None] >> torch.arange(voxels)) & 1
    assert_scipys(masks.reshape(-1, 1, *shape), connectivity)


@CASES
def test_random_masks(axes, connectivity):
    for (i, shape), (j, density) in itertools.product(enumerate(SHAPES[axes]), enumerate(DENSITIES)):
        assert_scipys(random_mask(3, 2, *shape, density=density, seed=100 * i + j), connectivity)


@CASES
def test_full_empty_and_checkerboards(axes, connectivity):
    for shape in SHAPES[axes]:
        parity = torch.from_numpy(np.indices(shape).sum(0) % 2)
        empty, full = torch.zeros(shape), torch.ones(shape)
        mask = torch.stack([empty, full, parity == 0, parity == 1])[None]
        assert_scipys(mask, connectivity)
        counts = connected_components(mask, connectivity)[1]
        assert counts[0, :2].tolist() == [0, 1]
        if axes == 1 or connectivity in (4, 6):  # no two voxels of a checkerboard share a face
            assert counts[0, 2:].tolist() == [int((parity == 0).sum()), int((parity == 1).sum())]


@CASES
def test_one_voxel_at_each_place(axes, connectivity):
    shape = (4, 3, 2)[:axes]
    voxels = int(np.prod(shape))
    labels, counts = connected_components(torch.eye(voxels).reshape(voxels, 1, *shape), connectivity)
    assert torch.equal(labels.reshape(voxels, voxels), torch.eye(voxels, dtype=torch.int32))
    assert counts.flatten().tolist() == [1] * voxels


def test_neighbourhoods_by_hand():
    """Three voxels that meet over an edge (1 and 2) and over a corner (2 and 3)."""
    mask = torch.zeros(1, 1, 3, 3, 3, dtype=torch.bool)
    for voxel in ((0, 0, 0), (0, 1, 1), (1, 2, 2)):
        mask[0, 0][voxel] = True
    for connectivity, ids in ((6, [1, 2, 3]), (18, [1, 1, 2]), (26, [1, 1, 1])):
        labels, counts = connected_components(mask, connectivity)
        assert labels[mask].tolist() == ids and counts.tolist() == [[max(ids)]]
    diagonal = torch.eye(3)[None, None]
    assert [int(connected_components(diagonal, k)[1]) for k in (4, 8, 26)] == [3, 1, 1]
    assert torch.equal(connected_components(mask)[0], connected_components(mask, 26)[0])
    assert torch.equal(connected_components(diagonal)[0], connected_components(diagonal, 8)[0])


@CASES
def test_samples_and_channels_are_alone(axes, connectivity):
    """Each is numbered from 1, and nothing joins across samples or channels, though all touch in memory."""
    mask = random_mask(3, 4, *(6, 5, 4)[:axes], density=0.4)
    mask[1, 2] = False
    labels, counts = connected_components(mask, connectivity)
    for b, c in np.ndindex(3, 4):
        alone, count = connected_components(mask[b : b + 1, c : c + 1], connectivity)
        assert torch.equal(labels[b, c], alone[0, 0])
        assert counts[b, c] == count == labels[b, c].max()
    assert counts[1, 2] == 0


@CASES
def test_foreground_in_a_part_of_the_volume(axes, connectivity):
    """At every border and at none, another part in every sample and channel, down to one voxel."""
    shape = (7, 6, 5)[:axes]
    parts = [(0, 3), (2, 4), (3, 5), (4, 5)]  # begin and end along each axis; the 5 of the last two stands for the end
    mask = torch.zeros(2, len(parts) ** axes, *shape, dtype=torch.bool)
    for channel, ends in enumerate(itertools.product(parts, repeat=axes)):
        box = tuple(slice(begin, end if end < 5 else None) for begin, end in ends)
        for b, sample in enumerate(mask):
            sample[channel][box] = random_mask(*sample[channel][box].shape, density=0.6, seed=channel + 1000 * b)
    assert_scipys(mask, connectivity)


# --------------------------------------------------------------------------- dtypes and memory layouts

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
)


@CASES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, axes, connectivity):
    for shape in SHAPES[axes]:
        mask = random_mask(2, 2, *shape, density=0.4)
        assert_scipys(mask.to(dtype), connectivity, truth=mask)


@CASES
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32], ids=str)
def test_memory_layouts(dtype, axes, connectivity):
    shape = (8, 7, 6)[:axes]
    mask = random_mask(2, 3, *shape, density=0.45).to(dtype)
    fortran = mask.permute(*reversed(range(mask.ndim))).contiguous().permute(*reversed(range(mask.ndim)))
    spatially = mask.transpose(2, -1).contiguous().transpose(2, -1)
    padded = torch.ones(4, 6, *(2 * n + 1 for n in shape), dtype=dtype)  # what a slice must not read
    sliced = padded[(slice(1, 3), slice(None, None, 2), *(slice(1, None, 2) for _ in shape))]
    sliced.copy_(mask)
    channels_last = mask.movedim(1, -1).contiguous().movedim(-1, 1)
    for view in (mask, fortran, spatially, sliced, channels_last):
        assert torch.equal(view, mask)
        assert_scipys(view, connectivity)
    assert_scipys(mask[:1, :1].expand(2, 3, *shape), connectivity)
    if axes > 1:
        assert_scipys(mask.transpose(2, -1), connectivity)
    from_numpy = torch.from_numpy(np.asfortranarray(mask.numpy()))
    assert_scipys(from_numpy, connectivity)


def test_the_mask_is_left_alone():
    for dtype in DTYPES:
        mask = random_mask(2, 2, 5, 6).to(dtype)
        before = mask.clone()
        connected_components(mask)[0].fill_(7)
        BlobLoss(ignore_index=1)(torch.zeros(mask.shape), mask)
        assert torch.equal(mask, before)


# ---------------------------------------------------------------------------- values, and where they are compared


def test_values_that_a_rounded_or_narrower_number_would_hide():
    """Each is 0 or 1 to a cast that wraps, truncates or rounds; none is a class."""
    wrong = {
        torch.uint8: (2, 128, 255),
        torch.int8: (-1, -128),
        torch.int16: (256, 257, -256),
        torch.int32: (2**16, 2**16 + 1, -(2**31)),
        torch.int64: (2**32, 2**32 + 1, -(2**63)),
        torch.float32: (1 + 2**-23, 1 - 2**-24, 2.0**-149, -1e-30, math.inf, -math.inf, math.nan, 2.0**32, 256.0),
        torch.float64: (1 + 2**-52, 5e-324, 2.0**64),
    }
    for dtype, values in wrong.items():
        for value in values:
            target = torch.zeros(2, 1, 3, 4, dtype=dtype)
            target[0, 0, 1, 1], target[1, 0, 2, 3] = 1, value
            for ignore in (None, 7, 0, 1):
                with pytest.raises(ValueError, match="0 or 1"):
                    _ops.label_target(target, 1, False, False, 26, ignore)
                with pytest.raises(ValueError, match="class map"):
                    _ops.label_target(target, 2, True, True, 26, ignore)
            with pytest.raises(ValueError, match="0 or 1"):
                connected_components(target)
    assert connected_components(torch.tensor([[[-0.0, 1.0]]]))[0].tolist() == [[[0, 1]]]


def test_classes_and_ignored_values_beyond_the_dtype(monkeypatch):
    """Neither wraps to a value that is there: 300 classes of a uint8 map, ignored values of any size."""
    monkeypatch.setattr(kernel, "_on_host", lambda tensor: False)  # for what is called directly: PyTorch compares
    channels = 300
    for dtype in (torch.uint8, torch.int16, torch.int64, torch.float32):
        drawn = torch.randint(0, 256 if dtype == torch.uint8 else channels, (1, 1, 31, 29))
        expected = labels_per_class(drawn, channels, 8)
        for ignore in (-1, 255, 256, 2**40):
            for label_target in (_ops.label_target, kernel.label_target):
                labels, counts = label_target(drawn.to(dtype), channels, True, True, 8, ignore)
                assert torch.equal(labels, expected.masked_fill(drawn == ignore, -1))
                assert torch.equal(counts, labels.clamp(min=0).amax((2, 3)).long())


@CASES
def test_comparisons_on_a_device(axes, connectivity, monkeypatch):
    """What happens to a tensor of a device, here on the CPU: PyTorch compares, and the rest is as on the CPU."""
    shape = (2, 3, *(8, 7, 6)[:axes])
    mask, ignored = random_mask(*shape, density=0.4).long(), random_mask(*shape, density=0.2, seed=1)
    classes = (mask + mask * ignored.roll(1, -1))[:, :1]
    calls = [
        ("label_target", target.to(dtype).masked_fill(where, value), 3, class_map, class_map, connectivity, ignore)
        for dtype in (torch.uint8, torch.int64, torch.float32, torch.float64)
        for target, where, class_map in ((mask, ignored, False), (classes, ignored[:, :1], True))
        for value, ignore in ((255, 255), (1, 1), (0, 0), (1, 0), (0, None))
    ]
    calls += [("connected_components", mask.to(dtype), connectivity) for dtype in (torch.bool, torch.float32)]
    expected = [getattr(_ops, function)(*arguments) for function, *arguments in calls]
    monkeypatch.setattr(kernel, "_on_host", lambda tensor: False)
    for (function, *arguments), labels in zip(calls, expected, strict=True):
        for a, b in zip(getattr(kernel, function)(*arguments), labels, strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype


# ---------------------------------------------------------------------------- labels found by the loss

CRITERION = criteria.dice() + 0.5 * criteria.bce()
BY_DIMENSION = pytest.mark.parametrize(("axes", "connectivity"), [(1, 26), (2, 4), (2, 26), (3, 6), (3, 18), (3, 26)])
SPARSE = {1: 0.3, 2: 0.25, 3: 0.1}  # densities at which every connectivity finds several instances
VOLUME = {1: (60,), 2: (12, 11), 3: (9, 7, 6)}


def assert_same_loss(found: tuple, given: tuple, channels: int, axes: int, **options) -> None:
    """The loss on the first (target, instances) is the loss on the second: terms, every instance, and gradient.

    Bit for bit where the second is ids alone; to rounding where it also has a target, whose table has other cells.
    """
    logits = 3 * torch.randn(2, channels, *VOLUME[axes], generator=torch.Generator().manual_seed(3)).double()
    loss = BlobLoss(CRITERION, main_weight=0.7, blob_weight=1.9, **options)
    results = []
    for target, instances in (found, given):
        x = logits.clone().requires_grad_()
        losses, ids = loss.instance_losses(x, target, instances)
        value, terms = loss(x, target, instances), torch.stack(loss.terms(x, target, instances))
        (gradient,) = torch.autograd.grad(value, x)
        results.append((ids, value.detach(), terms.detach(), losses.detach(), gradient))
    for a, b in zip(*results, strict=True):
        if given[0] is None or a.dtype == torch.int64:
            assert torch.equal(a, b)
        else:
            assert_fp64(a, b)
    ids, value, _, losses, gradient = results[0]
    assert value.isfinite() and gradient.abs().max() > 1e-4, "an empty loss shows nothing"
    assert ids.max() >= 3 and torch.equal(losses != 0, ids > 0)


def classes_of(axes: int, channels: int, seed: int = 4) -> Tensor:
    """A class map with much background, in which classes touch."""
    drawn = torch.randint(1, channels, (2, 1, *VOLUME[axes]), generator=torch.Generator().manual_seed(seed))
    return drawn.where(random_mask(2, 1, *VOLUME[axes], density=SPARSE[axes] * (1 if channels == 2 else 2)), 0)


def labels_per_class(classes: Tensor, channels: int, connectivity: int) -> Tensor:
    """scipy's labels of each class alone; channel 0, the background, has none."""
    hot = classes == torch.arange(channels).view(1, -1, *([1] * (classes.ndim - 2)))
    labels = scipy_labels(hot, connectivity)[0]
    labels[:, 0] = 0
    return labels


@BY_DIMENSION
@pytest.mark.parametrize("channels", [1, 3])
def test_bare_mask(channels, axes, connectivity):
    mask = random_mask(2, channels, *VOLUME[axes], density=SPARSE[axes])
    labels = scipy_labels(mask, connectivity)[0]
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32):
        assert_same_loss((mask.to(dtype), None), (None, labels), channels, axes, connectivity=connectivity)
    assert_same_loss((mask, None), (mask, labels), channels, axes, connectivity=connectivity)


@BY_DIMENSION
def test_bare_mask_with_ignored_voxels(axes, connectivity):
    """An ignored voxel parts what it lies between, belongs to no instance, and is ignored by both terms."""
    mask, ignored = (
        random_mask(2, 2, *VOLUME[axes], density=d, seed=s) for d, s in ((1.5 * SPARSE[axes], 0), (0.2, 9))
    )
    labels = scipy_labels(mask & ~ignored, connectivity)[0].masked_fill(ignored, -1)
    for dtype, value in ((torch.uint8, 255), (torch.int8, -1), (torch.int64, 255), (torch.float32, 255)):
        target = mask.to(dtype).masked_fill(ignored, value)
        options = {"connectivity": connectivity, "ignore_index": value}
        assert_same_loss((target, None), (None, labels), 2, axes, **options)
        assert_same_loss((target, None), (target, labels), 2, axes, **options)


@BY_DIMENSION
@pytest.mark.parametrize("include_background", [False, True])
@pytest.mark.parametrize("channels", [2, 4])
def test_class_map_and_one_hot(channels, include_background, axes, connectivity):
    classes = classes_of(axes, channels)
    one_hot = classes == torch.arange(channels).view(1, -1, *([1] * axes))
    labels = labels_per_class(classes, channels, connectivity)
    options = {"activation": "softmax", "include_background": include_background, "connectivity": connectivity}
    for target in (classes, classes.to(torch.uint8), classes.float(), one_hot, one_hot.float()):
        assert_same_loss((target, None), (None, labels), channels, axes, **options)
        assert_same_loss((target, None), (target, labels), channels, axes, **options)
    if channels == 2:
        assert_same_loss((classes, None), (None, labels[:, 1:]), channels, axes, **options)


@BY_DIMENSION
@pytest.mark.parametrize("include_background", [False, True])
@pytest.mark.parametrize("channels", [2, 4])
def test_class_map_with_ignored_voxels(channels, include_background, axes, connectivity):
    classes, ignored = classes_of(axes, channels), random_mask(2, 1, *VOLUME[axes], seed=9, density=0.2)
    labels = labels_per_class(classes.masked_fill(ignored, 0), channels, connectivity).masked_fill(ignored, -1)
    options = {
        "activation": "softmax",
        "include_background": include_background,
        "connectivity": connectivity,
        "ignore_index": 255,
    }
    for dtype in (torch.uint8, torch.int64, torch.float32):
        target = classes.to(dtype).masked_fill(ignored, 255)
        assert_same_loss((target, None), (None, labels), channels, axes, **options)
        assert_same_loss((target, None), (target, labels), channels, axes, **options)


@pytest.mark.parametrize("value", [0, 1, 2])
def test_the_ignored_value_may_be_a_class(value):
    """Whatever it is, its voxels are ignored in every channel: no instance, no background."""
    classes = classes_of(2, 4)
    labels = labels_per_class(classes, 4, 26).masked_fill(classes == value, -1)
    for include_background in (False, True):
        options = {"activation": "softmax", "include_background": include_background, "ignore_index": value}
        assert_same_loss((classes, None), (classes, labels), 4, 2, **options)
        assert_same_loss((classes.byte(), None), (None, labels), 4, 2, **options)
    if value == 0:  # only the instances are left of a mask
        mask = random_mask(2, 2, *VOLUME[2], density=SPARSE[2])
        labels = scipy_labels(mask, 8)[0].masked_fill(~mask, -1)
        assert_same_loss((mask, None), (None, labels), 2, 2, ignore_index=0)
        assert_same_loss((mask, None), (mask, labels), 2, 2, ignore_index=0)


def test_classes_that_touch_stay_apart_and_the_background_has_no_instance():
    """1 1 2 2 0 1: one blob of class 2, two of class 1, none of class 0, though class 0 is there."""
    classes = torch.tensor([[[1, 1, 2, 2, 0, 1]]])
    logits = torch.zeros(1, 3, 6)
    for include_background in (False, True):
        options = {"activation": "softmax", "include_background": include_background}
        losses, ids = blob_loss_instances(logits, classes, **options)
        assert ids.tolist() == [[[0, 0], [1, 2], [1, 0]]]
        assert (losses[0, 0] == 0).all()
        p, domain = 1 / 3, 2  # class 1 sees its blob and the two voxels that are not class 1 by being class 2 or 0
        blobs = [1 - 2 * n * p / ((n + domain + 1) * p + n) for n in (2, 1)]
        assert losses[0, 1].tolist() == pytest.approx(blobs, abs=1e-4)


def test_a_mask_without_foreground():
    logits = torch.zeros(2, 1, 4, 4, requires_grad=True)
    main, blob = BlobLoss().terms(logits, torch.zeros(2, 1, 4, 4))
    assert blob.item() == 0 and blob.requires_grad
    losses, ids = BlobLoss().instance_losses(logits, torch.zeros(2, 1, 4, 4))
    assert losses.shape == ids.shape == (2, 1, 0)
    assert main.item() == pytest.approx(1 - 1e-5 / (8 + 1e-5), abs=1e-6)
