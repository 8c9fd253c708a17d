"""A volume as rows of voxels that lie side by side, which is how kernels that take pointers and strides read it."""

from __future__ import annotations

from torch import Tensor


def rows(volume: Tensor) -> tuple[Tensor, int, int]:
    """The volume with its spatial axes dense (copied if they are not), and its batch and channel strides."""
    if not volume.is_contiguous():
        expected = 1
        for size, stride in zip(reversed(volume.shape[2:]), reversed(volume.stride()[2:]), strict=True):
            if size != 1 and stride != expected:
                volume = volume.contiguous()
                break
            expected *= size
    # The stride of an axis of one is never used and may be any number: 0 is one that hides no alignment, and it makes
    # a single channel serve them all.
    shape, strides = volume.shape, volume.stride()
    return volume, 0 if shape[0] == 1 else strides[0], 0 if shape[1] == 1 else strides[1]
