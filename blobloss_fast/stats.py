"""The differentiable table of sums, for anyone's own per-instance loss."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from . import _checks, _ops
from .kernels.layout import ACTIVATIONS, FEATURES


def segment_stats(
    logits: Tensor,
    cells: Tensor,
    num_cells: int,
    features: Iterable[str] = ("prob",),
    activation: str = "sigmoid",
    *,
    gamma: float = 2.0,
) -> tuple[Tensor, Tensor]:
    r"""Count the voxels of every cell and sum features of the prediction over it, in one pass.

    With :math:`p = \text{activation}(x)`, the features are ``prob`` p, ``prob_sq`` p^2, ``nll_pos`` -log p, ``nll_neg``
    -log(1 - p), ``focal_pos`` -(1 - p)^gamma log p and ``focal_neg`` -p^gamma log(1 - p). Cells below 0 are ignored:
    counted nowhere, not read, with a gradient of exactly 0. An empty cell has count 0 and sums 0.

    Args:
        logits: ``[B, C, *spatial]``, float16, bfloat16, float32 or float64; one to three spatial axes.
        cells: integers ``[B, C or 1, *spatial]``, each below ``num_cells``.
        num_cells: K, the number of cells.
        features: names of features.
        activation: "sigmoid", "softmax" (over C; needs two channels), or "none": the input is a probability, and the
            logarithms are clamped at -100 as in ``torch.nn.BCELoss``.
        gamma: the focal exponent, at least 0.

    Returns:
        counts, int64 ``[B, C, K]``, and sums ``[B, C, K, F]``, differentiable in the logits; float32, or float64 for
        float64 logits.

    Raises:
        TypeError: for an argument of the wrong kind or dtype.
        ValueError: for a wrong shape or option, or (on the CPU) a cell that is not below ``num_cells``; elsewhere it
            turns the sums NaN, and the Triton backend raises a RuntimeError at the next call.
        RuntimeError: for tensors on different devices, or a second derivative.

    Synchronises:
        Never.

    Reference:
        The sums that every criterion of blob loss is made of; Kofler et al. 2022, arXiv 2205.08209.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 1, 4)
        >>> counts, sums = segment_stats(logits, torch.tensor([[[0, 1, 1, -1]]]), num_cells=2)
        >>> counts.tolist(), sums.tolist()
        ([[[1, 2]]], [[[[0.5], [1.0]]]])
    """
    _checks.one_of("activation", activation, ACTIVATIONS)
    _checks.logits(logits, activation)
    _checks.tensor("cells", cells)
    _checks.matching("cells", cells, logits, (1, logits.shape[1]))
    cells = _checks.integers("cells", cells)
    num_cells = _checks.count("num_cells", num_cells, minimum=1, maximum=2**25)
    if isinstance(features, str) or not isinstance(features, Iterable):
        raise TypeError(f"features must be a sequence of names; got {features!r}: pass for example ('prob',)")
    features = tuple(features)
    for feature in features:
        _checks.one_of("features", feature, FEATURES)
    gamma = _checks.number("gamma", gamma, minimum=0)
    sums, counts = _ops.segment_stats(logits, cells, num_cells, list(features), activation, gamma)
    return counts, sums
