"""The losses that bench.gpu compares on a CUDA device, and what each must agree with before it is timed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.contestants import (
    BLOB_DICE,
    BLOB_DICE_CE,
    CC_DICE,
    DICE,
    DICE_CE,
    SMOOTH,
    TOLERANCE,
    TWO_CHANNEL_BLOB,
    Formula,
    Loss,
    blob_formula,
    cc_formula,
    loop_blob_loss,
    plain_formula,
    soft_dice,
)
from bench.gpu_timing import Clock, UnmeasuredError
from bench.workloads import Workload, logits_for, scene, synthetic, two_channels
from blobloss_fast import BlobLoss, CCLoss, connected_components, criteria, nearest_instance

REPLICAS = 32  # columns of tio_blob_loss
RUNNING_SUMS = 1e-4  # relative error allowed to losses that add up the volume in fp32 with atomics, in any order

# ---------------------------------------------------------------------------------------------------------- volumes


def on(device: torch.device, workload: Workload) -> Workload:
    return replace(workload, logits=workload.logits.to(device), instances=workload.instances.to(device))


def giant_pair(size: int) -> Workload:
    """Two samples with one giant instance each."""
    one = scene(size, "giant")
    instances = one.instances.repeat(2, 1, 1, 1, 1)
    return Workload(f"2x1x{size}^3, one giant ball each", logits_for(instances), instances, 2)


def pair(size: int, count: int) -> Workload:
    return synthetic(size, count, batch=2)


def pair_in_bf16(size: int, count: int) -> Workload:
    workload = pair(size, count)
    return replace(workload.to(torch.bfloat16), name=f"{workload.name}, bfloat16")


def pair_of_two_channels(size: int, count: int) -> Workload:
    return two_channels(pair(size, count))


def mistaken_pair(size: int, count: int) -> Workload:
    """For either sample the balls of the other one are predicted, without noise that would be a component each."""
    workload = pair(size, count)
    logits = logits_for(workload.instances.roll(1, 0), noise=0.5)
    return replace(workload, name=f"{workload.name}, as many others predicted", logits=logits)


SAMPLES, CLASSES = 8, 4


def classes(size: int, count: int) -> Workload:
    """8 samples with 4 classes, each with its own balls."""
    rows = synthetic(size, count, batch=SAMPLES * CLASSES)
    logits, ids = (tensor.view(SAMPLES, CLASSES, *(size,) * 3) for tensor in (rows.logits, rows.instances))
    name = f"{SAMPLES}x{CLASSES}x{size}^3, {count} balls each"
    return replace(rows, name=name, logits=logits, instances=ids)


def four_channels(size: int, count: int) -> Workload:
    """Two samples with a softmax over 4 classes; the ids of the first, the background, are not looked at."""
    rows = synthetic(size, count, batch=2 * CLASSES)
    logits, ids = (tensor.view(2, CLASSES, *(size,) * 3) for tensor in (rows.logits, rows.instances))
    return replace(rows, name=f"2x{CLASSES}x{size}^3, {count} balls each", logits=logits, instances=ids)


def end_to_end(size: int, count: int) -> Workload:
    """The same voxels as one sample of one class, in which every ball has an id of its own."""
    apart = classes(size, count)
    first = count * torch.arange(SAMPLES * CLASSES, dtype=torch.int32).view(SAMPLES, CLASSES, 1, 1, 1)
    ids = torch.where(apart.instances > 0, apart.instances + first, 0)
    logits, ids = (tensor.view(1, 1, -1, size, size) for tensor in (apart.logits, ids))
    name = f"1x1x{logits.shape[2]}x{size}x{size}, {SAMPLES * CLASSES * count:,} balls"
    return replace(apart, name=name, logits=logits, instances=ids)


NAMES = {"monai": "MONAI", "cupyx": "CuPy", "cucim": "cuCIM"}


def missing(package: str | None) -> str | None:
    """That a package is not installed; None if it is, or none is needed."""
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"{NAMES.get(package, package)} is not installed"


def version(module: str) -> str | None:
    """Of the distribution that holds it: CuPy and cuCIM have one for every CUDA."""
    names = importlib.metadata.packages_distributions().get(module, ())
    return importlib.metadata.version(names[0]) if names else None


# ------------------------------------------------------------------------------------------------------------ losses


def scatter_add_blob_loss(logits: Tensor, ids: Tensor, num_ids: int) -> Tensor:
    """bench.contestants.scatter_add_blob_loss with ids int64 up to a number that is known, so that nothing waits."""
    prob = torch.sigmoid(logits).flatten(1)
    ids = ids.flatten(1)
    table = prob.new_zeros(len(prob), num_ids + 1)
    sums, counts = table.scatter_add(1, ids, prob), table.scatter_add(1, ids, torch.ones_like(prob))
    total, s, n = prob.sum(1, keepdim=True), sums[:, 1:], counts[:, 1:]
    background = total - s.sum(1, keepdim=True)
    exists = n > 0
    dice = torch.where(exists, 1 - (2 * s + SMOOTH) / (background + s + n + SMOOTH), 0)
    found = exists.sum(1)
    blob = (dice.sum(1) / found.clamp(min=1)).sum() / (found > 0).sum().clamp(min=1)
    main = 1 - (2 * s.sum(1) + SMOOTH) / (total[:, 0] + n.sum(1) + SMOOTH)
    return main.mean() + blob


def tio_blob_loss(logits: Tensor, target: Tensor, ids: Tensor, num_ids: int) -> Tensor:
    """The approach of TIO-IKIM's BiCC-Loss: vmap over the samples, scatter_add of five sums for each instance.

    The sums are those of p y, p, y, the cross-entropy and 1; each is spread over 32 columns, so that fewer additions
    meet. Its Dice is taken; the number of ids, which it reads from the device, is given; and the loss over the whole
    volume is added, as a trainer would.
    """
    prob = torch.sigmoid(logits)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    columns = next(n for n in (REPLICAS, 16, 8, 4, 2, 1) if ids[0].numel() % n == 0)

    def of_sample(p: Tensor, y: Tensor, e: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        def by_id(values: Tensor) -> Tensor:
            table = torch.zeros(num_ids + 1, columns, dtype=values.dtype, device=values.device)
            return torch.scatter_add(table, 0, rows.reshape(-1, columns), values.reshape(-1, columns)).sum(1)

        overlap, size, truth, _, count = (by_id(values) for values in (p * y, p, y, e, torch.ones_like(p)))
        overlap, size, truth = (sums[0] + sums[1:] for sums in (overlap, size, truth))
        losses = 1 - (2 * overlap + SMOOTH) / (size + truth + SMOOTH)
        exists = (count[1:] > 0).to(losses.dtype)
        return (losses * exists).sum() / exists.sum().clamp(min=1), exists.amax()

    blob, has_any = torch.func.vmap(of_sample)(prob, target, entropy, ids)
    return soft_dice(prob, target) + (blob * has_any).sum() / has_any.sum().clamp(min=1)


def bicc_formula(logits: Tensor, instances: Tensor, target: Tensor) -> Tensor:
    """CC loss whose second term is, for one half, the mean over the zones of the predicted components."""
    components, _ = connected_components(logits > 0)
    zones, x, y = nearest_instance(components).flatten(1).long(), torch.sigmoid(logits.flatten(1)), target.flatten(1)

    def by_zone(values: Tensor) -> Tensor:
        return values.new_zeros(len(zones), int(zones.max()) + 1).scatter_add(1, zones, values)

    predicted, true = by_zone(x), by_zone(y)
    exists = by_zone(torch.ones_like(x)) > 0
    dice = 1 - (2 * by_zone(x * y) + SMOOTH) / (predicted + true + SMOOTH)
    spurious = by_zone(x * x.detach()) / torch.where(exists, predicted.detach(), 1)
    losses = torch.where(exists, torch.where(true > 0, dice, spurious), 0)
    mean = (losses.sum(1) / exists.sum(1)).mean()
    return (plain_formula(logits, target, ce=False) + cc_formula(logits, instances, target) + mean) / 2


def every_class_formula(logits: Tensor, instances: Tensor, target: Tensor) -> Tensor:
    """Blob loss with a sigmoid has a term for every sample and class alike."""
    return blob_formula(*(tensor.flatten(0, 1)[:, None] for tensor in (logits, instances, target)), ce=False)


def softmax_formula(logits: Tensor, instances: Tensor, target: Tensor) -> Tensor:
    """The same with a softmax, but for class 0."""
    log_p = torch.log_softmax(logits, 1)
    log_odds = log_p - torch.log(-torch.expm1(log_p))
    return every_class_formula(*(tensor[:, 1:] for tensor in (log_odds, instances, target)))


BICC_DICE: Formula = lambda x, w: bicc_formula(x, w.instances, w.target)  # noqa: E731
EVERY_CLASS: Formula = lambda x, w: every_class_formula(x, w.instances, w.target)  # noqa: E731
SOFTMAX_DICE: Formula = lambda x, w: softmax_formula(x, w.instances, w.target)  # noqa: E731


@dataclass(frozen=True)
class LossContestant:
    """A loss in the comparison.

    Attributes:
        title: as the tables print it.
        formula: what it must agree with.
        prepare: makes the loss of a volume's logits; not timed.
        tolerance: of its relative error in fp32, where it is not that of all.
        replayed: whether it can be captured in a CUDA graph.
        package: what must be installed.
    """

    title: str
    formula: Formula
    prepare: Callable[[Workload, Clock], Loss]
    tolerance: float | None = None
    replayed: bool = True
    package: str | None = None


CAPACITY = 256  # max_instances of a loss from a mask


def _largest_id(workload: Workload) -> int:
    return int(workload.instances.max())


def _of_ids(*criterion: criteria.Criterion, **options: Any) -> Callable[[Workload, Clock], Loss]:
    def prepare(workload: Workload, clock: Clock) -> Loss:
        loss = BlobLoss(*criterion, max_instances=_largest_id(workload), **options)
        return partial(loss, instances=workload.instances)

    return prepare


def _from_mask(loss: Callable[..., Tensor]) -> Callable[[Workload, Clock], Loss]:
    return lambda workload, clock: partial(loss, target=workload.mask)


def _monai(name: str) -> Callable[[Workload, Clock], Loss]:
    def prepare(workload: Workload, clock: Clock) -> Loss:
        import monai.losses

        return partial(getattr(monai.losses, name)(sigmoid=True), target=workload.target)

    return prepare


def plain_dice(logits: Tensor, target: Tensor) -> Tensor:
    return soft_dice(torch.sigmoid(logits), target)


def _compiled_dice(workload: Workload, clock: Clock) -> Loss:
    return partial(torch.compile(plain_dice, fullgraph=True, backend=clock.compiler), target=workload.target)


def _scatter_add(workload: Workload, clock: Clock) -> Loss:
    return partial(scatter_add_blob_loss, ids=workload.instances.long(), num_ids=_largest_id(workload))


def _tio(workload: Workload, clock: Clock) -> Loss:
    ids = workload.instances.long()
    return partial(tio_blob_loss, target=workload.target, ids=ids, num_ids=_largest_id(workload))


def _loop(workload: Workload, clock: Clock) -> Loss:
    return partial(loop_blob_loss, target=workload.target, instances=workload.instances)


DICE_AND_CE = criteria.dice() + criteria.bce()
SOFTMAX_DICE_AND_CE = criteria.dice() + criteria.cross_entropy()

LOSSES = {
    "ours": LossContestant("BlobLoss", BLOB_DICE, _of_ids()),
    "ours_ce": LossContestant("BlobLoss Dice+CE", BLOB_DICE_CE, _of_ids(DICE_AND_CE)),
    "mask": LossContestant("BlobLoss from a mask", BLOB_DICE, _from_mask(BlobLoss(max_instances=CAPACITY))),
    "mask_ce": LossContestant(
        "BlobLoss Dice+CE from a mask", BLOB_DICE_CE, _from_mask(BlobLoss(DICE_AND_CE, max_instances=CAPACITY))
    ),
    "monai": LossContestant("MONAI DiceLoss", DICE, _monai("DiceLoss"), package="monai"),
    "monai_ce": LossContestant("MONAI DiceCELoss", DICE_CE, _monai("DiceCELoss"), package="monai"),
    "compiled": LossContestant("plain Dice, torch.compile", DICE, _compiled_dice),
    "scatter_add": LossContestant("scatter_add", BLOB_DICE, _scatter_add, RUNNING_SUMS),
    "tio": LossContestant("vmap and five scatter_add (TIO-IKIM)", BLOB_DICE, _tio, RUNNING_SUMS),
    "loop": LossContestant("literal loop", BLOB_DICE, _loop, replayed=False),
    "cc": LossContestant("CCLoss from a mask", CC_DICE, _from_mask(CCLoss(max_instances=CAPACITY))),
    "bicc": LossContestant(
        "BiCC from a mask", BICC_DICE, _from_mask(CCLoss(max_instances=CAPACITY, bidirectional=True))
    ),
    # On volumes with more than one channel.
    "softmax": LossContestant(
        "BlobLoss Dice+CE, softmax", TWO_CHANNEL_BLOB, _of_ids(SOFTMAX_DICE_AND_CE, activation="softmax")
    ),
    "classes": LossContestant("BlobLoss of several classes", EVERY_CLASS, _of_ids()),
    "softmax_classes": LossContestant(
        "BlobLoss of several classes, softmax", SOFTMAX_DICE, _of_ids(activation="softmax")
    ),
}


class Pass:
    """Forward and backward of a loss, apart or together, that leave their results in `value` and `gradient`."""

    def __init__(self, loss: Loss, logits: Tensor) -> None:
        self.loss = loss
        self.logits = logits.detach().clone().requires_grad_()
        self.value: Tensor | None = None
        self.gradient: Tensor | None = None
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self._one = torch.ones((), dtype=dtype, device=logits.device)

    def forward(self) -> None:
        self.value = self.loss(self.logits)

    def backward(self) -> None:
        """Of the last forward, again and again; the 1 at its start is made beforehand."""
        assert self.value is not None
        (self.gradient,) = torch.autograd.grad(self.value, self.logits, self._one, retain_graph=True)

    def __call__(self) -> None:
        self.clear()
        value = self.loss(self.logits)
        (self.gradient,) = torch.autograd.grad(value, self.logits)
        self.value = value.detach()

    def clear(self) -> None:
        self.value = self.gradient = None

    def results(self) -> tuple[Tensor, Tensor]:
        assert self.value is not None
        assert self.gradient is not None
        return self.value.detach(), self.gradient


class Truth:
    """The formulas in double precision on one volume, each computed once."""

    def __init__(self, workload: Workload) -> None:
        self._exact = workload.to(torch.float64)
        self._dtype = workload.logits.dtype
        self._found: dict[Formula, tuple[Tensor, Tensor]] = {}

    def check(self, contestant: LossContestant, done: Pass, how: str) -> float:
        """The larger relative error of value and gradient; an `UnmeasuredError` if one of them is too large."""
        if contestant.formula not in self._found:
            exact = Pass(partial(contestant.formula, w=self._exact), self._exact.logits)
            exact()
            self._found[contestant.formula] = exact.results()
        (value, gradient), (true_value, true_gradient) = done.results(), self._found[contestant.formula]
        value_error = float((value - true_value).abs() / true_value.abs())
        gradient_error = float((gradient - true_gradient).abs().max() / true_gradient.abs().max())
        allowed = contestant.tolerance or TOLERANCE[self._dtype]
        if not (value_error <= allowed and gradient_error <= allowed + torch.finfo(self._dtype).eps / 2):  # or a NaN
            raise UnmeasuredError(
                f"{contestant.title}, {how}, DISAGREES with its formula in double precision: relative error "
                f"{value_error:.1e} in the value and {gradient_error:.1e} in the gradient, allowed {allowed:.0e}"
            )
        return max(value_error, gradient_error)
