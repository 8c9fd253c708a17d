"""From the table of sums to the loss, and from the gradient of the loss to the gradient of the sums.

Everything here works on the small table ``[B, C, K]``, never on the volume. With a target the table's cells are
``2 * id + bit``: the blob term reads a cell by its id, the main term by its bit. Without one, the bit is ``id > 0``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import COUNT, ROW_HEAD, row_terms, rows_of

Stats = dict[str, Tensor]


class LossSpec(NamedTuple):
    """The static options of a loss, as an operator receives them; rows as in ``layout``."""

    activation: str
    gamma: float
    main_rows: list[float]
    blob_rows: list[float]
    main_weight: float
    blob_weight: float
    masking: str
    channel0: str
    reduction: str


class _Table(NamedTuple):
    background: Stats  # [B, C, 1]
    blobs: Stats  # [B, C, N]
    main_pos: Stats  # [B, C, 1]
    main_neg: Stats  # [B, C, 1]


def finish(counts: Tensor, sums: Tensor, features: tuple[str, ...], has_target: bool, spec: LossSpec) -> Tensor:
    """Reduce the table to the loss.

    Returns:
        A scalar for the reductions "mean" and "sum", ``[B, C]`` for "none", the two unweighted terms ``[2]`` for
        "terms", and ``[B, C, N]`` for "instances" (0 where there is no instance).
    """
    table = _split(counts, sums, features, has_target)
    exists, weights = _existing(table, spec)
    blob = _evaluate(spec.blob_rows, table.blobs, _masked(table, spec), exists)
    if spec.reduction == "instances":
        return blob
    main = _evaluate(spec.main_rows, table.main_pos, table.main_neg, _inhabited(table)).squeeze(2)
    blob = (blob * weights).sum(2)
    main_scale, blob_scale = _scales(weights, spec)
    if spec.reduction == "terms":
        return torch.stack([(main_scale * main).sum(), (blob_scale * blob).sum()])
    loss = main_scale * main + blob_scale * blob
    return loss if spec.reduction == "none" else loss.sum()


def finish_backward(
    grad: Tensor, counts: Tensor, sums: Tensor, features: tuple[str, ...], has_target: bool, spec: LossSpec
) -> Tensor:
    """Return the gradient of ``finish`` with respect to the sums, ``[B, C, K, F]``."""
    table = _split(counts, sums, features, has_target)
    exists, weights = _existing(table, spec)
    grad_main = torch.zeros_like(weights[..., :1])
    if spec.reduction == "instances":
        grad_blob = grad
    else:
        main_scale, blob_scale = _scales(weights, spec)
        for_main, for_blob = grad.unbind() if spec.reduction == "terms" else (grad, grad)
        grad_main = (main_scale * for_main).expand(weights.shape[:2]).unsqueeze(2)
        grad_blob = (blob_scale * for_blob).expand(weights.shape[:2]).unsqueeze(2) * weights

    d_pos, d_neg = _slopes(spec.blob_rows, table.blobs, _masked(table, spec), exists, grad_blob)
    d_main_pos, d_main_neg = _slopes(spec.main_rows, table.main_pos, table.main_neg, _inhabited(table), grad_main)
    num_blobs = exists.shape[2]
    grad_sums = sums.new_zeros(*sums.shape[:2], num_blobs + 1, 2, len(features))
    for j, name in enumerate(features):
        by_id = grad_sums[..., j]
        if name in d_neg:
            by_id[:, :, :1] += d_neg[name].sum(2, keepdim=True).unsqueeze(3)
            if spec.masking == "none":
                by_id[:, :, 1:] += _sum_of_others(d_neg[name]).unsqueeze(3)
        if name in d_pos:
            by_id[:, :, 1:] += d_pos[name].unsqueeze(3)
        if name in d_main_pos:
            (by_id[..., 1] if has_target else by_id[:, :, 1:, 0]).add_(d_main_pos[name])
        if name in d_main_neg:
            (by_id[..., 0] if has_target else by_id[:, :, :1, 0]).add_(d_main_neg[name])
    grad_sums = grad_sums.flatten(2, 3) if has_target else grad_sums[:, :, :, 0]
    # Invalid labels have turned every sum NaN; a gradient scaler looks at gradients, and not every slope reads a sum.
    return grad_sums.masked_fill_(sums.isnan().all(), math.nan) if sums.numel() else grad_sums


def blob_counts(counts: Tensor, has_target: bool) -> Tensor:
    """Return the number of voxels of every instance, int64 ``[B, C, N]``."""
    return (counts.unflatten(2, (-1, 2)).sum(3) if has_target else counts)[:, :, 1:]


def _split(counts: Tensor, sums: Tensor, features: tuple[str, ...], has_target: bool) -> _Table:
    dtype = sums.dtype
    columns = {COUNT: counts} | {name: sums[..., j] for j, name in enumerate(features)}
    parts: tuple[Stats, Stats, Stats, Stats] = ({}, {}, {}, {})
    for name, column in columns.items():
        if has_target:
            by_bit = column.unflatten(2, (-1, 2))
            by_id = by_bit.sum(3)
            neg, pos = by_bit.sum(2).split(1, 2)
        else:
            by_id = column
            neg, pos = column[:, :, :1], column[:, :, 1:].sum(2, keepdim=True)
        for part, stat in zip(parts, (by_id[:, :, :1], by_id[:, :, 1:], pos, neg), strict=True):
            part[name] = stat.to(dtype)
    return _Table(*parts)


def _existing(table: _Table, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """Return which instances exist, ``[B, C, N]``, and the weight of each in the mean of its (sample, class)."""
    count = table.blobs[COUNT]
    exists = count > 0
    return exists, exists / exists.sum(2, keepdim=True, dtype=count.dtype).clamp_min(1)


def _inhabited(table: _Table) -> Tensor:
    return table.main_pos[COUNT] + table.main_neg[COUNT] > 0


def _scales(weights: Tensor, spec: LossSpec) -> tuple[float, Tensor | float]:
    """Return the factors of the main and the blob term of one (sample, class) in the reduced loss."""
    if spec.reduction in ("none", "sum"):
        return spec.main_weight, spec.blob_weight
    batch, channels = weights.shape[:2]
    pairs_with_blobs = (weights.sum(2) > 0).sum(dtype=weights.dtype).clamp_min(1)
    return (
        spec.main_weight / (batch * (channels - (spec.channel0 == "unused"))),
        spec.blob_weight / pairs_with_blobs,
    )


def _masked(table: _Table, spec: LossSpec) -> Stats:
    """Return the negative side of every blob's domain: the background, and the other blobs as the masking has them."""
    negative = dict(table.background)
    if spec.masking == "exclude":
        return negative
    others = {
        name: _sum_of_others(stat) for name, stat in table.blobs.items() if spec.masking == "none" or name == COUNT
    }
    if spec.masking == "zero_logit":
        prob = {"sigmoid": 0.5, "softmax": 1 / table.background[COUNT].shape[1], "none": 0.0}[spec.activation]
        nll = -math.log1p(-prob)
        at_zero = {"prob": prob, "prob_sq": prob * prob, "nll_neg": nll, "focal_neg": prob**spec.gamma * nll}
        others |= {name: value * others[COUNT] for name, value in at_zero.items() if name in negative}
    return negative | {name: negative[name] + stat for name, stat in others.items()}


