"""The finish in Triton, in the interpreter, against PyTorch's in float64: from a table that is filled here.

Run by test_triton_interpreter.py in a process of its own, like triton_interpreter_cases.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from blobloss_fast import criteria
from blobloss_fast.kernels import finish as pytorch
from blobloss_fast.kernels import triton_coefficients, triton_finish
from blobloss_fast.kernels.layout import MASKINGS, ZONES, features_of
from blobloss_fast.kernels.triton_table import HEAD, UNIT

from .interpreter_checks import MARKS
from .quick_interpreter import quick_interpreter  # noqa: F401
from .test_native_finish import CHANGES, COMPOUND, by_id, random_table, spec_of
from .test_native_finish_domains import EMPTY, REDUCTIONS
from .test_out_of_range import RIGHT, SPOILED, WRONG, check_finish_of_2_31_voxels

pytestmark = MARKS
FP64 = 1e-12  # relative to the largest of the same sample, class and feature
DOMAINS = [*itertools.product(MASKINGS, (False, True)), (ZONES, True)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles, and several programs a pair, from a few instances."""
    monkeypatch.setattr(triton_finish, "LANES", dict.fromkeys(triton_finish.LANES, 32))


def filled(counts: Tensor, sums: Tensor, room: int, numbers: Tensor) -> Tensor:
    """A table as the forward pass leaves it."""
    stats = [counts.double().long()]
    for values in sums.double().unbind(-1):
        finite = torch.where(values.isfinite() & (values < 2.0**46), values, 0.0)
        high = (finite * 2.0**16).floor()
        low = ((finite - high * 2.0**-16) * 2.0**46).round()
        stats += [high.long(), low.long(), (values - finite).view(torch.int64)]
    head = torch.zeros(HEAD, dtype=torch.float64)
    head[0] = float("nan") if sums.numel() and sums.isnan().all() else 0.0  # the poison
    table = torch.cat([head.view(torch.int64), torch.stack(stats, -1).flatten(), torch.zeros(room, dtype=torch.int64)])
    return torch.cat([table.view(torch.float64), numbers])


def in_units(sums: Tensor) -> Tensor:
    """The same sums, rounded as a table rounds them."""
    rounded = (sums.double() * 2.0**40).round() * 2.0**-40
    return torch.where(sums.isfinite() & (sums < 2.0**12), rounded, sums)


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    expected = expected.double()
    bad = ~expected.isfinite()
    assert torch.equal(~actual.isfinite(), bad), what
    scale = expected.masked_fill(bad, 0.0).abs()
    scale = scale.amax(2, keepdim=True) if expected.ndim > 2 else scale
    off = ((actual.double() - expected).abs() / scale.clamp(min=1e-30)).masked_fill(bad, 0.0)
    bound = FP64 if actual.dtype == torch.float64 else 2e-7
    assert not off.numel() or float(off.max()) <= bound, f"{what}: {float(off.max()):.3g}"


