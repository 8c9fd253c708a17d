"""What finding the labels may cost: how much of a volume cc3d is shown, and how much memory is taken besides."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from blobloss_fast.kernels import labels


def two_balls(*shape: int) -> torch.Tensor:
    """One voxel, and a cube of 3^3 some voxels further: their box is 9 x 8 x 7."""
    mask = torch.zeros(shape, dtype=torch.int64)
    mask[..., 20, 11, 5] = 1
    mask[..., 26:29, 16:19, 9:12] = 1
    return mask


def test_cc3d_sees_bytes_of_the_box_around_the_foreground(monkeypatch):
    seen = []
    connected_components = labels.cc3d.connected_components
    monkeypatch.setattr(
        labels.cc3d,
        "connected_components",
        lambda volume, **options: seen.append(volume) or connected_components(volume, **options),
    )
    target = two_balls(2, 1, 40, 30, 20)
    target[1] = 0
    target[1, 0, 39, 0, 0] = 2
    for dtype in (torch.uint8, torch.int64, torch.float32):
        found, counts = labels.label_target(target.to(dtype), 4, True, True, 26, None)
        assert counts.tolist() == [[0, 2, 0, 0], [0, 0, 1, 0]]
        assert found.amax((2, 3, 4)).tolist() == [[0, 2, 0, 0], [0, 0, 1, 0]]
        assert found[1, 2, 39, 0, 0] == found[0, 1, 20, 11, 5] == 1 and (found[0, 1, 26:29, 16:19, 9:12] == 2).all()
    assert [volume.shape for volume in seen] == 3 * [(9, 8, 7), (1, 1, 1)]  # of a class without voxels, nothing
    assert all(volume.dtype == np.uint8 and volume.flags.c_contiguous for volume in seen)


@pytest.mark.parametrize("ignore", [None, -1])
@pytest.mark.parametrize("class_map", [False, True], ids=["mask", "class map"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32], ids=str)
def test_memory_besides_the_labels(dtype, class_map, ignore):
    """A few bytes for each voxel of one sample: no copy of the target, whatever its dtype, and none of the batch."""
    batch, size = 8, 48
    target = torch.ones(batch, 1, size, size, size, dtype=dtype)
    target[..., ::2, :, :] = 0
    arguments = (target, 2, True, True) if class_map else (target, 1, False, False)
    labels.label_target(*arguments, 26, ignore)
    tracemalloc.start()
    try:
        found, _ = labels.label_target(*arguments, 26, ignore)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.amax().item() == size // 2 == found[3].amax().item()
    voxels = size**3
    assert peak > found.numel() * 4, "NumPy's memory was not seen"
    assert peak - found.numel() * 4 < 8 * voxels
