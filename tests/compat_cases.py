"""What the tests of blobloss_fast.compat share: configurations by path, scenes, and the comparison itself."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn import BCEWithLogitsLoss

from blobloss_fast import compat

from . import authors_loop as authors
from .tolerances import error, relative_to_largest

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import monai.data
        import monai.losses
except ImportError:
    monai = None
needs_monai = pytest.mark.skipif(monai is None, reason="MONAI is not installed: its criteria are not compared")

FAST = [
    "torch.nn.BCEWithLogitsLoss()",
    "monai.losses.DiceLoss(sigmoid=True)",
    "monai.losses.DiceLoss(sigmoid=True, squared_pred=True)",
    "monai.losses.DiceLoss(sigmoid=True, jaccard=True, smooth_nr=0.5)",
    "monai.losses.DiceLoss(sigmoid=True, smooth_nr=1.0, smooth_dr=2.0, batch=True, reduction='sum')",
    "monai.losses.DiceLoss(sigmoid=True, smooth_nr=0, smooth_dr=0, weight=[3.0])",
    "monai.losses.DiceLoss(sigmoid=True, include_background=False, to_onehot_y=True)",
    "monai.losses.TverskyLoss(sigmoid=True)",
    "monai.losses.TverskyLoss(sigmoid=True, alpha=0.3, beta=0.7, smooth_nr=0.1, smooth_dr=0.2, batch=True)",
    "monai.losses.TverskyLoss(sigmoid=True, alpha=0, beta=1, reduction='sum', include_background=False)",
    "monai.losses.FocalLoss()",
    "monai.losses.FocalLoss(gamma=0)",
    "monai.losses.FocalLoss(gamma=1.5, alpha=0.25, include_background=False)",
    "monai.losses.FocalLoss(gamma=3, alpha=1, reduction='sum', to_onehot_y=True)",
    "monai.losses.DiceCELoss(sigmoid=True)",
    "monai.losses.DiceCELoss(sigmoid=True, lambda_dice=0.3, lambda_ce=2.0, smooth_nr=0, label_smoothing=0.2)",
    "monai.losses.DiceCELoss(sigmoid=True, lambda_dice=0, squared_pred=True, batch=True)",
    "monai.losses.DiceFocalLoss(sigmoid=True)",
    "monai.losses.DiceFocalLoss(sigmoid=True, jaccard=True, gamma=2.5, alpha=0.75, lambda_focal=3, reduction='sum')",
]
# These take probabilities: fast with "sigmoid": True.
FAST_ON_PROBABILITIES = [
    "monai.losses.DiceLoss()",
    "monai.losses.DiceLoss(squared_pred=True)",
    "monai.losses.DiceLoss(jaccard=True, softmax=True)",
    "monai.losses.TverskyLoss(alpha=0.7, beta=0.1)",
]
LOOP = {
    "torch.nn.BCEWithLogitsLoss(reduction='sum')": "its option reduction is 'sum'",
    "torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0]))": "its option pos_weight is a Tensor",
    "torch.nn.BCEWithLogitsLoss(weight=torch.tensor([2.0]))": "its option weight is a Tensor",
    "torch.nn.MSELoss()": "not one of the types",
    "torch.nn.functional.l1_loss": "not one of the types",
    "monai.losses.DiceLoss(sigmoid=True, jaccard=True, squared_pred=True)": "jaccard together with squared_pred",
    "monai.losses.DiceLoss(sigmoid=True, reduction='none')": "its option reduction is 'none'",
    "monai.losses.DiceLoss(other_act=torch.sigmoid)": "its option other_act is a builtin_function_or_method",
    "monai.losses.DiceLoss(sigmoid=True, soft_label=True)": "its option soft_label is True",
    "monai.losses.DiceLoss(sigmoid=True, ignore_index=0)": "its option ignore_index is 0",
    "monai.losses.DiceLoss(sigmoid=True, smooth_nr=-0.1)": "its option smooth_nr is -0.1",
    "monai.losses.DiceLoss()": "it takes probabilities",
    "monai.losses.TverskyLoss(sigmoid=True, soft_label=True)": "its option soft_label is True",
    "monai.losses.TverskyLoss(sigmoid=True, reduction='none')": "its option reduction is 'none'",
    "monai.losses.TverskyLoss(softmax=True)": "it takes probabilities",
    "monai.losses.FocalLoss(alpha=[0.25])": "its option alpha is a Tensor",
    "monai.losses.FocalLoss(weight=2.0)": "its option weight is 2.0",
    "monai.losses.FocalLoss(use_softmax=True)": "its option use_softmax is True",
    "monai.losses.FocalLoss(gamma=-1)": "its option gamma is -1",
    "monai.losses.FocalLoss(ignore_index=0)": "its option ignore_index is 0",
    "monai.losses.DiceCELoss()": "its two parts read the outputs differently",
    "monai.losses.DiceCELoss(sigmoid=True, weight=torch.tensor([2.0]))": "its option pos_weight is a Tensor",
    "monai.losses.DiceCELoss(sigmoid=True, reduction='sum')": "its option reduction is 'sum'",
    "monai.losses.DiceFocalLoss()": "its two parts read the outputs differently",
    "monai.losses.DiceFocalLoss(sigmoid=True, weight=2.0)": "its option weight is 2.0",
    "monai.losses.DiceFocalLoss(sigmoid=True, other_act=None, reduction='none')": "its option reduction is 'none'",
    "monai.losses.MaskedDiceLoss(sigmoid=True)": "not one of the types",  # a subclass
    "monai.losses.GeneralizedDiceLoss(sigmoid=True)": "not one of the types",
}
# In float64 these compute in float32 themselves: with a float32 target, by a cast, or by a norm of the float32 target.
ROUNDED = ("BCEWithLogitsLoss", "Focal", "squared_pred=True")


def params(texts):
    return [pytest.param(text, marks=needs_monai if "monai" in text else (), id=text) for text in texts]


def build(text):
    """The criterion of a test's name: its text is the configuration that is tested."""
    old = monai is not None and tuple(map(int, monai.__version__.split(".")[:2])) < (1, 6)
    if old and any(option in text for option in ("alpha=[", "ignore_index", "soft_label")):
        pytest.skip(f"MONAI {monai.__version__} may not have this option yet")
    return eval(text, {"torch": torch, "monai": monai})


