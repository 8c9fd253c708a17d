"""From the table of sums to the loss, and to the gradient of the loss with respect to the sums.

Everything here works on the small table ``[B, C, K]``, never on the volume. With a target the table's cells are
``2 * id + bit``: the blob term reads a cell by its id, the main term by its bit. Without one, the bit is ``id > 0``.

The blob term is a weighted mean over domains, each with a positive and a negative side. The domain of an instance is
its voxels against the background, or, where the ids are zones, the two bits of its zone. Domain 0 has the background
alone: it stands for the instances of a (sample, class) that has none, if there are rows for that.

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
import torch.nn.functional as F
from torch import Tensor

from .layout import BLOCK, COUNT, ROW_HEAD, ZONES, features_of, row_terms, rows_from_text, rows_of

Stats = dict[str, Tensor]
Terms = dict[tuple[str, str], float]  # as in layout.row_terms


class LossSpec(NamedTuple):
    """The options of a loss; flat rows as in ``layout``."""

    activation: str
    gamma: float
    main_rows: tuple[float, ...]
    blob_rows: tuple[float, ...]
    empty_rows: tuple[float, ...]  # of domains without a positive voxel; none: the blob rows, and no domain 0
    main_weight: float
    blob_weight: float
    masking: str  # or layout.ZONES
    channel0: str
    reduction: str


# Changes with the shapes and the meaning of what the operator blob_loss returns: PyTorch keeps compiled graphs on disk,
# and finds them by an operator's name and options.
_VERSION = "2"


def encode(*options: str) -> str:
    """Return as one text what ``decode`` reads: activation, masking, channel0, reduction, main, blob and empty rows."""
    return "|".join((_VERSION, *options))


@functools.lru_cache
def decode(main_weight: float, blob_weight: float, options: str) -> tuple[LossSpec, tuple[str, ...]]:
    """Return the options of a loss, which an operator receives as a line of text, and the features that it reads.

    Args:
        main_weight: of the main term.
        blob_weight: of the blob term.
        options: by ``encode``; the rows by ``layout.rows_as_text``.
    """
    _, activation, masking, channel0, reduction, *texts = options.split("|")
    (gamma, main), (other_gamma, blob), (_, empty) = map(rows_from_text, texts)
    spec = LossSpec(
        activation, gamma or other_gamma, main, blob, empty, main_weight, blob_weight, masking, channel0, reduction
    )
    return spec, features_of(main, blob, empty)


def sizes_of_saved(logits: Tensor, num_cells: int, num_features: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return of what the operator ``blob_loss`` saves on the CPU how many numbers are a table, and how many there are.

    Behind the table there is room for notes on blocks of voxels, two bytes each (``bl_problem.block_cells``): not in a
    tensor of their own, which costs a small volume more time than they save. The reference leaves that room as well,
    since a compiled graph that PyTorch kept on disk may meet another backend.
    """
    batch, channels, *spatial = logits.shape
    pairs = batch * channels
    blocks = -(-math.prod(spatial) // BLOCK) * pairs
    table = pairs * num_cells * num_features
    return table, table + -(-blocks // 4) * 8 // dtype.itemsize


class _Domains(NamedTuple):
    """The domains of the blob term, ``[B, C, N + 1]``; a negative side that all share is ``[B, C, 1]``."""

    pos: Stats
    neg: Stats
    exist: Tensor


class _Ratio(NamedTuple):
    """A row of a criterion, on many domains side by side."""

    weight: float
    above: Terms
    below: Terms
    divisor: Tensor
    value: Tensor
    slope_above: float
    slope_below: float


class _Criterion(NamedTuple):
    """A criterion on many domains side by side."""

    ratios: list[_Ratio]
    valid: Tensor  # whether a domain has a value; elsewhere a divisor may be 0
    value: Tensor  # 0 where it is not valid


class _Loss(NamedTuple):
    main: _Criterion  # [B, C, 1]
    blob: list[_Criterion]  # [B, C, N + 1]; valid on different domains
    main_scale: float  # of every value in the reduced loss
    blob_scale: Tensor  # likewise, [B, C, N + 1]

    def blob_value(self) -> Tensor:
        return functools.reduce(Tensor.add, (criterion.value for criterion in self.blob))


def finish(
    counts: Tensor,
    sums: Tensor,
    features: tuple[str, ...],
    has_target: bool,
    spec: LossSpec,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reduce the table to the loss.

    Args:
        weights: of the instances, ``[B, C, N]``, at least 0; None: all alike.

    Returns:
        The value: a scalar for the reductions "mean" and "sum", ``[B, C]`` for "none", the two unweighted terms ``[2]``
        for "terms", and ``[B, C, N]`` for "instances" (0 where there is no instance).
        What ``finish_backward`` needs, ``[B, C, K, F]``: the gradient with respect to the sums; for "terms" and
        "instances" the sums.
    """
    loss = _evaluate(counts, sums, features, has_target, spec, weights)
    if spec.reduction == "instances":
        return loss.blob_value()[:, :, 1:].contiguous(), sums
    main = loss.main_scale * loss.main.value.squeeze(2)
    blob = (loss.blob_scale * loss.blob_value()).sum(2)
    if spec.reduction == "terms":
        return torch.stack([main.sum(), blob.sum()]), sums
    value = main + blob
    gradient = _gradient(loss, loss.main_scale, loss.blob_scale, sums, features, has_target, spec)
    return value if spec.reduction == "none" else value.sum(), gradient


def finish_backward(
    grad: Tensor,
    counts: Tensor,
    saved: Tensor,
    features: tuple[str, ...],
    has_target: bool,
    spec: LossSpec,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the gradient with respect to the sums, ``[B, C, K, F]``, given that with respect to the value."""
    if spec.reduction not in ("terms", "instances"):
        return saved * grad[..., None, None]
    loss = _evaluate(counts, saved, features, has_target, spec, weights)
    if spec.reduction == "instances":
        return _gradient(loss, 0.0, F.pad(grad, (1, 0)), saved, features, has_target, spec)
    main, blob = loss.main_scale * grad[0], loss.blob_scale * grad[1]
    return _gradient(loss, main, blob, saved, features, has_target, spec)


def blob_counts(counts: Tensor, has_target: bool) -> Tensor:
    """Return the number of voxels of every instance, int64 ``[B, C, N]``; of zones, of the whole zone."""
    return (counts.unflatten(2, (-1, 2)).sum(3) if has_target else counts)[:, :, 1:]


def _evaluate(
    counts: Tensor,
    sums: Tensor,
    features: tuple[str, ...],
    has_target: bool,
    spec: LossSpec,
    weights: Tensor | None,
) -> _Loss:
    columns = {COUNT: counts} | {name: sums[..., j] for j, name in enumerate(features)}
    table = {name: column.unflatten(2, (-1, 1 + has_target)).to(sums.dtype) for name, column in columns.items()}
    main_pos, main_neg = _sides_of_main(table, has_target)
    inhabited = main_pos[COUNT] + main_neg[COUNT] > 0
    domains = _zones(table) if spec.masking == ZONES else _blobs(table, spec)
    parts = [(spec.blob_rows, domains.exist)]
    if spec.empty_rows:
        positive = domains.pos[COUNT] > 0
        parts = [(spec.blob_rows, domains.exist & positive), (spec.empty_rows, domains.exist & ~positive)]

    share = domains.exist.to(sums.dtype)
    if weights is not None:
        share *= F.pad(weights.to(sums.dtype), (1, 0), value=1.0)
    total = share.sum(2, keepdim=True)
    main_scale, blob_scale = spec.main_weight, spec.blob_weight * share / total.masked_fill(total == 0, 1.0)
    if spec.reduction not in ("none", "sum"):
        batch, channels = counts.shape[:2]
        main_scale /= batch * (channels - (spec.channel0 == "unused"))
        blob_scale /= (total > 0).sum(dtype=sums.dtype).clamp_min(1)
    return _Loss(
        _criterion(spec.main_rows, main_pos, main_neg, inhabited),
        [_criterion(rows, domains.pos, domains.neg, valid) for rows, valid in parts],
        main_scale,
        blob_scale,
    )


def _sides_of_main(table: Stats, has_target: bool) -> tuple[Stats, Stats]:
    """Return the positive and the negative side of the main term, ``[B, C, 1]``."""
    if has_target:
        return {name: stat[..., 1].sum(2, keepdim=True) for name, stat in table.items()}, {
            name: stat[..., 0].sum(2, keepdim=True) for name, stat in table.items()
        }
    return {name: stat[:, :, 1:, 0].sum(2, keepdim=True) for name, stat in table.items()}, {
        name: stat[:, :, :1, 0] for name, stat in table.items()
    }


def _zones(table: Stats) -> _Domains:
    """Return the two bits of every zone. What lies in no zone (class 0 of a softmax) is in no domain either."""
    pos, neg = ({name: stat[..., bit] for name, stat in table.items()} for bit in (1, 0))
    exist = pos[COUNT] + neg[COUNT] > 0
    exist[:, :, 0] = False
    return _Domains(pos, neg, exist)


def _blobs(table: Stats, spec: LossSpec) -> _Domains:
    """Return every blob against the background, and the other blobs as the masking has them."""
    by_id = {name: stat.sum(3) for name, stat in table.items()}
    background = {name: stat[:, :, :1] for name, stat in by_id.items()}
    pos = {name: F.pad(stat[:, :, 1:], (1, 0)) for name, stat in by_id.items()}
    exist = pos[COUNT] > 0
    if spec.empty_rows:
        exist[:, :, 0] = ~exist.any(2) & (background[COUNT].squeeze(2) > 0)
        if spec.channel0 != "class":
            exist[:, 0, 0] = False
    return _Domains(pos, _masked(background, pos, spec), exist)


def _masked(background: Stats, blobs: Stats, spec: LossSpec) -> Stats:
    """Return the negative side of every blob's domain."""
    if spec.masking == "exclude":
        return background
    others = {name: _sum_of_others(stat) for name, stat in blobs.items() if spec.masking == "none" or name == COUNT}
    if spec.masking == "zero_logit":
        at_zero = at_zero_logit(spec.activation, background[COUNT].shape[1], spec.gamma)
        others |= {name: value * others[COUNT] for name, value in at_zero.items() if name in background}
    return background | {name: background[name] + stat for name, stat in others.items()}


def at_zero_logit(activation: str, channels: int, gamma: float) -> dict[str, float]:
    """Return what a negative voxel whose logits are 0 has of every feature; with activation "none", nothing."""
    prob = {"sigmoid": 0.5, "softmax": 1 / channels, "none": 0.0}[activation]
    nll = -math.log1p(-prob)
    return {"prob": prob, "prob_sq": prob * prob, "nll_neg": nll, "focal_neg": prob**gamma * nll}


def _sum_of_others(stat: Tensor) -> Tensor:
    """Return, for every domain, the sum over all the others: never by a difference, which a giant blob would spoil."""
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
        weight, offset, numerator, denominator, *slopes = row[:ROW_HEAD]
        above, below = row_terms(row)
        divisor = affine(below, denominator)
        ratio = affine(above, numerator) / divisor
        value += weight * (offset + ratio)
        ratios.append(_Ratio(weight, above, below, divisor, ratio, *slopes))
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
    grad_sums = torch.zeros_like(sums)
    by_id = grad_sums.unflatten(2, (-1, 1 + has_target))  # [B, C, N + 1, bits, F]
    d_pos, d_neg = _slopes([loss.main], grad_main)
    main_neg, main_pos = (
        (by_id[:, :, :, 0], by_id[:, :, :, 1]) if has_target else (by_id[:, :, :1, 0], by_id[:, :, 1:, 0])
    )
    _add(main_pos, d_pos, features)
    _add(main_neg, d_neg, features)
    d_pos, d_neg = _slopes(loss.blob, grad_blob)
    if spec.masking == ZONES:
        _add(by_id[:, :, :, 1], d_pos, features)
        _add(by_id[:, :, :, 0], d_neg, features)
    else:
        by_bit = by_id.movedim(3, 0)  # a blob is both bits
        _add(by_bit[:, :, :, 1:], {name: slope[:, :, 1:] for name, slope in d_pos.items()}, features)
        _add(by_bit[:, :, :, :1], {name: slope.sum(2, keepdim=True) for name, slope in d_neg.items()}, features)
        if spec.masking == "none":
            others = {name: _sum_of_others(slope[:, :, 1:]) for name, slope in d_neg.items()}
            _add(by_bit[:, :, :, 1:], others, features)
    # Invalid labels have turned every sum NaN; a gradient scaler looks at gradients, and not every slope reads a sum.
    return grad_sums.masked_fill_(sums.isnan().all(), math.nan) if sums.numel() else grad_sums


def _add(grad_sums: Tensor, slopes: Stats, features: tuple[str, ...]) -> None:
    for name, slope in slopes.items():
        grad_sums[..., features.index(name)] += slope


def _slopes(criteria: Sequence[_Criterion], grad: Tensor | float) -> tuple[Stats, Stats]:
    """Return ``grad`` times the derivative of the values with respect to the positive and the negative sums."""
    slopes: dict[str, Stats] = {"pos": {}, "neg": {}}
    for criterion in criteria:
        for weight, above, below, divisor, ratio, slope_above, slope_below in criterion.ratios:
            scale = weight * grad / divisor
            for side, stat in above.keys() | below.keys():
                if stat == COUNT:
                    continue
                a = slope_above * above.get((side, stat), 0.0)
                b = slope_below * below.get((side, stat), 0.0)
                slope = (a - b * ratio if b else a) * scale  # b = 0: the ratio may be infinite
                slopes[side][stat] = slopes[side].get(stat, 0.0) + torch.where(criterion.valid, slope, 0.0)
    return slopes["pos"], slopes["neg"]
