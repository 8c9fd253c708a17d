"""What the tests of the blob loss share: criteria, and the comparison of a loss and its gradient with the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from blobloss_fast import BlobLoss, criteria

from . import oracle, scenes
from .tolerances import assert_fp64

CRITERIA: dict[str, oracle.Criterion] = {
    "dice": ((1.0, "dice", {}),),
    "dice_unsmoothed": ((1.0, "dice", {"smooth_nr": 0.0, "smooth_dr": 1e-3}),),
    "squared_dice": ((1.0, "dice", {"squared": True, "smooth_nr": 0.1, "smooth_dr": 0.2}),),
    "jaccard": ((1.0, "jaccard", {"smooth_nr": 0.1, "smooth_dr": 0.2}),),
    "tversky": ((1.0, "tversky", {"alpha": 0.3, "beta": 0.7}),),
    "bce": ((1.0, "bce", {}),),
    "cross_entropy": ((1.0, "cross_entropy", {}),),
    "focal": ((1.0, "focal", {}),),
    "focal_alpha": ((1.0, "focal", {"gamma": 1.5, "alpha": 0.25}),),
    "focal_gamma0": ((1.0, "focal", {"gamma": 0.0}),),
    "dice+bce": ((1.0, "dice", {}), (0.5, "bce", {})),
    "compound": (
        (2.0, "dice", {"squared": True}),
        (0.7, "focal", {"gamma": 3.0, "alpha": 0.6}),
        (1.5, "tversky", {"alpha": 0.2, "beta": 0.4, "smooth_nr": 0.5, "smooth_dr": 0.25}),
        (0.1, "bce", {}),
    ),
}
DICE, BCE, COMPOUND = CRITERIA["dice"], CRITERIA["bce"], CRITERIA["compound"]


def criterion_of(spec: oracle.Criterion) -> criteria.Criterion:
    """The package's criterion for the oracle's description of it."""
    parts = [weight * getattr(criteria, name)(**options) for weight, name, options in spec]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def translated(options: dict) -> dict:
    return {k: criterion_of(v) if k in ("criterion", "main_criterion") else v for k, v in options.items()}


def random_grad(shape) -> Tensor:
    """A gradient that comes in from above: no element is 1, no two are alike."""
    return 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def value_and_gradient(function, logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = function(leaf)
    value.backward(random_grad(value.shape).to(value.dtype))
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def pair(scene: scenes.Scene, max_instances: int | None = None, **options):
    """(ours, truth): value and gradient of the loss with these options (criteria as the oracle describes them)."""
    options = {"criterion": DICE, **scene.options, **options}
    module = BlobLoss(**translated(options), max_instances=max_instances)
    ours = value_and_gradient(lambda x: module(x, scene.target, scene.instances), scene.logits)
    truth = value_and_gradient(lambda x: oracle.blob_loss(x, scene.target, scene.instances, **options), scene.logits)
    return ours, truth


def check(scene: scenes.Scene, **options) -> None:
    ours, truth = pair(scene, **options)
    what = f"{scene.name} {options}"
    assert_fp64(ours[0], truth[0], f"value of {what}")
    assert_fp64(ours[1], truth[1], f"gradient of {what}")


def check_all(every: list[scenes.Scene], **options) -> None:
    """As `check`, over many scenes; reports every scene that is off, not only the first."""
    wrong = []
    for scene in every:
        try:
            check(scene, **options)
        except (AssertionError, RuntimeError, ValueError, TypeError) as problem:
            wrong.append(f"{type(problem).__name__}: {str(problem).splitlines()[0]}")
    assert not wrong, f"{len(wrong)} of {len(every)} scenes:\n" + "\n".join(wrong)
