"""The kernels of nearest_instance in Triton's interpreter against brute force; bit for bit.

Run by test_triton_interpreter.py in a process of its own, or by hand:
``TRITON_INTERPRET=1 pytest tests/triton_zones_cases.py``.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from blobloss_fast.kernels import triton_zones as kernels

from .interpreter_checks import MARKS
from .quick_interpreter import quick_interpreter  # noqa: F401
from .triton_interpreter_cases import nothing_invalid_left_behind  # noqa: F401
from .triton_launcher_cases import Quietly, RefuseSynchronisation
from .zones_brute_force import batch, brute_force, volume

pytestmark = MARKS

KERNELS = ("nearest_in_row_kernel", "nearest_on_line_kernel")
FAR_APART = 2**45  # a weight whose distances take 64 bits


@pytest.fixture
def fast_scans(monkeypatch):
    """The interpreter scans element by element in Python; NumPy's own scans give the same."""
    accumulate = {kernels._larger: np.maximum.accumulate, kernels._smaller: np.minimum.accumulate}
    slow = interpreter.ScanOps.generic_scan

    def scan(self, args):
        if self.combine_fn not in accumulate or len(args) != 1:
            return slow(self, args)
        found = accumulate[self.combine_fn](args[0].handle.data, axis=self.axis)
        return [self.to_tensor(found, args[0].dtype)]

    monkeypatch.setattr(interpreter.ScanOps, "generic_scan", scan)


def check(instances, weights: list[int]) -> Tensor:
    instances = torch.as_tensor(instances)
    zones = kernels.nearest_instance(instances, weights)
    assert zones.dtype == torch.int32
    assert zones.is_contiguous()
    np.testing.assert_array_equal(zones.numpy(), brute_force(instances.numpy(), weights))
    return zones


# 12 volumes each, one of every kind. Tiles have 16 rows of 32 lines, rows 32, 128 or 512 voxels.
BATCHES = (
    ((5,), [1]),
    ((33,), [3]),
    ((131,), [FAR_APART]),
    ((7, 9), [1, 1]),
    ((19, 6), [4, 9]),
    ((6, 35), [25, 1]),
    ((40, 3), [1, 7]),
    ((5, 8), [FAR_APART, 1]),
    ((8, 5), [1, FAR_APART]),
    ((1, 9), [FAR_APART, 1]),
    ((9, 1), [1, 2**61]),
    ((1, 1), [1, 1]),
    ((4, 5, 6), [1, 1, 1]),
    ((6, 4, 5), [9, 1, 1]),
    ((5, 6, 4), [1, 1, 9]),
    ((3, 7, 5), [49, 49, 900]),
    ((4, 6, 5), [1, 9, 4]),
    ((5, 4, 4), [FAR_APART, FAR_APART + 1, 3]),
    ((4, 4, 5), [3, 1, FAR_APART]),
    ((4, 5, 4), [3, 2**57, 1]),
    ((17, 3, 3), [1, 2, 3]),
    ((3, 18, 3), [3, 1, 2]),
    ((2, 3, 34), [3, 2, 1]),
    ((1, 6, 7), [1, 2, 3]),
    ((6, 1, 7), [1, FAR_APART, 3]),
    ((6, 7, 1), [1, 2, 3]),
    ((1, 1, 9), [1, 2, 3]),
    ((1, 1, 1), [1, 2, 3]),
    ((2,), [5]),
    ((32,), [1]),
    ((129,), [1]),
    ((2, 2), [1, 1]),
    ((6, 6), [1, 1]),
    ((16, 2), [1, 3]),
    ((17, 2), [1, 1]),
    ((2, 33), [100, 1]),
    ((3, 64), [1, 1]),
    ((2, 2, 2), [1, 1, 1]),
    ((5, 5, 5), [1, 1, 1]),
    ((4, 4, 4), [4, 4, 9]),
    ((2, 5, 8), [225, 49, 49]),
    ((8, 2, 5), [1, 100, 100]),
    ((3, 3, 9), [FAR_APART, 1, 1]),
    ((2, 3, 3), [FAR_APART, 2 * FAR_APART, 3 * FAR_APART]),
)


@pytest.mark.usefixtures("fast_scans")
@pytest.mark.parametrize(("shape", "weights"), BATCHES)
def test_every_kind_of_volume(shape, weights):
    check(batch(4, 3, shape, seed=sum(shape)).astype(np.int32), weights)


