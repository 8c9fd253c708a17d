"""The losses that are compared, and what each must agree with before it is timed.

Every loss is given logits and what it needs of the labels (prepared outside the measured time) and returns a scalar.
The full losses add the criterion over the whole volume to its mean over the instances; the plain ones are the former
alone. Each is checked against its formula, written out in plain PyTorch and run in double precision.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import WARM, Step
from bench.workloads import Workload
from blobloss_fast import BlobLoss, CCLoss, _ops, connected_components, criteria, nearest_instance
from blobloss_fast.kernels import reference

SMOOTH = 1e-5

# Until backward the loop keeps a mask (1 byte a voxel) and a label (4 bytes) of every instance. Where that is more than
# this limit the loop is not run, and nothing is extrapolated.
LOOP_BYTES_PER_VOXEL = 5
LOOP_MEMORY_LIMIT = 6 * 2**30

Loss = Callable[[Tensor], Tensor]


# ---------------------------------------------------------------------------------------------- losses to compare with


def soft_dice(prob: Tensor, target: Tensor) -> Tensor:
    """Mean over (sample, channel) of 1 - (2 I + e) / (P + N + e)."""
    axes = tuple(range(2, prob.ndim))
    intersection = (prob * target).sum(axes)
    denominator = prob.sum(axes) + target.sum(axes)
    return (1 - (2 * intersection + SMOOTH) / (denominator + SMOOTH)).mean()


def loop_blob_loss(logits: Tensor, target: Tensor, instances: Tensor) -> Tensor:
    """The authors' algorithm, one instance after the other: hide all others, call the criterion, average.

    Their `"sigmoid": True` configuration: the sigmoid is taken once, hidden voxels become probability 0. Every instance
    costs six full-size temporaries before the criterion starts, two more in it (and as many in its backward pass), and
    a read of its id on the host.
    """
    prob = torch.sigmoid(logits)
    per_sample = []
    for sample_prob, ids in zip(prob.split(1), instances.split(1), strict=True):
        losses = []
        for instance in torch.unique(ids):
            if instance == 0:
                continue
            visible = ~(ids > 0)
            visible[ids == instance] = True
            own = (ids == instance).int()
            losses.append(soft_dice(sample_prob * visible, own))
        if losses:
            per_sample.append(torch.stack(losses).mean())
    return soft_dice(prob, target) + torch.stack(per_sample).mean()


def scatter_add_blob_loss(logits: Tensor, instances: Tensor) -> Tensor:
    """The same loss, vectorised in plain PyTorch: probabilities added up by id, then small tensors only.

    On a CPU scatter_add keeps one running sum per id. In fp32 that is off by 1e-4 to 1e-3 for a background of millions
    of voxels, so the background is the difference from the total, which `sum` adds up pairwise. An instance of a
    million voxels cannot be helped in this way, and its sum is off by more than one per cent.
    """
    prob = torch.sigmoid(logits).flatten(1)
    ids = instances.flatten(1).long()
    table = prob.new_zeros(prob.shape[0], int(ids.max()) + 1)
    sums = table.scatter_add(1, ids, prob)
    counts = table.scatter_add(1, ids, torch.ones_like(prob))
    total, s, n = prob.sum(1, keepdim=True), sums[:, 1:], counts[:, 1:]
    background = total - s.sum(1, keepdim=True)
    exists = n > 0
    dice = torch.where(exists, 1 - (2 * s + SMOOTH) / (background + s + n + SMOOTH), 0)
    has_any = exists.any(1)
    blob = (dice.sum(1) / exists.sum(1).clamp(min=1))[has_any].mean()
    main = 1 - (2 * s.sum(1) + SMOOTH) / (total[:, 0] + n.sum(1) + SMOOTH)
    return main.mean() + blob


# -------------------------------------------------------------------------------------------- formulas, not to be timed


def plain_formula(logits: Tensor, target: Tensor, *, ce: bool) -> Tensor:
    """Dice over the volume, plus the mean binary cross-entropy if wanted."""
    value = soft_dice(torch.sigmoid(logits), target)
    return value + F.binary_cross_entropy_with_logits(logits, target) if ce else value


def blob_formula(logits: Tensor, instances: Tensor, target: Tensor, *, ce: bool) -> Tensor:
    """Blob loss from running sums by id: right to the last digits in double precision, whatever the number of ids.

    The instance's domain is the background and itself. That this equals masks and a loop is a test on small volumes.
    """
    ids = instances.flatten(1).long()

    def by_id(values: Tensor) -> tuple[Tensor, Tensor]:
        table = values.new_zeros(len(ids), int(ids.max()) + 1).scatter_add(1, ids, values)
        return table[:, :1], table[:, 1:]

    x = logits.flatten(1)
    prob = torch.sigmoid(x)
    background, own = by_id(prob)
    n_background, n = by_id(torch.ones_like(prob))
    losses = 1 - (2 * own + SMOOTH) / (background + own + n + SMOOTH)
    if ce:
        losses = losses + (by_id(F.softplus(x))[0] + by_id(F.softplus(-x))[1]) / (n_background + n)
    exists = n > 0
    per_sample = torch.where(exists, losses, 0).sum(1) / exists.sum(1).clamp(min=1)
    return plain_formula(logits, target, ce=ce) + per_sample[exists.any(1)].mean()


def cc_formula(logits: Tensor, instances: Tensor, target: Tensor) -> Tensor:
    """CC loss with Dice from running sums by zone; a sample without instances would be one zone."""
    zones, x = nearest_instance(instances).flatten(1).long(), torch.sigmoid(logits.flatten(1))

    def by_zone(values: Tensor) -> Tensor:
        return values.new_zeros(len(zones), int(zones.max()) + 1).scatter_add(1, zones, values)

    y = target.flatten(1)
    losses = 1 - (2 * by_zone(x * y) + SMOOTH) / (by_zone(x) + by_zone(y) + SMOOTH)
    exists = by_zone(torch.ones_like(x)) > 0
    per_sample = torch.where(exists, losses, 0).sum(1) / exists.sum(1)
    return plain_formula(logits, target, ce=False) + per_sample.mean()


def two_channel_blob_formula(logits: Tensor, instances: Tensor, target: Tensor) -> Tensor:
    """Dice and cross-entropy of a two-channel softmax are those of a sigmoid of the difference."""
    return blob_formula(logits[:, 1:] - logits[:, :1], instances, target, ce=True)


def two_channel_plain_formula(logits: Tensor, target: Tensor) -> Tensor:
    """MONAI's DiceCELoss(softmax=True, to_onehot_y=True), which gives the background class a Dice of its own."""
    one_hot = torch.cat([1 - target, target], 1)
    return soft_dice(logits.softmax(1), one_hot) + F.cross_entropy(logits, target[:, 0].long())


