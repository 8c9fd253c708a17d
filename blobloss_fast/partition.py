"""From labels to cells: what a voxel belongs to.

The kernels want instance ids with a known largest one, and a target only where it says more than ``id > 0``. This
module brings every accepted form of labels (binary target, class map, one-hot, ids, both) into that form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _ops
from .kernels.labels import is_ignored


class Partition(NamedTuple):
    """The labels of one call, as the kernels read them.

    Attributes:
        instances: integer ids ``[B, C or 1, *spatial]``; 0 background, below 0 ignored.
        target: ``[B, C or 1, *spatial]`` (one channel for many: a class map), or None where it is ``instances > 0``.
        max_instances: the largest id that the table has room for.
        channel0: what channel 0 is, one of ``kernels.layout.CHANNEL0``.
        original_ids: int64 ``[max_instances]``, the ids as they were given, or None if they were not renumbered.
    """

    instances: Tensor
    target: Tensor | None
    max_instances: int
    channel0: str
    original_ids: Tensor | None

    def with_largest_id(self) -> Partition:
        """Return the partition with the capacity that its ids need, which reads them all."""
        instances, largest, original_ids = _largest_id(self.instances, self.instances[0, 0].numel())
        return self._replace(instances=instances, max_instances=largest, original_ids=original_ids)


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
    wants_blob: bool,
) -> Partition:
    """Validate the labels of a call and bring them into the form that the kernels read.

    Args:
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
            signed = instances.to(torch.int32) if instances.dtype == torch.uint8 else instances
            instances = torch.where(is_ignored(target, ignore_index), -1, signed)
        elif target is None and channel0 == "background":
            instances, target = _with_background_class(instances, channels)
    elif target is not None:
        _checks.connectivity(connectivity, logits.ndim - 2)
        if wants_blob:
            class_map = target.shape[1] < channels
            instances, _ = _ops.label_target(target, channels, class_map, softmax, connectivity, ignore_index)
            if channel0 != "background":
                target = None  # its components say the same
        else:
            instances = torch.zeros_like(target, dtype=torch.int8)
            if ignore_index is not None:
                instances.masked_fill_(is_ignored(target, ignore_index), -1)
            max_instances = 0
    else:
        raise ValueError("target or instances must be given; got neither: pass a binary target, instance ids, or both")

    if max_instances is None:
        return Partition(instances, target, 0, channel0, None).with_largest_id()
    return Partition(instances, target, max_instances, channel0, None)


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
