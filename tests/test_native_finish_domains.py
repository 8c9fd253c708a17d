"""The native finish step where domains are zones, instances have weights, or rows are for empty domains alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from blobloss_fast import criteria
from blobloss_fast.kernels import finish, native
from blobloss_fast.kernels.layout import MASKINGS, ZONES, features_of

from .test_native_finish import CHANGES, COMPOUND, assert_close, by_id, random_table, spec_of, table_of

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))

EMPTY = {"none": (), "lesion_free": criteria.lesion_free(30.0).rows, "false_positives": criteria.false_positives().rows}
REDUCTIONS = ("mean", "none", "sum", "terms", "instances")


def check(counts, sums, features, has_target, spec, weights) -> None:
    """Value and gradient against PyTorch in fp64, with a gradient from above."""
    truth, saved = finish.finish(counts, sums.double(), features, has_target, spec, weights)
    grad = 0.5 + torch.rand(truth.shape, generator=torch.Generator().manual_seed(7))  # in fp32
    grad = grad.double()
    expected = finish.finish_backward(grad, counts, saved, features, has_target, spec, weights)
    value, saved = native.finish(counts, sums, features, has_target, spec, weights)
    actual = native.finish_backward(grad.to(sums.dtype), counts, saved, features, has_target, spec, weights)
    about = f"of {spec.reduction}, {spec.masking}, target {has_target}"
    assert_close(value, truth, f"value {about}")
    assert_close(actual, expected, f"gradient {about}")


def cases():
    for masking, has_target in (*itertools.product(MASKINGS, (False, True)), (ZONES, True)):
        for reduction, channel0 in itertools.product(REDUCTIONS, ("class", "background")):
            yield masking, has_target, reduction, channel0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("change", [change for change in CHANGES if change.__name__ != "infinite"])
def test_agrees_with_pytorch(change, empty: str, dtype: torch.dtype) -> None:
    features = features_of(COMPOUND.rows, EMPTY[empty])
    random = torch.Generator().manual_seed(3)
    for masking, has_target, reduction, channel0 in cases():
        counts, sums = table_of(change, features, has_target)
        if masking == ZONES:  # some without foreground, and class 0 in no zone
            for table in (by_id(counts, True), by_id(sums, True)):
                table[:, :, 1::5, 1] = 0
                table[:, 1:, 0] = 0
        spec = spec_of(COMPOUND, COMPOUND, reduction, masking, channel0=channel0, empty_rows=EMPTY[empty])
        weights = (torch.rand(2, 3, 150, generator=random) - 0.3).clamp(min=0) if reduction != "sum" else None
        if weights is not None:
            weights[0, 1] = 0  # nothing of this pair counts
        check(counts, sums.to(dtype), features, has_target, spec, weights)


@pytest.mark.parametrize("blobs", [0, 1, 7, 8, 129, 4095, 4097])
def test_any_number_of_zones(blobs: int) -> None:
    criterion = criteria.dice() + 0.5 * criteria.bce()  # whose terms do not cancel
    features = features_of(criterion.rows, EMPTY["lesion_free"])
    counts, sums = random_table(features, True, blobs, batch=1)
    by_id(counts, True)[:, :, ::3, 1] = 0
    by_id(sums, True)[:, :, ::3, 1] = 0
    weights = torch.rand(1, 3, blobs, generator=torch.Generator().manual_seed(1))
    for reduction in REDUCTIONS:
        spec = spec_of(criterion, criterion, reduction, ZONES, empty_rows=EMPTY["lesion_free"])
        check(counts, sums, features, True, spec, weights)
        check(counts, sums, features, True, spec, None)


def test_what_would_read_other_memory_is_refused() -> None:
    features = features_of(COMPOUND.rows)
    counts, sums = random_table(features, False)
    with pytest.raises(ValueError, match="zones need a target"):
        native.finish(counts, sums, features, False, spec_of(COMPOUND, COMPOUND, masking=ZONES))
    with pytest.raises(ValueError, match=r"weights must be \[B, C, N\] with 900 elements in all; got \[2, 3, 149\]"):
        native.finish(counts, sums, features, False, spec_of(COMPOUND, COMPOUND), torch.ones(2, 3, 149))