def finish(
    counts: Tensor, sums: Tensor, features, has_target: bool, spec, weights, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, counts and what is saved, from a table that is filled with these."""
    batch, channels, num_cells = counts.shape
    slots = triton_finish.Slots.of(batch * channels, num_cells // (1 + has_target) - 1, len(features))
    logits = torch.empty(batch, channels, dtype=dtype)
    criterion = triton_finish.coefficients_of(spec, channels, features, logits.device)
    table = filled(counts, sums, slots.doubles, criterion.numbers)
    return triton_finish.finish(
        *(table.view(torch.int64), table, num_cells, slots, criterion, logits),
        *(features, has_target, spec, weights),
    )


def check(counts: Tensor, sums: Tensor, features, has_target: bool, spec, weights, dtype=torch.float64) -> None:
    counts, sums = counts.contiguous(), in_units(sums)
    weights_there = None if weights is None else weights.to(dtype)
    value, found, saved = finish(counts, sums, features, has_target, spec, weights_there, dtype)
    about = f"of {spec.reduction}, {spec.masking}, target {has_target}, {spec.channel0}"
    truth, expected = pytorch.finish(counts, sums, features, has_target, spec, weights)
    assert torch.equal(found, counts), about
    assert value.dtype == saved.dtype == dtype
    assert_close(value, truth, f"value {about}")
    assert_close(saved, expected, f"saved {about}")
    if spec.reduction in ("terms", "instances"):
        grad = 0.5 + torch.rand(truth.shape, generator=torch.Generator().manual_seed(7))
        expected = pytorch.finish_backward(grad.double(), counts, sums, features, has_target, spec, weights)
        actual = triton_finish.finish_backward(
            grad.to(dtype), counts, sums.to(dtype), features, has_target, spec, weights_there
        )
        assert_close(actual, expected, f"gradient {about}")


def scene(change, features, masking: str, has_target: bool, blobs: int = 45, batch: int = 2) -> tuple[Tensor, Tensor]:
    counts, sums = random_table(features, has_target, blobs, batch)
    change(by_id(counts, has_target), by_id(sums, has_target), features)
    if masking == ZONES:  # some without foreground, and class 0 in no zone
        for table in (by_id(counts, True), by_id(sums, True)):
            table[:, :, 1::5, 1] = 0
            table[:, 1:, 0] = 0
    return counts, sums


@pytest.mark.parametrize("change", CHANGES)
def test_agrees_with_pytorch(change):
    """A third of all maskings, without and with a target; in turn reductions, weights and rows for empty samples."""
    start = CHANGES.index(change)
    random = torch.Generator().manual_seed(start)
    for i in range(start, start + 3 * len(DOMAINS), 8):
        masking, has_target = DOMAINS[i % len(DOMAINS)]
        empty = list(EMPTY)[i % 3]
        if change.__name__ == "infinite":  # what a domain of empty samples would read
            empty = "none"
            masking = "exclude"
        features = features_of(COMPOUND.rows, EMPTY[empty])
        counts, sums = scene(change, features, masking, has_target)
        channel0 = ("class", "background", "unused")[(i // 2) % 3]
        spec = spec_of(
            COMPOUND, COMPOUND, REDUCTIONS[i % 5], masking, channel0=channel0, empty_rows=EMPTY[empty],
            activation=("sigmoid", "softmax", "none")[i % 3],
        )  # fmt: skip
        weights = None
        if i % 2:
            weights = (torch.rand(2, 3, 45, generator=random) - 0.3).clamp(min=0).double()
            weights[0, 1] = 0  # nothing of this pair counts
        check(counts, sums, features, has_target, spec, weights)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["dice", "jaccard", "bce", "focal"])
def test_other_criteria_and_float32(name, reduction):
    criterion = {
        "dice": criteria.dice(), "jaccard": criteria.jaccard(), "bce": criteria.bce(), "focal": criteria.focal()
    }[name]  # fmt: skip
    for masking, has_target in (("exclude", False), ("none", True)):
        features = features_of(criterion.rows)
        spec = spec_of(criterion, criterion, reduction, masking)
        check(*scene(CHANGES[0], features, masking, has_target, 20), features, has_target, spec, None, torch.float32)


@pytest.mark.parametrize("blobs", [0, 1, 32, 33, 550])
def test_any_number_of_instances(blobs):
    """550 are 18 tiles, more than a pair has programs."""
    others = (("none", True, "none"), (ZONES, True, "terms")) if blobs < 100 else ()
    for masking, has_target, reduction in (("exclude", False, "mean"), *others):
        features = features_of(criteria.dice().rows)
        spec = spec_of(criteria.dice(), criteria.dice(), reduction, masking)
        table = scene(CHANGES[0], features, masking, has_target, blobs, batch=1)
        check(*table, features, has_target, spec, None)


def test_weights_of_the_terms_keep_48_bits():
    single, rest = triton_coefficients.in_two(0.1)
    assert torch.tensor(single, dtype=torch.float32).double().item() == single
    assert abs(single + torch.tensor(rest, dtype=torch.float32).double().item() - 0.1) < 1e-15


def test_coefficients_are_made_once_whatever_the_weights_of_the_terms():
    """Weights change from step to step where they are annealed; nothing may be sent to the device for that."""
    triton_coefficients.coefficients.cache_clear()
    features = features_of(criteria.dice().rows)
    table = scene(CHANGES[0], features, "exclude", False, 3, batch=1)
    spec = spec_of(criteria.dice(), criteria.dice())
    for weight in (1.0, 0.5, 0.25):
        check(*table, features, False, spec._replace(main_weight=weight, blob_weight=1 - weight / 2), None)
    assert triton_coefficients.coefficients.cache_info().misses == 1


class Finish:
    """The interface of the other modules, with a table in between."""

    @staticmethod
    def finish(counts: Tensor, sums: Tensor, features, has_target: bool, spec) -> tuple[Tensor, Tensor]:
        value, _, saved = finish(counts, sums, features, has_target, spec, None, sums.dtype)
        return value, saved

    @staticmethod
    def finish_backward(grad: Tensor, counts: Tensor, saved: Tensor, features, has_target: bool, spec) -> Tensor:
        if spec.reduction == "instances":
            return triton_finish.finish_backward(grad, counts, saved, features, has_target, spec, None)
        return grad * saved  # as the volume's backward pass does


@pytest.mark.parametrize("spoiled", SPOILED)
@pytest.mark.parametrize(
    ("masking", "background"),
    [("exclude", RIGHT), ("exclude", WRONG), ("none", RIGHT), ("none", WRONG), (ZONES, RIGHT)],
    ids=["exclude-right", "exclude-wrong", "none-right", "none-wrong", ZONES],
)
@pytest.mark.parametrize("criterion", ["bce", "dice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_2_31_voxels(dtype, criterion, masking, background, spoiled):
    """1e4 for each of them lies in the table's integers still."""
    check_finish_of_2_31_voxels(Finish, dtype, criterion, masking, background, spoiled, UNIT)
