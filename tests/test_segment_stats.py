"""The table of sums and its gradient against the oracle, for the kernels of every backend."""

from __future__ import annotations

import math
from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import Tensor

from blobloss_fast.kernels.layout import FEATURES

from . import oracle, scenes
from .tolerances import assert_fp64, relative_to_largest

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
TARGETS = (torch.bool, *INTEGERS, torch.float16, torch.bfloat16, torch.float32, torch.float64)
INF = math.inf


@pytest.fixture(params=["reference", "native"])
def backend(request) -> ModuleType:
    """A module with ``segment_stats_forward`` and ``segment_stats_backward``."""
    module = import_module(f"blobloss_fast.kernels.{request.param}")
    if request.param == "native" and not module.available():
        pytest.skip(module.why_not())
    return module


def random_grad(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)


def run(backend, logits, ids, target, num_cells, features=FEATURES, activation="sigmoid", gamma=2.0, channel0="class"):
    """(counts, sums, gradient for a fixed random gradient of the sums)"""
    counts, sums = backend.segment_stats_forward(logits, ids, target, num_cells, features, activation, gamma, channel0)
    grad_sums = random_grad(*sums.shape).to(sums.dtype)
    grad = backend.segment_stats_backward(grad_sums, logits, ids, target, features, activation, gamma, channel0)
    assert grad.dtype == logits.dtype
    assert grad.shape == logits.shape
    assert grad.is_contiguous()
    return counts, sums, grad


def truth(logits, ids, target, num_cells, features=FEATURES, activation="sigmoid", gamma=2.0, channel0="class"):
    logits = logits.detach().double().requires_grad_()
    cells = oracle.cells_of(logits, ids, target, channel0)
    counts, sums = oracle.segment_stats(logits, cells, num_cells, features, activation, gamma)
    (grad,) = torch.autograd.grad(sums, logits, random_grad(*sums.shape))
    return counts, sums, grad


def check(actual, expected, what: str) -> None:
    assert torch.equal(actual[0], expected[0]), f"{what}: counts"
    assert actual[0].dtype == torch.int64
    assert_fp64(actual[1], expected[1], f"{what}: sums")
    assert_fp64(actual[2], expected[2], f"{what}: gradient")


def kernel_scene(scene: scenes.Scene, labels: str) -> tuple[Tensor, Tensor | None, int]:
    """(ids, target, num_cells): a kernel knows no ignore_index and no ids that are found on the fly."""
    channels = scene.logits.shape[1]
    ids = scene.instances if scene.instances is not None else (scene.target == 1).long()
    target = scene.target if scene.target is not None else (ids > 0).long()
    if labels == "ids" or (labels == "classes" and channels == 1):
        return ids, None, int(ids.max().clamp(min=0)) + 1
    if target.shape[1] > 1 and labels == "classes":
        target = scenes.class_map(target)
    elif target.shape[1] < channels and labels == "binary":
        target = scenes.one_hot(target, channels)
    ids = torch.where((target == scenes.IGNORE).any(1, keepdim=True), -1, ids)
    return ids, target, 2 * (int(ids.max().clamp(min=0)) + 1)


# ---------------- kernel level


@pytest.mark.parametrize("channel0", ["class", "background", "unused"])
@pytest.mark.parametrize("labels", ["ids", "binary", "classes"])
@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_against_the_oracle(backend, activation, labels, channel0):
    for scene in scenes.telling_scenes(activation):
        ids, target, num_cells = kernel_scene(scene, labels)
        arguments = (scene.logits, ids, target, num_cells, FEATURES, activation, 2.0, channel0)
        check(run(backend, *arguments), truth(*arguments), scene.name)


