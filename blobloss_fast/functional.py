"""The losses as functions: logits and labels in, a scalar or per-instance tensors out.

Reading order: this file, then ``criteria`` (what a loss is), ``partition`` (what a voxel belongs to), ``compute``, and
``kernels.reference`` with ``kernels.finish`` (how it is computed).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .compute import compute, compute_instances
from .criteria import Criterion
from .options import DICE, InstanceWeight, Options


def blob_loss(
    logits: Tensor,
    target: Tensor | None = None,
    instances: Tensor | None = None,
    *,
    criterion: Criterion = DICE,
    main_criterion: Criterion | None = None,
    main_weight: float = 1.0,
    blob_weight: float = 1.0,
    activation: str = "sigmoid",
    include_background: bool = False,
    masking: str = "exclude",
    connectivity: int = 26,
    reduction: str = "mean",
    ignore_index: int | None = None,
    max_instances: int | None = None,
    instance_weight: InstanceWeight = "uniform",
    empty_sample: float | None = None,
) -> Tensor:
    r"""Blob loss: a criterion on the whole image plus its mean over the instances, each seen without the others.

    .. math:: L = w_m L(p, y) + w_b \frac{1}{N} \sum_k L(p|_{\Omega_k}, y_k), \quad \Omega_k = B \cup \text{blob}_k

    The options are those of :class:`BlobLoss`, where they are explained with the empty cases.

    Args:
        logits: ``[B, C, *spatial]``, float16, bfloat16, float32 or float64; one to three spatial axes.
        target: binary ``[B, C, *spatial]`` of any dtype, or with a softmax a class map ``[B, 1, *spatial]`` or one-hot.
        instances: integer ids ``[B, C, *spatial]`` (``[B, 1, *spatial]`` with a two-channel softmax).

    Returns:
        A scalar, or ``[B, C]`` with ``reduction="none"``; float32, or float64 for float64 logits.

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`BlobLoss`.

    Synchronises:
        As :class:`BlobLoss`: never with ``max_instances`` given.

    Reference:
        Kofler et al. 2022, arXiv 2205.08209, eq. 1.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[9.0, 9.0, -9.0, 9.0, -9.0]]])
        >>> mask = torch.tensor([[[1, 1, 0, 0, 1]]])
        >>> blob_loss(logits, mask)
        tensor(0.9333)
    """
    options = Options(
        criterion, main_criterion, main_weight, blob_weight, activation, include_background, masking, connectivity,
        reduction, ignore_index, max_instances, instance_weight, empty_sample,
    ).checked()  # fmt: skip
    return compute(options, logits, target, instances, options.reduction)


def cc_loss(
    logits: Tensor,
    target: Tensor | None = None,
    instances: Tensor | None = None,
    zones: Tensor | None = None,
    *,
    criterion: Criterion = DICE,
    main_criterion: Criterion | None = None,
    main_weight: float = 1.0,
    blob_weight: float = 1.0,
    activation: str = "sigmoid",
    include_background: bool = False,
    connectivity: int = 26,
    reduction: str = "mean",
    ignore_index: int | None = None,
    max_instances: int | None = None,
    instance_weight: InstanceWeight = "uniform",
    empty_sample: float | None = None,
    spacing: Sequence[float] | None = None,
    bidirectional: bool = False,
) -> Tensor:
    r"""CC loss: a criterion on the whole image plus its mean over the zones of the instances.

    .. math:: L = w_m L(p, y) + w_b \frac{1}{N} \sum_k L(p|_{Z_k}, y|_{Z_k})

    The zone of an instance is where no other instance is nearer. The options are those of :class:`CCLoss`, where they
    are explained with the empty cases.

    Args:
        logits: ``[B, C, *spatial]``, float16, bfloat16, float32 or float64; one to three spatial axes.
        target: binary ``[B, C, *spatial]`` of any dtype, or with a softmax a class map ``[B, 1, *spatial]`` or one-hot.
        instances: integer ids ``[B, C, *spatial]`` (``[B, 1, *spatial]`` with a two-channel softmax).
        zones: :func:`nearest_instance` of the ids, in their shape, where you have it already.

    Returns:
        A scalar, or ``[B, C]`` with ``reduction="none"``; float32, or float64 for float64 logits.

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`CCLoss`.

    Synchronises:
        As :class:`CCLoss`.

    Reference:
        Bouteille et al., arXiv 2511.17146; arXiv 2609.30223 (bidirectional).

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[9.0, 9.0, -9.0, 9.0, -9.0]]])
        >>> mask = torch.tensor([[[1, 1, 0, 0, 1]]])
        >>> cc_loss(logits, mask)
        tensor(0.8333)
    """
    options = Options(
        criterion, main_criterion, main_weight, blob_weight, activation, include_background, "exclude", connectivity,
        reduction, ignore_index, max_instances, instance_weight, empty_sample, True, spacing, bidirectional,
    ).checked()  # fmt: skip
    return compute(options, logits, target, instances, options.reduction, zones)


def blob_loss_terms(
    logits: Tensor, target: Tensor | None = None, instances: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return the main term and the blob term, both unweighted means and differentiable, from one pass.

    What to log: ``main_weight * main + blob_weight * blob`` is :func:`blob_loss`.

    Args:
        logits: as in :func:`blob_loss`, like the other tensors.
        target: as there.
        instances: as there.
        **options: the keyword options of :func:`blob_loss`; weights and ``reduction`` have no effect.

    Returns:
        Two scalars. The blob term is a 0 that is connected to the graph where no sample has an instance.

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`BlobLoss`.

    Synchronises:
        As :class:`BlobLoss`: never with ``max_instances`` given.

    Reference:
        Kofler et al. 2022, arXiv 2205.08209, eq. 1.

    Example:
        >>> import torch
        >>> main, blob = blob_loss_terms(torch.zeros(1, 1, 4), torch.tensor([[[1, 0, 1, 1]]]))
        >>> round(main.item(), 4), round(blob.item(), 4)
        (0.4, 0.4643)
    """
    main, blob = compute(Options.named(options), logits, target, instances, "terms").unbind()
    return main, blob


def blob_loss_instances(
    logits: Tensor, target: Tensor | None = None, instances: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return the loss of every instance alone, differentiable, and its id: what to plot against lesion size.

    Args:
        logits: as in :func:`blob_loss`, like the other tensors.
        target: as there.
        instances: as there.
        **options: the keyword options of :func:`blob_loss`; weights, ``main_criterion`` and ``reduction`` have no
            effect.

    Returns:
        losses ``[B, C, N]`` and ids int64 ``[B, C, N]``, N the largest id (``max_instances`` if given; the number of
        different ids if they exceed the number of voxels); both 0 where there is no instance: select with ``ids > 0``.

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`BlobLoss`.

    Synchronises:
        As :class:`BlobLoss`: never with ``max_instances`` given.

    Reference:
        Kofler et al. 2022, arXiv 2205.08209, eq. 1.

    Example:
        >>> import torch
        >>> losses, ids = blob_loss_instances(torch.zeros(1, 1, 4), instances=torch.tensor([[[3, 0, 1, 1]]]))
        >>> ids.tolist(), [round(loss, 4) for loss in losses.flatten().tolist()]
        ([[[1, 0, 3]]], [0.4286, 0.0, 0.5])
    """
    return compute_instances(Options.named(options), logits, target, instances)
