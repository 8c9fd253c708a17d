"""Blob loss as a module: holds the options, calls ``functional``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .criteria import Criterion
from .functional import DICE, Options, blob_loss_instances, blob_loss_terms, compute


class BlobLoss(nn.Module):
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

    Raises:
        TypeError: for an argument of the wrong kind or dtype.
        ValueError: for a wrong option, shape or value. Values of labels are checked on the CPU, where a check is cheap;
            elsewhere an id beyond ``max_instances`` or a target outside {0, 1} makes the loss and its gradient NaN, and
            the Triton backend raises a RuntimeError at the next call.
        RuntimeError: for tensors on different devices, or a second derivative.

    Synchronises:
        Never with ``instances`` and ``max_instances`` given. ``max_instances=None`` reads the largest id from the
        device. Without ``instances`` the target is copied to the CPU, labelled there, and the ids are copied back.

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
    _checked: Options | None

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
    ) -> None:
        super().__init__()
        options = Options(
            criterion, main_criterion, main_weight, blob_weight, activation, include_background, masking, connectivity,
            reduction, ignore_index, max_instances,
        )  # fmt: skip
        for name, value in options.checked()._asdict().items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in Options._fields:
            self.__dict__["_checked"] = None

    def _options(self) -> Options:
        """Return the checked options; they are checked once, and again after one of them was set."""
        options = self._checked
        if options is None:
            options = Options(*[getattr(self, name) for name in Options._fields]).checked()
            if not torch.compiler.is_compiling():  # a traced call is not to change the module
                self.__dict__["_checked"] = options
        return options

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
        return compute(options, logits, target, instances, options.reduction)[0]

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
        return blob_loss_terms(logits, target, instances, **self._options()._asdict())

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
        return blob_loss_instances(logits, target, instances, **self._options()._asdict())

    def extra_repr(self) -> str:
        """Show the options that differ from the defaults."""
        changed = [
            f"{name}={value!r}"
            for name, value, default in zip(Options._fields, self._options(), Options(), strict=True)
            if value != default and name != "criterion"
        ]
        return ", ".join([repr(self.criterion), *changed])
