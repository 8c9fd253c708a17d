"""Triton's connected components, run by Triton's interpreter on the CPU: bit for bit scipy's.

Run by test_triton_interpreter.py in a process of its own, like triton_interpreter_cases.py. The interpreter's time goes
by operations, not by voxels: many small volumes are stacked into one, an empty slab after each, and tiles made larger,
or smaller where it is their borders that matter.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from blobloss_fast.kernels import triton_components as kernels

from .interpreter_checks import MARKS
from .quick_interpreter import quick_interpreter  # noqa: F401
from .triton_interpreter_cases import nothing_invalid_left_behind  # noqa: F401

ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is not installed: it is the truth of the labels")
pytestmark = MARKS

# (spatial axes, connectivity) -> how many axes two neighbours may differ in
ORDER = {(1, 26): 1, (2, 4): 1, (2, 8): 2, (2, 26): 2, (3, 6): 1, (3, 18): 2, (3, 26): 3}
CASES = pytest.mark.parametrize(("axes", "connectivity"), ORDER, ids=lambda value: str(value))
SHAPES = {
    1: [(1,), (2,), (37,), (90,)],
    2: [(1, 1), (1, 17), (17, 1), (2, 2), (7, 5), (11, 13)],
    3: [(1, 1, 9), (1, 9, 1), (9, 1, 1), (1, 7, 6), (7, 1, 6), (6, 7, 1), (2, 2, 2), (5, 4, 6), (4, 7, 5)],
}
DENSITIES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
SEEDS = 8


@pytest.fixture(autouse=True, scope="session")
def scan_at_once():
    """The interpreter scans element by element; test_the_scan_element_by_element lets it."""
    scan = interpreter.ScanOps.generic_scan

    def generic_scan(self, inputs):
        if self.combine_fn is not kernels._later:
            return scan(self, inputs)
        return [self.to_tensor(np.maximum.accumulate(inputs[0].handle.data), inputs[0].dtype)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.ScanOps, "generic_scan", generic_scan)
        yield scan


@pytest.fixture
def set_sizes(monkeypatch):
    def set_them(tile: int, block: int, chunk: int = 16) -> None:
        for name, value in (("TILE", tile), ("BLOCK", block), ("CHUNK", chunk)):
            monkeypatch.setattr(kernels, name, value)

    return set_them


def scipys(volume: np.ndarray, connectivity: int) -> tuple[np.ndarray, int]:
    structure = ndimage.generate_binary_structure(volume.ndim, ORDER[volume.ndim, connectivity])
    labels, count = ndimage.label(volume, structure)
    return labels.astype(np.int32), count


def assert_scipys(mask: Tensor, connectivity: int, hot: Tensor | None = None) -> None:
    """``hot``: the foreground, where the mask says it in another way."""
    labels, counts = kernels.connected_components(mask, connectivity)
    assert labels.dtype == torch.int32 and counts.dtype == torch.int64
    assert labels.shape == mask.shape and labels.is_contiguous()
    foreground = (mask != 0 if hot is None else hot).numpy()
    for b, c in np.ndindex(*mask.shape[:2]):
        expected, count = scipys(foreground[b, c], connectivity)
        assert counts[b, c] == count, f"{tuple(mask.shape)} at {connectivity}"
        np.testing.assert_array_equal(labels[b, c].numpy(), expected)


def random_mask(*shape: int, density: float = 0.4, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


# ---------------------------------------------------------------------------------- scipy, bit for bit


def test_how_many_random_volumes():
    assert sum(len(SHAPES[axes]) * len(DENSITIES) * SEEDS for axes, _ in ORDER) >= 2000


@CASES
def test_random_volumes(set_sizes, axes, connectivity):
    """Each of the stacked volumes against scipy's labels of it alone, which go on where the last one's end."""
    set_sizes(4096, 2048)
    for i, shape in enumerate(SHAPES[axes]):
        volumes = [random_mask(SEEDS, *shape, density=density, seed=100 * i + j) for j, density in enumerate(DENSITIES)]
        volumes = torch.cat(volumes)
        stack = torch.zeros(len(volumes), shape[0] + 1, *shape[1:], dtype=torch.bool)
        stack[:, :-1] = volumes
        labels, counts = kernels.connected_components(stack.flatten(0, 1)[None, None], connectivity)
        labels = labels.view(stack.shape).numpy()
        assert not labels[:, -1].any()
        before = 0
        for volume, found in zip(volumes.numpy(), labels[:, :-1], strict=True):
            expected, count = scipys(volume, connectivity)
            np.testing.assert_array_equal(found, np.where(volume, expected + before, 0))
            before += count
        assert counts.item() == before


@CASES
def test_samples_and_channels(axes, connectivity):
    """Each alone, in the sizes that a GPU runs: nothing joins across them, though all touch in memory."""
    for shape in SHAPES[axes][-2:]:
        mask = torch.stack([random_mask(3, *shape, density=density) for density in (0.0, 0.3, 0.6, 1.0)])
        assert_scipys(mask, connectivity)


@CASES
@pytest.mark.parametrize("width", [64, 75])
def test_rows_longer_than_a_tile(set_sizes, width, axes, connectivity):
    """Runs go on from tile to tile, rows end at, before and after a tile's end."""
    set_sizes(32, 16)
    shape = (2, 3, width)[3 - axes :]
    for density in (0.4, 0.95):
        assert_scipys(random_mask(1, 1, *shape, density=density, seed=width), connectivity)
    assert_scipys(torch.ones(1, 1, *shape), connectivity)


