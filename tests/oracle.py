"""The truth: blob loss and the table of sums written out literally, with masks and loops, in the dtype given.

Nothing here is fast and nothing is shared with the package. For every sample, class and instance the masked tensors
are really built (a zeroed logit is a zero in the logits, an excluded voxel is gone), a plain formula is applied to
them, and plain autograd differentiates it. Run it in fp64 for the truth, in fp32 for "the same loss in plain PyTorch".

A criterion is data: a tuple of ``(weight, name, options)``, for instance ``((1.0, "dice", {}), (0.5, "bce", {}))``.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Criterion = tuple[tuple[float, str, dict], ...]


# ---------------- one voxel's numbers


@dataclass
class Prediction:
    """What a criterion reads of each voxel: p, 1 - p and their logarithms, [V] each."""

    p: Tensor
    q: Tensor
    log_p: Tensor
    log_q: Tensor


def predict(x: Tensor, c: int, activation: str) -> Prediction:
    """x [C, V]: the network's output at V voxels; the probabilities of channel c."""
    if activation == "sigmoid":
        x = x[c]
        return Prediction(torch.sigmoid(x), torch.sigmoid(-x), F.logsigmoid(x), F.logsigmoid(-x))
    if activation == "softmax":
        others = [j for j in range(x.shape[0]) if j != c]
        p, log_p = torch.softmax(x, 0), torch.log_softmax(x, 0)
        return Prediction(p[c], p[others].sum(0), log_p[c], torch.logsumexp(log_p[others], 0))
    if activation == "none":
        p = x[c]
        # torch's own binary_cross_entropy clamps the logarithms at -100 and has a gradient of its own at p = 0 and 1.
        log_p = -F.binary_cross_entropy(p, torch.ones_like(p), reduction="none")
        log_q = -F.binary_cross_entropy(p, torch.zeros_like(p), reduction="none")
        return Prediction(p, 1 - p, log_p, log_q)
    raise ValueError(activation)


def zeroed(prediction: Prediction, where: Tensor) -> Prediction:
    """The same prediction with p = 0 at the voxels `where`."""
    fill = lambda value, t: torch.where(where, torch.full_like(t, value), t)  # noqa: E731
    return Prediction(
        fill(0.0, prediction.p), fill(1.0, prediction.q), fill(-math.inf, prediction.log_p), fill(0.0, prediction.log_q)
    )


# ---------------- criteria


def evaluate(criterion: Criterion, prediction: Prediction, y: Tensor) -> Tensor:
    """The criterion on the voxels of `prediction` with the binary label y [V]."""
    total = prediction.p.new_zeros(())
    for weight, name, options in criterion:
        total = total + weight * PLAIN_FORMULAS[name](prediction, y, **options)
    return total


def dice(prediction: Prediction, y: Tensor, squared=False, smooth_nr=1e-5, smooth_dr=1e-5) -> Tensor:
    p, y = prediction.p, y.to(prediction.p.dtype)
    intersection = (p * y).sum()
    sizes = (p * p).sum() + (y * y).sum() if squared else p.sum() + y.sum()
    return 1 - (2 * intersection + smooth_nr) / (sizes + smooth_dr)


def jaccard(prediction: Prediction, y: Tensor, smooth_nr=1e-5, smooth_dr=1e-5) -> Tensor:
    p, y = prediction.p, y.to(prediction.p.dtype)
    intersection = (p * y).sum()
    union = p.sum() + y.sum() - intersection
    return 1 - (2 * intersection + smooth_nr) / (2 * union + smooth_dr)


def tversky(prediction: Prediction, y: Tensor, alpha=0.5, beta=0.5, smooth_nr=1e-5, smooth_dr=1e-5) -> Tensor:
    p, q, y = prediction.p, prediction.q, y.to(prediction.p.dtype)
    true_positive, false_positive, false_negative = (p * y).sum(), (p * (1 - y)).sum(), (q * y).sum()
    score = (true_positive + smooth_nr) / (true_positive + alpha * false_positive + beta * false_negative + smooth_dr)
    return 1 - score


def bce(prediction: Prediction, y: Tensor) -> Tensor:
    return -torch.where(y, prediction.log_p, prediction.log_q).mean()


def focal(prediction: Prediction, y: Tensor, gamma=2.0, alpha=None) -> Tensor:
    weight_pos, weight_neg = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    # A voxel is computed on its own side only: the unused side may be 0 * inf.
    pos = weight_pos * prediction.q[y] ** gamma * -prediction.log_p[y]
    neg = weight_neg * prediction.p[~y] ** gamma * -prediction.log_q[~y]
    return torch.cat([pos, neg]).mean()


