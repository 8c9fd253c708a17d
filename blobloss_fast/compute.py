"""From options and tensors to the loss operator: what all losses share."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, _ops
from .criteria import Criterion, false_positives
from .kernels.finish import blob_counts, encode
from .kernels.layout import ZONES, IdTooLargeError
from .options import Options
from .partition import Partition, partition, predicted_zones

_FALSE_POSITIVES = false_positives()


def compute(
    options: Options,
    logits: Tensor,
    target: Tensor | None,
    instances: Tensor | None,
    reduction: str,
    zones: Tensor | None = None,
) -> Tensor:
    """Validate the tensors and run the loss operator; return the reduced loss."""
    weights = (1.0, 1.0) if reduction == "terms" else (options.main_weight, options.blob_weight)
    labels = _labels(options, logits, target, instances, reduction, zones)
    if not (options.bidirectional and weights[1] > 0):
        return _run(options, logits, labels, reduction, weights)[0]
    halves = weights[0], 0.5 * weights[1]
    uniform = options.but(instance_weight="uniform")
    found = predicted_zones(logits, labels, options)
    return torch.add(
        _run(options, logits, labels, reduction, halves)[0],
        _run(uniform, logits, found, reduction, (0.0, halves[1]), _FALSE_POSITIVES)[0],
    )


def compute_instances(
    options: Options,
    logits: Tensor,
    target: Tensor | None,
    instances: Tensor | None,
    zones: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss of every instance and its id, both 0 where there is none."""
    labels = _labels(options, logits, target, instances, "instances", zones)
    loss, labels, counts = _run(options, logits, labels, "instances", (1.0, 1.0))
    ids = labels.original_ids
    if ids is None:
        ids = torch.arange(1, labels.max_instances + 1, device=counts.device)
    return loss, torch.where(blob_counts(counts, labels.target is not None) > 0, ids, 0)


def _labels(
    options: Options,
    logits: Tensor,
    target: Tensor | None,
    instances: Tensor | None,
    reduction: str,
    zones: Tensor | None,
) -> Partition:
    _checks.logits(logits, options.activation)
    criterion, main_criterion = options.criterion, options.main_criterion or options.criterion
    if options.activation == "softmax" and logits.shape[1] > 2 and (criterion.own_class or main_criterion.own_class):
        raise ValueError(
            f"cross_entropy is not available for a softmax over three or more channels yet; got {logits.shape[1]} "
            "channels: use criteria.bce(), which is one-vs-rest"
        )
    wants_blob = reduction in ("terms", "instances") or options.blob_weight > 0
    may_guess = options.max_instances is None and reduction != "instances" and _ops.finds_large_ids(logits)
    labels = partition(
        logits,
        target,
        instances,
        activation=options.activation,
        include_background=options.include_background,
        connectivity=options.connectivity,
        ignore_index=options.ignore_index,
        max_instances=options.max_instances,
        may_guess=may_guess,
        wants_blob=wants_blob and (zones is None or instances is not None),
    )
    if not (options.in_zones and wants_blob):
        return labels
    labels = labels.in_zones(zones, options.spacing)
    return labels if zones is None else labels.with_capacity(options.max_instances, may_guess)


def _run(
    options: Options,
    logits: Tensor,
    labels: Partition,
    reduction: str,
    weights: tuple[float, float],
    empty: Criterion | None = None,
) -> tuple[Tensor, Partition, Tensor]:
    """Run the loss operator; return the reduced loss, the labels as they were at last, and the voxel counts."""
    main = options.main_criterion or options.criterion
    empty = empty or options.empty_criterion()
    wants_blob = reduction == "instances" or weights[1] > 0
    rows = (
        main.text if reduction != "instances" and weights[0] > 0 else "",
        options.criterion.text if wants_blob else "",
        empty.text if wants_blob and empty is not None and reduction != "instances" else "",
    )
    masking = ZONES if options.in_zones and wants_blob else options.masking

    def text(*rows: str) -> str:
        return encode(options.activation, masking, labels.channel0, reduction, *rows)

    try:
        sizes = None
        if options.instance_weight != "uniform" and wants_blob and reduction != "instances":
            with torch.no_grad():
                nothing, counts, _ = _ops.blob_loss(
                    logits, labels.instances, labels.target, None, labels.max_instances, 0.0, 0.0, text("", "", "")
                )
                sizes = _instance_weights(options, counts, labels, nothing.dtype)
        loss, counts, _ = _ops.run_blob_loss(
            logits, labels.instances, labels.target, sizes, labels.max_instances, *weights, text(*rows)
        )
    except IdTooLargeError:
        if not labels.is_guess:
            raise
        return _run(options, logits, labels.with_largest_id(), reduction, weights, empty)
    return loss, labels, counts


def _instance_weights(options: Options, counts: Tensor, labels: Partition, dtype: torch.dtype) -> Tensor:
    """Return the weight of every instance, ``[B, C, N]``; 1 of a zone without foreground."""
    has_target = labels.target is not None
    voxels = counts.unflatten(2, (-1, 2))[:, :, 1:, 1] if options.in_zones else blob_counts(counts, has_target)
    sizes = voxels.to(dtype)
    weights = options.instance_weight(sizes) if callable(options.instance_weight) else 1 / sizes
    if not isinstance(weights, Tensor) or weights.shape != sizes.shape or weights.is_complex():
        got = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(
            f"instance_weight must return one real weight for every size, a tensor {list(sizes.shape)}; got {got}"
        )
    weights = torch.where(sizes > 0, weights, 1).to(dtype)
    valid = (weights >= 0) & weights.isfinite()
    if _may_be_read(weights) and not bool(valid.all()):
        raise ValueError("instance_weight must return finite weights of at least 0; got others")
    return torch.where(valid, weights, torch.nan)


def _may_be_read(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