def test_rows_longer_than_a_tile_of_full_size():
    width = kernels.TILE + 6
    mask = random_mask(1, 1, 2, width, density=0.97)
    mask[..., 300:] = True
    for connectivity in (4, 8):
        assert_scipys(mask, connectivity)
    assert_scipys(torch.ones(1, 1, 1, 1, width), 26)


def test_more_tiles_than_one_step_of_the_scan(set_sizes):
    """Roots are counted over many steps, and programs take many tiles each."""
    set_sizes(16, 16, chunk=4)
    assert_scipys(random_mask(1, 2, 40, 9, density=0.3), 4)


def test_the_scan_element_by_element(set_sizes, scan_at_once, monkeypatch):
    set_sizes(32, 16)
    monkeypatch.setattr(interpreter.ScanOps, "generic_scan", scan_at_once)
    assert_scipys(random_mask(1, 1, 3, 50, density=0.6), 8)


def spiral(size: int) -> np.ndarray:
    """One path, one voxel wide, that ends in the middle."""
    canvas = np.zeros((size, size), bool)
    y, x, dy, dx = 0, 0, 0, 1
    canvas[0, 0] = True
    for length in [size - 1, *(n for n in range(size - 1, 0, -2) for _ in (0, 1))]:
        for _ in range(length):
            y, x = y + dy, x + dx
            canvas[y, x] = True
        dy, dx = dx, -dy
    return canvas


def comb(size: int, teeth_up: bool) -> np.ndarray:
    canvas = np.zeros((size, size), bool)
    canvas[:, ::2] = True
    canvas[-1 if teeth_up else 0] = True
    return canvas


def bridges(size: int) -> np.ndarray:
    """Teeth that are joined pair by pair, the last pair first: the longest chain of parents."""
    canvas = np.zeros((size, size), bool)
    canvas[:, ::2] = True
    for line, x in enumerate(range(size - 2, 0, -2)):
        canvas[min(2 * line + 1, size - 1), x] = True
    return canvas


def planes() -> dict[str, np.ndarray]:
    size = 13
    line, column = np.indices((size, size))
    drawn = {
        "spiral": spiral(size),
        "walls of a spiral": ~spiral(size),
        "comb": comb(size, True),
        "comb down": comb(size, False),
        "bridges": bridges(size),
        "checkerboard": (line + column) % 2 == 0,
        "zigzag": np.abs(column - line % 6) % 6 < 2,
        "full": np.ones((size, size), bool),
        "empty": np.zeros((size, size), bool),
        "corners": (line % (size - 1) == 0) & (column % (size - 1) == 0),
    }
    return drawn | {f"{name}, turned": np.ascontiguousarray(np.rot90(plane)) for name, plane in drawn.items()}


def test_drawn_planes(set_sizes):
    set_sizes(64, 64)
    mask = torch.from_numpy(np.stack(list(planes().values())))[None]
    assert kernels.connected_components(mask[:, :1], 4)[1].item() == 1  # the spiral is one path
    assert spiral(13).sum() == 97
    for connectivity in (4, 8):
        assert_scipys(mask, connectivity)


