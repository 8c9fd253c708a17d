"""Zones: the nearest instance of every voxel, on the native library and on its fallback.

Against all pairs of voxels in integers, and against one distance transform per instance; then what a caller may do.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from blobloss_fast import _ops, labelling, nearest_instance
from blobloss_fast.kernels import native_zones, zones

both_backends = pytest.mark.usefixtures("cpu_backend")

# Along a line, in planes and volumes: thin, of one voxel, around the sizes of a block (16) and a tile (128).
SHAPES = (
    *((n,) for n in (1, 2, 3, 15, 16, 17, 60, 129, 300)),
    *((1, 40), (40, 1), (2, 31), (17, 16), (23, 19), (33, 15), (9, 130), (130, 5)),
    *((1, 1, 1), (1, 9, 30), (9, 1, 30), (30, 9, 1), (2, 3, 4), (5, 17, 16), (8, 9, 10), (13, 4, 18), (2, 2, 140)),
)
SPACINGS = (None, (1, 1, 3), (0.5, 0.5, 1), (0.7, 0.7, 1.4), (3, 2, 1), (0.25, 5, 1.5), (2, 2, 5))
KINDS = ("one voxel", "few voxels", "balls", "noise", "dense", "gaps", "ignored", "giant")


def volume(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Ids of one sample and channel."""
    share = {"one voxel": 0, "few voxels": 0.01, "noise": 0.15, "dense": 0.8, "gaps": 0.05, "ignored": 0.1}
    ids = np.zeros(shape, np.int64)
    if kind == "giant":  # all but a corner, in which is another
        ids[...] = 2
        ids[tuple(slice(n // 2) for n in shape)] = 0
        ids[(0,) * len(shape)] = 1
    elif kind == "balls":
        places = np.indices(shape)
        for number in range(1, 5):
            centre = rng.integers(0, shape).reshape(-1, *(1,) * len(shape))
            ids[((places - centre) ** 2).sum(0) <= rng.integers(0, 9)] = number
    else:
        ids = np.where(rng.random(shape) < share[kind], rng.integers(1, 30, shape), 0)
    if kind == "gaps":
        ids *= rng.integers(2, 70_000_000)
    if kind == "ignored":
        ids[rng.random(shape) < 0.3] = -7
    if kind != "giant":
        ids[tuple(rng.integers(0, shape))] = 3
    return ids


def all_pairs(ids: np.ndarray, weights: list[int]) -> np.ndarray:
    """The definition: of all instance voxels the nearest, then the smallest id."""
    found = np.ones(ids.size, np.int64)
    sources, source_ids = np.argwhere(ids > 0), ids[ids > 0]
    voxels = np.indices(ids.shape).reshape(ids.ndim, -1).T
    for begin in range(0, ids.size if len(sources) else 0, 512):
        difference = voxels[begin : begin + 512, None] - sources
        distance = (difference * difference * np.array(weights)).sum(2)
        tied = distance == distance.min(1, keepdims=True)
        found[begin : begin + 512] = np.where(tied, source_ids, 2**62).min(1)
    return np.where(ids < 0, -1, found.reshape(ids.shape))


def one_transform_per_instance(ids: np.ndarray, spacing: tuple[float, ...] | None) -> tuple[np.ndarray, np.ndarray]:
    """The zones and the distances: in ascending order of the ids, one takes what it is strictly nearer to."""
    distance, found = np.full(ids.shape, np.inf), np.ones(ids.shape, np.int64)
    for number in np.unique(ids[ids > 0]):
        mine = ndimage.distance_transform_edt(ids != number, sampling=spacing)
        found[mine < distance] = number
        distance = np.minimum(distance, mine)
    return np.where(ids < 0, -1, found), distance


def weights_of(spacing: tuple[float, ...] | None, shape: tuple[int, ...]) -> list[int]:
    """By exact fractions."""
    exact = [Fraction(repr(float(value))) ** 2 for value in spacing or (1,) * len(shape)]
    lowest = [square for square, size in zip(exact, shape, strict=True) if size > 1] or exact
    common = math.lcm(*(square.denominator for square in lowest))
    factor = math.gcd(*(int(square * common) for square in lowest))
    return [int(square * common) // factor if size > 1 else 1 for square, size in zip(exact, shape, strict=True)]


def batch_of(*volumes: np.ndarray, channels: int = 1) -> Tensor:
    return torch.from_numpy(np.stack(volumes)).unflatten(0, (-1, channels))


def same(got: Tensor, expected: np.ndarray | Tensor, what: object = "") -> None:
    assert got.dtype == torch.int32 and got.is_contiguous()
    expected = torch.as_tensor(expected)
    assert got.shape == expected.shape
    wrong = got != expected
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()}, first at {wrong.nonzero()[0].tolist()}"


# ---------------------------------------------------------------- the truth


@both_backends
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_all_pairs(axes: int) -> None:
    """548 volumes of every kind, several samples and channels at a time."""
    rng = np.random.default_rng(axes)
    count = 0
    for shape in (shape for shape in SHAPES if len(shape) == axes):
        for number, spacing in enumerate(SPACINGS[: 1 if axes == 1 else None]):
            spacing = None if spacing is None else spacing[-axes:]
            chosen = rng.permutation(KINDS)[:4] if axes > 1 else KINDS
            volumes = [volume(kind, shape, rng) for kind in chosen]
            expected = [all_pairs(ids, weights_of(spacing, shape)) for ids in volumes]
            got = nearest_instance(batch_of(*volumes, channels=2), spacing=spacing)
            same(got, batch_of(*expected, channels=2), (shape, spacing, number))
            count += len(volumes)
    assert count == {1: 72, 2: 224, 3: 252}[axes]


@both_backends
@pytest.mark.parametrize("spacing", [None, (1, 1, 3), (2, 0.5, 1)])
def test_one_transform_per_instance(spacing: tuple[float, ...] | None) -> None:
    """Multiples of a half are exact in floating point, too, so that ties are ties there."""
    rng = np.random.default_rng(5)
    for kind in KINDS:
        for shape in ((20, 30, 24), (3, 40, 5)):
            ids = volume(kind, shape, rng)
            expected, _ = one_transform_per_instance(ids, spacing)
            same(nearest_instance(torch.from_numpy(ids)[None, None], spacing=spacing)[0, 0], expected, (kind, shape))


@both_backends
@pytest.mark.parametrize("spacing", [(0.7, 0.9765625, 3.3), (0.699999988079071, 0.699999988079071, 1.2000000476837158)])
def test_distances_with_odd_spacings(spacing: tuple[float, ...]) -> None:
    """Where floating point has no ties, the zones are those at the smallest distance, up to its rounding."""
    ids = volume("few voxels", (20, 21, 22), np.random.default_rng(1))
    expected, distance = one_transform_per_instance(ids, spacing)
    got = nearest_instance(torch.from_numpy(ids)[None, None], spacing=spacing)[0, 0].numpy()
    for number in np.unique(ids[ids > 0]):
        mine = ndimage.distance_transform_edt(ids != number, sampling=spacing)
        assert (mine <= distance * (1 + 1e-12))[got == number].all()
    assert (got == expected).mean() > 0.98 and len(np.unique(got)) > 10


@both_backends
def test_by_hand() -> None:
    plane = torch.tensor([[[[3, 0, 0, 0, 2], [0, 0, 0, 0, 0], [0, -1, 0, 0, 0], [1, 0, 0, 0, 0]]]])
    expected = [[3, 3, 2, 2, 2], [3, 3, 2, 2, 2], [1, -1, 1, 2, 2], [1, 1, 1, 1, 2]]
    assert nearest_instance(plane)[0, 0].tolist() == expected
    tall = [[3, 3, 2, 2, 2], [3, 3, 2, 2, 2], [1, -1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert nearest_instance(plane, spacing=(3, 1))[0, 0].tolist() == tall


@pytest.mark.usefixtures("library")
def test_the_backends_agree_bit_for_bit() -> None:
    """On every instruction set, with keys of 32 and 64 bits, and with weights that no 64 bits hold beside an id."""
    rng = np.random.default_rng(3)
    for shape in ((9, 20, 140), (40, 3, 17), (20, 140)):
        volumes = [volume(kind, shape, rng) for kind in ("few voxels", "balls", "ignored", "gaps")]
        for weight in (1, 7 * 2**12, 2**32, 2**46 - 1):
            weights = [weight, 1 + weight // 3, weight][: len(shape)]
            for chosen in (volumes, [ids % 1000 for ids in volumes]):
                ids = batch_of(*chosen, channels=2)
                same(native_zones.nearest_instance(ids, weights), zones.nearest_instance(ids, weights), weights)


@both_backends
@pytest.mark.parametrize("weights", [(2**60, 1, 2**57), (10**15, 10**15, 7), (2**33 + 1, 2**33, 2**33)])
def test_weights_beyond_32_bits(weights: tuple[int, ...]) -> None:
    ids = volume("noise", (2, 3, 4), np.random.default_rng(0)) * 70_000_000
    ids[1] = 0
    same(_ops.nearest_instance(torch.from_numpy(ids)[None, None], weights)[0, 0], all_pairs(ids, list(weights)))


# ---------------------------------------------------------------- spacings


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ((1, 1, 1), [1, 1, 1]),
        ((0.7, 0.7, 0.7), [1, 1, 1]),
        ((0.5, 0.5, 1), [1, 1, 4]),
        ((1, 1, 3), [1, 1, 9]),
        ((0.7, 0.7, 1.4), [1, 1, 4]),
        ((0.9765625, 0.9765625, 3.0), [15625, 15625, 147456]),
        ((1e-7, 1e-7, 2.5e-7), [4, 4, 25]),
        ((1e22, 1e22, 3e22), [1, 1, 9]),
        ([np.float32(0.5), np.float64(0.5), np.int64(1)], [1, 1, 4]),
        (np.array([1.5, 1.5, 3]), [1, 1, 4]),
    ],
)
def test_weights_of_spacings(monkeypatch: pytest.MonkeyPatch, spacing: object, expected: list[int]) -> None:
    seen = []
    monkeypatch.setattr(_ops, "nearest_instance", lambda ids, weights: seen.append(weights) or ids)
    nearest_instance(torch.ones(1, 1, 4, 5, 6, dtype=torch.int32), spacing=spacing)
    assert seen == [expected]


def test_weights_are_exact_fractions() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        digits = rng.integers(1, 5)
        spacing = tuple(np.maximum(np.round(rng.uniform(0.01, 9, 3), digits), 10.0**-digits).tolist())
        shape = tuple(rng.integers(1, 200, 3).tolist())
        assert labelling.squared_spacings(spacing, shape) == weights_of(spacing, shape)


def test_rounded_weights() -> None:
    """As large as they may be, and as near to the exact ones as the docstring says."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        spacing = tuple(rng.uniform(0.1, 3, 3).tolist())
        shape = tuple(rng.integers(2, 600, 3).tolist())
        weights, exact = labelling.squared_spacings(spacing, shape), [Fraction(repr(value)) ** 2 for value in spacing]
        assert tuple(weights) == zones.checked_weights(weights, shape)
        assert sum(w * (n - 1) ** 2 for w, n in zip(weights, shape, strict=True)) > 2**62 - 2**21
        diagonal = sum(square * (n - 1) ** 2 for square, n in zip(exact, shape, strict=True))
        bound = diagonal / min(exact) / 2**63 * (1 + Fraction(1, 2**30))
        scale = diagonal / (2**62 - 1 - sum((n - 1) ** 2 for n in shape))
        assert all(abs(w * scale / square - 1) <= bound for w, square in zip(weights, exact, strict=True))


def test_an_axis_of_one_voxel_has_no_spacing() -> None:
    assert labelling.squared_spacings((0.123456789012345, 1e300, 0.123456789012345), (30, 1, 30)) == [1, 1, 1]
    assert labelling.squared_spacings((1e-300, 1e300), (1, 1)) == [1, 1]


@both_backends
def test_extreme_spacings() -> None:
    """Rounded to what fits: an axis with next to no length is one that hardly counts."""
    ids = torch.tensor([[[[1, 0, 0, 0], [0, 0, 0, 2]]]])
    assert nearest_instance(ids, spacing=(1e-300, 1e300)).tolist() == [[[[1, 1, 2, 2], [1, 1, 2, 2]]]]
    assert nearest_instance(ids, spacing=(1e300, 1e-300)).tolist() == [[[[1, 1, 1, 1], [2, 2, 2, 2]]]]


# ---------------------------------------------------------------- input of every sort


@both_backends
def test_empty_and_ignored() -> None:
    ids = torch.zeros(2, 3, 4, 5, 6, dtype=torch.int64)
    ids[0, 1, 1, 2, 3], ids[1, 2, 0, 0, 0] = 9, 4
    ids[0, 2] = ids[1, 2, 3] = ids[0, 1, 0] = -5
    expected = torch.ones_like(ids)
    expected[0, 1], expected[1, 2] = 9, 4
    expected[ids < 0] = -1
    same(nearest_instance(ids), expected)


@both_backends
@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64],
    ids=str,
)
def test_dtypes(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    largest = min(torch.iinfo(dtype).max, 2**31 - 1)
    ids = np.where(rng.random((9, 10, 40)) < 0.02, rng.integers(largest - 9, largest, (9, 10, 40), endpoint=True), 0)
    if torch.iinfo(dtype).min < 0:
        ids[rng.random(ids.shape) < 0.2] = torch.iinfo(dtype).min
    got = nearest_instance(torch.from_numpy(ids)[None, None].to(dtype))
    same(got[0, 0], all_pairs(ids, [1, 1, 1]))


@both_backends
def test_strides() -> None:
    rng = np.random.default_rng(0)
    whole = batch_of(*(volume("few voxels", (18, 20, 22), rng) for _ in range(6)), channels=3)
    for ids in (
        whole[..., ::2],
        whole[:, 1:2],
        whole.transpose(0, 1),
        whole.movedim(2, 4),
        whole[:, :, 3:7, :, 5:],
        whole[:, :1].expand(-1, 4, -1, -1, -1),
        whole.contiguous(memory_format=torch.channels_last_3d),
    ):
        same(nearest_instance(ids), nearest_instance(ids.contiguous()))
        same(nearest_instance(ids)[1, 0], all_pairs(ids[1, 0].numpy(), [1, 1, 1]))


IDS = torch.ones(1, 1, 4, 5, 6, dtype=torch.int64)


@both_backends
@pytest.mark.parametrize(
    ("ids", "spacing", "error", "match"),
    [
        (
            IDS[0, 0, 0],
            None,
            ValueError,
            r"^instances must be \[B, C, \*spatial\] with 1 to 3 spatial axes; got",
        ),
        (IDS[..., :0], None, ValueError, r"^instances must have at least one voxel"),
        (IDS.bool(), None, TypeError, r"^instances must hold .* got bool: find them with connected_components\(mask\)"),
        (IDS.float(), None, TypeError, r"^instances must hold integer ids; got torch.float32: call instances.long"),
        (IDS.numpy(), None, TypeError, r"^instances must be a torch.Tensor; got ndarray"),
        (IDS + 2**31 - 1, None, ValueError, r"^instances must be ids below 2\*\*31.*got a larger one: renumber them"),
        (IDS, 1.0, TypeError, r"^spacing must be a sequence of 3 numbers, one per spatial axis; got 1.0"),
        (IDS, "111", TypeError, r"^spacing must be a sequence of 3 numbers"),
        (IDS, (1, 1), ValueError, r"^spacing must have one number for each of the 3 spatial axes; got \[1.0, 1.0\]"),
        (IDS, (1, 1, 1, 1), ValueError, r"^spacing must have one number for each"),
        (IDS, (1, 1, 0), ValueError, r"^spacing must be above 0 along every axis; got \[1.0, 1.0, 0.0\]"),
        (IDS, (1, -1, 1), ValueError, r"^spacing must be above 0"),
        (IDS, (1, math.inf, 1), ValueError, r"^spacing must be finite; got inf"),
        (IDS, (1, math.nan, 1), ValueError, r"^spacing must be finite; got nan"),
        (IDS, (1, "1", 1), TypeError, r"^spacing must be a number; got str"),
        (IDS, (1, True, 1), TypeError, r"^spacing must be a number; got bool"),
    ],
)
def test_wrong_calls(ids: Tensor, spacing: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        nearest_instance(ids, spacing=spacing)


@both_backends
@pytest.mark.parametrize("weights", [[1, 1], [1, 0, 1], [1, 1, -1], [2**57, 2**57, 2**57], [2**62, 1, 1]])
def test_wrong_weights_of_the_operator(weights: list[int]) -> None:
    """In C they would overflow, or name memory that is not there."""
    with pytest.raises(ValueError, match=r"^weights must be 3 positive integers with squared distances below 2\*\*62"):
        _ops.nearest_instance(IDS, weights)


# ---------------------------------------------------------------- in PyTorch


@both_backends
def test_opcheck() -> None:
    ids = batch_of(*(volume("ignored", (6, 7, 8), np.random.default_rng(0)) for _ in range(4)), channels=2)
    torch.library.opcheck(torch.ops.blobloss_fast.nearest_instance.default, (ids, [1, 1, 9]))
    torch.library.opcheck(torch.ops.blobloss_fast.nearest_instance.default, (ids[:, :, ::2, 0], [2**40, 3]))


@both_backends
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_fullgraph_equals_eager(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    backend = "aot_eager" if dynamic else "inductor"
    compiled = torch.compile(nearest_instance, fullgraph=True, dynamic=dynamic, backend=backend)
    rng = np.random.default_rng(0)
    for shape, spacing in (((9, 8, 7), None), ((6, 5, 4), (1, 1, 2.5)), ((9, 8, 7), (0.7, 1.1, 0.712345678901234))):
        ids = torch.from_numpy(volume("few voxels", shape, rng))[None, None]
        same(compiled(ids, spacing=spacing), nearest_instance(ids, spacing=spacing))


class RefuseSynchronisation(TorchDispatchMode):
    """Nothing may be read on the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert "local_scalar" not in str(function) and "nonzero" not in str(function), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("weight", [1, 2**40])
def test_the_fallback_reads_nothing_on_a_device(monkeypatch: pytest.MonkeyPatch, weight: int) -> None:
    ids = batch_of(*(volume("ignored", (11, 7, 8), np.random.default_rng(0)) for _ in range(4)), channels=2)
    expected = zones.nearest_instance(ids, [weight, 1, 3])
    with RefuseSynchronisation(), pytest.raises(AssertionError, match="local_scalar"):
        zones.nearest_instance(ids, [weight, 1, 3])  # as the CPU does
    monkeypatch.setattr(zones, "_on_host", lambda tensor: False)
    with RefuseSynchronisation():
        found = zones.nearest_instance(ids, [weight, 1, 3])
    same(found, expected)


def test_the_cpu_takes_the_backend_that_is_chosen(cpu_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = {"native": native_zones, "reference": zones}[cpu_backend]
    monkeypatch.setattr(module, "nearest_instance", lambda ids, weights: torch.full(ids.shape, 5, dtype=torch.int32))
    assert (nearest_instance(IDS) == 5).all()