def scene(shape, seed=0, *, blobs=4, extreme=False, dtype=torch.float32):
    """Outputs, and ids with gaps, one of them 10^9; the last sample has none."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(shape, generator=generator, dtype=torch.float64) * (15 if extreme else 1.5)
    outputs = outputs.clamp(-30, 30).float().to(dtype)
    outputs.view(-1)[:2] = torch.tensor([30.0, -30.0]) if extreme else 0.0
    ids = torch.zeros(shape, dtype=torch.int64)
    for b in range(max(1, shape[0] - 1)):
        for blob in range(1, blobs + 1 + b):
            ids[b][torch.rand(shape[1:], generator=generator) < 0.06] = 10**9 if blob == 3 else 2 * blob
        ids[b].view(-1)[:3] = torch.tensor([2, 0, 4])
    return outputs, ids


SHAPES = ((3, 1, 7, 9), (2, 1, 4, 5, 6), (2, 1, 40))


def square(outputs, target):
    return ((torch.sigmoid(outputs) - target) ** 2).mean()


class Subclass(BCEWithLogitsLoss):
    pass


def value_and_gradient(call, outputs):
    outputs = outputs.clone().requires_grad_()
    value = call(outputs)
    (gradient,) = torch.autograd.grad(value.sum(), outputs)
    return value.detach(), gradient


def assert_same(call, outputs, tolerance):
    """``call(module, outputs)`` of the authors' loop and of compat: values and gradients."""
    expected, expected_gradient = value_and_gradient(lambda x: call(authors, x), outputs)
    actual, gradient = value_and_gradient(lambda x: call(compat, x), outputs)
    assert expected.isfinite().all()
    assert error(actual, expected) <= tolerance
    assert gradient.dtype == outputs.dtype
    assert relative_to_largest(gradient, expected_gradient) <= tolerance


def entry(criterion, weight=1.0, sigmoid=False):
    return {"name": "any", "loss": criterion, "weight": weight, "sigmoid": sigmoid}


def both_modes(criterion, ids):
    """The two public functions for one criterion."""
    return (
        lambda module, x: module.compute_blob_loss_multi(criterion, x, ids),
        lambda module, x: module.compute_no_masking_multi(criterion, x, ids),
    )
