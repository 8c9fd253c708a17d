"""How far a result may be from the truth.

The numbers are promises of the package; they are never raised to make a test pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP64 = 1e-12  # relative, absolute where the true value is below 1
FLOOR = 1e-6  # what any result in fp32 may be off by, in the same sense
TIMES_PLAIN = 2.0  # beyond the floor: never worse than twice the same loss in plain PyTorch


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest error of any element: relative, absolute where the truth is below 1; infinite for a NaN."""
    if actual.shape != expected.shape:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    same = actual == expected  # equal infinities have no difference
    off = torch.where(same, 0.0, (actual - expected).abs() / expected.abs().clamp(min=1.0))
    return float(torch.nan_to_num(off, nan=float("inf"), posinf=float("inf")).max())


def relative_to_largest(actual: Tensor, expected: Tensor) -> float:
    """The largest error relative to the largest true element: for gradients, whose elements are tiny."""
    scale = float(expected.detach().abs().max()) if expected.numel() else 1.0
    if scale == 0.0:
        return 0.0 if bool((actual == 0).all()) else float("inf")
    actual, expected = actual.detach().double(), expected.detach().double()
    return float(torch.nan_to_num((actual - expected).abs() / scale, nan=float("inf")).max())


def assert_fp64(actual: Tensor, expected: Tensor, what: str = "value") -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    off = error(actual, expected)
    assert off <= FP64, f"{what}: off by {off:.3g}, allowed {FP64:g}"
