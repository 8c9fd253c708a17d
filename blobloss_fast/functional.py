"""Blob loss as functions: logits and labels in, a scalar or per-instance tensors out.

Reading order: this file, then ``criteria`` (what a loss is), ``partition`` (what a voxel belongs to), and
``kernels.reference`` with ``kernels.finish`` (how it is computed).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _ops
from .criteria import Criterion, common_gamma, dice
from .kernels.finish import blob_counts
from .kernels.layout import ACTIVATIONS, MASKINGS, IdTooLargeError
from .partition import Partition, partition

REDUCTIONS = ("mean", "none", "sum")
DICE = dice()
_MOST_INSTANCES = 2**24  # 64 MiB for each sum, sample and class
_USUAL_INSTANCES = 255  # tried first where a larger id is noticed, which saves reading all ids to find the largest


class Options(NamedTuple):
    """The options of blob loss, checked once; ``BlobLoss`` documents them."""

    criterion: Criterion = DICE
    main_criterion: Criterion | None = None
    main_weight: float = 1.0
    blob_weight: float = 1.0
    activation: str = "sigmoid"
    include_background: bool = False
    masking: str = "exclude"
    connectivity: int = 26
    reduction: str = "mean"
    ignore_index: int | None = None
    max_instances: int | None = None

    def checked(self) -> Options:
        """Return the options, or raise for the first that is wrong."""
        for name, criterion in (("criterion", self.criterion), ("main_criterion", self.main_criterion)):
            if not (isinstance(criterion, Criterion) or (name == "main_criterion" and criterion is None)):
                raise TypeError(
                    f"{name} must come from blobloss_fast.criteria, for example criteria.dice(); got "
                    f"{type(criterion).__name__}: blobloss_fast.compat takes arbitrary callables"
                )
        main_weight = _checks.number("main_weight", self.main_weight, minimum=0)
        blob_weight = _checks.number("blob_weight", self.blob_weight, minimum=0)
        if main_weight == blob_weight == 0:
            raise ValueError("main_weight and blob_weight must not both be 0: nothing would be left to learn from")
        _checks.one_of("activation", self.activation, ACTIVATIONS)
        _checks.flag("include_background", self.include_background)
        _checks.one_of("masking", self.masking, MASKINGS)
        _checks.one_of("connectivity", self.connectivity, (4, 8, 6, 18, 26))
        _checks.one_of("reduction", self.reduction, REDUCTIONS)
        ignore_index, max_instances = self.ignore_index, self.max_instances
        if ignore_index is not None:
            ignore_index = _checks.count("ignore_index", ignore_index, minimum=-(2**53), maximum=2**53)
        if max_instances is not None:
            max_instances = _checks.count("max_instances", max_instances, minimum=0, maximum=_MOST_INSTANCES)
        common_gamma(self.criterion, self.main_criterion or self.criterion)
        return self._replace(
            main_weight=main_weight,
            blob_weight=blob_weight,
            connectivity=int(self.connectivity),
            ignore_index=ignore_index,
            max_instances=max_instances,
        )

    @classmethod
    def named(cls, options: Mapping[str, Any]) -> Options:
        """Return checked options from keyword arguments."""
        unknown = sorted(options.keys() - set(cls._fields))
        if unknown:
            raise TypeError(f"unknown option {', '.join(unknown)}; the options are {', '.join(cls._fields)}")
        return cls(**options).checked()


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
        As :class:`BlobLoss`: never with ``instances`` and ``max_instances`` given.

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
        reduction, ignore_index, max_instances,
    ).checked()  # fmt: skip
    return compute(options, logits, target, instances, options.reduction)[0]


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
        As :class:`BlobLoss`: never with ``instances`` and ``max_instances`` given.

    Reference:
        Kofler et al. 2022, arXiv 2205.08209, eq. 1.

    Example:
        >>> import torch
        >>> main, blob = blob_loss_terms(torch.zeros(1, 1, 4), torch.tensor([[[1, 0, 1, 1]]]))
        >>> round(main.item(), 4), round(blob.item(), 4)
        (0.4, 0.4643)
    """
    terms = compute(Options.named(options), logits, target, instances, "terms")[0]
    main, blob = terms.unbind()
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
        As :class:`BlobLoss`: never with ``instances`` and ``max_instances`` given.

    Reference:
        Kofler et al. 2022, arXiv 2205.08209, eq. 1.

    Example:
        >>> import torch
        >>> losses, ids = blob_loss_instances(torch.zeros(1, 1, 4), instances=torch.tensor([[[3, 0, 1, 1]]]))
        >>> ids.tolist(), [round(loss, 4) for loss in losses.flatten().tolist()]
        ([[[1, 0, 3]]], [0.4286, 0.0, 0.5])
    """
    loss, labels, counts = compute(Options.named(options), logits, target, instances, "instances")
    ids = labels.original_ids
    if ids is None:
        ids = torch.arange(1, labels.max_instances + 1, device=counts.device)
    return loss, torch.where(blob_counts(counts, labels.target is not None) > 0, ids, 0)


def compute(
    options: Options, logits: Tensor, target: Tensor | None, instances: Tensor | None, reduction: str
) -> tuple[Tensor, Partition, Tensor]:
    """Validate the tensors and run the loss operator; return the reduced loss, the labels and the voxel counts."""
    _checks.logits(logits, options.activation)
    criterion, main_criterion = options.criterion, options.main_criterion or options.criterion
    if options.activation == "softmax" and logits.shape[1] > 2 and (criterion.own_class or main_criterion.own_class):
        raise ValueError(
            f"cross_entropy is not available for a softmax over three or more channels yet; got {logits.shape[1]} "
            "channels: use criteria.bce(), which is one-vs-rest"
        )
    wants_main = reduction == "terms" or (reduction != "instances" and options.main_weight > 0)
    wants_blob = reduction in ("terms", "instances") or options.blob_weight > 0
    guesses = options.max_instances is None and reduction != "instances" and _ops.finds_large_ids(logits)
    labels = partition(
        logits,
        target,
        instances,
        activation=options.activation,
        include_background=options.include_background,
        connectivity=options.connectivity,
        ignore_index=options.ignore_index,
        max_instances=_USUAL_INSTANCES if guesses else options.max_instances,
        wants_blob=wants_blob,
    )
    rows = [main_criterion.text if wants_main else "", criterion.text if wants_blob else ""]
    weights = (1.0, 1.0) if reduction == "terms" else (options.main_weight, options.blob_weight)
    text = "|".join((options.activation, options.masking, labels.channel0, reduction, *rows))
    try:
        loss, counts, _ = _ops.blob_loss(logits, *labels[:3], *weights, text)
    except IdTooLargeError:
        if not guesses:
            raise
        labels = labels.with_largest_id()
        loss, counts, _ = _ops.blob_loss(logits, *labels[:3], *weights, text)
    return loss, labels, counts
