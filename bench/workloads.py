"""Volumes with instances, and the losses that are compared on them.

Every loss is given logits and what it needs of the labels (prepared outside the measured time) and returns a scalar.
The full losses add a main Dice over the whole volume to the mean Dice of the instances; the plain ones are the main
Dice alone. All are checked against the same formula in double precision before anything is timed.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blobloss_fast import BlobLoss, connected_components

SMOOTH = 1e-5

# Until backward the loop keeps a mask (1 byte a voxel) and a label (4 bytes) of every instance. Where that is more than
# this limit the loop is not run, and nothing is extrapolated.
LOOP_BYTES_PER_VOXEL = 5
LOOP_MEMORY_LIMIT = 6 * 2**30


@dataclass(frozen=True)
class Workload:
    """One volume: `logits` float [1, 1, *spatial], `instances` int32 [1, 1, *spatial] with ids 0..num_instances."""

    name: str
    logits: Tensor
    instances: Tensor
    num_instances: int

    @property
    def target(self) -> Tensor:
        return (self.instances > 0).to(self.logits.dtype)

    def to(self, dtype: torch.dtype) -> Workload:
        return Workload(self.name, self.logits.to(dtype), self.instances, self.num_instances)


# ---------------------------------------------------------------------------------------------------------- volumes


def balls(size: int, num_instances: int, *, radius: tuple[float, float] = (1.0, 8.0), seed: int = 0) -> np.ndarray:
    """Instance ids int32 [size, size, size] of balls that do not touch, numbered in raster order of their first voxel.

    One ball lies in each of `num_instances` sites of a regular grid: its radius drawn log-uniformly from `radius`, as
    far as the site allows, its centre anywhere in the site that leaves the last planes free.
    """
    per_axis = math.ceil(round(num_instances ** (1 / 3), 9))
    pitch = size // per_axis
    if pitch < 2:
        raise ValueError(f"{num_instances} instances that do not touch do not fit into {size}^3")
    rng = np.random.default_rng([seed, size, num_instances])
    largest = (pitch - 2) // 2
    radii = np.exp(rng.uniform(*np.log(radius), num_instances)).clip(max=largest + 0.5)
    sites = rng.permutation(per_axis**3)[:num_instances]
    corners = np.stack(np.unravel_index(sites, (per_axis,) * 3), axis=1) * pitch

    volume = np.zeros((size,) * 3, dtype=np.int32)
    for index, (corner, r) in enumerate(zip(corners, radii, strict=True), start=1):
        reach = int(min(r, largest))
        low = corner + rng.integers(0, pitch - 1 - 2 * reach, 3)
        offset = np.arange(-reach, reach + 1)
        distance_sq = offset[:, None, None] ** 2 + offset[:, None] ** 2 + offset**2
        box = tuple(slice(start, start + 2 * reach + 1) for start in low)
        volume[box][distance_sq <= r * r] = index
    return _numbered_in_raster_order(volume)


def _numbered_in_raster_order(volume: np.ndarray) -> np.ndarray:
    ids, first = np.unique(volume, return_index=True)
    ids, first = ids[ids > 0], first[ids > 0]
    rank = np.zeros(ids.max() + 1, dtype=np.int32)
    rank[ids[np.argsort(first)]] = np.arange(1, len(ids) + 1)
    return rank[volume]


def logits_for(instances: Tensor, *, margin: float = 3.0, noise: float = 1.5, seed: int = 0) -> Tensor:
    """fp32 logits of a fair prediction: +-`margin` by the mask, plus Gaussian noise."""
    generator = torch.Generator().manual_seed(seed)
    sign = (instances > 0).float().mul_(2).sub_(1)
    return sign * margin + noise * torch.randn(instances.shape, generator=generator)


def synthetic(size: int, num_instances: int, *, seed: int = 0) -> Workload:
    instances = torch.from_numpy(balls(size, num_instances, seed=seed))[None, None]
    return Workload(f"{size}^3, {num_instances:,} balls", logits_for(instances, seed=seed), instances, num_instances)


def real() -> Workload:
    """The multiple sclerosis lesions that come with the package (CC-BY; see blobloss_fast/data/README.md)."""
    with (
        (importlib.resources.files("blobloss_fast") / "data" / "ms_lesions.npz").open("rb") as file,
        np.load(file) as arrays,
    ):
        mask = torch.from_numpy(arrays["label"])[None, None]
    instances, counts = connected_components(mask)
    shape = "x".join(str(n) for n in instances.shape[2:])
    count = int(counts)
    return Workload(f"real lesions, {shape}, {count} lesions", logits_for(instances), instances, count)


# ----------------------------------------------------------------------------------------------------------- losses

Loss = Callable[[Tensor], Tensor]


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
    of voxels, so the background is the difference from the total, which `sum` adds up pairwise.
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


@dataclass(frozen=True)
class Contestant:
    title: str
    instance_aware: bool
    prepare: Callable[[Workload], Loss]

    def step(self, workload: Workload) -> Callable[[], None]:
        """What is timed: one forward and one backward pass."""
        loss = self.prepare(workload)
        logits = workload.logits.clone().requires_grad_()

        def forward_and_backward() -> None:
            logits.grad = None
            loss(logits).backward()

        return forward_and_backward


def _loop(workload: Workload) -> Loss:
    target = workload.target
    return lambda logits: loop_blob_loss(logits, target, workload.instances)


def _plain_dice(workload: Workload) -> Loss:
    target = workload.target
    return lambda logits: soft_dice(torch.sigmoid(logits), target)


def _monai_dice(workload: Workload) -> Loss:
    from monai.losses import DiceLoss

    loss, target = DiceLoss(sigmoid=True), workload.target
    return lambda logits: loss(logits, target)


def _scatter_add(workload: Workload) -> Loss:
    return lambda logits: scatter_add_blob_loss(logits, workload.instances)


def _ours(workload: Workload) -> Loss:
    loss = BlobLoss()
    return lambda logits: loss(logits, instances=workload.instances)


CONTESTANTS = {
    "loop": Contestant("authors' loop", True, _loop),
    "scatter_add": Contestant("scatter_add", True, _scatter_add),
    "ours": Contestant("BlobLoss", True, _ours),
    "dice": Contestant("plain Dice", False, _plain_dice),
    "monai_dice": Contestant("MONAI DiceLoss", False, _monai_dice),
}


def why_not(key: str, workload: Workload) -> str | None:
    """The reason why a contestant is not run on a workload, None where it is."""
    if key == "monai_dice" and importlib.util.find_spec("monai") is None:
        return "MONAI is not installed"
    if key == "loop":
        needed = workload.num_instances * workload.instances.numel() * LOOP_BYTES_PER_VOXEL
        if needed > LOOP_MEMORY_LIMIT:
            return f"its graph would hold about {needed / 2**30:.0f} GiB"
    return None


# -------------------------------------------------------------------------------------------------------- agreement


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}


class DisagreementError(AssertionError):
    """Two implementations of one loss differ: nothing is timed."""


def value_and_gradient(loss: Loss, logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def check_agreement(workload: Workload, keys: Sequence[str]) -> dict[str, float]:
    """The largest relative error of each contestant's value and gradient, against the formula in double precision.

    The truth is `scatter_add_blob_loss` (or the plain Dice) in fp64: linear in the volume, so it can be had for ten
    thousand instances too. That it equals the loop to the last digits is a test on small volumes.
    """
    exact = workload.to(torch.float64)
    truth = {
        instance_aware: value_and_gradient(CONTESTANTS[key].prepare(exact), exact.logits)
        for instance_aware, key in ((True, "scatter_add"), (False, "dice"))
    }
    tolerance = TOLERANCE[workload.logits.dtype]
    errors = {}
    for key in keys:
        contestant = CONTESTANTS[key]
        value, gradient = value_and_gradient(contestant.prepare(workload), workload.logits)
        true_value, true_gradient = truth[contestant.instance_aware]
        value_error = float((value - true_value).abs() / true_value.abs())
        gradient_error = float((gradient - true_gradient).abs().max() / true_gradient.abs().max())
        errors[key] = max(value_error, gradient_error)
        if not errors[key] <= tolerance:  # written so that a NaN fails
            raise DisagreementError(
                f"{contestant.title} on {workload.name}: relative error {value_error:.1e} in the value and "
                f"{gradient_error:.1e} in the gradient, allowed {tolerance:.0e}"
            )
    return errors
