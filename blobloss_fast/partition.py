"""From labels to cells: what a voxel belongs to.

The kernels want instance ids with a known largest one, and a target only where it says more than ``id > 0``. This
module brings every accepted form of labels (binary target, class map, one-hot, ids, both) into that form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _ops
from .kernels import native
from .kernels.labels import is_ignored
from .labelling import squared_spacings
from .options import Options


class Partition(NamedTuple):
    """The labels of one call, as the kernels read them.

    Attributes:
        instances: integer ids ``[B, C or 1, *spatial]``; 0 background, below 0 ignored.
        target: ``[B, C or 1, *spatial]`` (one channel for many: a class map), or None where it is ``instances > 0``.
        max_instances: the largest id that the table has room for.
        channel0: what channel 0 is, one of ``kernels.layout.CHANNEL0``.
        original_ids: int64 ``[max_instances]``, the ids as they were given, or None if they were not renumbered.
        is_guess: whether an id may be larger: the kernels find out, and the caller tries again ``with_largest_id``.
    """

    instances: Tensor
    target: Tensor | None
    max_instances: int
    channel0: str
    original_ids: Tensor | None
    is_guess: bool

    def but(self, **changes: Any) -> Partition:
        """Return the partition with some changes: what _replace does, which PyTorch 2.7 cannot trace."""
        return Partition(**{**{name: getattr(self, name) for name in _FIELDS}, **changes})

    def with_largest_id(self) -> Partition:
        """Return the partition with the capacity that its ids need, which reads them all."""
        instances, largest, original_ids = _largest_id(self.instances, self.instances[0, 0].numel())
        return self.but(instances=instances, max_instances=largest, original_ids=original_ids, is_guess=False)

    def with_capacity(self, max_instances: int | None, may_guess: bool) -> Partition:
        """Return the partition with this capacity; without any, with what its ids need, or probably need."""
        if max_instances is not None:
            return self.but(max_instances=max_instances)
        guess = _probable_capacity(self.instances) if may_guess else None
        return self.with_largest_id() if guess is None else self.but(max_instances=guess, is_guess=True)

    def in_zones(self, zones: Tensor | None, spacing: Sequence[float] | None) -> Partition:
        """Return the partition into the zones of the instances, with a target that says where these are.

        Args:
            zones: the zones, if they are known: the partition need not know the instances then.
        """
        target = self.instances > 0 if self.target is None else self.target
        if zones is None:
            zones = _nearest_instance(self.instances, self.channel0, spacing)
            return self.but(instances=zones, target=target, max_instances=max(self.max_instances, 1))
        _checks.tensor("zones", zones)
        _checks.matching("zones", zones, self.instances, (self.instances.shape[1],))
        zones = _signed(_checks.integers("zones", zones))
        return self.but(instances=torch.where(self.instances < 0, -1, zones), target=target)


_FIELDS = Partition._fields
_USUAL_INSTANCES = 255
_LARGE_VOLUME = 2**18  # voxels, whose loss takes so long that 40 us for a look at a few do not matter


def partition(
    logits: Tensor,
    target: Tensor | None,
    instances: Tensor | None,
    *,
    activation: str,
    include_background: bool,
    connectivity: int,
    ignore_index: int | None,
    max_instances: int | None,
    may_guess: bool,
    wants_blob: bool,
) -> Partition:
    """Validate the labels of a call and bring them into the form that the kernels read.

    Args:
        max_instances: the largest id that is allowed; None: the largest there is.
        may_guess: whether the largest there is may be guessed, which saves reading all ids to find it.
        wants_blob: whether there is a blob term; without one, no instance is looked for in a target.
    """
    channels = logits.shape[1]
    softmax = activation == "softmax"
    channel0 = "class" if not softmax else "background" if include_background else "unused"
    if target is not None:
        _checks.tensor("target", target)
        _checks.matching("target", target, logits, (1, channels) if softmax else (channels,))
        target = _checks.binary_or_classes("target", target)
    if instances is not None:
        _checks.tensor("instances", instances)
        _checks.matching("instances", instances, logits, (1, 2) if softmax and channels == 2 else (channels,))
        instances = _checks.integers("instances", instances)
        if target is not None and ignore_index is not None:
            instances = torch.where(is_ignored(target, ignore_index), -1, _signed(instances))
        elif target is None and channel0 == "background":
            instances, target = _with_background_class(instances, channels)
    elif target is not None:
        _checks.connectivity(connectivity, logits.ndim - 2)
        if wants_blob:
            class_map = target.shape[1] < channels
            instances, counts = _ops.run_label_target(target, channels, class_map, softmax, connectivity, ignore_index)
            if max_instances is None:
                max_instances = int(counts.max())
            if channel0 != "background":
                target = None  # its components say the same
        else:
            instances = torch.zeros_like(target, dtype=torch.int8)
            if ignore_index is not None:
                instances.masked_fill_(is_ignored(target, ignore_index), -1)
            max_instances = 0
    else:
        raise ValueError("target or instances must be given; got neither: pass a binary target, instance ids, or both")

    return Partition(instances, target, 0, channel0, None, False).with_capacity(max_instances, may_guess)


def predicted_zones(logits: Tensor, labels: Partition, options: Options) -> Partition:
    """Return the partition into the zones of the predicted components, p > 0.5, with the target of ``labels``."""
    x = logits.detach()
    if options.activation == "softmax":
        x = torch.softmax(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, 1)
        x = x[:, 1:] if labels.instances.shape[1] < x.shape[1] else x
    ignored = labels.instances < 0
    predicted = (x > (0.0 if options.activation == "sigmoid" else 0.5)) & ~ignored
    components, counts = _ops.connected_components(predicted, options.connectivity)
    largest = int(counts.max()) if options.max_instances is None else options.max_instances
    zones = _nearest_instance(components, labels.channel0, options.spacing).masked_fill_(ignored, -1)
    return labels.but(instances=zones, max_instances=max(largest, 1), original_ids=None, is_guess=False)


def _with_background_class(instances: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Return the ids and the target of a softmax whose classes are where the ids are, class 0 being the rest.

    Where the ids of all other classes are ignored, nothing says that the rest is background: it is ignored as well.
    """
    instances = instances.expand(-1, channels, *instances.shape[2:]).clone()
    others = instances[:, 1:]
    foreground = instances > 0
    foreground[:, 0] = ~(others > 0).any(1)
    if instances.dtype != torch.uint8:
        instances[:, 0].masked_fill_((others < 0).all(1), -1)
    return instances, foreground


