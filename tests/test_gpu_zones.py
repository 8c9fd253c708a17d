"""nearest_instance on a GPU: the bits of the CPU, every time, without a wait, in a CUDA graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from .zones_brute_force import batch, brute_force

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FAR_APART = 2**45  # a weight whose distances take 64 bits
SHAPES = (
    ((700,), [2]),
    ((70, 45), [1, 3]),
    ((45, 70), [FAR_APART, 1]),
    ((5, 1300), [1, 1]),
    ((12, 19, 34), [1, 1, 1]),
    ((19, 34, 12), [9, 4, 4]),
    ((34, 12, 19), [1, FAR_APART, 7]),
    ((20, 1, 33), [1, 2, 3]),
    ((16, 16, 128), [4, 1, 1]),
)


def nearest_instance(instances: Tensor, weights: list[int]) -> Tensor:
    from blobloss_fast.kernels import triton_zones

    return triton_zones.nearest_instance(instances, weights)


def balls(size: int, count: int) -> Tensor:
    """Instances in a volume of ``size``^3, and ignored voxels."""
    rng = np.random.default_rng(size)
    found = np.zeros((size,) * 3, np.int32)
    grid = np.ogrid[:size, :size, :size]
    for i in range(count):
        centre, radius = rng.integers(0, size, 3), rng.uniform(size / 64, size / 16)
        found[sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) <= radius**2] = count - i
    found[(found == 0) & (rng.random(found.shape) < 0.01)] = -1
    return torch.from_numpy(found)[None, None]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize(("shape", "weights"), SHAPES)
def test_against_brute_force(shape, weights, dtype):
    instances = batch(4, 3, shape, seed=len(shape)).clip(-100, 100)
    if dtype == torch.uint8:
        instances = instances.clip(min=0)
    instances = torch.from_numpy(instances).to(dtype)
    zones = nearest_instance(instances.cuda(), weights)
    np.testing.assert_array_equal(zones.cpu().numpy(), brute_force(instances.numpy(), weights))


@pytest.mark.parametrize("weights", [[1, 1, 1], [25, 4, 9], [FAR_APART, 1, 3]])
def test_100_runs_give_the_bits_of_the_cpu(weights):
    """Against one exact distance transform per instance, the smallest id of the smallest distance."""
    instances = balls(48, 12)
    expected = torch.from_numpy(one_distance_per_instance(instances.numpy(), weights))
    on_device = instances.cuda()
    for _ in range(100):
        assert torch.equal(nearest_instance(on_device, weights).cpu(), expected)


def one_distance_per_instance(instances: np.ndarray, weights: list[int]) -> np.ndarray:
    """Separable, one instance and axis at a time, in int64."""
    best = np.full(instances.shape, np.iinfo(np.int64).max)
    zones = np.ones(instances.shape, np.int32)
    for identity in np.unique(instances[instances > 0]):
        squared = np.where(instances == identity, 0, 2**62)
        for axis, weight in enumerate(weights, start=2):
            size = squared.shape[axis]
            apart = weight * (np.arange(size)[:, None] - np.arange(size)) ** 2
            lines = np.moveaxis(squared, axis, -1)
            near = [np.minimum(lines + apart[i], 2**62).min(-1) for i in range(size)]
            squared = np.moveaxis(np.stack(near, -1), -1, axis)
        zones = np.where(squared < best, identity, zones)
        best = np.minimum(best, squared)
    return np.where(instances < 0, -1, zones).astype(np.int32)


def test_a_cuda_graph_replays_it():
    first, second = balls(40, 6).cuda(), balls(40, 9).cuda()
    expected = nearest_instance(second, [1, 1, 1])
    static = first.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        zones = nearest_instance(static, [1, 1, 1])
    static.copy_(second)
    graph.replay()
    assert torch.equal(zones, expected)


def test_it_never_waits():
    instances = balls(32, 5).long().cuda()
    nearest_instance(instances, [1, 1, 1])  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        nearest_instance(instances, [1, 1, 1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_id_beyond_int32_is_told_at_the_next_call():
    instances = torch.tensor([[[0, 2**40, 0, 3]]], device="cuda")
    assert nearest_instance(instances, [1]).tolist() == [[[2**31 - 1, 2**31 - 1, 3, 3]]]
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="nearest_instance met an id beyond int32"):
        nearest_instance(instances, [1])