@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
@pytest.mark.parametrize(
    "features", [*((f,) for f in FEATURES), FEATURES[::-1], ("nll_neg", "prob"), ("focal_neg", "prob_sq")]
)
def test_features_alone_and_in_any_order(backend, features, activation):
    scene = scenes.scene(2, 3, "ignored", activation)
    arguments = (scene.logits, scene.instances, None, 5, features, activation)
    check(run(backend, *arguments), truth(*arguments), str(features))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_gamma(backend, activation, gamma):
    scene = scenes.scene(1, 2, "plain", activation)
    arguments = (scene.logits, scene.instances, None, 5, ("focal_pos", "focal_neg", "nll_pos"), activation, gamma)
    check(run(backend, *arguments), truth(*arguments), f"gamma {gamma}")


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integer_dtypes_of_ids(backend, dtype):
    scene = scenes.scene(3, 2, "plain" if dtype == torch.uint8 else "ignored", "softmax")
    ids = scene.instances
    for target in (None, (ids > 0).long()):
        expected = truth(scene.logits, ids, target, 10, activation="softmax")
        check(run(backend, scene.logits, ids.to(dtype), target, 10, activation="softmax"), expected, str(dtype))


@pytest.mark.parametrize("dtype", TARGETS, ids=str)
def test_dtypes_of_targets(backend, dtype):
    scene = scenes.scene(2, 3, "ignored", "softmax")
    binary = (scene.instances > 0).long()
    kinds = {"binary": binary, "classes": scenes.class_map(binary)}
    if dtype == torch.bool:
        del kinds["classes"]
    for kind, target in kinds.items():
        expected = truth(scene.logits, scene.instances, target, 10, activation="softmax")
        actual = run(backend, scene.logits, scene.instances, target.to(dtype), 10, activation="softmax")
        check(actual, expected, f"{kind} {dtype}")


def test_one_map_of_ids_for_all_channels(backend):
    for activation in scenes.ACTIVATIONS:
        scene = scenes.scene(2, 3, "ignored", activation)
        shared = scene.instances[:, :1]
        target = (scene.instances > 0).long()
        for labels in (None, target, scenes.class_map(target)):
            expected = truth(scene.logits, shared.expand_as(scene.logits), labels, 10, activation=activation)
            check(run(backend, scene.logits, shared, labels, 10, activation=activation), expected, activation)


@pytest.mark.parametrize("lowest", [0, -1], ids=["nothing ignored", "ignored voxels"])
@pytest.mark.parametrize("num_cells", [1, 3])
def test_rows_that_need_padding_count_every_voxel_once(backend, num_cells, lowest):
    """The reference cuts a volume into a power of two of rows, of 4096 voxels or more: an odd one fills no last row."""
    shape = (1, 1, 23, 29, 31)
    ids = torch.randint(lowest, num_cells, shape, generator=torch.Generator().manual_seed(7))
    assert int(ids.min()) == lowest
    arguments = (scenes.random_logits(shape), ids, None, num_cells)
    actual = run(backend, *arguments)
    assert int(actual[0].sum()) == int((ids >= 0).sum())
    check(actual, truth(*arguments), f"{num_cells} cells, ids from {lowest}")


def strided(volume: Tensor) -> dict[str, Tensor]:
    """The same values in other strides."""
    padded = torch.zeros([n + 2 for n in volume.shape], dtype=volume.dtype)
    inner = padded[tuple(slice(1, -1) for _ in volume.shape)]
    inner.copy_(volume)
    spread = torch.zeros([*volume.shape[:-1], 2 * volume.shape[-1]], dtype=volume.dtype)[..., ::2]
    spread.copy_(volume)
    backwards = volume.transpose(0, -1).contiguous().transpose(0, -1)
    layouts = {"slice": inner, "every second voxel": spread, "transposed": backwards}
    if volume.ndim in (4, 5):
        form = torch.channels_last if volume.ndim == 4 else torch.channels_last_3d
        layouts["channels last"] = volume.contiguous(memory_format=form)
    return layouts


