"""From the table of sums to the loss, and to the gradient of the loss with respect to the sums.

Everything here works on the small table ``[B, C, K]``, never on the volume. With a target the table's cells are
``2 * id + bit``: the blob term reads a cell by its id, the main term by its bit. Without one, the bit is ``id > 0``.

Value and gradient are algebra on the same ratios. Where the loss is one number, of all or of every (sample, class),
both are computed at once, and the backward pass only scales what was saved. The gradient of "terms" and "instances",
several numbers out of one table, has to wait for the weights of these.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import COUNT, ROW_HEAD, features_of, row_terms, rows_from_text, rows_of

Stats = dict[str, Tensor]
Terms = dict[tuple[str, str], float]  # as in layout.row_terms


class LossSpec(NamedTuple):
    """The options of a loss; flat rows as in ``layout``."""

    activation: str
    gamma: float
    main_rows: tuple[float, ...]
    blob_rows: tuple[float, ...]
    main_weight: float
    blob_weight: float
    masking: str
    channel0: str
    reduction: str


@functools.lru_cache
def decode(main_weight: float, blob_weight: float, options: str) -> tuple[LossSpec, tuple[str, ...]]:
    """Return the options of a loss, which an operator receives as a line of text, and the features that it reads.

    Args:
        main_weight: of the main term.
        blob_weight: of the blob term.
        options: activation, masking, channel0, reduction, main and blob rows (``layout.rows_as_text``), joined by "|".
    """
    activation, masking, channel0, reduction, *rows = options.split("|")
    (gamma, main_rows), (other_gamma, blob_rows) = map(rows_from_text, rows)
    spec = LossSpec(
        activation, gamma or other_gamma, main_rows, blob_rows, main_weight, blob_weight, masking, channel0, reduction
    )
    return spec, features_of(main_rows, blob_rows)


class _Table(NamedTuple):
    background: Stats  # [B, C, 1]
    blobs: Stats  # [B, C, N]
    main_pos: Stats  # [B, C, 1]
    main_neg: Stats  # [B, C, 1]


class _Ratio(NamedTuple):
    """A row of a criterion, on many domains side by side."""

    weight: float
    above: Terms
    below: Terms
    divisor: Tensor
    value: Tensor


class _Criterion(NamedTuple):
    """A criterion on many domains side by side."""

    ratios: list[_Ratio]
    valid: Tensor  # whether a domain has a value; elsewhere a divisor may be 0
    value: Tensor  # 0 where it is not valid


class _Loss(NamedTuple):
    main: _Criterion  # [B, C, 1]
    blob: _Criterion  # [B, C, N]
    main_scale: float  # of every value in the reduced loss
    blob_scale: Tensor  # likewise, [B, C, 1]


def finish(
    counts: Tensor, sums: Tensor, features: tuple[str, ...], has_target: bool, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """Reduce the table to the loss.

    Returns:
        The value: a scalar for the reductions "mean" and "sum", ``[B, C]`` for "none", the two unweighted terms ``[2]``
        for "terms", and ``[B, C, N]`` for "instances" (0 where there is no instance).
        What ``finish_backward`` needs, ``[B, C, K, F]``: the gradient with respect to the sums; for "terms" and
        "instances" the sums.
    """
    loss = _evaluate(counts, sums, features, has_target, spec)
    if spec.reduction == "instances":
        return loss.blob.value, sums
    main = loss.main_scale * loss.main.value.squeeze(2)
    blob = (loss.blob_scale * loss.blob.value.sum(2, keepdim=True)).squeeze(2)
    if spec.reduction == "terms":
        return torch.stack([main.sum(), blob.sum()]), sums
    value = main + blob
    gradient = _gradient(loss, loss.main_scale, loss.blob_scale, sums, features, has_target, spec)
    return value if spec.reduction == "none" else value.sum(), gradient


def finish_backward(
    grad: Tensor, counts: Tensor, saved: Tensor, features: tuple[str, ...], has_target: bool, spec: LossSpec
) -> Tensor:
    """Return the gradient with respect to the sums, ``[B, C, K, F]``, given that with respect to the value."""
    if spec.reduction not in ("terms", "instances"):
        return saved * grad[..., None, None]
    loss = _evaluate(counts, saved, features, has_target, spec)
    if spec.reduction == "instances":
        return _gradient(loss, 0.0, grad, saved, features, has_target, spec)
    main, blob = loss.main_scale * grad[0], loss.blob_scale * grad[1]
    return _gradient(loss, main, blob, saved, features, has_target, spec)


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


def _evaluate(counts: Tensor, sums: Tensor, features: tuple[str, ...], has_target: bool, spec: LossSpec) -> _Loss:
    table = _split(counts, sums, features, has_target)
    exists = table.blobs[COUNT] > 0
    inhabited = table.main_pos[COUNT] + table.main_neg[COUNT] > 0
    num_blobs = exists.sum(2, keepdim=True, dtype=sums.dtype)
    main_scale, blob_scale = spec.main_weight, spec.blob_weight / num_blobs.clamp_min(1)
    if spec.reduction not in ("none", "sum"):
        batch, channels = counts.shape[:2]
        main_scale /= batch * (channels - (spec.channel0 == "unused"))
        blob_scale /= (num_blobs > 0).sum(dtype=sums.dtype).clamp_min(1)
    return _Loss(
        _criterion(spec.main_rows, table.main_pos, table.main_neg, inhabited),
        _criterion(spec.blob_rows, table.blobs, _masked(table, spec), exists),
        main_scale,
        blob_scale,
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


def _criterion(rows: Sequence[float], pos: Stats, neg: Stats, valid: Tensor) -> _Criterion:
    sides = {"pos": pos, "neg": neg}

    def affine(terms: Terms, constant: float) -> Tensor:
        form = pos[COUNT].new_full((), constant)
        for (side, stat), a in terms.items():
            form = form.add(sides[side][stat], alpha=a)
        return form

    value = torch.zeros_like(pos[COUNT])
    ratios = []
    for row in rows_of(rows):
        weight, offset, numerator, denominator = row[:ROW_HEAD]
        above, below = row_terms(row)
        divisor = affine(below, denominator)
        ratio = affine(above, numerator) / divisor
        value += weight * (offset + ratio)
        ratios.append(_Ratio(weight, above, below, divisor, ratio))
    return _Criterion(ratios, valid, value.masked_fill_(~valid, 0.0))


def _gradient(
    loss: _Loss,
    grad_main: Tensor | float,
    grad_blob: Tensor,
    sums: Tensor,
    features: tuple[str, ...],
    has_target: bool,
    spec: LossSpec,
) -> Tensor:
    """Return the gradient with respect to the sums, given that with respect to the value of every domain."""
    d_pos, d_neg = _slopes(loss.blob, grad_blob)
    d_main_pos, d_main_neg = _slopes(loss.main, grad_main)
    grad_sums = torch.zeros_like(sums)
    by_id = grad_sums.unflatten(2, (-1, 1 + has_target))  # [B, C, N + 1, bits, F]
    background, blobs = by_id[:, :, :1], by_id[:, :, 1:]
    main_neg, main_pos = (
        (by_id[:, :, :, 0], by_id[:, :, :, 1]) if has_target else (by_id[:, :, :1, 0], by_id[:, :, 1:, 0])
    )
    for j, name in enumerate(features):
        if name in d_neg:
            background[..., j] += d_neg[name].sum(2, keepdim=True).unsqueeze(3)
            if spec.masking == "none":
                blobs[..., j] += _sum_of_others(d_neg[name]).unsqueeze(3)
        if name in d_pos:
            blobs[..., j] += d_pos[name].unsqueeze(3)
        if name in d_main_pos:
            main_pos[..., j] += d_main_pos[name]
        if name in d_main_neg:
            main_neg[..., j] += d_main_neg[name]
    # Invalid labels have turned every sum NaN; a gradient scaler looks at gradients, and not every slope reads a sum.
    return grad_sums.masked_fill_(sums.isnan().all(), math.nan) if sums.numel() else grad_sums


def _slopes(criterion: _Criterion, grad: Tensor | float) -> tuple[Stats, Stats]:
    """Return ``grad`` times the derivative of the value with respect to the positive and the negative sums."""
    slopes: dict[str, Stats] = {"pos": {}, "neg": {}}
    for weight, above, below, divisor, ratio in criterion.ratios:
        scale = weight * grad / divisor
        for side, stat in above.keys() | below.keys():
            if stat == COUNT:
                continue
            a, b = above.get((side, stat), 0.0), below.get((side, stat), 0.0)
            slope = (a - b * ratio if b else a) * scale  # b = 0: the ratio may be infinite
            slopes[side][stat] = slopes[side].get(stat, 0.0) + torch.where(criterion.valid, slope, 0.0)
    return slopes["pos"], slopes["neg"]
