"""The native library's labels on every instruction set, and in two bytes where a loss asks for no more."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blobloss_fast import BlobLoss, CCLoss, connected_components
from blobloss_fast.kernels import native, native_labels

from .test_labelling import random_mask, scipy_labels

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))

# ---------------------------------------------------------------- every instruction set


@pytest.mark.usefixtures("library")
def test_every_instruction_set():
    """Short stretches and long ones, at the ends of rows and of volumes, ids of two bytes and of four."""
    random = np.random.default_rng(5)
    for shape in ((1, 2, 5, 9, 129), (2, 1, 70, 64), (1, 1, 3000), (1, 1, 4, 3, 17), (1, 1, 40, 40, 40)):
        for step, density in itertools.product((1, 4, 16, 40), (0.05, 0.3, 0.6)):
            changes = random.random(shape) < density / step
            drawn = changes.cumsum(-1) % 2 if step > 1 else random.random(shape) < density
            for dtype in (torch.uint8, torch.int32, torch.float32):
                mask = torch.from_numpy(np.asarray(drawn, np.uint8)).to(dtype)
                expected, _ = scipy_labels(mask, 26)
                assert torch.equal(connected_components(mask)[0], expected)
                ignored = torch.from_numpy(random.random(shape) < 0.1)
                target = mask.masked_fill(ignored, 9)
                arguments = target, shape[1], False, False, 26, 9
                narrow, counts = native_labels.label_target(*arguments, narrow=True)
                wide, expected_counts = native_labels.label_target(*arguments)
                assert narrow.dtype == torch.int16 and wide.dtype == torch.int32
                assert torch.equal(narrow.int(), wide) and torch.equal(counts, expected_counts)
                truth, _ = scipy_labels(mask * ~ignored, 26)
                assert torch.equal(wide, truth.masked_fill(ignored, -1))


# ---------------------------------------------------------------- ids of two bytes


@pytest.mark.parametrize("count", [0, 32767, 32768])
def test_ids_of_two_bytes_where_they_hold_them_all(count):
    mask = torch.zeros(2, 1, 2 * 32768, dtype=torch.uint8)
    mask[1, 0, : 2 * count : 2] = 1
    ids, counts = native_labels.label_target(mask, 1, False, False, 26, None, narrow=True)
    assert ids.dtype == (torch.int16 if count < 32768 else torch.int32)
    assert counts.tolist() == [[0], [count]] and ids.amax((1, 2)).tolist() == [0, count]
    assert torch.equal(ids.int(), connected_components(mask)[0])


def test_the_loss_does_not_change_with_the_bytes_of_ids(monkeypatch):
    """Bit for bit; a subclass of tensors goes through the operator, whose ids have four."""
    mask = random_mask(2, 2, 12, 13, 14, density=0.1).to(torch.uint8)
    logits = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    seen = []
    find = native_labels.label_target

    def label_target(*arguments, **options):
        found = find(*arguments, **options)
        seen.append(found[0].dtype)
        return found

    monkeypatch.setattr(native_labels, "label_target", label_target)
    results = []
    for target in (mask, mask.as_subclass(type("Volume", (torch.Tensor,), {}))):
        x = logits.clone().requires_grad_()
        value = BlobLoss(ignore_index=9)(x, target)
        (gradient,) = torch.autograd.grad(value, x)
        results.append((value.detach().as_subclass(torch.Tensor), gradient.as_subclass(torch.Tensor)))
    assert seen == [torch.int16, torch.int32]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("given", ["mask", "ids", "zones"])
def test_the_default_device_is_for_new_tensors_of_the_user(given):
    """A loss of CPU tensors stays on the CPU: the library was once handed memory of the default device for its ids."""
    mask = random_mask(1, 2, 12, 13, density=0.2)
    ids, _ = connected_components(mask)
    logits = torch.randn(mask.shape)
    loss = CCLoss() if given == "zones" else BlobLoss()
    arguments = (logits, None, ids) if given == "ids" else (logits, mask)
    expected = loss(*arguments)
    with torch.device("meta"):
        assert torch.equal(loss(*arguments), expected)
        assert torch.equal(connected_components(mask)[0], ids)
        assert torch.equal(loss.instance_losses(*arguments)[0].isnan().any(), torch.tensor(False, device="cpu"))


def test_what_something_else_wants_to_see_goes_through_the_operator(monkeypatch):
    mask = random_mask(1, 1, 9, 9).float()
    logits = torch.randn(mask.shape)
    expected = BlobLoss()(logits, mask)
    seen = []
    find = native_labels.label_target
    monkeypatch.setattr(native_labels, "label_target", lambda *args, **kw: seen.append(kw) or find(*args, **kw))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(str(function))
            return function(*args, **(kwargs or {}))

    names = set()
    with Watch():
        assert torch.equal(BlobLoss()(logits, mask), expected)
    assert "blobloss_fast.label_target.default" in names
    negated = (-1j * mask).conj().imag  # whose memory holds the opposite of what it is
    assert negated.is_neg() and torch.equal(negated, mask)
    assert torch.equal(BlobLoss()(logits, negated), expected)
    assert seen == [{}, {}]
    assert torch.equal(BlobLoss()(logits, mask), expected) and seen[2:] == [{"narrow": True}]
