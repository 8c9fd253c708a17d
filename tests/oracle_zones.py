"""The truth of what lives on zones, and of weights and empty samples: masks and loops over the literal oracle.

Nothing is shared with the package. A zone is found by the distance of every voxel to every voxel of every instance;
a domain is really cut out of the logits; a stopped gradient is a ``detach``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import oracle
from .oracle import Losses, evaluate, labels_of, predict

Weight = Callable[[int], float]


def zones_of(ids: Tensor, spacing: Sequence[float] | None = None) -> Tensor:
    """ids [*spatial] -> the id of the nearest instance of every voxel, the smallest one of several; 1 without any."""
    axes = [torch.arange(size, dtype=torch.float64) for size in ids.shape]
    scale = torch.tensor(spacing or [1.0] * ids.ndim, dtype=torch.float64)
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1) * scale
    nearest, zones = torch.full(ids.shape, torch.inf, dtype=torch.float64), torch.ones(ids.shape, dtype=torch.int64)
    for k in sorted(set(ids[ids > 0].tolist())):
        distance = ((places.unsqueeze(-2) - places[ids == k]) ** 2).sum(-1).amin(-1)
        zones[distance < nearest] = k
        nearest = torch.minimum(nearest, distance)
    return zones


def lesion_free(p: Tensor, c: float) -> Tensor:
    return p.sum() / (p.sum() + c)


def false_positives(p: Tensor) -> Tensor:
    return (p * p.detach()).sum() / p.sum().detach() if bool(p.sum() > 0) else p.sum()


def weigh(weight: str | Weight) -> Weight:
    return {"uniform": lambda n: 1.0, "inverse_size": lambda n: 1 / n}[weight] if isinstance(weight, str) else weight


class Terms(Losses):
    """The oracle's losses, with a weight for each instance and a loss for (sample, class) pairs without any."""

    weights: dict[tuple[int, int, int], float]
    empty: dict[tuple[int, int], Tensor]

    def blob(self) -> dict[tuple[int, int], Tensor]:
        pairs = dict(self.empty)
        for b, c in {key[:2] for key in self.instances}:
            mine = {key: loss for key, loss in self.instances.items() if key[:2] == (b, c)}
            total = sum(self.weights[key] for key in mine)
            if total > 0:
                pairs[b, c] = torch.stack([self.weights[key] * loss for key, loss in mine.items()]).sum() / total
        return pairs


def _terms(found: Losses) -> Terms:
    terms = Terms(found.main, found.instances, found.shape, found.zero)
    terms.weights, terms.empty = dict.fromkeys(found.instances, 1.0), {}
    return terms


def _pairs(logits: Tensor, activation: str, include_background: bool) -> list[tuple[int, int]]:
    batch, channels = logits.shape[:2]
    classes = range(channels) if activation != "softmax" or include_background else range(1, channels)
    return list(itertools.product(range(batch), classes))


def blob_terms(
    logits: Tensor,
    target: Tensor | None,
    instances: Tensor | None,
    *,
    instance_weight: str | Weight = "uniform",
    empty_sample: float | None = None,
    **options,
) -> Terms:
    """Blob loss with weights and a term for empty samples; options as ``oracle.losses``."""
    terms = _terms(oracle.losses(logits, target, instances, **options))
    activation = options.get("activation", "sigmoid")
    for b, c in _pairs(logits, activation, options.get("include_background", False)):
        labels = labels_of(
            b, c, logits, target, instances, activation, options.get("connectivity", 26), options.get("ignore_index")
        )
        kept = ~labels.ignored
        ids = labels.ids[kept]
        for k in set(ids[ids > 0].tolist()):
            terms.weights[b, c, k] = float(weigh(instance_weight)(int((ids == k).sum())))
        if empty_sample is not None and kept.any() and not (ids > 0).any() and not (activation == "softmax" and c == 0):
            terms.empty[b, c] = lesion_free(predict(logits[b].flatten(1)[:, kept], c, activation).p, empty_sample)
    return terms