PLAIN_FORMULAS = {
    "dice": dice,
    "jaccard": jaccard,
    "tversky": tversky,
    "bce": bce,
    # One-vs-rest: with a sigmoid, and with two channels, -log p of the voxel's own class is just this.
    "cross_entropy": bce,
    "focal": focal,
}


# ---------------- labels


@dataclass
class Labels:
    """Of one sample and class, flattened to [V]: what is ignored, the main term's label, the instance ids."""

    ignored: Tensor
    truth: Tensor
    ids: Tensor


def labels_of(
    b: int,
    c: int,
    logits: Tensor,
    target: Tensor | None,
    instances: Tensor | None,
    activation: str,
    connectivity: int,
    ignore_index: int | None,
) -> Labels:
    spatial = logits.shape[2:]
    background = activation == "softmax" and c == 0
    ignored = torch.zeros(spatial, dtype=torch.bool)

    ids = None
    if instances is not None:
        own = instances[b, 0] if instances.shape[1] == 1 else instances[b, c]
        ids = own.to(torch.int64)
        ignored |= ids < 0
        if background:  # the background class has no instances
            ids = torch.where(ids > 0, 0, ids)

    if target is not None:
        class_map = activation == "softmax" and target.shape[1] == 1
        own = target[b, 0] if class_map else target[b, c]
        truth = own == c if class_map else own != 0
        if ignore_index is not None:
            ignored |= own == ignore_index
    elif background:  # background is where no class has an instance
        foreground = instances if instances.shape[1] == 1 else instances[:, 1:]
        truth = ~(foreground[b] > 0).any(0)
        ignored |= (foreground[b] < 0).all(0)  # what is in no class for sure is not background either
    else:
        truth = ids > 0

    if ids is None:
        mask = truth & ~ignored
        ids = torch.zeros(spatial, dtype=torch.int64) if background else connected_components(mask, connectivity)
    return Labels(ignored.flatten(), truth.flatten(), ids.flatten())


def connected_components(mask: Tensor, connectivity: int = 26) -> Tensor:
    """mask [*spatial] of one sample and channel -> ids int64, numbered 1..N in raster order of the first voxel."""
    steps = {4: 1, 6: 1, 8: 2, 18: 2, 26: 3}[connectivity]  # axes along which a neighbour may differ at once
    offsets = [o for o in itertools.product((-1, 0, 1), repeat=mask.ndim) if 0 < sum(map(abs, o)) <= steps]
    foreground = {tuple(v) for v in mask.nonzero().tolist()}
    ids, found = torch.zeros(mask.shape, dtype=torch.int64), 0
    for seed in sorted(foreground):
        if ids[seed] > 0:
            continue
        found += 1
        ids[seed] = found
        front = [seed]
        while front:
            voxel = front.pop()
            for offset in offsets:
                neighbour = tuple(i + o for i, o in zip(voxel, offset, strict=True))
                if neighbour in foreground and ids[neighbour] == 0:
                    ids[neighbour] = found
                    front.append(neighbour)
    return ids


# ---------------- the loss


@dataclass
class Losses:
    """Everything the loss is made of, unweighted; dictionaries keyed by (sample, class[, id])."""

    main: dict[tuple[int, int], Tensor]
    instances: dict[tuple[int, int, int], Tensor]
    shape: tuple[int, int]
    zero: Tensor

    def blob(self) -> dict[tuple[int, int], Tensor]:
        pairs: dict[tuple[int, int], list[Tensor]] = {}
        for (b, c, _), loss in self.instances.items():
            pairs.setdefault((b, c), []).append(loss)
        return {pair: torch.stack(losses).mean() for pair, losses in pairs.items()}

    def main_mean(self) -> Tensor:
        return torch.stack(list(self.main.values())).mean()

    def blob_mean(self) -> Tensor:
        pairs = list(self.blob().values())
        return torch.stack(pairs).mean() if pairs else self.zero


