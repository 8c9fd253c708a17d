"""The surprises of the authors' code that blobloss_fast.compat keeps, and the four that it does not."""

from __future__ import annotations

import doctest
import inspect
import warnings

import pytest
import torch
from torch.nn import BCEWithLogitsLoss

from blobloss_fast import compat

from . import authors_loop as authors
from . import scenes
from .compat_cases import (
    FAST,
    SHAPES,
    Subclass,
    assert_same,
    both_modes,
    build,
    entry,
    params,
    scene,
    square,
    value_and_gradient,
)
from .tolerances import error, relative_to_largest


@pytest.fixture(autouse=True)
def _fresh_warnings():
    compat._warn_slow.cache_clear()
    with warnings.catch_warnings():
        for message in ("single channel prediction", "No mask value specified"):  # MONAI's
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield


# ---------------------------------------------------------------- the transcription itself


@pytest.mark.parametrize("sigmoid", [False, True])
def test_transcription_by_hand(sigmoid):
    # All logits 0, ids 1 . 2 2: see scenes.HALVES. A function of probabilities reads masked voxels as p = 0.
    bce = torch.nn.functional.binary_cross_entropy if sigmoid else BCEWithLogitsLoss()
    value = authors.compute_compound_loss(
        {"bce": entry(bce, 1.0, sigmoid)}, scenes.HALVES.logits.float(), scenes.HALVES.instances, True
    )
    expected = scenes.HALVES_BCE_IN_LOG2["zero_prob" if sigmoid else "zero_logit"] * torch.log(torch.tensor(2.0))
    assert float(value) == pytest.approx(float(expected), abs=1e-7)


def test_transcription_running_means():
    # Means of the target: 1/8, 2/8, 3/8 and in the second sample 1/8. Running means 1/8, 3/16, 2/8 and 1/8.
    ids = torch.tensor([[[7, 9, 9, 12, 12, 12, 0, 0]], [[0, 5, 0, 0, 0, 0, 0, 0]]])
    value = authors.compute_no_masking_multi(lambda _, target: target.float().mean(), torch.zeros(2, 1, 8), ids)
    assert float(value) == pytest.approx((1 / 8 + 3 / 16 + 2 / 8 + 1 / 8) / 4, abs=1e-7)


def test_signatures():
    for name in ("compute_compound_loss", "compute_blob_loss_multi", "compute_no_masking_multi", "get_loss_value"):
        theirs, ours = (inspect.signature(getattr(module, name)).parameters for module in (authors, compat))
        assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


# ---------------------------------------------------------------- inputs that need the loop


def negative(ids):
    return torch.where(ids == 4, -4, ids)


def only_negative(ids):
    return torch.where(ids > 0, -ids, 0)


def fractions(ids):
    return torch.where(ids == 4, 0.5, ids.double())


@pytest.mark.parametrize(
    ("change", "reason"),
    [(negative, "an id is negative"), (only_negative, "an id is negative"), (fractions, "not a whole number")],
)
def test_loop_for_ids(change, reason):
    outputs, ids = scene(SHAPES[0])
    for call in both_modes(BCEWithLogitsLoss(), change(ids)):
        compat._warn_slow.cache_clear()
        with pytest.warns(compat.SlowPathWarning, match=reason):
            assert_same(call, outputs, 1e-6)


@pytest.mark.parametrize(
    "text", params(["torch.nn.BCEWithLogitsLoss()", *(t for t in FAST if "sigmoid=True)" in t), "square"])
)
def test_three_channels(text):
    criterion = square if text == "square" else build(text)
    for shape in ((3, 3, 6, 7), (2, 3, 4, 5, 3)):
        for extreme in (False, True):
            outputs, ids = scene(shape, blobs=2, extreme=extreme)  # one id spans channels
            for call in both_modes(criterion, ids):
                compat._warn_slow.cache_clear()
                with pytest.warns(compat.SlowPathWarning, match="not one of the types|with one channel"):
                    assert_same(call, outputs, 1e-6)


