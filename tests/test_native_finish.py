"""The native step from the table of sums to the loss and to the gradient of the table, against PyTorch's in fp64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from blobloss_fast.criteria import Criterion
from blobloss_fast.kernels import finish, native
from blobloss_fast.kernels.finish import LossSpec
from blobloss_fast.kernels.layout import ACTIVATIONS, MASKINGS, features_of

from .blob_loss_checks import CRITERIA, criterion_of

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))

FP64 = 1e-13  # relative to the largest of the same sample, class and feature
ALONE = 2e-7  # relative, of every element alone: parts of either sign may cancel, and fp32 rounds
BATCH, CHANNELS, BLOBS = 2, 3, 150  # more than one block of instances, the last one not full
INF, NAN = math.inf, math.nan
ALL = {name: criterion_of(spec) for name, spec in CRITERIA.items()}
DICE, BCE, COMPOUND = ALL["dice"], ALL["bce"], ALL["compound"]

# Options that a table is finished with; those that have no effect on one another are not crossed.
MASKED = [(m, a) for m in MASKINGS for a in (ACTIVATIONS if m == "zero_logit" else ("sigmoid",))]
REDUCED = [("none", "class"), ("sum", "background"), ("instances", "class")]
REDUCED += list(itertools.product(("mean", "terms"), ("class", "unused")))


def spec_of(main: Criterion, blob: Criterion, reduction: str = "mean", masking: str = "exclude", **options) -> LossSpec:
    terms = reduction == "terms"
    return LossSpec(
        activation=options.get("activation", "sigmoid"),
        gamma=blob.gamma or main.gamma or 0.0,
        main_rows=main.rows,
        blob_rows=blob.rows,
        empty_rows=options.get("empty_rows", ()),
        main_weight=1.0 if terms else 0.7,
        blob_weight=1.0 if terms else 1.3,
        masking=masking,
        channel0=options.get("channel0", "class"),
        reduction=reduction,
    )


def specs(main: Criterion, blob: Criterion) -> Iterator[LossSpec]:
    for (masking, activation), (reduction, channel0) in itertools.product(MASKED, REDUCED):
        yield spec_of(main, blob, reduction, masking, activation=activation, channel0=channel0)


# ---------------------------------------------------------------- tables


def random_table(features: tuple[str, ...], has_target: bool, blobs: int = BLOBS, batch: int = BATCH):
    """counts [B, C, K] and fp64 sums [B, C, K, F]; a cell of a target may well be empty, an instance never is."""
    random = torch.Generator().manual_seed(5)
    shape = (batch, CHANNELS, blobs + 1, 1 + has_target)
    counts = torch.randint(0, 40, shape, generator=random)
    counts[:, :, :, 0].clamp_(min=1)
    counts[:, :, 0, 0] += 20_000
    mean = 0.05 + torch.rand(*shape, len(features), generator=random, dtype=torch.float64)
    sums = mean * counts.unsqueeze(-1)
    return counts.flatten(2), sums.flatten(2, 3)


def by_id(table: Tensor, has_target: bool) -> Tensor:
    """A view of a table, [B, C, N + 1, bits, ...]."""
    return table.unflatten(2, (-1, 1 + has_target))


def empty(counts: Tensor, sums: Tensor, *where) -> None:
    counts[where] = 0
    sums[where] = 0


def plain(counts: Tensor, sums: Tensor, features: tuple[str, ...]) -> None:
    pass


def empty_sample(counts: Tensor, sums: Tensor, features: tuple[str, ...]) -> None:
    empty(counts, sums, 1)


def no_instance(counts: Tensor, sums: Tensor, features: tuple[str, ...]) -> None:
    empty(counts, sums, slice(None), slice(None), slice(1, None))


def no_instance_in_one_pair(counts: Tensor, sums: Tensor, features: tuple[str, ...]) -> None:
    empty(counts, sums, 0, 1, slice(1, None))


def gaps(counts: Tensor, sums: Tensor, features: tuple[str, ...]) -> None:
    for start, step in ((1, 3), (2, 5), (140, 1)):
        empty(counts, sums, slice(None), slice(None), slice(start, None, step))


def infinite(counts: Tensor, sums: Tensor, features: tuple[str, ...]) -> None:
    """-log p of the background and -log(1 - p) of the instances, which no domain reads under "exclude"."""
    for j, name in enumerate(features):
        if name.endswith("_pos"):
            sums[:, :, 0, 0, j] = INF
        if name.endswith("_neg"):
            sums[:, :, 1:, -1, j] = INF


def infinite_loss(counts: Tensor, sums: Tensor, features: tuple[str, ...]) -> None:
    for j, name in enumerate(features):
        if name.endswith("_pos"):
            sums[0, :, 7, -1, j] = INF
        if name.endswith("_neg"):
            sums[1, 0, 0, 0, j] = INF


def one_nan(counts: Tensor, sums: Tensor, features: tuple[str, ...]) -> None:
    sums[0, 1, 3] = NAN


def all_nan(counts: Tensor, sums: Tensor, features: tuple[str, ...]) -> None:
    sums.fill_(NAN)


def giant(counts: Tensor, sums: Tensor, features: tuple[str, ...]) -> None:
    """A blob of 10^9 voxels beside small ones, one of them faint: a difference of sums would lose it."""
    counts[:, :, 40, -1] = 10**9
    sums[:, :, 40, -1] *= 10**9
    sums[:, :, 41] *= 1e-6


CHANGES = (
    plain, empty_sample, no_instance, no_instance_in_one_pair, gaps, infinite, infinite_loss, one_nan, all_nan, giant,
)  # fmt: skip


def table_of(change, features: tuple[str, ...], has_target: bool) -> tuple[Tensor, Tensor]:
    counts, sums = random_table(features, has_target)
    change(by_id(counts, has_target), by_id(sums, has_target), features)
    return counts, sums


# ---------------------------------------------------------------- comparison


def truth(counts: Tensor, sums: Tensor, features: tuple[str, ...], has_target: bool, spec: LossSpec):
    """(value, its gradient for ones, a gradient from above, its gradient), from PyTorch in fp64."""
    value, saved = finish.finish(counts, sums.double(), features, has_target, spec)
    grad = (0.5 + torch.rand(value.shape, generator=torch.Generator().manual_seed(7), dtype=sums.dtype)).double()
    ones = finish.finish_backward(torch.ones_like(value), counts, saved, features, has_target, spec)
    return value, ones, grad, finish.finish_backward(grad, counts, saved, features, has_target, spec)


def call(counts, sums, features, has_target, spec, *, grad=None, value=None, gradient=True):
    """Value (if given one to replace) and gradient of one native call, into memory that holds something else before."""
    if value is not None:
        value = torch.full_like(value, 123.0, dtype=sums.dtype)
    grad_sums = torch.full_like(sums, 123.0) if gradient else None
    native._finish(counts, sums, grad, value, grad_sums, features, has_target, spec)
    return value, grad_sums


def off(actual: Tensor, expected: Tensor, scale: Tensor) -> float:
    """The largest error relative to the scale; infinite where only one of the two is a number."""
    actual = actual.double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    error = torch.where(same, 0.0, (actual - expected).abs() / scale)
    return float(error.nan_to_num(nan=INF).max()) if error.numel() else 0.0


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    size = expected.abs()
    alone = off(actual, expected, size)
    assert alone <= ALONE, f"{what} off by {alone:.3g}, allowed {ALONE}"
    if actual.dtype == torch.float64:
        if size.ndim == 4 and size.numel():  # a gradient
            size = size.nan_to_num(nan=0.0, posinf=0.0).amax(2, keepdim=True)
        error = off(actual, expected, size)
        assert error <= FP64, f"{what} off by {error:.3g}, allowed {FP64}"


def assert_agrees(*table) -> None:
    """Compares everything that a call can be asked for; takes counts, sums, features, has_target and a spec."""
    dtype, spec = table[1].dtype, table[-1]
    value, ones, grad, expected = truth(*table)
    about = f"of {spec.reduction}, {spec.masking}, {spec.activation}, {spec.channel0}, target {table[3]}"
    actual_value, actual_ones = call(*table, value=value)
    assert_close(actual_value, value, f"value {about}")
    assert_close(call(*table, value=value, gradient=False)[0], value, f"value alone {about}")
    assert_close(actual_ones, ones, f"gradient for ones {about}")
    assert_close(call(*table, grad=grad.to(dtype))[1], expected, f"gradient {about}")


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ALL)
def test_agrees_with_pytorch(name: str, change) -> None:
    criterion = ALL[name]
    features = features_of(list(criterion.rows))
    for has_target in (False, True):
        counts, sums = table_of(change, features, has_target)
        for spec in specs(criterion, criterion):
            assert_agrees(counts, sums, features, has_target, spec)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["dice", "dice+bce", "compound"])
def test_a_table_in_fp32_is_computed_in_fp64(name: str, change) -> None:
    criterion = ALL[name]
    features = features_of(list(criterion.rows))
    for has_target in (False, True):
        counts, sums = table_of(change, features, has_target)
        for spec in specs(criterion, criterion):
            assert_agrees(counts, sums.float(), features, has_target, spec)


@pytest.mark.parametrize(("main", "blob"), [(DICE, BCE), (ALL["focal"], DICE), (None, COMPOUND), (COMPOUND, None)])
def test_terms_with_criteria_of_their_own(main: Criterion | None, blob: Criterion | None) -> None:
    nothing = 0.0 * DICE
    main, blob = main or nothing, blob or nothing
    features = features_of(list(main.rows), list(blob.rows))
    for has_target in (False, True):
        counts, sums = table_of(gaps, features, has_target)
        for spec in specs(main, blob):
            assert_agrees(counts, sums, features, has_target, spec)


@pytest.mark.parametrize("blobs", [0, 1, 7, 8, 9, 127, 128, 129, 2047, 2048, 2049])
def test_any_number_of_instances(blobs: int) -> None:
    criterion = DICE + 0.5 * BCE
    features = features_of(list(criterion.rows))
    for has_target, masking in itertools.product((False, True), MASKINGS):
        counts, sums = random_table(features, has_target, blobs, batch=1)
        for reduction in ("mean", "instances"):
            spec = spec_of(criterion, criterion, reduction, masking)
            assert_agrees(counts, sums, features, has_target, spec)


@pytest.mark.parametrize("masking", MASKINGS)
def test_what_no_row_reads_may_be_infinite(masking: str) -> None:
    features = features_of(list(BCE.rows))
    counts, sums = table_of(infinite, features, False)
    value, gradient = native.finish(counts, sums, features, False, spec_of(BCE, BCE, masking=masking))
    assert bool(value.isfinite()) == (masking != "none")  # which reads -log(1 - p) of the other instances
    assert bool(gradient.isfinite().all())


def test_a_giant_does_not_hide_the_others() -> None:
    counts = torch.tensor([[[100, 10, 10**9, 10]]])
    voxels, features = 10**9 + 120, ("nll_pos", "nll_neg")
    sums = torch.tensor([[[[0, 0], [1, 1e-9], [0, 9e8], [2, 3e-9]]]], dtype=torch.float64)
    spec = spec_of(0.0 * DICE, BCE, "instances", "none")
    value, saved = native.finish(counts, sums, features, False, spec)
    expected = [(1 + 3e-9 + 9e8) / voxels, 4e-9 / voxels, (2 + 1e-9 + 9e8) / voxels]
    assert value.flatten().tolist() == pytest.approx(expected, rel=1e-15, abs=0)

    grad = torch.tensor([[[1e-9, 9e8, 3e-9]]], dtype=torch.float64)
    gradient = native.finish_backward(grad, counts, saved, features, False, spec)
    of_others = [(9e8 + 4e-9) / voxels, (9e8 + 3e-9) / voxels, 4e-9 / voxels, (9e8 + 1e-9) / voxels]
    assert gradient[..., 1].flatten().tolist() == pytest.approx(of_others, rel=1e-15, abs=0)


@pytest.mark.parametrize("masking", MASKINGS)
def test_the_gradient_of_what_does_not_exist_is_not_used(masking: str) -> None:
    criterion = DICE + 0.5 * BCE
    features = features_of(list(criterion.rows))
    table = (*table_of(gaps, features, False), features, False, spec_of(criterion, criterion, "instances", masking))
    counts, sums = table[:2]
    exists = counts[:, :, 1:] > 0
    grad = torch.rand(exists.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    actual = native.finish_backward(grad.masked_fill(~exists, NAN), counts, sums, *table[2:])
    assert_close(actual, finish.finish_backward(grad, counts, sums, *table[2:]), "gradient")


def test_what_the_operators_call() -> None:
    features = features_of(list(COMPOUND.rows))
    for has_target, (reduction, channel0) in itertools.product((False, True), REDUCED):
        spec = spec_of(COMPOUND, COMPOUND, reduction, channel0=channel0)
        table = (*table_of(gaps, features, has_target), features, has_target, spec)
        expected, _, grad, expected_gradient = truth(*table)
        value, saved = native.finish(*table)
        assert_close(value, expected, f"value of {reduction}")
        gradient = native.finish_backward(grad, table[0], saved, *table[2:])
        assert_close(gradient, expected_gradient, f"gradient of {reduction}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masking", ["exclude", "zero_logit", "none"])
@pytest.mark.parametrize("has_target", [False, True])
def test_threads_change_no_bit(dtype: torch.dtype, masking: str, has_target: bool) -> None:
    criterion = DICE + 0.5 * BCE
    features = features_of(list(criterion.rows))
    counts, sums = random_table(features, has_target, blobs=4200, batch=3)  # worth several threads; three spans a pair
    table = (counts, sums.to(dtype), features, has_target, spec_of(criterion, criterion, masking=masking))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(native.finish(*table))
    finally:
        torch.set_num_threads(before)
    for value, gradient in results[1:]:
        assert value.numpy().tobytes() == results[0][0].numpy().tobytes()
        assert gradient.numpy().tobytes() == results[0][1].numpy().tobytes()
    expected, ones = truth(*table)[:2]
    assert_close(results[0][0], expected, "value")
    assert_close(results[0][1], ones, "gradient")


def test_a_row_that_reads_what_the_table_lacks_gives_nan() -> None:
    counts, sums = random_table(("prob",), False)
    value, _ = native.finish(counts, sums, ("prob",), False, spec_of(DICE, BCE))
    assert math.isnan(value)


def test_no_memory_is_an_error() -> None:
    counts = torch.ones(1, dtype=torch.int64).expand(1, 1, 2**60)  # refused before anything is read
    sums, value = torch.ones(1, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    with pytest.raises(MemoryError, match="use fewer cells or smaller volumes"):
        native._finish(counts, sums, None, value, None, ("prob",), False, spec_of(DICE, DICE))
