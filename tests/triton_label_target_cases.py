"""Triton's label_target, run by Triton's interpreter on the CPU: classes, ignored values, and what is neither; and
what the launcher asks of the device.

Run by test_triton_interpreter.py in a process of its own, like triton_components_cases.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from blobloss_fast.kernels import labels
from blobloss_fast.kernels import triton_components as kernels

from .interpreter_checks import MARKS
from .quick_interpreter import quick_interpreter  # noqa: F401
from .triton_components_cases import random_mask, scan_at_once, scipys  # noqa: F401
from .triton_interpreter_cases import nothing_invalid_left_behind  # noqa: F401
from .triton_launcher_cases import Operations, Quietly

pytestmark = MARKS
INVALID_ID = 2**31 - 1


def truth(target: Tensor, channels: int, class_map: bool, softmax: bool, connectivity: int, ignore: int | None):
    """Every channel by scipy, from the meaning of the arguments."""
    ids, counts = [], []
    for sample in target.double():
        for c in range(channels):
            values = sample[0 if class_map else c]
            ignored = values == ignore if ignore is not None else torch.zeros_like(values, dtype=torch.bool)
            hot = (values == (c if class_map else 1)) & ~ignored
            if c == 0 and (softmax or class_map):
                hot &= False
            labels, count = scipys(hot.numpy(), connectivity)
            ids.append(torch.from_numpy(labels).masked_fill(ignored, -1))
            counts.append(count)
    ids = torch.stack(ids).unflatten(0, (-1, channels))
    counts = torch.tensor(counts).view(-1, channels)
    last = slice(1, None) if softmax and channels == 2 else slice(None)
    return ids[:, last], counts[:, last]


def check_target(target: Tensor, *options) -> None:
    ids, counts = kernels.label_target(target, *options)
    expected, expected_counts = truth(target, *options)
    assert ids.dtype == torch.int32 and counts.dtype == torch.int64
    assert torch.equal(counts, expected_counts)
    assert torch.equal(ids, expected)
    assert all(map(torch.equal, labels.label_target(target, *options), (expected, expected_counts)))  # the CPU's


@pytest.mark.parametrize("ignore", [None, 0, 1, 2, 255, -1, 300, 2**40])
@pytest.mark.parametrize(("softmax", "channels"), [(True, 2), (True, 4), (False, 3)])
def test_class_maps(softmax, channels, ignore):
    """Classes that touch stay apart; whatever value is ignored, its voxels are in every channel."""
    classes = torch.randint(0, channels, (1, 1, 3, 5, 9), generator=torch.Generator().manual_seed(3))
    if ignore is not None:
        classes[random_mask(*classes.shape, density=0.15, seed=1)] = ignore
    more = (torch.int8, torch.int32, torch.float64) if ignore == -1 else ()
    for dtype in (torch.int64, torch.uint8, torch.float32, *more):
        if torch.equal(classes.to(dtype).to(torch.int64), classes):
            check_target(classes.to(dtype), channels, True, softmax, 18, ignore)


@pytest.mark.parametrize("ignore", [None, 0, 1, 255])
@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("softmax", [True, False])
def test_binary_channels(softmax, channels, ignore):
    if softmax and channels == 1:
        return
    target = random_mask(2, channels, 4, 17).to(torch.uint8)
    if ignore is not None:
        target[random_mask(*target.shape, density=0.15, seed=1)] = ignore
    for dtype in (torch.uint8, torch.float32):
        check_target(target.to(dtype), channels, False, softmax, 8, ignore)


def test_an_ignored_value_that_the_dtype_rounds():
    """2^25 + 1 is no fp32: a target of that dtype holds 2^25 instead."""
    target = torch.tensor([[[0, 2.0**25, 1, 1]]])
    ids, _ = kernels.label_target(target, 1, False, False, 26, 2**25 + 1)
    assert ids.tolist() == [[[0, -1, 1, 1]]]


def invalid():
    """(target, options, where the labels say so)"""
    wrong = {
        np.uint8: (2, 128, 255),
        np.int16: (-1, 256, 257),
        np.int64: (2**32, 2**32 + 1, -(2**63)),
        np.uint64: (2**32 + 1, 2**64 - 1),
        np.float32: (1 + 2**-23, -1e-30, np.nan, np.inf),
        np.float64: (1 + 2**-52, 5e-324),
    }
    for dtype, values in wrong.items():
        for value in values:
            target = torch.from_numpy(np.array([[[0, 0, 0, value, 0, 0]]], dtype))
            yield target, (1, False, False), [[3]]
            if value != 2:
                yield target, (3, True, True), [[3]] * 3
    for value in (0.5, 3.0, -1.0):
        yield torch.tensor([[[1, 1, value, 2, 2, 0]]]), (3, True, True), [[2]] * 3
    one_hot = torch.tensor([[[1, 2, 0, 0]], [[0, 0, 1, 3]], [[0, 0, 0, 0]]]).transpose(0, 1)
    yield one_hot, (3, False, True), [[1], [1, 3], []]  # what is wrong in channel 0 is wrong in channel 1
    yield one_hot[:, :2], (2, False, True), [[1, 3]]
    yield one_hot[:, :2], (2, False, False), [[1], [3]]


@pytest.mark.parametrize("case", list(invalid()), ids=lambda case: f"{case[0].dtype} {case[0].flatten().tolist()}")
def test_an_invalid_value_has_an_id_that_no_table_has_and_raises_at_the_next_call(case):
    target, options, where = case
    valid = torch.zeros(target.shape, dtype=torch.uint8)
    for ignore in (None, 7):
        ids, _ = kernels.label_target(target, *options, 26, ignore)
        assert [(row == INVALID_ID).nonzero().flatten().tolist() for row in ids[0]] == where
        with pytest.raises(RuntimeError, match="no class of the logits"):
            kernels.label_target(valid, *options, 26, ignore)
        assert not kernels.label_target(valid, *options, 26, ignore)[0].any()


def test_the_loss_of_an_invalid_target_is_nan(monkeypatch):
    from blobloss_fast import BlobLoss, _ops
    from blobloss_fast.kernels import triton_segment_stats

    monkeypatch.setattr(_ops, "_for_cpu", lambda: triton_segment_stats)
    ids, _ = kernels.connected_components(torch.tensor([[[0, 1, 1, 0, 2, 1.0]]]), 26)
    assert ids.tolist() == [[[0, 1, 1, 0, INVALID_ID, 2]]]
    kernels.Invalid._per_device.clear()  # it would raise already
    assert torch.isnan(BlobLoss(max_instances=2)(torch.zeros(1, 1, 6), instances=ids))
    kernels.Invalid._per_device.clear()


def test_parents_of_64_bits(monkeypatch):
    """As where a volume has 2^31 voxels and more."""
    monkeypatch.setattr(kernels, "_NARROW", 0)
    target = torch.tensor([[[0, 7, 1, 1, 7, 0, 1, 2]]])
    labels, counts = kernels.label_target(target, 1, False, False, 26, 7)
    assert labels.tolist() == [[[0, -1, 1, 1, -1, 0, 2, INVALID_ID]]] and counts.item() == 2
    kernels.Invalid._per_device.clear()


# --------------------------------------------------------------------------- the launcher

NAMES = ["start", "join", "rank", "scan", "number"]


class Recorded(Quietly):
    """Notes the grid as well."""

    def __getitem__(self, grid):
        self.launches.append((self.kernel.fn.__name__, grid))
        return Quietly(self.kernel, [])[grid]


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, tuple[int, ...]]]:
    found: list[tuple[str, tuple[int, ...]]] = []
    for name in NAMES:
        kernel = f"components_{name}_kernel"
        monkeypatch.setattr(kernels, kernel, Recorded(getattr(kernels, kernel), found))
    return found


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32], ids=str)
def test_five_launches_one_clear_and_no_wait(launches, device, dtype):
    """On "meta" there is no data: reading any of it raises by itself. On "cpu" the kernels really run."""
    target = torch.ones(2, 3, 4, 5, 6, device=device).to(dtype)[:, 1:]  # channels are not dense: no copy
    kernels.Invalid.on(target.device)
    for options in ((2, False, False, 26, None), (2, False, True, 6, 255)):
        launches.clear()
        with Operations() as mode:
            ids, counts = kernels.label_target(target, *options)
        assert [name for name, _ in launches] == [f"components_{name}_kernel" for name in NAMES]
        memory = sorted(name for name in mode.called if name not in ("view", "detach"))
        assert memory == ["empty", "empty", "zeros"]  # labels, counts, the list
        assert ids.shape == (2, counts.shape[1], 4, 5, 6) and counts.dtype == torch.int64


def test_launches_and_memory_depend_on_shapes_alone(launches):
    """A graph that was captured for one mask serves any other."""
    seen = set()
    for density in (0.0, 0.2, 1.0):
        launches.clear()
        kernels.connected_components(random_mask(1, 2, 9, 10, 11, density=density), 26)
        seen.add(tuple(launches))
    assert len(seen) == 1


def test_memory_besides_the_labels_is_two_numbers_per_tile(monkeypatch):
    taken = []
    zeros = torch.zeros
    mask = torch.zeros(3, 2, 5, kernels.TILE, dtype=torch.bool)
    kernels.Invalid.on(mask.device)
    monkeypatch.setattr(torch, "zeros", lambda *args, **options: taken.append(args[0]) or zeros(*args, **options))
    kernels.connected_components(mask, 4)
    assert taken == [4 + 2 * 3 * 2 * 5]


def test_cuda_tensors_are_registered_for_triton():
    from blobloss_fast import _ops

    for name in ("connected_components", "label_target"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"blobloss_fast::{name}", "CUDA")
    assert _ops._triton("triton_components", labels) is kernels
