"""The integers of the table: range, resolution, and bits that do not depend on the order of the programs.

Run by test_triton_interpreter.py in a process of its own, like triton_interpreter_cases.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from blobloss_fast import BlobLoss, _ops, criteria
from blobloss_fast.kernels import triton_segment_stats as kernels
from blobloss_fast.kernels import triton_table
from blobloss_fast.kernels.layout import FEATURES
from blobloss_fast.kernels.triton_launch import rows
from blobloss_fast.kernels.triton_table import add_sums, read_stats

from .interpreter_checks import MARKS
from .quick_interpreter import quick_interpreter  # noqa: F401
from .scenes import random_logits
from .test_out_of_range import (  # noqa: F401  the same tests on this backend: they ask for the fixture below
    test_a_whole_volume_of_one_such_logit,
    test_far_out_gradients_are_no_wrong_numbers,
    test_far_out_logits_of_a_large_volume,
)
from .triton_interpreter_cases import (  # noqa: F401
    compare,
    nothing_invalid_left_behind,
    random_ids,
)

pytestmark = MARKS


@pytest.fixture
def backend() -> ModuleType:
    return kernels


# ------------------------------------------------------------------------------------------------- range and resolution


@triton.jit
def add_kernel(table_ptr, real_ptr, values_ptr, times, count, largest):
    """Add a value to cell 0 many times, as a sum over so many voxels each, and the next one, of one, to cell 1."""
    value = tl.load(values_ptr)
    one = tl.load(values_ptr + 1)
    for _ in range(times):
        add_sums(table_ptr, real_ptr, 0, count, (value,), largest, count > 0, 1)
    add_sums(table_ptr, real_ptr, 1, (count > 0).to(tl.int32), (one,), largest, count > 0, 1)


@triton.jit
def read_kernel(table_ptr, real_ptr, out_ptr):
    cell = tl.arange(0, 2)[None, :]
    stat = tl.arange(0, 2)[:, None]
    stats = read_stats(table_ptr, real_ptr, 0.0, cell, stat, cell >= 0, 1)
    tl.store(out_ptr + 2 * cell + stat, stats)


def added(value: float, one: float, times: int, count: int, voxels: int) -> list[list[float]]:
    """[[count, sum] of cell 0, [count, sum] of cell 1]"""
    table, out = torch.zeros(8, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    values = torch.tensor([value, one], dtype=torch.float32)
    add_kernel[(1,)](table.view(torch.int64), table, values, times, count, triton_table.largest(voxels))
    read_kernel[(1,)](table.view(torch.int64), table, out)
    return out.tolist()


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_2_31_voxels_of_1e4_beside_a_lone_millionth(value):
    voxels, block = 2**31, 2**21
    (count, total), (_, alone) = added(value * block, 1e-6, voxels // block, block, voxels)
    assert count == voxels
    assert total == value * voxels
    assert abs(alone - 1e-6) < 1e-14


@pytest.mark.parametrize("log_voxels", [0, 10, 24, 31, 32])
def test_nothing_wraps_at_the_limit_and_what_lies_beyond_is_added_as_it_is(log_voxels):
    voxels = 2**log_voxels
    times = min(voxels, 1024)
    limit = 2.0**46 / voxels
    for value in (limit, limit * (1 - 2.0**-20), limit * 1.5, limit * 1e9):
        count = voxels // times
        (_, total), _ = added(value * count, 0.5, times, count, voxels)
        exact = float(torch.tensor(value * count, dtype=torch.float32)) * times
        assert abs(total / exact - 1) < 1e-12, value
    (_, total), (_, other) = added(float("inf"), 0.5, 3, 1, voxels)
    assert (total, other) == (float("inf"), 0.5)
    (_, total), (_, other) = added(float("nan"), 0.5, 3, 1, voxels)
    assert total != total and other == 0.5


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_no_voxel_adds_less_than_nothing(channels):
    """As -inf would: that is no larger than the limit, and no integer either."""
    far = torch.tensor([0.0, 1e-8, 0.1, 1.0, 16.0, 17.0, 88.0, 89.0, 1e4, 1e9, 3e38, float("inf")])
    logits = torch.cat([far, -far]).repeat(channels, 1)
    logits[1:] = 0.5 * logits[1:].roll(1, -1)
    ids = torch.arange(24, dtype=torch.int32).expand(1, channels, -1)
    options = ("sigmoid" if channels == 1 else "softmax", 2.0, "class")
    _, sums = kernels.segment_stats_forward(logits[None], ids, None, 24, FEATURES, *options)
    assert ((sums >= 0) | sums.isnan()).all()
    assert sums.isfinite().float().mean() > 0.8


def test_low_does_not_wrap_either():
    """The largest rests that there are, as often as there may be voxels: in Python, of what the kernel adds once."""
    table = torch.zeros(8, dtype=torch.float64)
    rest = torch.tensor([2.0**-16 * (1 - 2.0**-24), 0.0])
    add_kernel[(1,)](table.view(torch.int64), table, rest, 1, 1, triton_table.largest(2**32))
    _, high, low, *_ = table.view(torch.int64).tolist()
    assert high == 0
    assert 0 < low <= 2**30
    assert low * triton_table.MOST_VOXELS < 2**63


@pytest.mark.parametrize("log_voxels", [0, 10, 24, 31, 32])
def test_high_does_not_wrap_where_every_voxel_is_at_the_limit(log_voxels):
    """Its largest sum, from what the kernel adds once."""
    limit = triton_table.largest(2**log_voxels)
    table = torch.zeros(8, dtype=torch.float64)
    values = torch.tensor([limit, 0.0])
    add_kernel[(1,)](table.view(torch.int64), table, values, 1, 1, limit)
    _, high, _, real, *_ = table.view(torch.int64).tolist()
    assert real == 0
    assert 0 < high * 2**log_voxels < 2**63


def test_more_voxels_than_the_integers_have_room_for():
    shape = (1, 1, 2**32 + 1)
    logits, ids = torch.zeros(1, 1, 1).expand(shape), torch.zeros(1, 1, 1, dtype=torch.int8).expand(shape)
    with pytest.raises(ValueError, match=r"at most 4294967296 \(2\^32\) voxels"):
        kernels.segment_stats_forward(logits, ids, None, 2, (), "sigmoid", 2.0, "class")


# --------------------------------------------------------------------------------------------- several blocks a program


def blocks_scene(name: str, channels: int = 2) -> tuple[torch.Tensor, int]:
    """ids of channels of seven blocks and a tail, and num_cells."""
    shape = (1, channels, 23, 13, 12)
    if name == "a giant":
        ids = torch.ones(shape, dtype=torch.int32)
        ids[..., 0] = 0
        return ids, 2
    if name == "a few in every block":
        return (torch.arange(channels * 3588, dtype=torch.int32).view(shape) // 100 % 9).clamp(min=1) - 1, 9
    if name == "a crowd":
        return random_ids(shape, -1, 40), 40
    if name == "late":
        ids = torch.zeros(shape, dtype=torch.int32)
        ids[0, 0, 15:] = 3
        ids[0, 1, 20:, 4] = 1
        ids[0, 1, 21:, 5] = 2
        return ids, 4
    raise ValueError(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["a giant", "a few in every block", "a crowd", "late"])
def test_several_blocks_a_program(monkeypatch, name, dtype):
    monkeypatch.setattr(kernels, "blocks_of_a_program", lambda blocks: 3)
    ids, num_cells = blocks_scene(name)
    features = ("prob", "nll_pos", "nll_neg")
    compare(random_logits(ids.shape).to(dtype), ids, None, num_cells, features=features)
    target = random_ids(ids.shape, 0, 2)
    compare(random_logits(ids.shape).to(dtype), ids, target, 2 * num_cells, features=("prob",))


@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize(
    ("name", "channel0"),
    [("a giant", "class"), ("a few in every block", "unused"), ("a crowd", "unused"), ("late", "class")],
)
def test_several_blocks_of_a_softmax(monkeypatch, name, channels, channel0):
    monkeypatch.setattr(kernels, "blocks_of_a_program", lambda blocks: 3)
    ids, num_cells = blocks_scene(name, channels)
    options = {"features": ("prob", "nll_pos"), "activation": "softmax", "channel0": channel0}
    logits = random_logits(ids.shape)
    compare(logits, ids, None, num_cells, **options)
    compare(logits.float(), ids, random_ids(ids.shape, 0, 2), 2 * num_cells, **options)


def test_a_softmax_over_more_channels_than_a_program_has_lanes(monkeypatch):
    """Those beyond add themselves to the table block by block."""
    monkeypatch.setattr(kernels, "blocks_of_a_program", lambda blocks: 2)
    shape = (1, 32 * kernels.NUM_WARPS[torch.float32] + 2, kernels.BLOCK + 7)
    ids = random_ids(shape, -1, 2)
    ids[:, -1, :3] = 2
    compare(random_logits(shape).float(), ids, None, 3, features=("prob",), activation="softmax", channel0="unused")


@pytest.fixture
def additions(monkeypatch) -> list[int]:
    """How many numbers the atomics of the interpreter add, one after the other."""
    found = []
    create = interpreter.interpreter_builder.create_atomic_rmw

    def counted(op, ptr, val, mask, *rest):
        found.append(int(mask.data.sum()))
        return create(op, ptr, val, mask, *rest)

    monkeypatch.setattr(interpreter.interpreter_builder, "create_atomic_rmw", counted)
    return found


@pytest.mark.parametrize("name", ["background", "home"])
@pytest.mark.parametrize("channels", [2, 3])
def test_a_cell_of_all_voxels_is_added_to_once_per_program_and_channel(monkeypatch, additions, channels, name):
    """No hot address: what a table slot receives does not grow with the blocks of a program."""
    monkeypatch.setattr(kernels, "blocks_of_a_program", lambda blocks: 4)
    ids = torch.full((1, channels, 8 * kernels.BLOCK), int(name == "home"), dtype=torch.int32)
    kernels.segment_stats_forward(torch.zeros(ids.shape), ids, None, 2, ("prob",), "softmax", 2.0, "class")
    assert sum(additions) == 2 * channels * 3  # programs, channels; a count and the two integers of a sum


@pytest.mark.parametrize("features", [("prob",), ("prob", "nll_pos", "nll_neg")], ids=len)
@pytest.mark.parametrize("blobs", [3, 40])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_additions_of_blocks_of_several_cells(monkeypatch, additions, channels, blobs, features):
    """Background and home once a program and channel, 16 more cells of a block once each, of all others every voxel."""
    monkeypatch.setattr(kernels, "blocks_of_a_program", lambda blocks: 2)
    ids = torch.arange(2 * kernels.BLOCK, dtype=torch.int32).expand(1, channels, -1) % (blobs + 1)
    activation = "sigmoid" if channels == 1 else "softmax"
    kernels.segment_stats_forward(torch.zeros(ids.shape), ids, None, blobs + 1, features, activation, 2.0, "class")
    searched = min(blobs - 1, 16)  # home is 1
    crowd = int((ids[0, 0] > 1 + searched).sum())
    assert (crowd > 500) == (blobs == 40)
    assert sum(additions) == channels * (2 + 2 * searched + crowd) * (1 + 2 * len(features))


def test_an_invalid_id_in_a_later_block(monkeypatch):
    monkeypatch.setattr(kernels, "blocks_of_a_program", lambda blocks: 4)
    ids = torch.zeros(1, 1, 2048, dtype=torch.int32)
    ids[..., 100:900] = 1
    ids[..., 1700] = 5
    arguments = (None, 2, ("prob",), "sigmoid", 2.0, "class")
    counts, sums = kernels.segment_stats_forward(torch.zeros(1, 1, 2048), ids, *arguments)
    assert counts.tolist() == [[[1247, 800]]]
    assert sums.isnan().all()
    with pytest.raises(RuntimeError, match="max_instances"):
        kernels.segment_stats_forward(torch.zeros(1, 1, 2048), ids.clamp(max=1), *arguments)


def test_how_many_blocks_a_program_has():
    found = [kernels.blocks_of_a_program(size**3 // kernels.BLOCK) for size in (16, 64, 128, 192, 256, 512)]
    assert found == [1, 1, 4, 13, 16, 16]


# ------------------------------------------------------------------------------------------------------- 64-bit offsets


def far_apart(values: torch.Tensor, axis: int, stride: int) -> torch.Tensor:
    """The same values with this stride of samples (axis 0) or channels, in memory that is there where it is written."""
    voxels, others = values[0, 0].numel(), values.shape[1 - axis]
    size = {1: np.int8, 2: np.int16}[values.element_size()]
    try:
        memory = torch.from_numpy(np.zeros((values.shape[axis] - 1) * stride + others * voxels, size))
    except MemoryError:
        pytest.skip("no address space for 9 GB")
    strides = (stride, voxels) if axis == 0 else (voxels, stride)
    view = memory.view(values.dtype).as_strided(values.shape, (*strides, *values[0, 0].stride()))
    return view.copy_(values)


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="pages that nobody has written must not take memory")
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("size", "stride"), [(3, 2**30 + 512), (2, 2**31 + 512)], ids=["product", "stride"])
@pytest.mark.parametrize("axis", [0, 1], ids=["samples", "channels"])
def test_offsets_of_more_than_32_bits(axis, size, stride, activation):
    """Bit for bit as side by side, where the stride is that long, or only twice the stride."""
    shape = (*((size, 2) if axis == 0 else (1, size)), 5, 13, 17)
    ids, target = (random_ids(shape, *limits).to(torch.int8) for limits in ((-1, 4), (0, 2)))
    volumes = random_logits(shape).half(), ids, target
    before = resident()
    views = [far_apart(values, axis, stride) for values in volumes]
    for view in views:
        assert rows(view)[0] is view
        assert view.stride(axis) * (shape[axis] - 1) >= 2**31
    features, options = ("prob", "nll_pos", "nll_neg"), (activation, 2.0, "class")
    results = []
    for logits, ids, target in (volumes, views):
        stats = kernels.segment_stats_forward(logits, ids, target, 10, features, *options)
        grad_sums = torch.linspace(0.5, 1.5, stats[1].numel()).view(stats[1].shape)
        results.append((*stats, kernels.segment_stats_backward(grad_sums, logits, ids, target, features, *options)))
    for near, far in zip(*results, strict=True):
        assert near.isfinite().all() and near.any()
        assert torch.equal(near, far)
    assert resident() - before < 2**26


# ------------------------------------------------------------------------------------------------ order of the programs


@pytest.mark.parametrize("order", ["backwards", "shuffled"])
def test_the_order_of_the_programs_changes_no_bit(monkeypatch, order):
    """The interpreter runs them one after the other; here, in another order. Crowded blocks and several tiles too."""
    shape = (2, 2, 11, 13, 17)
    ids, logits = random_ids(shape, -1, 40), random_logits(shape).float().requires_grad_()
    ids[:, 0] = (ids[:, 0] > 20).int() * 2
    monkeypatch.setattr(_ops, "_for_cpu", lambda: kernels)
    monkeypatch.setattr(kernels.triton_finish, "LANES", dict.fromkeys(kernels.triton_finish.LANES, 16))
    monkeypatch.setattr(kernels, "blocks_of_a_program", lambda blocks: 2)
    losses = [BlobLoss(criteria.dice() + criteria.bce(), max_instances=40, reduction=r) for r in ("mean", "none")]

    def results():
        out = []
        for loss in losses:
            logits.grad = None
            value = loss(logits, instances=ids)
            value.sum().backward()
            out += [value.detach(), logits.grad]
        return out

    expected = results()
    builder, set_grid = interpreter.interpreter_builder, interpreter.interpreter_builder.set_grid_idx
    generator, orders, moved = torch.Generator().manual_seed(1), {}, []

    def elsewhere(x, y, z):
        programs = builder.grid_dim[0]
        moved.append(programs > 2)
        if order == "backwards":
            return set_grid(programs - 1 - x, y, z)
        if x == 0:
            orders[0] = torch.randperm(programs, generator=generator).tolist()
        return set_grid(orders[0][x], y, z)

    monkeypatch.setattr(builder, "set_grid_idx", elsewhere)
    for a, b in zip(results(), expected, strict=True):
        assert torch.equal(a, b)
    assert sum(moved) > 50


def test_a_sample_has_the_same_bits_in_any_batch():
    ids, logits = random_ids((3, 1, 9, 10, 11), 0, 5), random_logits((3, 1, 9, 10, 11)).float()
    arguments = (None, 5, ("prob", "nll_pos"), "sigmoid", 2.0, "class")
    _, together = kernels.segment_stats_forward(logits, ids, *arguments)
    for b in range(3):
        _, alone = kernels.segment_stats_forward(logits[b : b + 1], ids[b : b + 1], *arguments)
        assert torch.equal(alone, together[b : b + 1])
