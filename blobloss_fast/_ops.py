"""Operators registered with PyTorch: the only file that knows torch.library.

The dispatcher is the registry of backends (``run_label_target``, and the look at a few ids in ``partition``, alone may
go past it). Every operator has the reference as its kernel for any device and a fake for tracing; CUDA tensors take
Triton where it is installed. The formula of a differentiable operator *is* its ``torch.autograd.Function``: it is
registered for the Autograd key, so eager mode, ``torch.compile`` and opcheck all go through one backward, which is an
operator of its own.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .kernels import finish, labels, native, native_labels, native_zones, reference, zones
from .kernels.finish import decode

_LIBRARY = torch.library.Library("blobloss_fast", "DEF")
_STATS_OPTIONS = "str[] features, str activation, float gamma"
_LOSS_OPTIONS = "float main_weight, float blob_weight, str options"  # kernels.finish.decode
_LOSS_INPUTS = "Tensor logits, Tensor instances, Tensor? target, Tensor? weights"

_LIBRARY.define(f"segment_stats(Tensor logits, Tensor cells, SymInt num_cells, {_STATS_OPTIONS}) -> (Tensor, Tensor)")
_LIBRARY.define(f"segment_stats_backward(Tensor grad_sums, Tensor logits, Tensor cells, {_STATS_OPTIONS}) -> Tensor")
_LIBRARY.define(f"blob_loss({_LOSS_INPUTS}, SymInt max_instances, {_LOSS_OPTIONS}) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    f"blob_loss_backward(Tensor grad, {_LOSS_INPUTS}, Tensor counts, Tensor saved, {_LOSS_OPTIONS}) -> Tensor"
)
_LIBRARY.define("connected_components(Tensor mask, int connectivity) -> (Tensor, Tensor)")
_LIBRARY.define(
    "label_target(Tensor target, int channels, bool class_map, bool softmax, int connectivity, int? ignore) "
    "-> (Tensor, Tensor)"
)

_LIBRARY.define("nearest_instance(Tensor instances, int[] weights) -> Tensor")

_ops = torch.ops.blobloss_fast
segment_stats = _ops.segment_stats.default
segment_stats_backward = _ops.segment_stats_backward.default
blob_loss = _ops.blob_loss.default
blob_loss_backward = _ops.blob_loss_backward.default
connected_components = _ops.connected_components.default
label_target = _ops.label_target.default
nearest_instance = _ops.nearest_instance.default

# ---------------------------------------------------------------- kernels, written once for every backend module


def _register(backend: Callable[[], ModuleType], key: str) -> None:
    def segment_stats(logits, cells, num_cells, features, activation, gamma):  # type: ignore[no-untyped-def]
        counts, sums = backend().segment_stats_forward(
            logits, cells, None, num_cells, tuple(features), activation, gamma, "class"
        )
        return sums, counts

    def segment_stats_backward(grad_sums, logits, cells, features, activation, gamma):  # type: ignore[no-untyped-def]
        return backend().segment_stats_backward(
            grad_sums, logits, cells, None, tuple(features), activation, gamma, "class"
        )

    def blob_loss(logits, instances, target, weights, max_instances, *options):  # type: ignore[no-untyped-def]
        spec, features = decode(*options)
        num_cells = _num_cells(max_instances, target)
        module = backend()
        if hasattr(module, "blob_loss"):  # all of it at once
            return module.blob_loss(logits, instances, target, weights, num_cells, features, spec)
        counts, sums = module.segment_stats_forward(
            logits, instances, target, num_cells, features, spec.activation, spec.gamma, spec.channel0
        )
        loss, saved = finish.finish(counts, sums, features, target is not None, spec, weights)
        if logits.device.type == "cpu":
            table, size = finish.sizes_of_saved(logits, num_cells, len(features), saved.dtype)
            saved = torch.nn.functional.pad(saved.flatten(), (0, size - table))
        return loss, counts, saved

    def blob_loss_backward(  # type: ignore[no-untyped-def]
        grad, logits, instances, target, weights, counts, saved, *options
    ):
        spec, features = decode(*options)
        module = backend()
        if hasattr(module, "blob_loss"):
            return module.blob_loss_backward(grad, logits, instances, target, weights, counts, saved, features, spec)
        if logits.device.type == "cpu":
            saved = saved[: counts.numel() * len(features)].view(*counts.shape, len(features))
        grad_sums = finish.finish_backward(grad, counts, saved, features, target is not None, spec, weights)
        return module.segment_stats_backward(
            grad_sums, logits, instances, target, features, spec.activation, spec.gamma, spec.channel0
        )

    for kernel in (segment_stats, segment_stats_backward, blob_loss, blob_loss_backward):
        _LIBRARY.impl(kernel.__name__, kernel, key)


def _register_labels(labels: Callable[[], ModuleType], zones: Callable[[], ModuleType], key: str) -> None:
    _LIBRARY.impl("connected_components", lambda *args: labels().connected_components(*args), key)
    _LIBRARY.impl("label_target", lambda *args: labels().label_target(*args), key)
    _LIBRARY.impl("nearest_instance", lambda *args: zones().nearest_instance(*args), key)


def has_triton() -> bool:
    """Whether Triton is installed, found without importing it."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _triton(name: str, otherwise: ModuleType) -> ModuleType:
    """A module of Triton kernels, imported at the first CUDA tensor, or where there is no Triton what runs anywhere."""
    return importlib.import_module(f".kernels.{name}", __package__) if has_triton() else otherwise


