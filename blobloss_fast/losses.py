"""The losses as modules: they hold the options that ``functional`` takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .compute import compute, compute_instances
from .criteria import Criterion
from .options import BLOB_OPTIONS, CC_OPTIONS, DICE, InstanceWeight, Options


class _InstanceLoss(nn.Module):
    """Options as attributes, which may be set between calls."""

    _names: ClassVar[tuple[str, ...]] = Options._fields
    _in_zones: ClassVar[bool] = False
    criterion: Criterion
    main_criterion: Criterion | None
    main_weight: float
    blob_weight: float
    activation: str
    include_background: bool
    masking: str
    connectivity: int
    reduction: str
    ignore_index: int | None
    max_instances: int | None
    instance_weight: InstanceWeight
    empty_sample: float | None
    spacing: Sequence[float] | None
    bidirectional: bool
    _checked: Options | None

    def __init__(self, options: Options) -> None:
        super().__init__()
        checked = options.checked()
        for name in self._names:
            setattr(self, name, getattr(checked, name))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._names:
            self.__dict__["_checked"] = None

    def _options(self) -> Options:
        """Return the checked options; they are checked once, and again after one of them was set."""
        options = self._checked
        if options is None:
            named = {name: getattr(self, name) for name in self._names}
            options = Options(**named, in_zones=self._in_zones).checked()
            if not torch.compiler.is_compiling():  # a traced call is not to change the module
                self.__dict__["_checked"] = options
        return options

    def extra_repr(self) -> str:
        """Show the options that differ from the defaults."""
        options, defaults = self._options(), Options._field_defaults
        changed = [
            f"{name}={getattr(options, name)!r}"
            for name in self._names
            if name != "criterion" and getattr(options, name) != defaults[name]
        ]
        return ", ".join([repr(self.criterion), *changed])


class BlobLoss(_InstanceLoss):
    r"""Blob loss: a segmentation loss in which every ground-truth instance counts the same, whatever its size.

    .. math:: L = w_m L(p, y) + w_b \frac{1}{N} \sum_k L(p|_{\Omega_k}, y_k), \quad \Omega_k = B \cup \text{blob}_k

    The main term is the criterion per (sample, class) over all voxels, then the mean over samples and classes. The blob
    term is the mean over the instances of a (sample, class) of the criterion on that instance and the background, the
    other instances being masked out, then the mean over the (sample, class) pairs that have an instance. Both come from
    one pass over the logits forward and one backward; the cost does not depend on the number of instances.

    Empty cases: a pair without instances is skipped by the blob term; if no pair has one, the blob term is a 0 that is
    connected to the graph. A sample without a voxel that is not ignored has a main term of 0. Ignored voxels are not
    read and get a gradient of exactly 0.

    Softmax: channel 0 is the background class. It never has instances, and a main term only with
    ``include_background``; results keep its place, holding 0. Two channels with a ``[B, 1]`` class map or ids are the
    usual binary case.

    The options are attributes and may be changed between calls, for instance to raise ``blob_weight`` over the epochs.

    Args:
        criterion: from :mod:`blobloss_fast.criteria`; sums and multiples compose, ``dice() + 0.5 * bce()``.
        main_criterion: criterion of the main term; None: the same.
        main_weight: weight of the main term, at least 0. A term with weight 0 is not computed.
        blob_weight: weight of the blob term, at least 0.
        activation: "sigmoid", "softmax" (over C), or "none" for logits that are probabilities already.
        include_background: give the softmax's background class a main term. No effect without a softmax. A one-hot
            target is read channel by channel, each against the rest.
        masking: what the other instances are in an instance's term: "exclude" (they do not exist: the paper's domain),
            "zero_prob" (probability 0, still counted in a mean), "zero_logit" (logit 0: what the authors' code does
            where the criterion applies the sigmoid), "none" (they stay in, as background).
        connectivity: of the instances found in a target: 4 or 8 in 2D, 6, 18 or 26 in 3D; 26 means all neighbours in
            any dimension.
        reduction: "mean" (the formula above), "none" (``[B, C]``: main_weight * main + blob_weight * blob), "sum" (of
            that).
        ignore_index: value of the target that is ignored by both terms; without a target it has no effect, as
            ``connectivity`` has none where ids are given. Ids below 0 are ignored as well.
        max_instances: the largest id allowed, which fixes the shape of the table. None reads it from the ids.
        instance_weight: "uniform"; "inverse_size", 1 / (number of voxels); or a function from the numbers of voxels
            (``[B, C, N]`` in the dtype of the loss, 0 where there is no instance) to weights of the same shape, at
            least 0: others raise, or make the loss NaN where nothing is read (on a GPU, in a compiled call). The mean
            over the instances of a (sample, class) becomes a weighted mean. An instance of weight 0 has no term of its
            own: ``lambda sizes: sizes >= 5`` leaves out what has less than five voxels.
        empty_sample: c > 0, in voxels: a (sample, class) without instances has the term :math:`s / (s + c)` in the blob
            term's mean, s the sum of its p, so that false positives cost something there as well. None: it is skipped.

    Raises:
        TypeError: for an argument of the wrong kind or dtype.
        ValueError: for a wrong option, shape or value. Values of labels are checked on the CPU, where a check is cheap;
            elsewhere an id beyond ``max_instances`` or a target outside {0, 1} makes the loss and its gradient NaN, and
            the Triton backend raises a RuntimeError at the next call.
        RuntimeError: for tensors on different devices, or a second derivative.

    Synchronises:
        Never with ``max_instances`` given, which otherwise is read from the device. On a GPU without Triton, a target
        without ``instances`` is copied to the CPU, labelled there, and the ids are copied back.

    Reference:
        Kofler et al. 2022, blob loss: instance imbalance aware loss functions for semantic segmentation,
        arXiv 2205.08209, eq. 1.

    Example:
        >>> import torch
        >>> from blobloss_fast import BlobLoss
        >>> logits = torch.zeros(2, 1, 8, 8, 8, requires_grad=True)
        >>> mask = torch.zeros(2, 1, 8, 8, 8)
        >>> mask[0, 0, 1:3, 1:3, 1:3] = mask[0, 0, 6, 6, 6] = mask[1, 0, 4] = 1
        >>> loss = BlobLoss()(logits, mask)
        >>> loss.backward()
        >>> round(loss.item(), 4)
        1.7744
    """

    _names = BLOB_OPTIONS

    def __init__(
        self,
        criterion: Criterion = DICE,
        *,
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
    ) -> None:
        options = Options(
            criterion, main_criterion, main_weight, blob_weight, activation, include_background, masking, connectivity,
            reduction, ignore_index, max_instances, instance_weight, empty_sample,
        )  # fmt: skip
        super().__init__(options)

    def forward(self, logits: Tensor, target: Tensor | None = None, instances: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            logits: ``[B, C, *spatial]``, float16, bfloat16, float32 or float64; one to three spatial axes.
            target: binary ``[B, C, *spatial]`` (bool, integer, or floating point 0 and 1), or with a softmax a class
                map ``[B, 1, *spatial]`` or one-hot. Its instances are its connected components unless ids are given.
            instances: integer ids ``[B, C, *spatial]`` (``[B, 1, *spatial]`` with a two-channel softmax); 0 is
                background, below 0 ignored, gaps are fine. Alone, the foreground is ``instances > 0``; beside a target,
                the main term reads the target and the blob term the ids, and they need not agree.

        Returns:
            A scalar, or ``[B, C]`` with ``reduction="none"``; float32, or float64 for float64 logits.
        """
        options = self._options()
        return compute(options, logits, target, instances, options.reduction)

    def terms(
        self, logits: Tensor, target: Tensor | None = None, instances: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the unweighted main and blob terms: :func:`blob_loss_terms` with this module's options.

        Args:
            logits: as in :meth:`forward`, like the labels.
            target: as there.
            instances: as there.

        Returns:
            Two scalars, main and blob. Errors and synchronisation are those of the class.
        """
        main, blob = compute(self._options(), logits, target, instances, "terms").unbind()
        return main, blob

    def instance_losses(
        self, logits: Tensor, target: Tensor | None = None, instances: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return every instance's loss and id: :func:`blob_loss_instances` with this module's options.

        Args:
            logits: as in :meth:`forward`, like the labels.
            target: as there.
            instances: as there.

        Returns:
            losses ``[B, C, N]`` and ids int64 ``[B, C, N]``, both 0 where there is none. Errors and synchronisation are
            those of the class.
        """
        return compute_instances(self._options(), logits, target, instances)


class CCLoss(_InstanceLoss):
    r"""CC loss: every instance counts the same, in the part of the image that is nearest to it.

    .. math:: L = w_m L(p, y) + w_b \frac{1}{N} \sum_k L(p|_{Z_k}, y|_{Z_k})

    :math:`Z_k` is the zone of instance k: the voxels that no other instance is nearer to. A false positive is charged
    to one instance, the nearest, where :class:`BlobLoss` charges it to all. Both terms come from one pass over the
    logits forward and one backward. CC-DiceCE as published is
    ``CCLoss(criteria.dice() + criteria.cross_entropy(), activation="softmax")`` on two channels.

    Empty cases: where a sample has no instance, its whole volume is one zone without foreground, and that counts in the
    mean like any other (blob loss skips such samples). Ignored voxels are in no zone, not read, and get a gradient of
    exactly 0. Channel 0 of a softmax has no zones.

    The options are attributes and may be changed between calls.

    Args:
        criterion: as in :class:`BlobLoss`, like all options that are not below.
        main_criterion: as there.
        main_weight: as there.
        blob_weight: weight of the mean over the zones.
        activation: as there.
        include_background: as there.
        connectivity: as there; also of predicted components.
        reduction: as there.
        ignore_index: as there.
        max_instances: the largest id allowed; with ``bidirectional`` also the largest number of predicted components.
        instance_weight: as there, of the ground truth's zones; the size is the number of foreground voxels in a zone,
            and a zone without any has weight 1.
        empty_sample: c > 0: a zone without foreground has the term :math:`s / (s + c)` in place of the criterion, s the
            sum of p in it.
        spacing: size of a voxel along each spatial axis, in any unit; None: 1 along all.
        bidirectional: BiCC: half of the zones' term is the mean over the ground truth's zones, half that over the zones
            of the predicted components (p > 0.5), in which the criterion compares with the same target. A predicted
            zone without foreground has the term :math:`\sum p\,sg(p) / sg(\sum p)` instead, sg being the stopped
            gradient: it pushes false positives down, which a Dice there could not.

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`BlobLoss`.

    Synchronises:
        As :class:`BlobLoss`: never with ``max_instances`` given.

    Reference:
        Bouteille et al., arXiv 2511.17146 (CC-DiceCE); arXiv 2604.24276 (several classes); arXiv 2609.30223 (BiCC).

    Example:
        >>> import torch
        >>> from blobloss_fast import CCLoss, criteria
        >>> logits = torch.zeros(1, 2, 8, 8, requires_grad=True)
        >>> class_map = torch.zeros(1, 1, 8, 8)
        >>> class_map[0, 0, 1, 1] = class_map[0, 0, 5:7, 5:7] = 1
        >>> loss = CCLoss(criteria.dice() + criteria.cross_entropy(), activation="softmax")(logits, class_map)
        >>> loss.backward()
        >>> round(loss.item(), 4)
        3.1285
    """

    _names = CC_OPTIONS
    _in_zones = True

    def __init__(
        self,
        criterion: Criterion = DICE,
        *,
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
    ) -> None:
        options = Options(
            criterion, main_criterion, main_weight, blob_weight, activation, include_background, "exclude",
            connectivity, reduction, ignore_index, max_instances, instance_weight, empty_sample, True, spacing,
            bidirectional,
        )  # fmt: skip
        super().__init__(options)

    def forward(
        self,
        logits: Tensor,
        target: Tensor | None = None,
        instances: Tensor | None = None,
        zones: Tensor | None = None,
    ) -> Tensor:
        """Return the loss.

        Args:
            logits: as in :meth:`BlobLoss.forward`.
            target: as there. Beside ids it is the label inside the zones, which come from the ids.
            instances: as there.
            zones: :func:`nearest_instance` of the ids, in their shape, where you have it already; beside a target, no
                instance is looked for then. A voxel with 0 is in no zone.

        Returns:
            A scalar, or ``[B, C]`` with ``reduction="none"``; float32, or float64 for float64 logits.
        """
        options = self._options()
        return compute(options, logits, target, instances, options.reduction, zones)

    def terms(
        self,
        logits: Tensor,
        target: Tensor | None = None,
        instances: Tensor | None = None,
        zones: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the unweighted main term and the mean over the zones, both differentiable, from one pass.

        Args:
            logits: as in :meth:`forward`, like the labels.
            target: as there.
            instances: as there.
            zones: as there.

        Returns:
            Two scalars. Errors and synchronisation are those of the class.
        """
        main, blob = compute(self._options(), logits, target, instances, "terms", zones).unbind()
        return main, blob

    def instance_losses(
        self,
        logits: Tensor,
        target: Tensor | None = None,
        instances: Tensor | None = None,
        zones: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the criterion in every zone of the ground truth, differentiable, and the zone's id.

        Args:
            logits: as in :meth:`forward`, like the labels.
            target: as there.
            instances: as there.
            zones: as there.

        Returns:
            losses ``[B, C, N]`` and ids int64 ``[B, C, N]``, both 0 where there is none; the zone of a sample without
            instances has id 1. Weights, ``empty_sample`` and ``bidirectional`` have no effect. Errors and
            synchronisation are those of the class.
        """
        return compute_instances(self._options(), logits, target, instances, zones)