def test_one_label_for_three_channels():
    outputs, _ = scene((2, 3, 6, 7))
    _, ids = scene((2, 1, 6, 7))
    for call in both_modes(square, ids):
        compat._warn_slow.cache_clear()
        with pytest.warns(compat.SlowPathWarning, match="square"):
            assert_same(call, outputs, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    outputs, ids = scene(SHAPES[0], dtype=dtype)
    with pytest.warns(compat.SlowPathWarning, match=rf"outputs are {dtype} \(`.float\(\)` makes it fast"):
        assert_same(both_modes(BCEWithLogitsLoss(), ids)[0], outputs, 1e-6)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize("weights", [(0, 0), (-1, 1), (1, -1), (-1, 0), (float("nan"), 1)])
def test_weights_that_select_nothing(weights):
    outputs, ids = scene(SHAPES[0])
    bce = {"bce": entry(BCEWithLogitsLoss())}
    arguments = (
        dict(zip(("main_weight", "blob_weight"), weights, strict=True)),
        bce,
        bce,
        outputs,
        ids.clamp(max=1),
        ids,
    )
    with pytest.raises(ValueError, match="main_weight and blob_weight must not be negative"):
        compat.compute_loss(*arguments)
    with pytest.raises((UnboundLocalError, RuntimeError)):  # theirs, or the int target of the main term
        authors.compute_loss(*arguments)


def test_example():
    result = doctest.testmod(compat)
    assert result.attempted > 0
    assert result.failed == 0


def test_flags():
    outputs, ids = scene(SHAPES[0])
    entries = {"bce": entry(BCEWithLogitsLoss())}
    with pytest.raises(ValueError, match="blob_loss_mode must be True or False; got None"):
        compat.compute_compound_loss(entries, outputs, ids, None)
    with pytest.raises(ValueError, match="masked must be True or False; got 'no'"):
        compat.compute_compound_loss(entries, outputs, ids, True, "no")
    assert compat.compute_compound_loss({}, outputs, ids, True) == authors.compute_compound_loss({}, outputs, ids) == 0


def test_get_loss_value():
    for value in (0, torch.tensor(0.0), torch.tensor(2.5)):
        assert compat.get_loss_value(value) == authors.get_loss_value(value)
        assert type(compat.get_loss_value(value)) is type(authors.get_loss_value(value))


# ---------------------------------------------------------------- deliberate differences


@pytest.mark.parametrize("shape", [(2, 1, 5, 6), (2, 3, 5, 6)])
def test_no_blobs(shape):
    outputs, ids = scene(shape)
    outputs[0, 0, 0, 0] = float("inf")
    for call in both_modes(BCEWithLogitsLoss(), torch.zeros_like(ids)):
        compat._warn_slow.cache_clear()
        theirs = call(authors, outputs)
        assert type(theirs) is int
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", compat.SlowPathWarning)
            value, gradient = value_and_gradient(lambda x: call(compat, x), outputs)  # noqa: B023
        assert value.shape == ()
        assert float(value) == theirs == 0
        assert torch.equal(gradient, torch.zeros_like(outputs))


class Counting:
    """A criterion that raises what it is told: for an int target, or for every one."""

    def __init__(self, error=None, always=False):
        self.error, self.always, self.targets = error, always, []

    def __call__(self, outputs, target):
        self.targets.append(target.dtype)
        if self.error is not None and (self.always or target.dtype == torch.int32):
            raise self.error
        return outputs.mean() * target.float().mean()


@pytest.mark.parametrize("error_type", [TypeError, ValueError, RuntimeError, AssertionError, NotImplementedError])
@pytest.mark.filterwarnings("ignore::blobloss_fast.compat.SlowPathWarning")
def test_float_target_where_an_int_target_raises(error_type):
    outputs, ids = scene(SHAPES[0])
    for call in both_modes(Counting(error_type("no ints")), ids):
        assert_same(call, outputs, 1e-6)
    counting = Counting(error_type("no ints"))
    compat.compute_blob_loss_multi(counting, outputs, ids)
    assert counting.targets == [torch.int32, torch.float32] * (len(counting.targets) // 2)
    counting = Counting()
    compat.compute_blob_loss_multi(counting, outputs, ids)
    assert set(counting.targets) == {torch.int32}


@pytest.mark.filterwarnings("ignore::blobloss_fast.compat.SlowPathWarning")
def test_real_errors_are_not_swallowed():
    outputs, ids = scene(SHAPES[0])
    for problem in (KeyboardInterrupt(), KeyError("bug"), torch.OutOfMemoryError("full"), ZeroDivisionError("bug")):
        counting = Counting(problem)  # a float target would go through
        authors.compute_blob_loss_multi(counting, outputs, ids)
        counting = Counting(problem)
        with pytest.raises(type(problem)):
            compat.compute_blob_loss_multi(counting, outputs, ids)
        assert counting.targets == [torch.int32]
    counting = Counting(RuntimeError("broken"), always=True)
    with pytest.raises(RuntimeError, match="broken"):
        compat.compute_blob_loss_multi(counting, outputs, ids)
    assert counting.targets == [torch.int32, torch.float32]


@pytest.mark.parametrize("criterion", [BCEWithLogitsLoss(), square], ids=["fast", "loop"])
@pytest.mark.filterwarnings("ignore::blobloss_fast.compat.SlowPathWarning")
def test_non_finite_outputs(criterion):
    outputs, ids = scene(SHAPES[0])
    outputs[0][ids[0] == 2] = float("inf")  # a right answer: it costs nothing, and is masked for the others
    assert authors.compute_blob_loss_multi(criterion, outputs, ids).isnan()
    finite = torch.where(outputs == float("inf"), 80.0, outputs)
    value, gradient = value_and_gradient(lambda x: compat.compute_blob_loss_multi(criterion, x, ids), outputs)
    expected, expected_gradient = value_and_gradient(
        lambda x: authors.compute_blob_loss_multi(criterion, x, ids), finite
    )
    assert error(value, expected) <= 2e-5
    assert relative_to_largest(gradient, expected_gradient) <= 2e-5
    outputs[0, 0, 0, 0] = float("nan")
    assert compat.compute_blob_loss_multi(criterion, outputs, ids).isnan()


def test_second_derivative():
    outputs, ids = scene(SHAPES[0])
    outputs.requires_grad_()
    bce = BCEWithLogitsLoss()

    def penalty(criterion):
        loss = compat.compute_blob_loss_multi(criterion, outputs, ids)
        return torch.autograd.grad(loss, outputs, create_graph=True)[0].square().sum()

    with pytest.raises(RuntimeError, match="no second derivative"):
        penalty(bce).backward()
    with pytest.warns(compat.SlowPathWarning, match="<lambda>"):
        penalty(lambda y, t: bce(y, t.float())).backward()
    assert outputs.grad.abs().max() > 0


# ---------------------------------------------------------------- the warning


def test_warns_once_where_it_was_called():
    outputs, ids = scene(SHAPES[0])
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(3):
            compat.compute_compound_loss({"a": entry(square)}, outputs, ids, True)
            compat.compute_blob_loss_multi(square, outputs, ids)
        compat.compute_blob_loss_multi(Subclass(), outputs, ids)
    assert [str(w.message).partition(" loops")[0].rpartition(".")[2] for w in record] == ["square", "Subclass"]
    assert {w.filename for w in record} == {__file__}


def test_warns_again_for_another_reason():
    outputs, ids = scene(SHAPES[0])
    with pytest.warns(compat.SlowPathWarning, match="negative"):
        compat.compute_blob_loss_multi(BCEWithLogitsLoss(), outputs, negative(ids))
    with pytest.warns(compat.SlowPathWarning, match="float16"):
        compat.compute_blob_loss_multi(BCEWithLogitsLoss(), outputs.half(), ids)


@pytest.mark.filterwarnings("error")
def test_warning_as_error_is_raised_every_time():
    outputs, ids = scene(SHAPES[0])
    for _ in range(2):
        with pytest.raises(compat.SlowPathWarning, match="square"):
            compat.compute_blob_loss_multi(square, outputs, ids)