@functools.cache
def _for_cpu() -> ModuleType:
    """The native library, loaded at the first CPU tensor, or the reference where it could not be built."""
    return native if native.available() else reference


def _labels_for_cpu() -> ModuleType:
    """What finds the labels of a CPU tensor: the native library if it is the backend, else connected-components-3d."""
    return native_labels if _for_cpu() is native else labels


def _zones_for_cpu() -> ModuleType:
    return native_zones if _for_cpu() is native else zones


def finds_large_ids(logits: Tensor) -> bool:
    """Whether an id beyond the capacity raises ``IdTooLargeError``, early, for such logits."""
    return logits.device.type == "cpu" and not torch.compiler.is_compiling() and _for_cpu() is native


_register(lambda: reference, "CompositeExplicitAutograd")
_register(lambda: _for_cpu(), "CPU")  # looked up at every call, so that a test or a benchmark may put another one there
_register(lambda: _triton("triton_segment_stats", reference), "CUDA")
_register_labels(lambda: labels, lambda: zones, "CompositeExplicitAutograd")
_register_labels(lambda: _labels_for_cpu(), lambda: _zones_for_cpu(), "CPU")
_register_labels(lambda: _triton("triton_components", labels), lambda: _triton("triton_zones", zones), "CUDA")

# ---------------------------------------------------------------- fakes: shapes and dtypes, for tracing


def _num_cells(max_instances: int, target: Tensor | None) -> int:
    return (max_instances + 1) * (1 if target is None else 2)


def _fake_table(logits: Tensor, num_cells: int, num_features: int) -> tuple[Tensor, Tensor]:
    shape = (*logits.shape[:2], num_cells)
    return (
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty((*shape, num_features), dtype=reference.compute_dtype(logits.dtype)),
    )


def _fake_segment_stats(logits, cells, num_cells, features, activation, gamma):  # type: ignore[no-untyped-def]
    counts, sums = _fake_table(logits, num_cells, len(features))
    return sums, counts


def _fake_blob_loss(logits, instances, target, weights, max_instances, *options):  # type: ignore[no-untyped-def]
    spec, features = decode(*options)
    counts, saved = _fake_table(logits, _num_cells(max_instances, target), len(features))
    shapes = {"none": logits.shape[:2], "terms": (2,), "instances": (*logits.shape[:2], max_instances)}
    value = saved.new_empty(shapes.get(spec.reduction, ()))
    if logits.device.type == "cpu":
        saved = saved.new_empty(finish.sizes_of_saved(logits, counts.shape[2], len(features), saved.dtype)[1])
    return value, counts, saved


def _fake_gradient(grad, logits, *rest):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


def _fake_connected_components(mask: Tensor, connectivity: int) -> tuple[Tensor, Tensor]:
    return mask.new_empty(mask.shape, dtype=torch.int32), mask.new_empty(mask.shape[:2], dtype=torch.int64)