def _sum_of_others(stat: Tensor) -> Tensor:
    """Return, for every blob, the sum over all the others: never by a difference, which a giant blob would spoil."""
    zero = stat.new_zeros(*stat.shape[:2], 1)
    before = torch.cat([zero, stat.cumsum(2)], 2)[:, :, :-1]
    after = torch.cat([stat.flip(2).cumsum(2).flip(2), zero], 2)[:, :, 1:]
    return before + after


def _affine(terms: dict[tuple[str, str], float], constant: float, sides: dict[str, Stats]) -> Tensor | float:
    return sum((a * sides[side][stat] for (side, stat), a in terms.items()), start=constant)


def _evaluate(rows: list[float], pos: Stats, neg: Stats, valid: Tensor) -> Tensor:
    """Return the criterion of every domain, 0 where a domain is not valid (its denominator may be 0)."""
    value = torch.zeros_like(pos[COUNT])
    for row in rows_of(rows):
        weight, offset, numerator, denominator = row[:ROW_HEAD]
        above, below = row_terms(row)
        sides = {"pos": pos, "neg": neg}
        ratio = _affine(above, numerator, sides) / _affine(below, denominator, sides)
        value = value + weight * (offset + ratio)
    return torch.where(valid, value, 0.0)


def _slopes(rows: list[float], pos: Stats, neg: Stats, valid: Tensor, grad: Tensor) -> tuple[Stats, Stats]:
    """Return ``grad`` times the derivative of ``_evaluate`` with respect to the positive and the negative sums."""
    slopes: dict[str, Stats] = {"pos": {}, "neg": {}}
    for row in rows_of(rows):
        weight, _, numerator, denominator = row[:ROW_HEAD]
        above, below = row_terms(row)
        sides = {"pos": pos, "neg": neg}
        divisor = _affine(below, denominator, sides)
        ratio = _affine(above, numerator, sides) / divisor
        for side, stat in above.keys() | below.keys():
            if stat == COUNT:
                continue
            a, b = above.get((side, stat), 0.0), below.get((side, stat), 0.0)
            slope = (a - b * ratio if b else a) * (weight * grad) / divisor  # b = 0: the ratio may be infinite
            slopes[side][stat] = slopes[side].get(stat, 0.0) + torch.where(valid, slope, 0.0)
    return slopes["pos"], slopes["neg"]