Formula = Callable[[Tensor, Workload], Tensor]

BLOB_DICE: Formula = lambda x, w: blob_formula(x, w.instances, w.target, ce=False)  # noqa: E731
BLOB_DICE_CE: Formula = lambda x, w: blob_formula(x, w.instances, w.target, ce=True)  # noqa: E731
DICE: Formula = lambda x, w: plain_formula(x, w.target, ce=False)  # noqa: E731
DICE_CE: Formula = lambda x, w: plain_formula(x, w.target, ce=True)  # noqa: E731
CC_DICE: Formula = lambda x, w: cc_formula(x, w.instances, w.target)  # noqa: E731
TWO_CHANNEL_BLOB: Formula = lambda x, w: two_channel_blob_formula(x, w.instances, w.target)  # noqa: E731
TWO_CHANNEL_PLAIN: Formula = lambda x, w: two_channel_plain_formula(x, w.target)  # noqa: E731


# -------------------------------------------------------------------------------------------------------- contestants


def pure_pytorch() -> AbstractContextManager[Any]:
    """Put the reference in the place of the native library, as if that had not been built."""

    def for_cpu() -> ModuleType:
        return reference

    return mock.patch.object(_ops, "_for_cpu", for_cpu)


@dataclass(frozen=True)
class Contestant:
    """A loss in the comparison.

    Attributes:
        title: as the tables print it.
        formula: what it must agree with.
        prepare: makes the loss of a volume's logits; not timed.
        backend: what it must run in; entered and left outside the measured time.
        weakness: why it may miss its formula, and is then not timed; anything else that misses it ends the run.
    """

    title: str
    formula: Formula
    prepare: Callable[[Workload], Loss]
    backend: Callable[[], AbstractContextManager[Any]] = nullcontext
    weakness: str | None = None

    def step(self, workload: Workload) -> Step:
        """What is timed: one forward and one backward pass."""
        loss = self.prepare(workload)
        logits = workload.logits.clone().requires_grad_()

        def forward_and_backward() -> None:
            logits.grad = None
            loss(logits).backward()

        return Step(forward_and_backward, self.backend, warm=0 if self.prepare is _loop else WARM)