def test_there_are_enough_volumes():
    """Of more than one voxel: as many as the other backends are compared in."""
    assert len(set(map(repr, BATCHES))) == len(BATCHES)
    assert 12 * sum(math.prod(shape) > 1 for shape, _ in BATCHES) >= 500


@pytest.mark.usefixtures("fast_scans")
@pytest.mark.parametrize("kind", ["points", "empty planes", "two corners"])
def test_lines_longer_than_a_tile(kind):
    """Tiles above and below, the last one not full; programs whose lines end."""
    rng = np.random.default_rng(5)
    for shape, weights in (
        ((1, 1, 37, 35), [1, 2]),
        ((1, 1, 35, 2, 3), [2, 1, 1]),
        ((1, 1, 2, 35, 3), [1, 1, FAR_APART]),
    ):
        check(volume(kind, shape[2:], rng)[None, None].astype(np.int32), weights)


@pytest.mark.usefixtures("fast_scans")
@pytest.mark.parametrize("weight", [1, FAR_APART])
@pytest.mark.parametrize("axis", [0, 1])
def test_ties_across_the_edges_of_tiles(axis, weight):
    """The voxel at a tile's edge is the farthest one of its line, and as far from a smaller id in the next tile."""
    shape = [2, 3, 2]
    shape[axis] = 41
    instances = np.zeros((1, 1, *shape), np.int32)
    lines = np.moveaxis(instances[0, 0], axis, 0)
    lines[8], lines[24] = 4, 9  # rows 16 to 31: 16 is 8 away from either
    zones = check(instances, [weight] * 3)
    assert int(zones[0, 0].moveaxis(axis, 0)[16].max()) == 4
    lines[8], lines[24], lines[7], lines[23] = 0, 0, 9, 4  # rows 0 to 15: 15 is
    zones = check(instances, [weight] * 3)
    assert int(zones[0, 0].moveaxis(axis, 0)[15].max()) == 4


@pytest.mark.usefixtures("fast_scans")
@pytest.mark.parametrize("shape", [(2, 1, 1500), (1, 2, 3, 1027), (1, 1, 2, 2, 600), (1, 2, 513)])
def test_rows_longer_than_a_block(shape):
    """Left and right neighbours are carried over blocks that hold none."""
    instances = np.zeros(shape, np.int16)
    instances[..., 3] = 2
    instances[..., 511] = -1
    instances[0, ..., -1] = 1
    if shape[:2] == (2, 1):
        instances[1, 0, 700:710] = 5
    check(instances, [2] * (len(shape) - 2))


@pytest.mark.parametrize("shape", [(1, 2, 40), (1, 1, 3, 6), (1, 1, 2, 600)])
def test_scans_of_the_interpreter_itself(shape):
    check(batch(*shape[:2], shape[2:], seed=1).astype(np.int32), [3] * (len(shape) - 2))


@pytest.mark.usefixtures("fast_scans")
@pytest.mark.parametrize("patched", [{"LARGE": 0}, {"SHORT_Y": 2}, {"SHORT_X": 2}, {"LARGE": 0, "SHORT_Y": 2}], ids=str)
@pytest.mark.parametrize("weights", [[3, 2, 1], [FAR_APART, 1, 1]])
def test_what_only_huge_volumes_need(monkeypatch, patched, weights):
    """Offsets of 64 bits, and a scratch volume of 64 bits."""
    for name, value in patched.items():
        monkeypatch.setattr(kernels, name, value)
    for shape in ((5, 4, 3), (5, 4), (9,)):
        check(batch(2, 3, shape, seed=2).astype(np.int32), weights[: len(shape)])