def _probable_capacity(instances: Tensor) -> int | None:
    """Guess the largest id: in a large volume, a quarter more than the largest of about a thousand voxels.

    Only where ``_ops.finds_large_ids``, since the native library reads these in place. None if the largest is so large
    that ids will have to be renumbered.
    """
    if not _ops.is_plain(instances):
        return _USUAL_INSTANCES
    shape = instances.shape[2:]
    voxels = math.prod(shape)
    if voxels < _LARGE_VOLUME:
        return _USUAL_INSTANCES
    steps = (int(size / 1000 ** (1 / len(shape))) | 1 for size in shape)  # odd, which few patterns fall in step with
    seen = native.largest_in_grid(instances, tuple(steps))
    if seen > voxels:
        return None
    return max(_USUAL_INSTANCES, min(seen + seen // 4, voxels, torch.iinfo(instances.dtype).max))


def _largest_id(instances: Tensor, voxels: int) -> tuple[Tensor, int, Tensor | None]:
    """Read the largest id; renumber ids that are larger than any volume of this size could need."""
    largest = max(int(instances.max()), 0)
    if largest <= voxels:
        return instances, largest, None
    foreground = instances > 0
    original, dense = torch.unique(instances[foreground], return_inverse=True)
    renumbered = instances.clamp(-1, 0).to(torch.int32)
    renumbered[foreground] = dense.to(torch.int32) + 1
    return renumbered, original.numel(), original.to(torch.int64)


def _signed(ids: Tensor) -> Tensor:
    return ids.to(torch.int32) if ids.dtype == torch.uint8 else ids


def _nearest_instance(instances: Tensor, channel0: str, spacing: Sequence[float] | None) -> Tensor:
    weights = squared_spacings(spacing, instances.shape[2:])
    if channel0 == "class" or instances.shape[1] == 1:
        return _ops.nearest_instance(instances, weights)
    # The background class of a softmax has no zones: nothing is looked for there.
    background = instances[:, :1].clamp(-1, 0).to(torch.int32)
    return torch.cat([background, _ops.nearest_instance(instances[:, 1:], weights)], 1)
