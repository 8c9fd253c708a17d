"""blobloss_fast.compat against a literal transcription of the authors' algorithm: values, gradients, which path ran.

Which type and configuration takes which path: ``pytest tests/test_compat.py -k "test_fast or test_loop" --co -q``.
"""

from __future__ import annotations

import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.nn import BCEWithLogitsLoss

from blobloss_fast import compat

from . import authors_loop as authors
from .compat_cases import (
    FAST,
    FAST_ON_PROBABILITIES,
    LOOP,
    ROUNDED,
    SHAPES,
    Subclass,
    assert_same,
    both_modes,
    build,
    entry,
    monai,
    needs_monai,
    params,
    scene,
    square,
)
from .tolerances import error

pytestmark = pytest.mark.usefixtures("cpu_backend")


@pytest.fixture(autouse=True)
def _fresh_warnings():
    compat._warn_slow.cache_clear()
    with warnings.catch_warnings():
        for message in ("single channel prediction", "No mask value specified"):  # MONAI's
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield


@pytest.fixture
def calls(monkeypatch):
    """How often the criteria were called, and how many passes over the volume there were."""
    count = SimpleNamespace(criterion=0, passes=0)

    def counting(function, what):
        def counted(*args, **kwargs):
            setattr(count, what, getattr(count, what) + 1)
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(compat, "blob_loss", counting(compat.blob_loss, "passes"))
    monkeypatch.setattr(compat, "blob_loss_instances", counting(compat.blob_loss_instances, "passes"))
    outer = [BCEWithLogitsLoss]
    if monai is not None:
        outer += [getattr(monai.losses, name) for name in compat._KNOWN if name.startswith(("Dice", "Tv", "Fo"))]
    for kind in outer:
        monkeypatch.setattr(kind, "forward", counting(kind.forward, "criterion"))
    return count


# ---------------------------------------------------------------- which path, and its value


@pytest.mark.parametrize("text", params(FAST))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fast(text, dtype, calls):
    tolerance = 2e-5 if dtype == torch.float32 or any(word in text for word in ROUNDED) else 1e-10
    criterion = build(text)
    for shape in SHAPES:
        for extreme in (False, True):
            outputs, ids = scene(shape, extreme=extreme, dtype=dtype)
            for call in both_modes(criterion, ids):
                assert_same(call, outputs, tolerance)
            calls.criterion = calls.passes = 0
            compat.compute_blob_loss_multi(criterion, outputs, ids)
            compat.compute_no_masking_multi(criterion, outputs, ids)
            assert (calls.criterion, calls.passes) == (0, 2)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("text", params(FAST_ON_PROBABILITIES))
def test_fast_on_probabilities(text, masked, calls):
    criterion = build(text)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 2e-5 if "squared" in text else 1e-10)):
        outputs, ids = scene(SHAPES[0], extreme=True, dtype=dtype)
        entries = {"one": entry(criterion, 0.7, True)}
        assert_same(lambda m, x: m.compute_compound_loss(entries, x, ids, True, masked), outputs, tolerance)  # noqa: B023
        probabilities = torch.sigmoid(outputs)
        probabilities.view(-1)[5:7] = torch.tensor([0.0, 1.0])
        for call in both_modes(criterion, ids):
            assert_same(call, probabilities, tolerance)
    calls.criterion = calls.passes = 0
    compat.compute_compound_loss(entries, outputs, ids, True, masked)
    compat.compute_blob_loss_multi(criterion, probabilities, ids)
    assert (calls.criterion, calls.passes) == (0, 2)


@needs_monai
@pytest.mark.parametrize("text", params([*FAST[:2], *FAST[-2:]]))
def test_fast_with_a_second_sigmoid(text, calls):
    # "sigmoid": True for a criterion that applies its own: one on top of the other, as in the authors' code.
    outputs, ids = scene(SHAPES[0])
    entries = {"one": entry(build(text), 1.3, True)}
    for masked in (True, False):
        assert_same(lambda m, x: m.compute_compound_loss(entries, x, ids, True, masked), outputs, 2e-5)  # noqa: B023
    assert calls.passes == 2


