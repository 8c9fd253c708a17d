"""Instance labels from masks."""

from __future__ import annotations

from torch import Tensor

from . import _checks, _ops


def connected_components(mask: Tensor, connectivity: int = 26) -> tuple[Tensor, Tensor]:
    """Label the connected components of every sample and channel, each alone, 1..N in raster order.

    The numbering is that of ``scipy.ndimage.label``. A mask without foreground has no component.

    Args:
        mask: ``[B, C, *spatial]`` bool, integer or floating point 0 and 1; one to three spatial axes.
        connectivity: 4 or 8 in 2D, 6, 18 or 26 in 3D; 26 means all neighbours in any dimension.

    Returns:
        labels, int32 ``[B, C, *spatial]``, 0 for background, and the number of components, int64 ``[B, C]``.

    Raises:
        TypeError: if the mask is not a tensor, or complex.
        ValueError: for another shape, a connectivity that the number of axes does not have, or values but 0 and 1.

    Synchronises:
        On a GPU: the mask is copied to the CPU and the labels are copied back.

    Reference:
        Silversmith 2021, connected-components-3d, doi 10.5281/zenodo.5719536.

    Example:
        >>> import torch
        >>> labels, counts = connected_components(torch.tensor([[[[1, 0, 1], [0, 0, 1]]]]))
        >>> labels.tolist(), counts.tolist()
        ([[[[1, 0, 2], [0, 0, 2]]]], [[2]])
    """
    _checks.tensor("mask", mask)
    _checks.volume("mask", mask)
    mask = _checks.binary_or_classes("mask", mask)
    _checks.connectivity(connectivity, mask.ndim - 2)
    labels, counts = _ops.connected_components(mask, connectivity)
    return labels, counts