@pytest.mark.parametrize("dim", scenes.DIMS)
@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_strides(backend, activation, dim):
    scene = scenes.scene(dim, 3, "disagree", activation)
    target = scene.target if scene.target.shape[1] > 1 else scenes.one_hot(scene.target, 3)
    arguments = {"logits": scene.logits, "ids": scene.instances, "target": target}
    expected = truth(*arguments.values(), 12, activation=activation)
    for name in arguments:
        for layout, volume in strided(arguments[name]).items():
            assert torch.equal(volume, arguments[name])
            changed = arguments | {name: volume}
            check(run(backend, *changed.values(), 12, activation=activation), expected, f"{name} {layout}")
    every = [strided(v)["every second voxel"] for v in arguments.values()]
    check(run(backend, *every, 12, activation=activation), expected, "all strided")


def test_expanded_input(backend):
    scene = scenes.scene(2, 2, "plain")
    logits = scene.logits[:1, :1].expand(3, 2, 5, 7)
    ids = scene.instances[:1].expand(3, 2, 5, 7)
    target = (scene.instances[:1, :1] > 0).long().expand(3, 2, 5, 7)
    contiguous = [v.contiguous() for v in (logits, ids, target)]
    check(run(backend, logits, ids, target, 12), truth(*contiguous, 12), "expanded")


@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_ignored_voxels_are_not_read_and_get_no_gradient(backend, activation):
    scene = scenes.scene(3, 3, "plain", activation)
    ids = scene.instances.clone()
    ids[:, :, 1:] = torch.where(ids[:, :, 1:] == 2, -1, ids[:, :, 1:])
    ids[0, :, 0, 0] = -5  # in every channel
    ids[1, 1, 2] = -2  # in one channel
    ignored = ids < 0 if activation != "softmax" else (ids < 0).all(1, keepdim=True).expand_as(ids)
    for target in (None, (ids > 0).long(), scenes.class_map((ids > 0).long())):
        clean = run(backend, scene.logits, ids, target, 10, activation=activation)
        for poison in (math.nan, INF, -INF):
            logits = torch.where(ignored, poison, scene.logits)
            poisoned = run(backend, logits, ids, target, 10, activation=activation)
            for a, b in zip(poisoned, clean, strict=True):
                assert torch.equal(a, b), f"{poison} in an ignored voxel changed something"
            assert (poisoned[2][ignored] == 0).all()
        if target is not None:  # nor is the target read there
            where = (ids < 0) if target.shape[1] == 3 else (ids < 0).all(1, keepdim=True)
            odd = run(backend, scene.logits, ids, torch.where(where, 77, target), 10, activation=activation)
            for a, b in zip(odd, clean, strict=True):
                assert torch.equal(a, b)


def test_an_unused_channel_0_of_a_softmax_is_not_read_where_the_others_are_ignored(backend):
    scene = scenes.scene(2, 3, "plain", "softmax")
    ids = scene.instances.clone()
    ids[0, 1:, 2:4] = -1
    ids[0, 0] = 0
    logits = scene.logits.clone()
    logits[0, :, 2:4] = math.nan
    _, sums, grad = run(backend, logits, ids, None, 5, activation="softmax", channel0="unused")
    assert sums.isfinite().all()
    assert (grad[0, :, 2:4] == 0).all()
    assert (grad[:, 0] != 0).any()  # the other classes' probabilities depend on it