@pytest.mark.parametrize("connectivity", [6, 18, 26])
def test_drawn_volumes(set_sizes, connectivity):
    """Planes that are joined at some voxels, and checkerboards, full and empty volumes."""
    set_sizes(2048, 2048)
    drawn = list(planes().values())[::2]
    volume = np.stack([part for plane in drawn for part in (plane, plane & ~np.roll(plane, 1, 1), ~plane)])
    assert_scipys(torch.from_numpy(volume)[None, None], connectivity)
    parity = np.indices((6, 5, 7)).sum(0) % 2
    boards = np.stack([parity == 0, parity == 1, parity < 2, parity > 2])
    assert_scipys(torch.from_numpy(boards)[None], connectivity)


def test_parents_of_64_bits(set_sizes, monkeypatch):
    """As where a volume has 2^31 voxels and more."""
    monkeypatch.setattr(kernels, "_NARROW", 0)
    for sizes in ((1024, 128), (64, 32)):
        set_sizes(*sizes)
        for connectivity in (6, 26):
            assert_scipys(random_mask(2, 1, 3, 5, 17, density=0.5), connectivity)


# --------------------------------------------------------------------------- real masks

PACKAGE, ROOT = Path(kernels.__file__).parents[1], Path(__file__).parents[1]
SHARED = next((path for path in (ROOT / "shared", ROOT.parent / "shared") if path.exists()), ROOT / "shared") / "data"
DATA = [PACKAGE / "data" / "ms_lesions.npz", *(SHARED / f"oms_mni_p{patient}.npz" for patient in ("07", "19", "26"))]


@pytest.mark.parametrize("file", DATA, ids=lambda path: path.name)
def test_crops_of_real_masks_are_labelled_as_by_cc3d(set_sizes, file):
    cc3d = pytest.importorskip("cc3d")
    if not file.exists():
        pytest.skip(f"{file.name} is not here: it is not part of the package")
    set_sizes(4096, 2048)
    mask = np.load(file)["label"]
    middle = np.argwhere(mask)[np.count_nonzero(mask) // 2]
    begin = np.clip(middle - 12, 0, np.array(mask.shape) - 24).clip(0)
    crop = np.ascontiguousarray(mask[tuple(slice(n, n + 24) for n in begin)], dtype=np.uint8)
    assert crop.any()
    for connectivity in (6, 18, 26):
        expected, count = cc3d.connected_components(crop, connectivity=connectivity, return_N=True)
        labels, counts = kernels.connected_components(torch.from_numpy(crop)[None, None], connectivity)
        assert counts.item() == count
        np.testing.assert_array_equal(labels[0, 0].numpy(), expected)


# --------------------------------------------------------------------------- dtypes and memory layouts

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    mask = random_mask(2, 1, 5, 4, 6)
    assert_scipys(mask.to(dtype), 18, hot=mask)


def test_memory_layouts():
    mask = random_mask(2, 2, 4, 5, 6)
    padded = torch.ones(4, 6, 4, 5, 6, dtype=torch.bool)
    channels = padded[1:3, ::3]  # read where it lies
    channels.copy_(mask)
    crop = torch.ones(2, 2, 4, 5, 8, dtype=torch.bool)[..., 1:7]
    crop.copy_(mask)
    for view in (channels, crop, mask.to(memory_format=torch.channels_last_3d), mask.transpose(2, 4)):
        assert_scipys(view, 26)
    assert_scipys(mask[:1, :1].expand(2, 2, 4, 5, 6), 26)


def test_the_mask_is_left_alone():
    mask = random_mask(2, 2, 5, 6)
    before = mask.clone()
    kernels.connected_components(mask, 8)[0].fill_(7)
    assert torch.equal(mask, before)


def test_no_voxel_and_one():
    for shape in ((0, 2, 4, 4), (2, 0, 4, 4), (2, 1, 4, 0)):
        labels, counts = kernels.connected_components(torch.ones(shape), 4)
        assert labels.shape == shape and counts.shape == shape[:2] and not counts.any()
    for value in (0, 1):
        labels, counts = kernels.connected_components(torch.full((2, 1, 1), value), 26)
        assert labels.tolist() == [[[value]]] * 2 and counts.tolist() == [[value]] * 2
