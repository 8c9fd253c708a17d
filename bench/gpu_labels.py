"""What bench.gpu compares components and zones with on a CUDA device, and what is true of them by definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.gpu_timing import UnmeasuredError
from blobloss_fast import connected_components, nearest_instance

FAR = 2**30  # more than a squared distance in any volume here


def noise(batch: int, size: int, density: float) -> Tensor:
    """bool [batch, 1, size, size, size]"""
    generator = torch.Generator().manual_seed(0)
    return torch.rand((batch, 1, *(size,) * 3), generator=generator) < density


@dataclass(frozen=True)
class LabelContestant:
    """What finds components in a mask uint8, or zones of ids int32, [B, 1, *spatial].

    Attributes:
        title: as the tables print it.
        prepare: makes a function that returns labels [B, 1, *spatial], tensor or array; not timed.
        package: what must be installed.
        on_device: whether it is timed on the device, or on the host's clock.
        exact: whether labels must be those of the truth bit for bit, or up to numbering (components) and ties (zones).
    """

    title: str
    prepare: Callable[[Tensor], Callable[[], Any]]
    package: str | None = None
    on_device: bool = True
    exact: bool = False


def _every_sample(function: Callable[[Any], Any], labels: Tensor, array: Callable[[Tensor], Any]) -> Callable[[], Any]:
    volumes = [array(sample[0]) for sample in labels]
    return lambda: [function(volume) for volume in volumes]


def _numpy(volume: Tensor) -> np.ndarray:
    return volume.cpu().numpy()


def _cupy(volume: Tensor) -> Any:
    import cupy

    return cupy.from_dlpack(volume.contiguous())


def _scipy_label(volume: Tensor) -> Callable[[], Any]:
    from scipy import ndimage

    return _every_sample(lambda mask: ndimage.label(mask, np.ones((3,) * mask.ndim))[0], volume, _numpy)


def _cc3d_label(volume: Tensor) -> Callable[[], Any]:
    import cc3d

    return _every_sample(partial(cc3d.connected_components, connectivity=26), volume, _numpy)


def _cupy_label(volume: Tensor) -> Callable[[], Any]:
    import cupy
    from cupyx.scipy import ndimage

    structure = cupy.ones((3, 3, 3), dtype=bool)
    return _every_sample(lambda mask: ndimage.label(mask, structure)[0], volume, _cupy)


def _cucim_label(volume: Tensor) -> Callable[[], Any]:
    from cucim.skimage import measure

    return _every_sample(partial(measure.label, connectivity=3), volume, _cupy)


COMPONENTS = {
    "ours": LabelContestant("ours", lambda mask: lambda: connected_components(mask)[0], exact=True),
    "scipy": LabelContestant("scipy on the CPU", _scipy_label, "scipy", on_device=False),
    "cc3d": LabelContestant("cc3d on the CPU", _cc3d_label, "cc3d", on_device=False),
    "cupy": LabelContestant("cupyx.scipy.ndimage.label", _cupy_label, "cupyx"),
    "cucim": LabelContestant("cucim.skimage.measure.label", _cucim_label, "cucim"),
}


def _nearest(module: Any, ids: Any) -> Any:
    places = module.distance_transform_edt(ids == 0, return_distances=False, return_indices=True)
    return ids[tuple(places)]


def _scipy_zones(volume: Tensor) -> Callable[[], Any]:
    from scipy import ndimage

    return _every_sample(partial(_nearest, ndimage), volume, _numpy)


def _cupy_zones(volume: Tensor) -> Callable[[], Any]:
    from cupyx.scipy import ndimage

    if not hasattr(ndimage, "distance_transform_edt"):
        raise UnmeasuredError("this CuPy has no distance_transform_edt")
    return _every_sample(partial(_nearest, ndimage), volume, _cupy)


ZONES = {
    "ours": LabelContestant("ours", lambda ids: lambda: nearest_instance(ids), exact=True),
    "scipy": LabelContestant("scipy's single transform on the CPU", _scipy_zones, "scipy", on_device=False),
    "cupy": LabelContestant("cupyx.scipy.ndimage.distance_transform_edt", _cupy_zones, "cupyx"),
}


# --------------------------------------------------------------------------------------------------- truth of labels


def as_tensor(found: Any, like: Tensor) -> Tensor:
    """What a contestant returned, int64, on the device and in the shape of its input."""
    if not isinstance(found, Tensor):
        samples = [torch.as_tensor(sample.astype(np.int64), device=like.device) for sample in found]
        found = torch.stack(samples).view(like.shape)
    return found.long()


def components_by_definition(mask: Tensor) -> Tensor:
    return as_tensor(_scipy_label(mask)(), mask)


def zones_by_definition(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest id of the smallest squared distance, and that distance: one instance after the other."""
    zones, best = torch.ones_like(ids, dtype=torch.int64), torch.full_like(ids, FAR, dtype=torch.int32)
    for zone, nearest, sample in zip(zones, best, ids, strict=True):
        for k in sample[sample > 0].unique().tolist():
            squared = squared_distance(sample[0] == k)
            closer = squared < nearest[0]
            zone[0][closer] = k
            torch.minimum(nearest[0], squared, out=nearest[0])
    return zones, best