SIDES = {  # x: (value, derivative) of each feature at x = +-inf, gamma = 2
    INF: {
        "prob": (1, 0),
        "prob_sq": (1, 0),
        "nll_pos": (0, 0),
        "nll_neg": (INF, 1),
        "focal_pos": (0, 0),
        "focal_neg": (INF, 1),
    },
    -INF: {
        "prob": (0, 0),
        "prob_sq": (0, 0),
        "nll_pos": (INF, -1),
        "nll_neg": (0, 0),
        "focal_pos": (INF, -1),
        "focal_neg": (0, 0),
    },
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("x", [INF, -INF])
def test_infinite_logits(backend, x, gamma, dtype):
    logits = torch.tensor([[[x, 0.5]]], dtype=dtype)
    ids = torch.tensor([[[1, 0]]])
    for name, (value, slope) in SIDES[x].items():
        _, sums = backend.segment_stats_forward(logits, ids, None, 2, (name,), "sigmoid", gamma, "class")
        grad = backend.segment_stats_backward(
            torch.ones_like(sums), logits, ids, None, (name,), "sigmoid", gamma, "class"
        )
        assert float(sums[0, 0, 1, 0]) == value, name
        assert sums[0, 0, 0, 0].isfinite(), name
        assert float(grad[0, 0, 0]) == slope, name


@pytest.mark.parametrize("x", [INF, -INF])
@pytest.mark.parametrize("channels", [2, 3, 5])
def test_infinite_logits_of_a_softmax(backend, channels, x):
    """One infinite channel is the limit of a huge one: p is exactly 0 and 1, slopes are finite, -log 0 is infinite."""
    finite = scenes.random_logits((1, channels, 3))
    finite[0, 1, 0] = math.copysign(1e4, x)
    logits = finite.clone()
    logits[0, 1, 0] = x
    ids = torch.tensor([[[1, 0, 2]]])
    counts, sums, grad = truth(finite, ids, None, 3, activation="softmax")
    sums = torch.where(sums > 5e3, INF, sums)
    check(run(backend, logits, ids, None, 3, activation="softmax"), (counts, sums, grad), f"{channels} {x}")


@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_nan_poisons_its_cell_and_its_voxel_only(backend, activation):
    scene = scenes.scene(2, 2, "plain", activation)
    logits = scene.logits.clone()
    logits[0, 1, 2, 3] = math.nan
    k = int(scene.instances[0, 1, 2, 3])
    clean = run(backend, scene.logits, scene.instances, None, 5, activation=activation)
    counts, sums, grad = run(backend, logits, scene.instances, None, 5, activation=activation)
    assert torch.equal(counts, clean[0])
    poisoned = torch.zeros(sums.shape, dtype=torch.bool)
    poisoned[0, 1, k] = True
    at = torch.zeros(grad.shape, dtype=torch.bool)
    at[0, 1, 2, 3] = True
    if activation == "softmax":  # all probabilities of the voxel are NaN
        poisoned[0, 0, int(scene.instances[0, 0, 2, 3])] = True
        at[0, 0, 2, 3] = True
    assert torch.equal(sums.isnan(), poisoned)
    assert torch.equal(grad.isnan(), at)
    assert_fp64(sums[~poisoned], clean[1][~poisoned])
    assert_fp64(grad[~at], clean[2][~at])


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_extreme_logits(backend, scale, activation):
    scene = scenes.scene(2, 3, "plain", activation)
    logits = scale * scene.logits.sign() * (1 + 0.1 * scene.logits.abs())
    arguments = (logits, scene.instances, None, 5, FEATURES, activation)
    check(run(backend, *arguments), truth(*arguments), f"+-{scale}")


def test_probabilities_of_exactly_0_and_1(backend):
    """As torch's binary cross-entropy: logarithms stop at -100 and p (1 - p) at 1e-12.

    By hand and not through torch: its fp64 kernel reads that 1e-12 as an fp32 constant, 4e-9 off.
    """
    p = torch.tensor([[[0.0, 1.0, 0.25, 1e-14]]], dtype=torch.float64)
    ids = torch.tensor([[[0, 1, 2, 3]]])
    expected = {
        "nll_pos": ([100.0, 0.0, math.log(4), 14 * math.log(10)], [-1e12, 0.0, -4.0, -1e12]),
        "nll_neg": ([0.0, 100.0, math.log(4 / 3), 1e-14], [0.0, 1e12, 4 / 3, 1e-2]),
    }
    for name, (values, slopes) in expected.items():
        counts, sums = backend.segment_stats_forward(p, ids, None, 4, (name,), "none", 2.0, "class")
        grad = backend.segment_stats_backward(torch.ones_like(sums), p, ids, None, (name,), "none", 2.0, "class")
        assert counts.tolist() == [[[1, 1, 1, 1]]]
        assert_fp64(sums, torch.tensor(values, dtype=torch.float64).view(1, 1, 4, 1), name)
        assert_fp64(grad, torch.tensor(slopes, dtype=torch.float64).view(1, 1, 4), f"slope of {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_lower_precision_is_computed_in_fp32(backend, activation, dtype):
    scene = scenes.scene(3, 2, "disagree", activation)
    logits = scene.logits.to(dtype)
    target = scene.target if scene.target.shape[1] > 1 else scenes.one_hot(scene.target, 2)
    counts, sums, grad = run(backend, logits, scene.instances, target, 10, activation=activation)
    expected = truth(logits, scene.instances, target, 10, activation=activation)
    assert sums.dtype == torch.float32
    assert torch.equal(counts, expected[0])
    assert relative_to_largest(sums, expected[1]) <= 1e-6
    # Half of the last bit of the gradient's own dtype is unavoidable.
    assert relative_to_largest(grad, expected[2]) <= 1e-6 + torch.finfo(dtype).eps / 2


def test_wrong_labels_are_refused(backend):
    logits, ids = torch.zeros(1, 2, 4), torch.tensor([[[0, 1, 2, -1], [0, 1, 0, -1]]])
    binary = (ids > 0).long()
    features = ("prob",)

    def table(ids, target, num_cells):
        return backend.segment_stats_forward(logits, ids, target, num_cells, features, "sigmoid", 2.0, "class")

    assert table(ids, None, 3)[0].tolist() == [[[1, 1, 1], [2, 1, 0]]]
    assert table(ids, binary, 6)[0].tolist() == [[[1, 0, 0, 1, 0, 1], [2, 0, 0, 1, 0, 0]]]
    for wrong in (
        (ids, None, 2),  # id 2 is beyond two cells
        (ids, binary, 5),  # cell 2 * 2 + 1 is beyond five
        (ids, 2 * binary, 6),
        (ids, -binary, 6),
        (ids, 0.5 * binary, 6),
        (ids, torch.tensor([[[0, 1, 2, 0]]]), 6),  # a class beyond the channels
        (ids, torch.tensor([[[0, 1, -1, 0]]]), 6),
    ):
        with pytest.raises(ValueError, match=r"\w+ \w+"):
            table(*wrong)
    # Where a voxel is ignored, nothing is wrong with its label.
    odd = binary.clone()
    odd[..., -1] = 9
    assert torch.equal(table(ids, odd, 6)[0], table(ids, binary, 6)[0])


@pytest.mark.parametrize("channel0", ["class", "background", "unused"])
@pytest.mark.parametrize("labels", ["ids", "binary", "classes"])
@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_reference_where_reading_a_value_would_be_a_wait(monkeypatch, activation, labels, channel0):
    """On another device than the CPU every voxel is listed, since counting the foreground would synchronise."""
    reference = import_module("blobloss_fast.kernels.reference")
    monkeypatch.setattr(reference, "_on_host", lambda tensor: False)
    for scene in scenes.telling_scenes(activation):
        ids, target, num_cells = kernel_scene(scene, labels)
        arguments = (scene.logits, ids, target, num_cells, FEATURES, activation, 2.0, channel0)
        check(run(reference, *arguments), truth(*arguments), scene.name)


@pytest.mark.parametrize("channel0", ["class", "background", "unused"])
@pytest.mark.parametrize("labels", ["ids", "binary", "classes"])
@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_reference_in_many_spans(monkeypatch, activation, labels, channel0):
    """On a CPU a volume is worked on in spans; some hold no instance, and only some ignored voxels."""
    reference = import_module("blobloss_fast.kernels.reference")
    monkeypatch.setattr(reference, "_SPAN_SIZE", 32)
    monkeypatch.setattr(reference, "_ROW_ENTRIES", 8)
    for scene in scenes.telling_scenes(activation):
        ids, target, num_cells = kernel_scene(scene, labels)
        arguments = (scene.logits, ids, target, num_cells, FEATURES, activation, 2.0, channel0)
        check(run(reference, *arguments), truth(*arguments), scene.name)