def _has_gradient_with_integers() -> bool:
    numbers = torch.zeros(1, requires_grad=True)
    try:
        torch.nn.functional.mse_loss(numbers, torch.zeros(1, dtype=torch.int32)).backward()
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("text", params(LOOP))
def test_loop(text, calls):
    if text == "torch.nn.MSELoss()" and not _has_gradient_with_integers():
        pytest.skip("the authors' code takes the squared error to integers, whose gradient this PyTorch lacks")
    name = "l1_loss" if "l1_loss" in text else text.partition("(")[0].rpartition(".")[2]
    criterion = build(text)
    outputs, ids = scene(SHAPES[0], extreme=True)
    for call in both_modes(criterion, ids):
        compat._warn_slow.cache_clear()
        with pytest.warns(compat.SlowPathWarning, match=f"{name} loops over .*{re.escape(LOOP[text])}"):
            assert_same(call, outputs, 1e-6)
    assert calls.passes == 0


def test_table_lists_the_types():
    fast = set(re.findall(r"^\| ``([\w.]+)`` \|", compat.__doc__, flags=re.MULTILINE))
    assert fast == {text.partition("(")[0] for text in FAST}
    for word in ("soft_label", "ignore_index", "other_act", "pos_weight", "use_softmax", "several channels", "hooks"):
        assert word in compat.__doc__


class DiceLoss(torch.nn.Module):
    """Not MONAI's."""

    def forward(self, outputs, target):
        return (torch.sigmoid(outputs) - target).abs().mean()


def hooked():
    criterion = BCEWithLogitsLoss()
    criterion.register_forward_hook(lambda module, args, loss: 2 * loss)
    return criterion


def patched():
    criterion = BCEWithLogitsLoss()
    criterion.forward = lambda outputs, target: ((outputs - target) ** 2).mean()
    return criterion


def hooked_inside():
    criterion = monai.losses.DiceCELoss(sigmoid=True)
    criterion.dice.register_forward_pre_hook(lambda module, args: (2 * args[0], args[1]))
    return criterion


def other_part():
    criterion = monai.losses.DiceCELoss(sigmoid=True)
    criterion.dice = torch.nn.L1Loss()
    return criterion


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Subclass, "not one of the types"),
        (DiceLoss, "not one of the types"),
        (hooked, "it has hooks"),
        (patched, "its attribute 'forward' is not known"),
        (torch.nn.BCELoss, "not one of the types"),
        pytest.param(hooked_inside, "it has hooks", marks=needs_monai),
        pytest.param(other_part, "not one of the types", marks=needs_monai),
    ],
)
def test_loop_for_objects(make, reason):
    outputs, ids = scene(SHAPES[0])
    outputs = torch.sigmoid(outputs)  # BCELoss takes nothing else
    with pytest.warns(compat.SlowPathWarning, match=f"{type(make()).__name__} loops .*{reason}"):
        assert_same(both_modes(make(), ids)[0], outputs, 1e-6)


# ---------------------------------------------------------------- inputs

LABELS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", LABELS, ids=str)
def test_label_dtypes(dtype, calls):
    outputs, ids = scene(SHAPES[0])
    ids = ids.clamp(max=77).to(dtype)
    for call in both_modes(BCEWithLogitsLoss(), ids):
        assert_same(call, outputs, 2e-5)
        assert_same(call, outputs.transpose(2, 3).contiguous().transpose(2, 3), 2e-5)
    assert calls.passes == 4


def test_large_float_ids(calls):
    outputs, ids = scene(SHAPES[1])
    for call in both_modes(BCEWithLogitsLoss(), ids.double()):
        assert_same(call, outputs, 2e-5)
    assert calls.passes == 2


@needs_monai
def test_metatensor(calls):
    outputs, ids = scene(SHAPES[0])
    criterion = monai.losses.DiceLoss(sigmoid=True)
    expected = authors.compute_blob_loss_multi(criterion, outputs, ids)
    actual = compat.compute_blob_loss_multi(criterion, *(monai.data.MetaTensor(x) for x in (outputs, ids)))
    assert error(torch.as_tensor(actual), expected) <= 2e-5
    assert calls.passes == 1