def _loop(workload: Workload) -> Loss:
    return partial(loop_blob_loss, target=workload.target, instances=workload.instances)


def _scatter_add(workload: Workload) -> Loss:
    return partial(scatter_add_blob_loss, instances=workload.instances)


def _blob_loss(criterion: criteria.Criterion) -> Callable[[Workload], Loss]:
    return lambda workload: partial(BlobLoss(criterion), instances=workload.instances)


def _blob_loss_and_target(workload: Workload) -> Loss:
    return partial(BlobLoss(), target=workload.mask, instances=workload.instances)


def _blob_loss_and_float_target(workload: Workload) -> Loss:
    return partial(BlobLoss(), target=workload.target, instances=workload.instances)


def _from_mask(loss: Callable[..., Tensor]) -> Callable[[Workload], Loss]:
    """Instances, and zones, are found on the fly: the components of these volumes are their instances."""
    return lambda workload: partial(loss, target=workload.mask)


def _blob_loss_softmax(workload: Workload) -> Loss:
    loss = BlobLoss(criteria.dice() + criteria.cross_entropy(), activation="softmax")
    return partial(loss, target=workload.mask.long(), instances=workload.instances)


def _plain_dice(workload: Workload) -> Loss:
    target = workload.target
    return lambda logits: soft_dice(torch.sigmoid(logits), target)


def _monai(name: str, **options: bool) -> Callable[[Workload], Loss]:
    def prepare(workload: Workload) -> Loss:
        import monai.losses

        target = workload.mask.long() if "softmax" in options else workload.target
        return partial(getattr(monai.losses, name)(**options), target=target)

    return prepare


CONTESTANTS = {
    "loop": Contestant("authors' loop", BLOB_DICE, _loop),
    "scatter_add": Contestant(
        "scatter_add", BLOB_DICE, _scatter_add, weakness="its running sums in fp32 do not bear large instances"
    ),
    "reference": Contestant("reference", BLOB_DICE, _blob_loss(criteria.dice()), pure_pytorch),
    "ours": Contestant("BlobLoss", BLOB_DICE, _blob_loss(criteria.dice())),
    "ours_ce": Contestant("BlobLoss Dice+CE", BLOB_DICE_CE, _blob_loss(criteria.dice() + criteria.bce())),
    "dice": Contestant("plain Dice", DICE, _plain_dice),
    "monai_dice": Contestant("MONAI DiceLoss", DICE, _monai("DiceLoss", sigmoid=True)),
    "monai_dice_ce": Contestant("MONAI DiceCELoss", DICE_CE, _monai("DiceCELoss", sigmoid=True)),
    # The rest are in the ratios and in bench.labels alone.
    "mask": Contestant("BlobLoss", BLOB_DICE, _from_mask(BlobLoss())),
    "mask_ce": Contestant("BlobLoss Dice+CE", BLOB_DICE_CE, _from_mask(BlobLoss(criteria.dice() + criteria.bce()))),
    "mask_cc": Contestant("CCLoss", CC_DICE, _from_mask(CCLoss())),
    "ours_target": Contestant("BlobLoss with a target of its own (bool)", BLOB_DICE, _blob_loss_and_target),
    "ours_float_target": Contestant(
        "BlobLoss with a target of its own (float)", BLOB_DICE, _blob_loss_and_float_target
    ),
    "ours_softmax": Contestant("BlobLoss Dice+CE, softmax", TWO_CHANNEL_BLOB, _blob_loss_softmax),
    "monai_softmax": Contestant(
        "MONAI DiceCELoss, softmax", TWO_CHANNEL_PLAIN, _monai("DiceCELoss", softmax=True, to_onehot_y=True)
    ),
}
TABLE = ("loop", "scatter_add", "reference", "ours", "ours_ce", "dice", "monai_dice", "monai_dice_ce")


