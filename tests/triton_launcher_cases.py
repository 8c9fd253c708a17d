"""The launchers of the Triton kernels: what they copy, and that they never wait for the device.

Run by test_triton_interpreter.py in a process of its own, like triton_interpreter_cases.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from blobloss_fast import _ops
from blobloss_fast.kernels import reference
from blobloss_fast.kernels import triton_segment_stats as kernels
from blobloss_fast.kernels.layout import FEATURES
from blobloss_fast.kernels.triton_launch import rows

from .interpreter_checks import MARKS

pytestmark = MARKS


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


class SeeInside(TorchDispatchMode):
    """Follows the package's operators into the kernels of CPU tensors, on "meta" as well, where they have fakes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "blobloss_fast":
            return func(*args, **(kwargs or {}))
        with self:
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))


class RefuseSynchronisation(SeeInside):
    """Refuses what would make the host wait, and any copy between host and device.

    On "cpu" nothing is called for `.cpu()`, `.tolist()` and `.numpy()`: they are refused on "meta" alone, the last by
    PyTorch itself. A tensor made of numbers (lift_fresh), which is a copy from the host, is seen on "cpu" alone.
    """

    WAITS = (
        *("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "masked_select", "unique", "_unique2"),
        *("allclose", "bincount", "repeat_interleave", "lift_fresh"),
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in self.WAITS:
            raise AssertionError(f"{name} waits for the device")
        if name in ("index", "index_put_", "index_put") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        ):
            raise AssertionError("a boolean index waits for the device")
        if name == "_to_copy" and kwargs.get("device") not in (None, args[0].device):
            raise AssertionError("a copy between host and device waits")
        if name == "copy_" and args[0].device != args[1].device:
            raise AssertionError("a copy between host and device waits")
        return super().__torch_dispatch__(func, types, args, kwargs)


class Operations(RefuseSynchronisation):
    """Refuses what waits, and notes what is called."""

    # What makes no kernel run: memory, and other views of it.
    NO_KERNEL = (
        *("view", "detach", "alias", "expand", "permute", "transpose", "select", "slice", "unsqueeze", "squeeze"),
        *("split", "unbind", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "blobloss_fast":  # what that calls is noted
            self.called.append(func.overloadpacket.__name__)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def take_kernels(self) -> list[str]:
        """Return PyTorch's operations since the last call, in their order: each launches a kernel, or may."""
        called, self.called = self.called, []
        return [name for name in called if name not in self.NO_KERNEL]


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


WAITING = {
    "item": lambda t: t.sum().item(),
    "float": lambda t: float(t[0]),
    "bool": lambda t: bool(t.any()),
    "nonzero": lambda t: t.nonzero(),
    "boolean index": lambda t: t[t > 0],
    "assignment": lambda t: t.index_put_((t > 0,), t),
    "equal": lambda t: torch.equal(t, t),
    "allclose": lambda t: torch.allclose(t, t),
    "unique": lambda t: t.unique(),
    "masked_select": lambda t: t.masked_select(t > 0),
    "copy_": lambda t: t.copy_(torch.ones(3, device="meta" if t.device.type == "cpu" else "cpu")),
    "to another": lambda t: t.to("meta" if t.device.type == "cpu" else "cpu"),
}
WAITING_ON_META = {
    "cpu": lambda t: t.cpu(),
    "to": lambda t: t.to("cpu"),
    "to, with a dtype": lambda t: t.to("cpu", torch.float64),
    "tolist": lambda t: t.tolist(),
}
CALLS = [(device, *call) for device in ("cpu", "meta") for call in WAITING.items()]
CALLS += [("meta", *call) for call in WAITING_ON_META.items()]
CALLS += [("cpu", "tensor", lambda t: torch.tensor([1, 2], device=t.device)), ("cpu", "list", lambda t: t[[0, 1]])]


@pytest.mark.parametrize(("device", "waits"), [call[::2] for call in CALLS], ids=[" ".join(call[:2]) for call in CALLS])
def test_the_refusal_refuses(device, waits):
    tensor = torch.ones(3, device=device)
    with pytest.raises(AssertionError, match="waits"), RefuseSynchronisation():
        waits(tensor)


def test_on_meta_numpy_is_refused_by_pytorch():
    for reads in (lambda t: t.numpy(), np.asarray):
        with pytest.raises(TypeError, match="meta"):
            reads(torch.ones(3, device="meta"))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_does_not_wait_is_let_through(device):
    """And noted in order, if it would launch a kernel."""
    with Operations() as mode:
        t = torch.zeros(2, 3, device=device)
        u = torch.where(t > 0, t, t.to(torch.float64))[:, 1:].clone()
        u.masked_fill_(t.view(3, 2).mT[:, 1:] < 1, 2.0)
        u[0].sum()
    assert u.shape == (2, 2)
    assert mode.take_kernels() == ["zeros", "gt", "_to_copy", "where", "clone", "lt", "masked_fill_", "sum"]
    assert mode.take_kernels() == []


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("waits", [WAITING["item"], WAITING["nonzero"]], ids=["item", "nonzero"])
def test_the_refusal_sees_into_an_operator(monkeypatch, device, waits):
    """Also on "meta", where an operator has a fake."""
    mask = torch.ones(1, 1, 4, device=device)

    class Backend:
        @staticmethod
        def connected_components(mask, connectivity):
            waits(mask)
            return mask, mask

    monkeypatch.setattr(_ops, "_labels_for_cpu", lambda: Backend)
    with pytest.raises(AssertionError, match="waits"), RefuseSynchronisation():
        _ops.connected_components(mask, 26)


def test_a_launch_copies_out_of_inference_mode():
    logits, ids = torch.zeros(1, 1, 4), torch.tensor([[[0, 1, 2, 3]]])
    kernels.Invalid._per_device.clear()
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            counts, _ = kernels.segment_stats_forward(logits, ids, None, 4, ("prob",), "sigmoid", 2.0, "class")
            assert counts.tolist() == [[[1, 1, 1, 1]]]
