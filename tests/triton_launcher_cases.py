"""The launchers of the Triton kernels: what they copy, and that they never wait for the device.

Run by test_triton_interpreter.py in a process of its own, like triton_interpreter_cases.py.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 must be set before Triton is imported", allow_module_level=True)

from blobloss_fast.kernels import reference
from blobloss_fast.kernels import triton_segment_stats as kernels
from blobloss_fast.kernels.layout import FEATURES
from blobloss_fast.kernels.triton_launch import rows

# As in triton_interpreter_cases.py.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]


def test_a_volume_is_copied_only_if_its_spatial_axes_are_not_dense():
    volume = torch.zeros(2, 4, 3, 5, 7)
    for view, strides in (
        (volume, (420, 105)),
        (volume[:, 1:3], (420, 105)),
        (volume[:, :1].expand(2, 3, 3, 5, 7), (420, 0)),
    ):
        same, *found = rows(view)
        assert same.data_ptr() == view.data_ptr()
        assert tuple(found) == strides
    for view in (volume.to(memory_format=torch.channels_last_3d), volume[..., 1:], volume.transpose(2, 3)):
        copy, *found = rows(view)
        assert copy.is_contiguous()
        assert torch.equal(copy, view)
        assert tuple(found) == copy.stride()[:2]


class RefuseSynchronisation(TorchDispatchMode):
    """Refuses what would make the host wait, and any copy between host and device."""

    WAITS = ("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "masked_select", "unique", "_unique2")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in self.WAITS:
            raise AssertionError(f"{name} waits for the device")
        if "index" in name and any(getattr(i, "dtype", None) == torch.bool for i in args[1]):
            raise AssertionError("a boolean index waits for the device")
        if name == "_to_copy" and kwargs.get("device") not in (None, args[0].device):
            raise AssertionError("a copy between host and device waits")
        if name == "copy_" and args[0].device != args[1].device:
            raise AssertionError("a copy between host and device waits")
        return func(*args, **kwargs)


class Operations(RefuseSynchronisation):
    """Refuses what waits, and notes what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(func.overloadpacket.__name__)
        return super().__torch_dispatch__(func, types, args, kwargs)


class Quietly:
    """A kernel whose launch the mode does not see: the interpreter copies its arguments, a GPU launch does not."""

    def __init__(self, kernel, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launches.append(self.kernel.fn.__name__)
            if args[0].device.type == "cpu":
                with _disable_current_modes():
                    self.kernel[grid](*args, **kwargs)

        return launch


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("with_target", [False, True])
def test_launchers_never_wait(monkeypatch, device, with_target):
    """On "meta" there is no data: reading any of it raises by itself. On "cpu" the kernels really run."""
    launches: list = []
    for name in ("segment_stats_fwd_kernel", "segment_stats_bwd_kernel", "read_table_kernel"):
        monkeypatch.setattr(kernels, name, Quietly(getattr(kernels, name), launches))
    logits = torch.rand(1, 2, 3, 4, device=device).transpose(2, 3)
    ids = torch.ones(1, 2, 4, 3, dtype=torch.int64, device=device)
    target = torch.ones(1, 2, 4, 3, dtype=torch.bool, device=device) if with_target else None
    options = (FEATURES, "softmax", 2.0, "background")
    with RefuseSynchronisation():
        for _ in range(2):
            counts, sums = kernels.segment_stats_forward(logits, ids, target, 4, *options)
            grad = kernels.segment_stats_backward(sums, logits, ids, target, *options)
    assert launches == 2 * ["segment_stats_fwd_kernel", "read_table_kernel", "segment_stats_bwd_kernel"]
    assert counts.shape == (1, 2, 4)
    assert grad.shape == logits.shape
    if device == "cpu":
        assert torch.equal(counts, reference.segment_stats_forward(logits, ids, target, 4, *options)[0])


def test_what_was_invalid_is_told_again_after_a_capture(monkeypatch):
    """While a graph is captured nothing may wait: the message comes, and once more from the next call."""
    state = kernels.Invalid(torch.device("cpu"))
    state.device = torch.device("cuda")
    capturing, waits = [True], []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    state.flag.fill_(1)
    for expected in (0, 1):
        with pytest.raises(RuntimeError, match="max_instances"):
            state.raise_if_seen()
        assert len(waits) == expected
        capturing[0] = False
    state.raise_if_seen()


def test_the_refusal_refuses():
    t = torch.ones(3)
    for waits in (
        t.sum().item,
        t.nonzero,
        lambda: t[t > 0],
        lambda: bool(t.any()),
        lambda: torch.equal(t, t),
        t.unique,
    ):
        with pytest.raises(AssertionError, match="waits"), RefuseSynchronisation():
            waits()
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.ones(3, device="meta").cpu()


def test_a_launch_copies_out_of_inference_mode():
    logits, ids = torch.zeros(1, 1, 4), torch.tensor([[[0, 1, 2, 3]]])
    kernels.Invalid._per_device.clear()
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            counts, _ = kernels.segment_stats_forward(logits, ids, None, 4, ("prob",), "sigmoid", 2.0, "class")
            assert counts.tolist() == [[[1, 1, 1, 1]]]