def cc_terms(
    logits: Tensor,
    target: Tensor | None,
    instances: Tensor | None,
    *,
    criterion: oracle.Criterion,
    main_criterion: oracle.Criterion | None = None,
    activation: str = "sigmoid",
    include_background: bool = False,
    connectivity: int = 26,
    ignore_index: int | None = None,
    spacing: Sequence[float] | None = None,
    instance_weight: str | Weight = "uniform",
    empty_sample: float | None = None,
    predicted: bool = False,
) -> Terms:
    """CC loss on the zones of the ground truth, or on those of the predicted components."""
    zero = torch.nan_to_num(logits, 0.0, 0.0, 0.0).sum() * 0
    terms = _terms(Losses({}, {}, (logits.shape[0], logits.shape[1]), zero))
    for b, c in _pairs(logits, activation, include_background):
        labels = labels_of(b, c, logits, target, instances, activation, connectivity, ignore_index)
        spatial, x, kept = logits.shape[2:], logits[b].flatten(1), ~labels.ignored
        prediction = predict(x[:, kept], c, activation)
        terms.main[b, c] = evaluate(main_criterion or criterion, prediction, labels.truth[kept]) if kept.any() else zero
        if activation == "softmax" and c == 0:
            continue
        ids = torch.where(labels.ignored, 0, labels.ids)
        if predicted:
            mask = (predict(x.detach(), c, activation).p > 0.5) & ~labels.ignored
            ids = oracle.connected_components(mask.view(spatial), connectivity).flatten()
        zones = zones_of(ids.view(spatial), spacing).flatten()
        for k in sorted(set(zones[~labels.ignored].tolist())):
            inside = (zones == k) & ~labels.ignored
            prediction, truth = predict(x[:, inside], c, activation), labels.truth[inside]
            size = int(truth.sum())
            terms.weights[b, c, k] = float(weigh(instance_weight)(size)) if size else 1.0
            if size == 0 and predicted:
                terms.instances[b, c, k] = false_positives(prediction.p)
            elif size == 0 and empty_sample is not None:
                terms.instances[b, c, k] = lesion_free(prediction.p, empty_sample)
            else:
                terms.instances[b, c, k] = evaluate(criterion, prediction, truth)
    return terms


def reduce(parts: Sequence[Terms], *, main_weight: float = 1.0, blob_weight: float = 1.0, reduction: str = "mean"):
    """The loss from one partition, or the mean of the losses from several."""
    main = parts[0]
    if reduction == "terms":
        return torch.stack([main.main_mean(), torch.stack([part.blob_mean() for part in parts]).mean()])
    if reduction == "mean":
        blob = torch.stack([part.blob_mean() for part in parts]).mean()
        return main_weight * main.main_mean() + blob_weight * blob
    zero = main.zero
    table = torch.stack(
        [
            main_weight * main.main.get(pair, zero)
            + blob_weight * torch.stack([part.blob().get(pair, zero) for part in parts]).mean()
            for pair in itertools.product(*map(range, main.shape))
        ]
    ).reshape(main.shape)
    return table if reduction == "none" else table.sum()


def blob_loss(logits, target=None, instances=None, *, main_weight=1.0, blob_weight=1.0, reduction="mean", **options):
    terms = blob_terms(logits, target, instances, **options)
    return reduce([terms], main_weight=main_weight, blob_weight=blob_weight, reduction=reduction)


def cc_loss(
    logits, target=None, instances=None, *, main_weight=1.0, blob_weight=1.0, reduction="mean", bidirectional=False,
    **options,
):  # fmt: skip
    parts = [cc_terms(logits, target, instances, **options)]
    if bidirectional:
        uniform = {**options, "instance_weight": "uniform"}
        parts.append(cc_terms(logits, target, instances, predicted=True, **uniform))
    return reduce(parts, main_weight=main_weight, blob_weight=blob_weight, reduction=reduction)
