"""The native library's connected components: scipy's bits for any mask, and the same for any number of threads."""

from __future__ import annotations

import importlib.resources
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import cc3d
import numpy as np
import pytest
import torch
from torch import Tensor

from blobloss_fast import _ops, connected_components
from blobloss_fast.kernels import labels, native, native_labels

from .test_labelling import CASES, assert_scipys, labels_per_class, random_mask, scipy_labels

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))

ROOT = Path(__file__).resolve().parents[1]
SHARED = next((path for path in (ROOT / "shared", ROOT.parent / "shared") if path.exists()), ROOT / "shared") / "data"
SIZES = (1, 1, 2, 3, 5, 8, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)  # a word has 64 voxels
DENSITIES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64)
LARGE = {1: (300_000,), 2: (523, 700), 3: (70, 65, 129)}  # many slabs, but for a line


@pytest.fixture(autouse=True)
def native_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make sure of what is tested: no call may end up in cc3d."""
    assert _ops._labels_for_cpu() is native_labels
    monkeypatch.setattr(labels, "_find", None)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---------------------------------------------------------------- random masks


@CASES
@pytest.mark.parametrize("part", range(3))
def test_random_masks(part, axes, connectivity):
    """100 volumes each, 2,100 together, of shapes around the length of a word."""
    random = np.random.default_rng([part, axes, connectivity])
    seen = 0
    while seen < 100:
        shape = tuple(int(n) for n in random.choice(SIZES, axes))
        if np.prod(shape) > 20_000:
            continue
        mask = torch.from_numpy(random.random((1, 1, *shape)) < DENSITIES[seen % len(DENSITIES)])
        assert_scipys(mask.to(DTYPES[seen % len(DTYPES)]), connectivity, truth=mask)
        seen += 1


@CASES
@pytest.mark.parametrize("width", sorted(set(SIZES)))
def test_rows_of_every_length(width, axes, connectivity):
    """Long and short stretches that end at the ends of words, beyond them and before."""
    shape = (2, 3, *(6, 7)[: axes - 1], width)
    random = np.random.default_rng(width)
    steps = (random.random(shape) < 0.15).cumsum(-1) % 2  # stretches of seven voxels, more or less
    for mask in (steps, 1 - steps, steps | (random.random(shape) < 0.1), random.random(shape) < 0.5):
        assert_scipys(torch.from_numpy(mask.astype(np.uint8)), connectivity)


# ---------------------------------------------------------------- masks that are hard to unite


def spiral(size: int) -> np.ndarray:
    """A line that winds to the middle of a square: one component whose two neighbouring turns do not touch."""
    mask = np.zeros((size, size), np.uint8)
    y, x, dy, dx = 0, 0, 0, 1
    low, high = [0, 0], [size - 1, size - 1]
    while low[0] <= high[0] and low[1] <= high[1]:
        while low[0] <= y + dy <= high[0] and low[1] <= x + dx <= high[1]:
            mask[y, x] = 1
            y, x = y + dy, x + dx
        mask[y, x] = 1
        if dx == 1:
            low[0] = y + 2
        elif dy == 1:
            high[1] = x - 2
        elif dx == -1:
            high[0] = y - 2
        else:
            low[1] = x + 2
        dy, dx = dx, -dy
    return mask


def comb(shape: tuple[int, ...], axis: int, upwards: bool) -> np.ndarray:
    """Teeth along an axis that meet at its end alone, or at its beginning: every tooth is a component until then."""
    mask = np.zeros(shape, np.uint8)
    others = np.indices(shape).sum(0) - np.indices(shape)[axis]
    mask[others % 2 == 0] = 1
    for other in range(len(shape)):
        if other != axis:
            mask[(slice(None),) * other + (slice(1, None, 2),)] = 0
    end = [slice(None)] * len(shape)
    end[axis] = slice(-1, None) if upwards else slice(0, 1)
    mask[tuple(end)] = 1
    return mask


def snake(depth: int, height: int, width: int, *, cut: bool = False) -> np.ndarray:
    """A line through all planes and back, again and again: up and down along the first axis, a step along the second.

    With `cut`, it is interrupted at every second turn.
    """
    mask = np.zeros((depth, height, width), np.uint8)
    mask[:, ::2, ::3] = 1
    mask[-1, 1::4, ::3] = 1
    if not cut:
        mask[0, 3::4, ::3] = 1
    return mask


HARD = {
    "spiral": spiral(65)[None],
    "spiral of planes": np.repeat(spiral(33)[:, None], 3, 1),
    "snake": snake(40, 11, 64),
    "cut snake": snake(40, 11, 64, cut=True),
    **{f"comb {axis} up": comb((9, 13, 67), axis, True) for axis in range(3)},
    **{f"comb {axis} down": comb((9, 13, 67), axis, False) for axis in range(3)},
    **{f"checkerboard {parity}": (np.indices((9, 7, 66)).sum(0) % 2 == parity).astype(np.uint8) for parity in (0, 1)},
    "planes": (np.indices((9, 9, 65))[0] % 2).astype(np.uint8),
    "full": np.ones((5, 6, 129), np.uint8),
    "empty": np.zeros((5, 6, 129), np.uint8),
}


@CASES
@pytest.mark.parametrize("name", HARD)
def test_hard_masks(name, axes, connectivity):
    """Also turned, mirrored, and cut into planes or lines."""
    mask = torch.from_numpy(HARD[name])
    for order in itertools.permutations(range(3)):
        for flipped in ((), (0,), (1, 2)):
            turned = mask.permute(order).flip(flipped)
            as_batch = turned[None] if axes == 3 else turned.reshape(-1, *turned.shape[3 - axes :])
            assert_scipys(as_batch[: 2 * 16, None], connectivity)


def test_a_snake_is_one():
    for mask, count in ((snake(40, 11, 64), 22), (snake(40, 11, 64, cut=True), 66)):
        for connectivity in (6, 18, 26):
            assert connected_components(torch.from_numpy(mask)[None, None], connectivity)[1].tolist() == [[count]]
    assert connected_components(torch.from_numpy(spiral(65))[None, None], 4)[1].tolist() == [[1]]


# ---------------------------------------------------------------- threads


def large_masks(axes: int) -> Iterator[Tensor]:
    shape = LARGE[axes]
    for seed, density in enumerate((0.02, 0.12, 0.3, 0.45, 0.7)):
        yield random_mask(1, 1, *shape, density=density, seed=seed)
    if axes > 1:
        for axis, up in itertools.product(range(axes), (True, False)):
            yield torch.from_numpy(comb(shape, axis, up))[None, None]
    if axes == 3:
        yield torch.from_numpy(snake(*shape))[None, None]
        yield torch.from_numpy(snake(*shape, cut=True))[None, None]
        yield random_mask(2, 2, *(n - 1 for n in shape), density=0.2)  # slabs and volumes


@CASES
def test_any_number_of_threads(axes, connectivity, set_threads, monkeypatch):
    """Volumes of many slabs: PyTorch's threads, and the library's own after a fork."""
    for mask in large_masks(axes):
        mask = mask.to(torch.uint8)
        for threads in (1, 2, 3, 16):
            set_threads(threads)
            if threads == 1:
                assert_scipys(mask, connectivity)
                expected = connected_components(mask, connectivity)
            for forked in (False, True):
                monkeypatch.setattr(native, "_forked", forked)
                for a, b in zip(connected_components(mask, connectivity), expected, strict=True):
                    assert torch.equal(a, b)


# ---------------------------------------------------------------- real masks


def real_masks() -> Iterator[np.ndarray]:
    with (
        (importlib.resources.files("blobloss_fast") / "data" / "ms_lesions.npz").open("rb") as file,
        np.load(file) as arrays,
    ):
        yield arrays["label"] > 0


def assert_cc3ds(mask: np.ndarray) -> None:
    for connectivity in (6, 18, 26):
        expected = cc3d.connected_components(np.ascontiguousarray(mask, np.uint8), connectivity=connectivity)
        ids, count = connected_components(torch.from_numpy(mask.astype(np.uint8))[None, None], connectivity)
        assert np.array_equal(ids[0, 0].numpy(), expected)
        assert count.item() == expected.max() > 0, "a crop without a lesion shows nothing"


def test_real_masks_that_come_with_the_package():
    for mask in real_masks():
        assert_cc3ds(mask)
        assert_cc3ds(mask[1::2, ::2, ::3])


def test_crops_of_real_masks():
    file = SHARED / "oms_mni_masks.npz"
    if not file.exists():
        pytest.skip(f"{file.name} is not here: it is not part of the package")
    with np.load(file) as arrays:
        for name in ("p07", "p19", "p26"):
            mask = arrays[name] > 0
            middle = np.argwhere(mask).mean(0).astype(int)
            for size in (128, 61):
                assert_cc3ds(mask[tuple(slice(max(n - size // 2, 0), n + size // 2) for n in middle)])


# ---------------------------------------------------------------- class maps and ignored voxels


@CASES
@pytest.mark.parametrize("channels", [2, 5])
@pytest.mark.parametrize("ignore", [None, 0, 1, 255, -1, 300])
def test_class_maps(ignore, channels, axes, connectivity):
    shape = (2, 1, *(5, 6, 70)[3 - axes :])
    random = np.random.default_rng([channels, axes])
    classes = torch.from_numpy((random.random(shape) ** 2 * channels).astype(np.int64))
    hit = random_mask(*shape, density=0.15)
    for dtype in DTYPES[1:]:
        target = classes.to(dtype)
        fits = dtype.is_floating_point or ignore is None or torch.iinfo(dtype).min <= ignore <= torch.iinfo(dtype).max
        if ignore is not None and fits:
            target = target.masked_fill(hit, ignore)
        ignored = torch.zeros_like(hit) if ignore is None or not fits else target == ignore
        expected = labels_per_class(target.long().masked_fill(ignored, 0), channels, connectivity)
        expected = expected.masked_fill(ignored, -1)[:, 1 if channels == 2 else 0 :]
        ids, counts = _ops.label_target(target, channels, True, True, connectivity, ignore)
        assert ids.dtype == torch.int32 and counts.dtype == torch.int64
        assert torch.equal(ids, expected)
        assert torch.equal(counts, expected.flatten(2).amax(2).clamp(min=0).long())


@CASES
@pytest.mark.parametrize(("channels", "softmax"), [(1, False), (3, False), (2, True), (3, True)])
@pytest.mark.parametrize("ignore", [None, 0, 1, 255])
def test_binary_targets(ignore, channels, softmax, axes, connectivity):
    """One channel for each class: that of the background has no instances, but its values and ignored voxels count."""
    shape = (2, channels, *(5, 6, 70)[3 - axes :])
    mask = random_mask(*shape, density=0.3).to(torch.int16)
    if ignore == 255:
        mask[random_mask(*shape, density=0.2, seed=1)] = 255
    ignored = mask == ignore if ignore is not None else torch.zeros_like(mask, dtype=torch.bool)
    expected = scipy_labels(mask.masked_fill(ignored, 0), connectivity)[0]
    if softmax:
        expected[:, 0] = 0
    expected = expected.masked_fill(ignored, -1)[:, 1 if softmax and channels == 2 else 0 :]
    for dtype in (torch.uint8, torch.int16, torch.int64, torch.float32, torch.float64):
        ids, counts = _ops.label_target(mask.to(dtype), channels, False, softmax, connectivity, ignore)
        assert torch.equal(ids, expected)
        assert torch.equal(counts, expected.flatten(2).amax(2).clamp(min=0).long())


# ---------------------------------------------------------------- values that are wrong, and what is not read


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_one_wrong_voxel_anywhere(dtype, set_threads):
    """In any slab, in whole words and beyond them, for every way in which a target is read."""
    set_threads(3)
    wrong = {torch.float32: [0.5, float("nan"), -1.0], torch.float64: [1e-300, float("inf")]}.get(dtype, [2, -1, 127])
    calls = (
        ("0 or 1", 2, lambda target: connected_components(target)),
        ("0 or 1", 2, lambda target: _ops.label_target(target, 2, False, True, 26, 99)),
        ("class map", 1, lambda target: _ops.label_target(target, 2, True, True, 26, None)),
        ("class map", 1, lambda target: _ops.label_target(target, 2, True, True, 26, 99)),
    )
    for match, channels, call in calls:
        target = torch.zeros(2, channels, 33, 20, 129, dtype=dtype)
        target[:, :, ::3] = 1
        call(target)
        last = channels - 1
        places = ((0, 0, 0, 0, 0), (1, last, 32, 19, 128), (0, last, 16, 10, 64), (1, 0, 17, 1, 127))
        for place, value in itertools.product(places, wrong):
            changed = target.clone()
            changed[place] = value if dtype != torch.uint8 else value % 256
            with pytest.raises(ValueError, match=match):
                call(changed)


def test_a_bool_with_another_byte_is_not_binary():
    """As memory that was not made by PyTorch may hold: neither 0 nor 1."""
    mask = torch.tensor([[[0, 1, 2]]], dtype=torch.uint8).view(torch.bool)
    with pytest.raises(ValueError, match="0 or 1"):
        connected_components(mask)


def test_classes_of_a_float_are_whole():
    for channels in (3, 2**20):
        target = torch.tensor([[[0.0, -0.0, 1.0, 2.0, 1.5]]])
        with pytest.raises(ValueError, match="class map"):
            _ops.label_target(target, channels, True, True, 26, None)
        if channels == 3:
            ids, _ = _ops.label_target(target[..., :4], channels, True, True, 26, None)
            assert ids.tolist() == [[[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]]


def test_the_channels_must_be_those_of_the_call():
    """In C a wrong number would read other memory."""
    for channels, class_map in ((3, False), (1, True)):
        with pytest.raises(ValueError, match="channel"):
            _ops.label_target(torch.zeros(1, 2, 4, 4), channels, class_map, False, 26, None)


def test_what_the_library_does_not_read_goes_to_cc3d(monkeypatch):
    monkeypatch.undo()
    mask = random_mask(2, 2, 9, 8)
    for dtype in (torch.float16, torch.uint16):
        assert torch.equal(_ops.connected_components(mask.to(dtype), 8)[0], connected_components(mask, 8)[0])
        found = _ops.label_target(mask.to(dtype), 2, False, False, 8, None)
        assert torch.equal(found[0], connected_components(mask, 8)[0])


def test_no_voxel_at_all():
    for shape in ((0, 1, 4), (1, 2, 0, 3), (2, 1, 3, 0)):
        ids, counts = _ops.connected_components(torch.zeros(shape), 26)
        assert ids.shape == shape and counts.tolist() == [[0] * shape[1]] * shape[0]


@pytest.mark.parametrize(("status", "error", "match"), [(16, MemoryError, "no memory"), (32, ValueError, "2\\^31")])
def test_what_the_library_reports(status, error, match, monkeypatch):
    """Of volumes that are too large for a test."""
    library = native._library()._replace(find_components=lambda arguments, found: status)
    monkeypatch.setattr(native, "_library", lambda: library)
    with pytest.raises(error, match=match):
        connected_components(torch.ones(1, 1, 2, 2))


def test_nothing_stays_where_there_is_no_memory_for_the_ids(monkeypatch):
    written = []
    library = native._library()

    def write(found, *ids):
        written.append(ids)
        library.write_components(found, *ids)

    def empty(*shape, dtype, device):
        if dtype == torch.int64:
            return torch.zeros(*shape, dtype=dtype, device=device)
        raise MemoryError("no ids")

    monkeypatch.setattr(native, "_library", lambda: library._replace(write_components=write))
    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(MemoryError, match="no ids"):
        connected_components(torch.ones(1, 1, 2, 2))
    assert written == [(0, 0)]
