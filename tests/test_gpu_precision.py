"""On a CUDA device: gradients where all logits are far out, CUDA graphs of invalid labels and of torch.compile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu_contestants import Pass
from bench.gpu_timing import CudaClock
from blobloss_fast import BlobLoss, criteria, segment_stats

from .tolerances import FLOOR, relative_to_largest

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

COLD = """
import torch
from blobloss_fast import BlobLoss
ids = torch.zeros(2, 1, 16, 16, 16, dtype=torch.int32, device="cuda")
ids[:, :, 3:6, 3:6, 3:6], ids[:, :, 9:11, 9:11] = 1, 2
torch.manual_seed(0)
logits = [torch.randn(2, 1, 16, 16, 16, device="cuda", requires_grad=True) for _ in range(4)]
loss = BlobLoss(max_instances=2)
step = torch.compile(lambda x, ids: loss(2 * x, instances=ids), fullgraph=True, mode="reduce-overhead")
found = []
for x in logits:
    torch.compiler.cudagraph_mark_step_begin()
    value = step(x, ids)
    value.backward()
    found.append((value.detach().clone(), x.grad.clone()))
for x, (value, gradient) in zip(logits, found):
    x.grad = None
    eager = loss(2 * x, instances=ids)
    eager.backward()
    torch.testing.assert_close(value, eager.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, x.grad, rtol=1e-5, atol=1e-9)
print("the same")
"""


@pytest.mark.parametrize("offset", [-80.0, -60.0, -30.0, 30.0, 60.0])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_gradients_where_every_logit_is_far_out(activation, offset):
    """The largest element of the gradient is then a tiny one, which a careless exponential gets wrong."""
    generator = torch.Generator().manual_seed(0)
    channels = 1 if activation == "sigmoid" else 3
    logits = offset + torch.randn(1, channels, 9, 10, 11, generator=generator)
    if channels > 1:
        logits[:, 1:] = torch.randn(1, channels - 1, 9, 10, 11, generator=generator)
    ids = torch.randint(0, 3, logits.shape, generator=generator)
    grads = []
    for x in (logits.cuda(), logits.double(), logits):
        x = x.detach().requires_grad_()
        _, sums = segment_stats(x, ids.to(x.device), 3, ["prob"], activation=activation)
        grads.append(torch.autograd.grad(sums.sum(), x)[0].cpu())
    ours, truth, plain = grads
    assert relative_to_largest(ours, truth) <= max(FLOOR, 2 * relative_to_largest(plain, truth))


def test_a_replay_on_invalid_ids_is_nan_and_the_next_call_raises():
    logits = torch.randn(1, 1, 16, 16, 16, device="cuda")
    ids = torch.randint(0, 3, logits.shape, dtype=torch.int32, device="cuda")
    loss = BlobLoss(max_instances=2)
    step = Pass(lambda x: loss(x, instances=ids), logits)
    (replay,) = CudaClock().capture(step)
    ids[0, 0, 3, 4, 5] = 3
    replay()
    torch.cuda.synchronize()
    assert step.results()[0].isnan()
    with pytest.raises(RuntimeError, match="max_instances"):
        loss(logits, instances=ids.clamp(max=2))
    assert loss(logits, instances=ids.clamp(max=2)).isfinite()


def test_graphs_of_the_compiler_from_a_cold_start():
    """The first call of the process is the compiler's own warm-up, whose memory is its graphs' from then on."""
    root = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", COLD], cwd=root, capture_output=True, text=True, timeout=600)
    assert found.stdout.strip() == "the same", found.stderr[-3000:]


def test_another_criterion_on_the_same_kernel():
    """Its numbers lie in the host's memory, from where the kernels read them: another weight compiles nothing."""
    from blobloss_fast.kernels import triton_finish

    logits = torch.randn(2, 1, 16, 16, 16, device="cuda")
    ids = torch.randint(0, 3, logits.shape, device="cuda")
    compiled = []
    for weight in (0.5, 0.25, 0.125):
        loss = BlobLoss(criteria.dice() + weight * criteria.bce(), max_instances=2)
        expected = float(loss(logits.cpu(), instances=ids.cpu()))
        assert float(loss(logits, instances=ids)) == pytest.approx(expected, rel=1e-6)
        compiled.append(sum(len(cache[0]) for cache in triton_finish.finish_kernel.device_caches.values()))
    assert len(set(compiled)) == 1
