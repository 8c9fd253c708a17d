"""Instance labels from masks, and zones from instance labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import _checks, _ops
from .kernels.zones import MOST_DISTANCE


def connected_components(mask: Tensor, connectivity: int = 26) -> tuple[Tensor, Tensor]:
    """Label the connected components of every sample and channel, each alone, 1..N in raster order.

    The numbering is that of ``scipy.ndimage.label``. A mask without foreground has no component. For a class map, pass
    its classes as channels, ``torch.nn.functional.one_hot(...).movedim(-1, 1)``; the losses take it as it is.

    Args:
        mask: ``[B, C, *spatial]`` bool, integer or floating point 0 and 1; one to three spatial axes.
        connectivity: 4 or 8 in 2D, 6, 18 or 26 in 3D; 26 means all neighbours in any dimension.

    Returns:
        labels, int32 ``[B, C, *spatial]``, 0 for background, and the number of components, int64 ``[B, C]``.

    Raises:
        TypeError: if the mask is not a tensor, or complex.
        ValueError: for another shape, a connectivity that the number of axes does not have, or values but 0 and 1.

    Synchronises:
        Never with Triton, where a value but 0 and 1 has the label 2^31 - 1, and the next call raises RuntimeError.
        On a GPU without Triton the mask is copied to the CPU and the labels are copied back.

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


def nearest_instance(instances: Tensor, *, spacing: Iterable[float] | None = None) -> Tensor:
    """Find the nearest instance of every voxel: the zones, or Voronoi cells, of the instances of a sample and channel.

    A voxel gets the id of the instance voxel at the smallest Euclidean distance; of instances that are as near, the
    smallest id. That is one distance transform per instance with a strict comparison in the order of the ids, exactly:
    distances are compared as integers, and two that are equal are equal on every device.

    Voxels below 0 are ignored: their zone is -1, but distances are measured across them. A sample and channel without
    instances is one zone of its own, with id 1, that has no foreground.

    The spacings are taken as the decimal numbers that Python prints, their squares as whole numbers in the same
    proportion: (0.7, 0.7, 1.4) is 1 : 1 : 4, (1, 1, 3) is 1 : 1 : 9. Only where a squared distance in the volume would
    reach 2**62 with these numbers, they are rounded to the largest in proportion that do not. The relative error of a
    squared spacing is then at most (diagonal of the volume / smallest spacing)**2 / 2**63: 2**-40 for a diagonal of
    2,900 of the smallest spacings.

    Args:
        instances: integer ids ``[B, C, *spatial]``, above 0 an instance; one to three spatial axes, any strides.
        spacing: the size of a voxel along every spatial axis, in their order and in any unit; None for cubes.

    Returns:
        zones, int32 ``[B, C, *spatial]``, contiguous.

    Raises:
        TypeError: if the instances are not an integer tensor, or the spacing is not a sequence of numbers.
        ValueError: for another shape, a spacing that is not positive and finite or not one number per axis, or, on the
            CPU, an id of 2**31 or more.

    Synchronises:
        Never.

    Reference:
        Maurer et al. 2003, IEEE TPAMI 25(2): exact distance transforms and nearest features, axis by axis.

    Example:
        >>> import torch
        >>> nearest_instance(torch.tensor([[[2, 0, 0, 0, 5, 0, -1]]])).tolist()
        [[[2, 2, 2, 5, 5, 5, -1]]]
    """
    _checks.tensor("instances", instances)
    if instances.dtype == torch.bool:
        raise TypeError("instances must hold integer ids; got bool: find them with connected_components(mask)[0]")
    _checks.volume("instances", instances)
    instances = _checks.integers("instances", instances)
    return _ops.nearest_instance(instances, squared_spacings(spacing, instances.shape[2:]))


def squared_spacings(spacing: Iterable[float] | None, sizes: Sequence[int]) -> list[int]:
    """Return squared spacings as whole numbers, exact up to a common factor unless distances get too large.

    In plain integers, which torch.compile can follow. An axis of one voxel has no distances: its weight is 1.
    """
    if spacing is None:
        return [1] * len(sizes)
    numbers = _checks.spacing(spacing, len(sizes))
    decimals = [_decimal(value.__float__()) for value in numbers]  # float(value) is a variable to torch.compile
    lowest = min(exponent for _, exponent in decimals)
    exact = [digits * 10 ** (exponent - lowest) for digits, exponent in decimals]
    factor = math.gcd(*[value for value, size in zip(exact, sizes, strict=True) if size > 1])
    squares = [(value // factor) ** 2 if size > 1 else 1 for value, size in zip(exact, sizes, strict=True)]
    reach = [(size - 1) ** 2 for size in sizes]
    largest = sum(square * squared for square, squared in zip(squares, reach, strict=True))
    if largest <= MOST_DISTANCE:
        return squares
    room = MOST_DISTANCE - sum(reach)  # as if every weight were rounded up by one
    return [max(1, (2 * square * room + largest) // (2 * largest)) for square in squares]


def _decimal(value: float) -> tuple[int, int]:
    """Return digits and exponent of the shortest decimal number that is this float, which Python prints."""
    mantissa, _, exponent = repr(value).partition("e")
    whole, _, fraction = mantissa.partition(".")
    return int(whole + fraction), int(exponent or "0") - len(fraction)