def squared_distance(own: Tensor) -> Tensor:
    """Squared distance int32 to the nearest voxel of `own`: every plane of its box reaches all planes of the volume."""
    places = own.nonzero()
    low, high = places.amin(0).tolist(), (places.amax(0) + 1).tolist()
    box = own[tuple(slice(*span) for span in zip(low, high, strict=True))]
    squared = torch.where(box, 0, FAR).int()
    for axis, size in enumerate(own.shape):
        along = torch.arange(size, dtype=torch.int32, device=own.device)
        along = along.view([-1 if a == axis else 1 for a in range(own.ndim)])
        planes = squared.split(1, axis)
        squared = planes[0] + (along - low[axis]) ** 2
        for i, plane in enumerate(planes[1:], start=low[axis] + 1):
            squared = torch.minimum(squared, plane + (along - i) ** 2)
    return squared


def check_components(found: Tensor, truth: Tensor, *, exact: bool) -> None:
    if exact:
        if not torch.equal(found, truth):
            raise UnmeasuredError("its components are NOT scipy's, bit for bit")
        return
    wide = int(truth.max()) + 1
    pairs = (found * wide + truth).unique()  # as many as there are labels on either side, if one renumbers the other
    theirs, scipys = (pairs // wide).unique(), (pairs % wide).unique()
    zero_is_zero = torch.equal(found == 0, truth == 0)
    if not (zero_is_zero and len(pairs) == len(theirs) == len(scipys)):
        raise UnmeasuredError("its components are NOT scipy's, whatever their numbers")


def check_zones(found: Tensor, ids: Tensor, truth: tuple[Tensor, Tensor], *, exact: bool) -> None:
    zones, best = truth
    if exact and not torch.equal(found, zones):
        raise UnmeasuredError("its zones are NOT those of one transform for each instance, bit for bit")
    for sample, own, zone, nearest in zip(found, ids, zones, best, strict=True):
        differ = sample != zone
        for k in sample[differ].unique().tolist():  # which may be where two instances are as near
            where = (differ & (sample == k))[0]
            if not (own == k).any() or not torch.equal(squared_distance(own[0] == k)[where], nearest[0][where]):
                raise UnmeasuredError("its zones are NOT the nearest instances, also but for ties")


Check = Callable[[Tensor, bool], None]  # of labels that a contestant found, and whether they must be exact


class Contest(NamedTuple):
    """What finds labels in a volume, and how to find the truth of a volume, which returns a check."""

    contestants: dict[str, LabelContestant]
    truth: Callable[[Tensor], Check]


def _components_contest(mask: Tensor) -> Check:
    truth = components_by_definition(mask)
    return lambda found, exact: check_components(found, truth, exact=exact)


def _zones_contest(ids: Tensor) -> Check:
    truth = zones_by_definition(ids)
    return lambda found, exact: check_zones(found, ids, truth, exact=exact)


CONTESTS = {"components": Contest(COMPONENTS, _components_contest), "zones": Contest(ZONES, _zones_contest)}