def losses(
    logits: Tensor,
    target: Tensor | None = None,
    instances: Tensor | None = None,
    *,
    criterion: Criterion,
    main_criterion: Criterion | None = None,
    activation: str = "sigmoid",
    include_background: bool = False,
    masking: str = "exclude",
    connectivity: int = 26,
    ignore_index: int | None = None,
) -> Losses:
    batch, channels = logits.shape[:2]
    rows = range(channels) if activation != "softmax" or include_background else range(1, channels)
    zero = logits.sum() * 0 if logits.isfinite().all() else torch.nan_to_num(logits, 0.0, 0.0, 0.0).sum() * 0
    found = Losses({}, {}, (batch, channels), zero)

    for b, c in itertools.product(range(batch), rows):
        labels = labels_of(b, c, logits, target, instances, activation, connectivity, ignore_index)
        kept = ~labels.ignored
        x, truth, ids = logits[b].flatten(1)[:, kept], labels.truth[kept], labels.ids[kept]

        if kept.any():
            found.main[b, c] = evaluate(main_criterion or criterion, predict(x, c, activation), truth)
        else:
            found.main[b, c] = zero

        for k in sorted(set(ids[ids > 0].tolist())):
            blob, others = ids == k, (ids > 0) & (ids != k)
            if masking == "exclude":
                loss = evaluate(criterion, predict(x[:, ~others], c, activation), blob[~others])
            elif masking == "zero_prob":
                loss = evaluate(criterion, zeroed(predict(x, c, activation), others), blob)
            elif masking == "zero_logit":
                masked = torch.where(others, torch.zeros_like(x), x)
                loss = evaluate(criterion, predict(masked, c, activation), blob)
            elif masking == "none":
                loss = evaluate(criterion, predict(x, c, activation), blob)
            else:
                raise ValueError(masking)
            found.instances[b, c, k] = loss
    return found


def blob_loss(logits, target=None, instances=None, *, main_weight=1.0, blob_weight=1.0, reduction="mean", **options):
    found = losses(logits, target, instances, **options)
    if reduction == "mean":
        return main_weight * found.main_mean() + blob_weight * found.blob_mean()
    blob = found.blob()
    table = [
        main_weight * found.main.get((b, c), found.zero) + blob_weight * blob.get((b, c), found.zero)
        for b, c in itertools.product(*map(range, found.shape))
    ]
    table = torch.stack(table).reshape(found.shape)
    return table if reduction == "none" else table.sum()


# ---------------- the table of sums


def feature(name: str, prediction: Prediction, gamma: float) -> Tensor:
    return {
        "prob": lambda: prediction.p,
        "prob_sq": lambda: prediction.p**2,
        "nll_pos": lambda: -prediction.log_p,
        "nll_neg": lambda: -prediction.log_q,
        "focal_pos": lambda: prediction.q**gamma * -prediction.log_p,
        "focal_neg": lambda: prediction.p**gamma * -prediction.log_q,
    }[name]()


def cells_of(logits: Tensor, ids: Tensor, target: Tensor | None, channel0: str = "class") -> Tensor:
    """The final cell of every voxel and channel, int64 [B, C, *spatial], -1 where ignored."""
    cells = torch.full(logits.shape, -1, dtype=torch.int64)
    channels = logits.shape[1]
    for index in itertools.product(*map(range, logits.shape)):
        b, c, *voxel = index
        k = int(ids[(b, c if ids.shape[1] == channels else 0, *voxel)])
        if k < 0 or (c == 0 and channel0 == "unused"):
            continue
        if c == 0 and channel0 == "background":
            k = 0
        if target is None:
            cells[index] = k
        elif target.shape[1] == 1 and channels > 1:
            cells[index] = 2 * k + int(target[(b, 0, *voxel)] == c)
        else:
            cells[index] = 2 * k + int(target[index] != 0)
    return cells


def segment_stats(
    logits: Tensor,
    cells: Tensor,
    num_cells: int,
    features: tuple[str, ...] = ("prob",),
    activation: str = "sigmoid",
    gamma: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """cells: final cells, [B, C or 1, *spatial]. Returns counts int64 [B, C, K] and sums [B, C, K, F]."""
    batch, channels = logits.shape[:2]
    counts = torch.zeros(batch, channels, num_cells, dtype=torch.int64)
    rows = []
    for b, c in itertools.product(range(batch), range(channels)):
        own = cells[b, c if cells.shape[1] == channels else 0].flatten()
        for k in range(num_cells):
            x = logits[b].flatten(1)[:, own == k]
            counts[b, c, k] = x.shape[1]
            prediction = predict(x, c, activation)
            rows.append(torch.stack([feature(name, prediction, gamma).sum() for name in features]))
    return counts, torch.stack(rows).reshape(batch, channels, num_cells, len(features))
