"""The Triton kernels in Triton's interpreter against the reference.

Run by test_triton_interpreter.py in a process of its own, or by hand:
``TRITON_INTERPRET=1 pytest tests/triton_interpreter_cases.py``.

Volumes are tiny (the interpreter needs milliseconds per instruction) but hold full blocks, tails and crowded blocks.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from blobloss_fast.kernels import reference
from blobloss_fast.kernels import triton_segment_stats as kernels
from blobloss_fast.kernels.layout import FEATURES
from blobloss_fast.kernels.triton_table import UNIT
from blobloss_fast.kernels.triton_voxel import exp, log1p

from .interpreter_checks import MARKS
from .quick_interpreter import quick_interpreter  # noqa: F401
from .scenes import random_logits
from .test_segment_stats import (  # noqa: F401  the same tests on this backend: they ask for the fixture below
    test_an_unused_channel_0_of_a_softmax_is_not_read_where_the_others_are_ignored,
    test_dtypes_of_targets,
    test_expanded_input,
    test_extreme_logits,
    test_features_alone_and_in_any_order,
    test_gamma,
    test_ignored_voxels_are_not_read_and_get_no_gradient,
    test_infinite_logits,
    test_infinite_logits_of_a_softmax,
    test_integer_dtypes_of_ids,
    test_nan_poisons_its_cell_and_its_voxel_only,
    test_one_map_of_ids_for_all_channels,
    test_probabilities_of_exactly_0_and_1,
    test_strides,
)
from .tolerances import FLOOR, FP64, TIMES_PLAIN, error

pytestmark = MARKS

ACTIVATIONS = ("sigmoid", "softmax", "none")
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture
def backend() -> ModuleType:
    return kernels


@pytest.fixture(autouse=True)
def nothing_invalid_left_behind():
    yield
    left = [state for state in kernels.Invalid._per_device.values() if state.flag.item()]
    kernels.Invalid._per_device.clear()
    assert not left, "a kernel met something invalid in a test that does not expect it"


def random_ids(shape, low: int, high: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(7), dtype=torch.int32)


def make_scene(name: str) -> tuple[Tensor, int]:
    """(ids, num_cells). Blocks hold 512 voxels."""
    if name == "odd sizes":
        return random_ids((2, 3, 5, 7, 9), -1, 4), 4
    if name == "single voxel rows":
        return random_ids((2, 2, 13, 1, 1), -1, 3), 3
    if name == "one voxel":
        return random_ids((3, 2, 1), 0, 2), 2
    if name == "one giant instance":  # a full block and a tail
        ids = torch.ones((1, 2, 11, 11, 11), dtype=torch.int32)
        ids[0, 1, 0, 0, 0] = 0
        return ids, 2
    if name == "whole blocks":
        return random_ids((1, 2, 16, 16, 8), -1, 3).clamp_(max=1), 2
    if name == "salt and pepper":  # far more cells per block than are reduced in registers
        return (torch.arange(2 * 1331, dtype=torch.int32) * 37 % 600).view(1, 2, 11, 11, 11), 600
    if name == "all ignored":
        return torch.full((1, 2, 7, 5, 3), -4, dtype=torch.int32), 3
    raise ValueError(name)


SCENES = (
    "odd sizes",
    "single voxel rows",
    "one voxel",
    "one giant instance",
    "whole blocks",
    "salt and pepper",
    "all ignored",
)


def run(backend, logits, ids, target, num_cells, features=FEATURES, activation="sigmoid", gamma=2.0, channel0="class"):
    counts, sums = backend.segment_stats_forward(logits, ids, target, num_cells, features, activation, gamma, channel0)
    generator = torch.Generator().manual_seed(3)
    grad_sums = torch.randn(sums.shape, generator=generator, dtype=torch.float64).to(sums.dtype)
    grad = backend.segment_stats_backward(grad_sums, logits, ids, target, features, activation, gamma, channel0)
    assert grad.shape == logits.shape
    assert grad.dtype == logits.dtype
    assert grad.is_contiguous()
    return counts, sums, grad


def compare(logits, ids, target, num_cells, **options) -> None:
    """Against the reference in fp64 on the same logits; below fp64, relative to how far the reference itself is off."""
    dtype = logits.dtype
    actual = run(kernels, logits, ids, target, num_cells, **options)
    truth = run(reference, logits.double(), ids, target, num_cells, **options)
    assert torch.equal(actual[0], truth[0])
    assert actual[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    plain = None if dtype == torch.float64 else run(reference, logits.float(), ids, target, num_cells, **options)
    for i, what in ((1, "sums"), (2, "gradient")):
        bound = FP64 if plain is None else TIMES_PLAIN * error(plain[i], truth[i]) + FLOOR
        if what == "gradient" and dtype in HALVES:
            # Its own last bit. A GPU rounds to nearest (test_triton_offline.py); the interpreter cuts bf16 off.
            bound += torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)
        assert error(actual[i], truth[i]) <= bound, f"{what}: {error(actual[i], truth[i]):.3g} > {bound:.3g}"
    ignored = (ids < 0).expand(logits.shape)
    if options.get("activation") == "softmax":
        ignored = ignored.all(1, keepdim=True).expand(logits.shape)
    assert (actual[2][ignored] == 0).all()


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_the_reference(activation, dtype, name):
    ids, num_cells = make_scene(name)
    logits = random_logits(ids.shape, scale=1.0 if activation == "none" else 4.0, activation=activation).to(dtype)
    features = ("prob", "nll_pos", "nll_neg") if name == "salt and pepper" else FEATURES
    compare(logits, ids, None, num_cells, features=features, activation=activation)


@pytest.mark.parametrize("channel0", ["class", "background", "unused"])
@pytest.mark.parametrize("kind", ["none", "binary", "class map"])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_cells(activation, channels, kind, channel0):
    if channels == 1 and (activation == "softmax" or kind == "class map"):
        pytest.skip("takes two channels")
    shape = (2, channels, 3, 5)
    ids, logits = random_ids(shape, -1, 4), random_logits(shape)
    target = None
    if kind == "binary":
        target = random_ids(shape, 0, 2)
    elif kind == "class map":
        target = random_ids((2, 1, 3, 5), 0, channels)
    num_cells = 4 if target is None else 8
    compare(logits, ids, target, num_cells, features=("prob", "nll_pos"), activation=activation, channel0=channel0)


def test_tail_and_blocks_with_a_target_in_every_precision():
    ids, _ = make_scene("one giant instance")
    target = random_ids(ids.shape, 0, 2)
    for dtype in (torch.float64, torch.float32, *HALVES):
        compare(random_logits(ids.shape).to(dtype), ids, target, 4, features=("prob", "nll_pos", "nll_neg"))


def test_nothing_to_do():
    for shape, num_cells in (((0, 2, 3, 3), 2), ((2, 1, 0, 3), 2)):
        counts, sums, grad = run(kernels, torch.zeros(shape), torch.zeros(shape, dtype=torch.int32), None, num_cells)
        assert counts.shape == (shape[0], shape[1], num_cells)
        assert (counts == 0).all()
        assert (sums == 0).all()
        assert grad.shape == shape
    counts, sums, grad = run(kernels, torch.randn(1, 1, 9), torch.full((1, 1, 9), -1), None, 0)
    assert counts.shape == (1, 1, 0)
    assert (grad == 0).all()


# ------------------------------------------------------------------------------------------------------------ precision


@triton.jit
def log1p_kernel(y_ptr, out_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, log1p(tl.load(y_ptr + lanes)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_log1p_over_the_whole_range(dtype):
    info = torch.finfo(dtype)
    lowest = np.log10(info.tiny)
    positive = torch.from_numpy(np.logspace(lowest, np.log10(info.max) - 1, 3 * 1024)).to(dtype)
    near_one = torch.linspace(0, 2, 512, dtype=torch.float64).to(dtype)
    negative = -torch.from_numpy(np.logspace(lowest, 0, 512)).to(dtype)[:-1]
    y = torch.cat([positive, near_one, negative, torch.tensor([0.0], dtype=dtype)])
    out = torch.empty_like(y)
    log1p_kernel[(1,)](y, out, BLOCK=len(y))
    exact = np.log1p(y.numpy().astype(np.longdouble))
    off = np.abs(out.numpy().astype(np.longdouble) - exact)
    assert (off <= 3 * info.eps * np.abs(exact)).all(), float((off / np.maximum(np.abs(exact), info.tiny)).max())


@triton.jit
def exp_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, exp(tl.load(x_ptr + lanes)))


def test_exp_over_the_whole_range():
    """The reduction of its argument; what a GPU's 2^x adds, for |x| <= 1/2, is 2 ulp."""
    x = torch.cat([torch.linspace(-110, 0, 4091), torch.tensor([-0.0, -1e-30, -3e38, -torch.inf, torch.nan])])
    out = torch.empty_like(x)
    exp_kernel[(1,)](x, out, BLOCK=len(x))
    exact = np.exp(x.numpy().astype(np.longdouble))
    tiny = torch.finfo(torch.float32).tiny
    for value, truth in zip(out.tolist(), exact, strict=True):
        if np.isnan(truth):
            assert np.isnan(value)
        else:
            assert abs(value - truth) <= 3e-7 * truth + 1e-7 * tiny, (value, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_each_feature_of_one_voxel_over_the_whole_range(dtype):
    """One voxel per cell: relative error, also where the value is tiny (softplus(-20) is 2e-9, not 0), down to the unit
    of the table, which is what integers give up for equal bits.
    """
    z = torch.cat([torch.linspace(-80, 80, 401), torch.logspace(-6, 3, 50), -torch.logspace(-6, 3, 50)]).to(dtype)
    ids = torch.arange(len(z)).view(1, 1, -1)
    features = ("prob", "nll_pos", "nll_neg")
    _, sums, _ = run(kernels, z.view(1, 1, -1), ids, None, len(z), features=features)
    z = z.numpy().astype(np.longdouble)
    exact = np.stack([1 / (1 + np.exp(-z)), np.logaddexp(0, -z), np.logaddexp(0, z)], -1)
    off = np.abs(sums[0, 0].numpy().astype(np.longdouble) - exact)
    assert (off <= 8 * torch.finfo(dtype).eps * exact + UNIT / 2).all()


# -------------------------------------------------------------------------------------------------------- invalid input


def invalid_inputs():
    """name: (logits, ids, target, num_cells, activation, voxels that are wrong)"""
    logits = random_logits((1, 2, 6)).float()
    ids = torch.tensor([[[0, 1, 2, -1, 0, 1], [0, 0, 1, 1, -1, 2]]])
    target = (ids > 0).long()
    wrong = torch.zeros(ids.shape, dtype=torch.bool)
    wrong[0, 0, 2] = True

    def with_value(volume, value):
        changed = volume.clone()
        changed[wrong] = value
        return changed

    both = wrong | (ids == 2)
    yield "id", logits, ids, None, 2, "sigmoid", both
    yield "id of a softmax", logits, ids, None, 2, "softmax", both.any(1, keepdim=True).expand(ids.shape)
    yield "id with target", logits, ids, target, 5, "sigmoid", both
    yield "2^40", logits, with_value(ids, 2**40), None, 3, "sigmoid", wrong
    yield "2^32: 0 if wrapped", logits, with_value(ids, 2**32), None, 3, "sigmoid", wrong
    yield "2^31 - 1 doubled", logits, with_value(ids, 2**31 - 1).int(), target, 6, "sigmoid", wrong
    yield "target 2", logits, ids, with_value(target, 2), 6, "sigmoid", wrong
    yield "target -1", logits, ids, with_value(target, -1), 6, "sigmoid", wrong
    yield "target 1/2", logits, ids, with_value(target.double(), 0.5), 6, "sigmoid", wrong
    yield "target NaN", logits, ids, with_value(target.half(), float("nan")), 6, "sigmoid", wrong
    classes = torch.tensor([[[0, 1, 2, 0, 1, 0]]])
    everywhere = torch.zeros_like(wrong)
    everywhere[0, :, 2] = True
    yield "class 2 of 2", logits, ids, classes, 6, "sigmoid", everywhere
    yield "class -1", logits, ids, torch.where(classes == 2, -1, classes).to(torch.int8), 6, "softmax", everywhere
    yield "class 1/2", logits, ids, torch.where(classes == 2, 0.5, classes), 6, "sigmoid", everywhere


@pytest.mark.parametrize("case", list(invalid_inputs()), ids=lambda case: case[0])
def test_invalid_input_is_nan_then_raises_once(case):
    _, logits, ids, target, num_cells, activation, wrong = case
    counts, sums, grad = run(kernels, logits, ids, target, num_cells, activation=activation)
    assert sums.isnan().all()
    assert torch.equal(grad.isnan(), wrong)
    counted = (ids >= 0) & ~(wrong if activation != "softmax" or target is not None else ids >= num_cells)
    assert counts.sum() == counted.sum()

    def valid():
        return run(kernels, logits, ids.clamp(max=2), None, 3, activation=activation)

    with pytest.raises(RuntimeError, match=r"max_instances.*num_cells.*target"):
        valid()
    assert valid()[1].isfinite().all()


def test_no_later_call_hides_an_earlier_one(monkeypatch):
    """The call that follows on the device may have run before the host looks: it must not clear the flag."""
    logits, ids = torch.zeros(1, 1, 4), torch.tensor([[[0, 1, 2, 3]]])
    arguments = (("prob",), "sigmoid", 2.0, "class")
    kernels.segment_stats_forward(logits, ids, None, 2, *arguments)
    with monkeypatch.context() as patch:
        patch.setattr(kernels.Invalid, "raise_if_seen", lambda self: None)  # as if the device had not got that far
        assert kernels.segment_stats_forward(logits, ids, None, 4, *arguments)[1].tolist() == [[[[0.5]] * 4]]
    with pytest.raises(RuntimeError, match="max_instances"):
        kernels.segment_stats_forward(logits, ids, None, 4, *arguments)


def test_not_a_probability():
    ids = torch.tensor([[[0, 1, -1]]])
    arguments = (ids, None, 2, ("prob",), "none", 2.0, "class")
    for value in (-0.1, 1.1, float("inf")):
        assert kernels.segment_stats_forward(torch.tensor([[[0.5, value, 7.0]]]), *arguments)[1].isnan().all()
        with pytest.raises(RuntimeError, match=r"outside \[0, 1\]"):
            kernels.segment_stats_forward(torch.tensor([[[0.5, 0.1, 7.0]]]), *arguments)


def test_too_many_cells_for_32_bit_offsets():
    with pytest.raises(ValueError, match="num_cells must be at most"):
        kernels.segment_stats_forward(
            torch.zeros(1, 1, 2), torch.zeros(1, 1, 2).int(), None, 2**26 + 1, (), "sigmoid", 2.0, "class"
        )