# ---------------------------------------------------------------- compounds and weights


def documented():
    return {
        "bce": entry(BCEWithLogitsLoss(reduction="mean"), 1.0),
        "dice": entry(
            monai.losses.DiceLoss(
                include_background=True, to_onehot_y=False, sigmoid=True, softmax=False, squared_pred=False
            ),
            1.0,
        ),
    }


@needs_monai
@pytest.mark.parametrize(("main_weight", "blob_weight"), [(1, 0), (0, 1), (1, 2), (3, 0), (0, 0.5), (0.25, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_documented_configuration(main_weight, blob_weight, dtype, calls):
    weights = {"main_weight": main_weight, "blob_weight": blob_weight}
    for shape, extreme in ((SHAPES[0], False), (SHAPES[1], True)):
        outputs, ids = scene(shape, extreme=extreme, dtype=dtype)
        target = ((ids == 2) | (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.1)).to(dtype)
        for part in range(3):
            arguments = (weights, documented(), documented())
            if (part == 1 and main_weight == 0) or (part == 2 and blob_weight == 0):
                parts = compat.compute_loss(*arguments, outputs, target, ids)
                assert type(parts[part]) is int
                assert parts[part] == 0
                continue
            assert_same(lambda m, x: m.compute_loss(*arguments, x, target, ids)[part], outputs, 2e-5)  # noqa: B023
        calls.passes = 0
        compat.compute_loss(*arguments, outputs, target, ids)
        assert calls.passes == (blob_weight > 0)  # one for the whole compound


@needs_monai
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("kinds", "passes"),
    [
        (["bce", "dice", "tversky", "focal"], 1),
        (["bce", "prob", "prob_sigmoid", "dice"], 2),
        (["focal", "sharp", "bce", "dicefocal"], 2),
        (["bce", "square", "dice"], 1),
        (["square"], 0),
    ],
)
def test_compounds_share_passes(kinds, passes, masked, calls):
    losses = monai.losses
    known = {
        "bce": entry(BCEWithLogitsLoss(), 0.5),
        "dice": entry(losses.DiceLoss(sigmoid=True), 2),
        "tversky": entry(losses.TverskyLoss(sigmoid=True, alpha=0.2, beta=0.8), -0.3),
        "focal": entry(losses.FocalLoss(gamma=2.0), 1.5),
        "sharp": entry(losses.FocalLoss(gamma=4.0, alpha=0.3), 10.0),
        "dicefocal": entry(losses.DiceFocalLoss(sigmoid=True, gamma=2.0), 0.0),
        "prob": entry(losses.DiceLoss(squared_pred=True), 1.0, True),
        "prob_sigmoid": entry(losses.TverskyLoss(), 0.7, True),
        "square": entry(square, 0.9),
    }
    entries = {kind: known[kind] for kind in kinds}
    outputs, ids = scene(SHAPES[1], extreme=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", compat.SlowPathWarning)
        assert_same(lambda m, x: m.compute_compound_loss(entries, x, ids, True, masked), outputs, 2e-5)
    assert calls.passes == passes


def test_main_term_calls_the_criteria(calls):
    outputs, ids = scene((2, 3, 5, 6))
    entries = {"a": entry(BCEWithLogitsLoss(), 0.4), "b": entry(square, 3.0, True)}
    assert_same(lambda m, x: m.compute_compound_loss(entries, x, (ids > 0).float()), outputs, 0.0)
    assert (calls.criterion, calls.passes) == (2, 0)


def test_learned_weight():
    outputs, ids = scene(SHAPES[0])
    gradients = []
    for module in (authors, compat):
        weight = torch.tensor(0.3, requires_grad=True)
        module.compute_compound_loss({"bce": entry(BCEWithLogitsLoss(), weight)}, outputs, ids, True).backward()
        gradients.append(weight.grad)
    assert error(gradients[1], gradients[0]) <= 2e-5