def why_not(key: str, workload: Workload) -> str | None:
    """The reason why a contestant is not run on a workload, None where it is."""
    if key.startswith("monai") and importlib.util.find_spec("monai") is None:
        return "MONAI is not installed"
    if key.startswith("mask") and not torch.equal(connected_components(workload.mask)[0], workload.instances):
        return "its instances are not the components of its mask"
    if key == "loop":
        needed = workload.num_instances * workload.instances[0].numel() * LOOP_BYTES_PER_VOXEL
        if needed > LOOP_MEMORY_LIMIT:
            return f"its graph would hold about {needed / 2**30:.0f} GiB"
    return None


# -------------------------------------------------------------------------------------------------------- agreement


TOLERANCE = {torch.bfloat16: 1e-5, torch.float32: 1e-5, torch.float64: 1e-11}


class DisagreementError(AssertionError):
    """Two implementations of one loss differ: nothing is timed."""


class Agreement(NamedTuple):
    """The larger of a contestant's relative errors, in its value and its gradient.

    Attributes:
        error: as said.
        seconds: how long one evaluation took.
        reason: why the contestant must not be timed: it missed its formula, and its weakness is known; else None.
    """

    error: float
    seconds: float
    reason: str | None


def value_and_gradient(loss: Loss, logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def check_agreement(workload: Workload, keys: Sequence[str]) -> dict[str, Agreement]:
    """The errors of the contestants against their formulas in double precision, of the very same logits.

    Both errors are relative to the largest true number. A gradient may be off by half a unit of its dtype on top, which
    is what rounding it to bfloat16 costs.
    """
    exact = workload.to(torch.float64)
    truths: dict[Formula, tuple[Tensor, Tensor]] = {}
    dtype = workload.logits.dtype
    tolerance = TOLERANCE[dtype]
    agreements = {}
    for key in keys:
        contestant = CONTESTANTS[key]
        formula = contestant.formula
        if formula not in truths:
            truths[formula] = value_and_gradient(partial(formula, w=exact), exact.logits)
        true_value, true_gradient = truths[formula]
        loss = contestant.prepare(workload)
        with contestant.backend():
            start = time.perf_counter()
            value, gradient = value_and_gradient(loss, workload.logits)
            seconds = time.perf_counter() - start
        value_error = float((value - true_value).abs() / true_value.abs())
        gradient_error = float((gradient - true_gradient).abs().max() / true_gradient.abs().max())
        allowed = tolerance + torch.finfo(dtype).eps / 2
        error, reason = max(value_error, gradient_error), None
        if not (value_error <= tolerance and gradient_error <= allowed):  # written so that a NaN fails
            if contestant.weakness is None:
                raise DisagreementError(
                    f"{contestant.title} on {workload.name}: relative error {value_error:.1e} in the value and "
                    f"{gradient_error:.1e} in the gradient, allowed {tolerance:.0e} and {allowed:.0e}"
                )
            reason = f"{contestant.weakness}, relative error {error:.0e}"
        agreements[key] = Agreement(error, seconds, reason)
    return agreements
