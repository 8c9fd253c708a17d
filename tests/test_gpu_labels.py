"""Connected components on a CUDA device: bit for bit scipy's, run after run, also from a captured graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from blobloss_fast import _ops, connected_components

pytestmark = [
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is not installed: it is the truth of the labels")
pytest.importorskip("triton")

RUNS = 100
REACH = {4: 1, 8: 2, 6: 1, 18: 2, 26: 3}
PACKAGE, ROOT = Path(_ops.__file__).parent, Path(__file__).parents[1]
SHARED = next((path for path in (ROOT / "shared", ROOT.parent / "shared") if path.exists()), ROOT / "shared") / "data"
REAL = [PACKAGE / "data" / "ms_lesions.npz", *(SHARED / f"oms_mni_p{patient}.npz" for patient in ("07", "19", "26"))]


def scipys(mask: Tensor, connectivity: int) -> tuple[Tensor, Tensor]:
    axes = mask.ndim - 2
    structure = ndimage.generate_binary_structure(axes, min(REACH[connectivity], axes))
    labels, counts = np.zeros(mask.shape, np.int32), np.zeros(mask.shape[:2], np.int64)
    for b, c in np.ndindex(*counts.shape):
        labels[b, c], counts[b, c] = ndimage.label(mask[b, c].numpy(), structure)
    return torch.from_numpy(labels).cuda(), torch.from_numpy(counts).cuda()


def assert_stable(mask: Tensor, connectivity: int, runs: int) -> None:
    expected, expected_counts = scipys(mask, connectivity)
    mask = mask.cuda()
    for run in range(runs):
        labels, counts = connected_components(mask, connectivity)
        assert torch.equal(counts, expected_counts), f"run {run}"
        assert torch.equal(labels, expected), f"run {run}"


def random_mask(*shape: int, density: float) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density


@pytest.mark.parametrize("connectivity", [6, 18, 26])
@pytest.mark.parametrize("density", [0.01, 0.1, 0.3, 0.6, 0.9, 1.0])
def test_random_volumes(density, connectivity):
    assert_stable(random_mask(2, 2, 67, 65, 131, density=density), connectivity, RUNS)


@pytest.mark.parametrize("connectivity", [4, 8])
def test_random_planes(connectivity):
    for density in (0.3, 0.6):
        assert_stable(random_mask(3, 2, 257, 511, density=density), connectivity, RUNS // 5)


def test_lines():
    assert_stable(random_mask(2, 3, 100_003, density=0.7), 26, RUNS // 5)


@pytest.mark.parametrize("file", REAL, ids=lambda path: path.name)
def test_real_masks(file):
    if not file.exists():
        pytest.skip(f"{file.name} is not here: it is not part of the package")
    mask = torch.from_numpy(np.load(file)["label"] > 0)[None, None].contiguous()
    for connectivity in (6, 18, 26):
        assert_stable(mask, connectivity, RUNS)


def test_a_long_path():
    """One run after the other is joined to the last: the deepest trees."""
    mask = torch.zeros(1, 1, 64, 129, 128, dtype=torch.bool)
    mask[..., ::2, :] = True
    mask[..., 1::4, -1] = mask[..., 3::4, 0] = True
    assert_stable(mask & (torch.arange(64) % 2 == 0)[:, None, None], 6, RUNS // 5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.float32, torch.float64], ids=str)
def test_class_maps(dtype):
    """As on the CPU, with an ignored value."""
    generator = torch.Generator().manual_seed(1)
    classes = torch.randint(0, 4, (2, 1, 33, 34, 35), generator=generator)
    classes[torch.rand(classes.shape, generator=generator) < 0.1] = 100
    for options in ((4, True, True, 26, 100), (4, True, True, 6, 100)):
        expected = _ops.label_target(classes, *options)
        found = _ops.label_target(classes.to(dtype).cuda(), *options)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


def test_a_graph_labels_what_its_input_holds():
    """Captured once, replayed for masks with other components, down to none."""
    masks = [random_mask(1, 2, 40, 50, 60, density=density) for density in (0.3, 0.0, 1.0, 0.05)]
    static = masks[0].cuda()
    connected_components(static, 26)  # compiles
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        labels, counts = connected_components(static, 26)
    for mask in masks:
        static.copy_(mask)
        graph.replay()
        expected, expected_counts = scipys(mask, 26)
        assert torch.equal(labels, expected) and torch.equal(counts, expected_counts)


def test_no_wait():
    mask = random_mask(1, 1, 40, 50, 60, density=0.2).cuda()
    connected_components(mask, 26)
    torch.cuda.set_sync_debug_mode("error")
    try:
        connected_components(mask, 26)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_invalid_value_raises_at_the_next_call():
    mask = torch.tensor([[[0, 1, 1, 2, 1]]], device="cuda")
    assert connected_components(mask)[0].tolist() == [[[0, 1, 1, 2**31 - 1, 2]]]
    with pytest.raises(RuntimeError, match="no class of the logits"):
        connected_components(mask.clamp(max=1))
    assert connected_components(mask.clamp(max=1))[0].tolist() == [[[0, 1, 1, 1, 1]]]