def _fake_label_target(target, channels, class_map, softmax, connectivity, ignore):  # type: ignore[no-untyped-def]
    returned = (target.shape[0], 1 if softmax and channels == 2 else channels)
    return (
        target.new_empty((*returned, *target.shape[2:]), dtype=torch.int32),
        target.new_empty(returned, dtype=torch.int64),
    )


def _fake_nearest_instance(instances: Tensor, weights: list[int]) -> Tensor:
    return instances.new_empty(instances.shape, dtype=torch.int32)


_FAKES: dict[str, Callable[..., Any]] = {
    "segment_stats": _fake_segment_stats,
    "segment_stats_backward": _fake_gradient,
    "blob_loss": _fake_blob_loss,
    "blob_loss_backward": _fake_gradient,
    "connected_components": _fake_connected_components,
    "label_target": _fake_label_target,
    "nearest_instance": _fake_nearest_instance,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"blobloss_fast::{_name}", _fake, lib=_LIBRARY)

# ---------------------------------------------------------------- autograd


def _gradient(operator: Callable[..., Tensor], *args: Any) -> Tensor:
    """Call the backward operator; past autograd, which takes as long as all else here, unless that is recording."""
    if torch.is_grad_enabled():  # with create_graph=True
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


class SegmentStatsFunction(torch.autograd.Function):
    """The differentiable table of sums."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, cells: Tensor, num_cells: int, *options: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            sums, counts = segment_stats(logits, cells, num_cells, *options)
        ctx.save_for_backward(logits, cells)
        ctx.options = options
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)  # a gradient that there is not is None, rather than zeros made for it
        return sums, counts

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = None
        if grad_sums is not None:
            grad = _gradient(segment_stats_backward, grad_sums, *ctx.saved_tensors, *ctx.options)
        return grad, None, None, *(None for _ in ctx.options)


class BlobLossFunction(torch.autograd.Function):
    """The whole loss: one pass over the volume forward, one backward."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        instances: Tensor,
        target: Tensor | None,
        weights: Tensor | None,
        max_instances: int,
        *options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            loss, counts, saved = blob_loss(logits, instances, target, weights, max_instances, *options)
        ctx.save_for_backward(logits, instances, target, weights, counts, saved)
        ctx.options = options
        ctx.mark_non_differentiable(counts, saved)
        ctx.set_materialize_grads(False)
        return loss, counts, saved

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = None
        if grad_loss is not None:
            grad = _gradient(blob_loss_backward, grad_loss, *ctx.saved_tensors, *ctx.options)
        return grad, None, None, None, None, None, None, None


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def run_blob_loss(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``blob_loss``, past its dispatch to autograd, which takes 5 us, unless something has to see it."""
    return blob_loss(*args) if _is_traced() else BlobLossFunction.apply(*args)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is what its memory says, and nothing else wants to see what is done with it."""
    watched = _is_traced() or torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0
    return type(tensor) is Tensor and not (watched or tensor.is_neg())


def run_label_target(target: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The operator ``label_target``, past it on the CPU, since an operator cannot choose the dtype of its ids.

    Ids of two bytes, where there are few enough, are half as much to write, and to read twice.
    """
    if target.device.type == "cpu" and is_plain(target):
        module = _labels_for_cpu()
        if module is native_labels:
            return module.label_target(target, *args, narrow=True)
    return label_target(target, *args)


class _OnceDifferentiable(torch.autograd.Function):
    """A gradient that says clearly that it has no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, operator: Callable[..., Tensor], *args: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "blobloss_fast has no second derivative: its gradient cannot be differentiated again; call backward() "
            "without create_graph=True, or write the loss in plain PyTorch where a gradient penalty needs it"
        )


def _autograd(function: type[torch.autograd.Function], *leading: Any) -> Any:
    return lambda *args: function.apply(*leading, *args)


_LIBRARY.impl("segment_stats", _autograd(SegmentStatsFunction), "Autograd")
_LIBRARY.impl("blob_loss", _autograd(BlobLossFunction), "Autograd")
_LIBRARY.impl("segment_stats_backward", _autograd(_OnceDifferentiable, segment_stats_backward), "Autograd")
_LIBRARY.impl("blob_loss_backward", _autograd(_OnceDifferentiable, blob_loss_backward), "Autograd")
