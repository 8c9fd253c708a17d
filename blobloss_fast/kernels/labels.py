"""Connected components on the CPU, through connected-components-3d."""

from __future__ import annotations

from typing import Any

import cc3d
import numpy as np
import torch
from torch import Tensor

from .layout import NOT_A_CLASS, NOT_BINARY

# by the 3D name: "all neighbours" is 26 whatever the number of axes; one axis is labelled as a plane of one line
_CC3D: dict[int, dict[int, Any]] = {1: {26: 8}, 2: {4: 4, 8: 8, 26: 8}, 3: {6: 6, 18: 18, 26: 26}}


def connected_components(mask: Tensor, connectivity: int) -> tuple[Tensor, Tensor]:
    """Label every sample and channel of a binary mask alone, 1..N in raster order.

    Args:
        mask: ``[B, C, *spatial]``, non-zero is foreground; any device (copied to the CPU and back).

    Returns:
        labels int32 ``[B, C, *spatial]`` and counts int64 ``[B, C]``.
    """
    if bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(NOT_BINARY)
    axes = mask.ndim - 2
    # C-contiguous uint8 only: cc3d labels background pixels of some 2D bool input and numbers Fortran order differently
    foreground = np.ascontiguousarray((mask != 0).to("cpu", torch.uint8).numpy())
    labels = np.zeros(mask.shape, np.int32)
    counts = np.zeros(mask.shape[:2], np.int64)
    for b, c in np.ndindex(*counts.shape):
        volume = foreground[b, c] if axes > 1 else foreground[b, c][None]
        if volume.any():
            found, count = cc3d.connected_components(volume, connectivity=_CC3D[axes][connectivity], return_N=True)
            labels[b, c], counts[b, c] = found.reshape(mask.shape[2:]), count
    return torch.from_numpy(labels).to(mask.device), torch.from_numpy(counts).to(mask.device)


def is_ignored(target: Tensor, ignore: int) -> Tensor:
    """Where the target has its ignored value, which its dtype need not be able to hold."""
    if target.is_floating_point() or target.dtype == torch.bool:
        return target == float(ignore)
    bounds = torch.iinfo(target.dtype)
    return target == ignore if bounds.min <= ignore <= bounds.max else torch.zeros_like(target, dtype=torch.bool)


def label_target(
    target: Tensor, channels: int, class_map: bool, softmax: bool, connectivity: int, ignore: int | None
) -> Tensor:
    """Find the instances of a target: int32 ids, -1 where the target is ignored.

    Args:
        target: ``[B, 1, *spatial]`` class map or ``[B, C, *spatial]`` binary.
        channels: C, the channels of the logits.
        softmax: channel 0 is the background class and has no instances.
        ignore: the ignored value of the target.

    Returns:
        ``[B, C, *spatial]``; ``[B, 1, *spatial]`` for the only foreground class of a two-channel softmax.
    """
    ignored = None if ignore is None else is_ignored(target, ignore)
    shape = [1, channels] + [1] * (target.ndim - 2)
    classes = torch.arange(channels, device=target.device).view(shape)
    hot = target == classes if class_map else target == 1
    wrong = ~hot.any(1, keepdim=True) if class_map else ~hot & (target != 0)
    if ignored is not None:
        wrong = wrong & ~ignored
        hot = hot & ~ignored
    if bool(wrong.any()):
        raise ValueError(NOT_A_CLASS if class_map else NOT_BINARY)
    if softmax:
        hot = hot & (classes > 0)
        if channels == 2:
            hot = hot[:, 1:]
            ignored = ignored[:, -1:] if ignored is not None else None
    labels, _ = connected_components(hot, connectivity)
    return labels if ignored is None else labels.masked_fill_(ignored.expand_as(labels), -1)
