"""The whole loss on the Triton kernels, as a CUDA tensor takes it: operator, autograd function, finish, kernels.

Run by test_triton_interpreter.py in a process of its own, like triton_interpreter_cases.py.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 must be set before Triton is imported", allow_module_level=True)

from blobloss_fast import BlobLoss, _ops, criteria
from blobloss_fast.kernels import reference, triton_segment_stats

from . import scenes
from .blob_loss_checks import COMPOUND, check

# As in triton_interpreter_cases.py.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]
KERNELS = ("segment_stats_forward", "segment_stats_backward")


@pytest.fixture(autouse=True)
def launches(monkeypatch) -> list[str]:
    """Have CPU tensors take the kernels of CUDA tensors, and count them."""
    assert _ops._triton("triton_segment_stats", reference) is triton_segment_stats
    calls: list[str] = []
    for name in KERNELS:
        kernel = getattr(triton_segment_stats, name)
        counting = lambda *a, _kernel=kernel, _name=name: calls.append(_name) or _kernel(*a)  # noqa: E731
        monkeypatch.setattr(triton_segment_stats, name, counting)
    monkeypatch.setattr(_ops, "_for_cpu", lambda: triton_segment_stats)
    return calls


def test_cuda_tensors_are_registered_for_triton():
    for name in ("segment_stats", "segment_stats_backward", "blob_loss", "blob_loss_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"blobloss_fast::{name}", "CUDA")


@pytest.mark.parametrize("masking", scenes.MASKINGS)
@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_value_and_gradient_against_the_oracle(activation, masking):
    for scene in scenes.every_scene(activation)[::9]:
        check(scene, criterion=COMPOUND, masking=masking)


def test_one_launch_forward_and_one_backward(launches):
    scene = scenes.scene(3, 1, "plain")
    logits = scene.logits.clone().requires_grad_()
    loss = BlobLoss(criteria.dice() + criteria.bce(), main_criterion=criteria.jaccard())
    loss(logits, scene.instances > 1, scene.instances).backward()
    assert launches == list(KERNELS)


def test_an_id_beyond_max_instances_is_never_merged():
    """NaN loss, then an error at the next call that names the option, then all is well again."""
    scene = scenes.scene(3, 1, "plain")
    loss = BlobLoss(max_instances=1)
    assert int(scene.instances.max()) > 1
    assert torch.isnan(loss(scene.logits, instances=scene.instances))
    with pytest.raises(RuntimeError, match="max_instances"):
        loss(scene.logits, instances=scene.instances.clamp(max=1))
    assert torch.isfinite(loss(scene.logits, instances=scene.instances.clamp(max=1)))