@pytest.mark.usefixtures("fast_scans")
@pytest.mark.parametrize("weight", [2**30 // 27, 2**30 // 27 + 1, (2**62 - 1) // 27])
def test_the_largest_distances_of_either_width(weight):
    """3 w (n - 1)^2 just below 2^30, just beyond it, and just below 2^62."""
    for kind in ("two corners", "points", "one voxel"):
        instances = volume(kind, (4, 4, 4), np.random.default_rng(3))[None, None]
        check(instances.astype(np.int32), [weight] * 3)
    assert 27 * weight < 2**62


@pytest.mark.usefixtures("fast_scans")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integer_dtypes(dtype):
    instances = torch.from_numpy(batch(2, 3, (4, 5, 6), seed=4)).clamp(-100, 100)
    if dtype == torch.uint8:
        instances = instances.clamp(min=0) * 2  # beyond int8
    check(instances.to(dtype), [1, 2, 3])


@pytest.mark.usefixtures("fast_scans")
def test_strides():
    whole = torch.from_numpy(batch(4, 4, (5, 6, 7), seed=8)).to(torch.int32)
    weights = [4, 2, 1]
    for view in (
        whole[1::2, 1:3],  # rows where they lie
        whole[:1].expand(3, 4, 5, 6, 7)[:, :2],
        whole[:2, :2, 1:4, ::2, 1:],  # copied
        whole[:2, :2].transpose(2, 4),
        whole[:2, :2].to(memory_format=torch.channels_last_3d),
        torch.ones(2, 2, 5, 6, 7, dtype=torch.int32)[..., 0:0, :, :],
    ):
        check(view, weights)
    untouched = whole.clone()
    check(whole[:1], weights)
    assert torch.equal(whole, untouched)


def test_ids_beyond_int32():
    """They are the largest id, and the next call says so; negative ones of any size are ignored."""
    instances = torch.tensor([[[2**31, 0, 0, 2**40, -(2**40), 0, 5, 2**31 - 1]]])
    zones = kernels.nearest_instance(instances, [1])
    largest = 2**31 - 1
    assert zones.tolist() == [[[largest, largest, largest, largest, -1, 5, 5, largest]]]
    with pytest.raises(RuntimeError, match="nearest_instance met an id beyond int32"):
        kernels.nearest_instance(instances.clamp(max=largest), [1])
    assert kernels.nearest_instance(instances.clamp(max=largest), [1]).equal(zones)
    long_rows = torch.nn.functional.pad(instances, (0, 600))
    assert kernels.nearest_instance(long_rows, [1])[..., :8].equal(zones)
    with pytest.raises(RuntimeError, match="nearest_instance met an id beyond int32"):
        kernels.nearest_instance(instances, [1])


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -3], [2**62 // 9, 1]])
def test_weights_are_checked(weights):
    with pytest.raises(ValueError, match="2 positive integers"):
        kernels.nearest_instance(torch.ones(1, 1, 4, 5, dtype=torch.int32), weights)


def test_an_axis_that_int32_cannot_count():
    with pytest.raises(ValueError, match=r"shorter than 2147483648 \(2\^31\); got \[2147483648\]"):
        kernels.nearest_instance(torch.zeros(1, dtype=torch.uint8).expand(1, 1, 2**31), [1])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("shape", "launched"), [((3, 4, 5), 3), ((4, 5), 2), ((3, 1, 5), 2), ((9,), 1), ((1, 1, 1), 1), ((0, 3, 4), 0)]
)
def test_the_launcher_never_waits(monkeypatch, device, dtype, shape, launched):
    """One launch for every axis longer than one. On "meta" there is no data."""
    launches: list = []
    for name in KERNELS:
        monkeypatch.setattr(kernels, name, Quietly(getattr(kernels, name), launches))
    instances = torch.ones(2, 3, *shape, dtype=dtype, device=device).transpose(0, 1)
    with RefuseSynchronisation():
        zones = kernels.nearest_instance(instances, [1] * len(shape))
    assert len(launches) == launched
    assert zones.shape == (3, 2, *shape)
    if device == "cpu":
        assert bool((zones == 1).all())


@pytest.mark.parametrize(
    ("shape", "scratch"), [((3, 4, 5), 1), ((4, 5), 1), ((9,), 0), ((2**15, 1, 2), 1), ((2, 2**15 + 1, 2), 2)]
)
def test_memory_beyond_input_and_output(monkeypatch, shape, scratch):
    """None in 1D, one int32 volume otherwise; one of int64 where the rows of a plane are very many."""
    for name in KERNELS:
        monkeypatch.setattr(kernels, name, Quietly(getattr(kernels, name), []))
    instances = torch.zeros(2, 3, *shape, dtype=torch.int32, device="meta")
    allocated = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: allocated.append(empty(*a, **k)) or allocated[-1])
    kernels.nearest_instance(instances, [1] * len(shape))
    assert sum(t.numel() * t.element_size() for t in allocated) == (1 + scratch) * 4 * instances.numel()
