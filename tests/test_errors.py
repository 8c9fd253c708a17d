"""Wrong calls and the error each gets.

``python -m tests.test_errors`` prints the table of wrong calls.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from blobloss_fast import (
    BlobLoss,
    blob_loss,
    blob_loss_instances,
    blob_loss_terms,
    connected_components,
    criteria,
    segment_stats,
)

NAN, INF = float("nan"), float("inf")
LOGITS = torch.linspace(-2, 2, 32, dtype=torch.float64).reshape(2, 1, 4, 4)
MASK = torch.zeros(2, 1, 4, 4, dtype=torch.int64)
MASK[0, 0, 0, :2] = MASK[0, 0, 3, 3] = MASK[1, 0, 1:3, 2] = 1
IDS = connected_components(MASK)[0].long()
LOGITS3 = torch.cat([LOGITS, -LOGITS, LOGITS.flip(2)], 1)
CLASSES = MASK + (IDS == 2)  # a class map with 0, 1 and 2
IDS3 = torch.cat([0 * IDS, IDS * (CLASSES == 1), CLASSES // 2], 1)
LOGITS_3D, MASK_3D = LOGITS[..., None], MASK[..., None]
META = "meta"  # stands for a second device: no computer lacks it


def a_loss_function(logits: Tensor, target: Tensor) -> Tensor:
    return logits.mean()


def twice_differentiated(loss: Callable[[Tensor], Tensor]) -> None:
    leaf = LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    gradient.sum().backward()


class Case(NamedTuple):
    name: str
    call: Callable[[], Any]
    error: type[Exception]
    match: str


# One row is one line: a table is read by its columns.
# ruff: noqa: E501
# fmt: off
CASES = [
    # shape
    Case("logits without a channel axis", lambda: blob_loss(LOGITS[0, 0], MASK[0, 0]), ValueError, r"^logits must be \[B, C, \*spatial\] .*got \[4, 4\]: add a"),
    Case("logits, 0 axes", lambda: blob_loss(torch.tensor(1.0), MASK), ValueError, r"^logits must be \[B, C, \*spatial\]"),
    Case("logits, 6 axes", lambda: blob_loss(LOGITS[None, None], MASK[None, None]), ValueError, r"^logits must be .*1 to 3 spatial axes; got"),
    Case("logits without a voxel", lambda: blob_loss(LOGITS[..., :0], MASK[..., :0]), ValueError, r"^logits must have at least one voxel; got \[2, 1, 4, 0\]"),
    Case("an empty batch", lambda: blob_loss(LOGITS[:0], MASK[:0]), ValueError, r"^logits must have at least one voxel"),
    Case("no channel at all", lambda: blob_loss(LOGITS[:, :0], MASK[:, :0]), ValueError, r"^logits must have at least one voxel"),
    Case("target without a channel axis", lambda: blob_loss(LOGITS, MASK[:, 0]), ValueError, r"^target must be .*add a channel axis with target\[:, None\]"),
    Case("target without batch and channel", lambda: blob_loss(LOGITS, MASK[0, 0]), ValueError, r"^target must be .*matching logits \[2, 1, 4, 4\]; got \[4, 4\]"),
    Case("target, 0 axes", lambda: blob_loss(LOGITS, torch.tensor(1)), ValueError, r"^target must be .*got \[\]"),
    Case("target, 6 axes", lambda: blob_loss(LOGITS, MASK[None, None]), ValueError, r"^target must be .*got \[1, 1, 2, 1, 4, 4\]"),
    Case("target of another batch", lambda: blob_loss(LOGITS, MASK[:1]), ValueError, r"^target must be .*got \[1, 1, 4, 4\]"),
    Case("target of another size", lambda: blob_loss(LOGITS, MASK[..., :3]), ValueError, r"^target must be .*got \[2, 1, 4, 3\]"),
    Case("target with too many channels", lambda: blob_loss(LOGITS, MASK.expand(2, 2, 4, 4)), ValueError, r"^target must have 1 channel"),
    Case("class map with a sigmoid", lambda: blob_loss(LOGITS3, CLASSES), ValueError, r"^target must have 3 channel"),
    Case("two channels for a softmax of three", lambda: blob_loss(LOGITS3, MASK.expand(2, 2, 4, 4), activation="softmax"), ValueError, r"^target must have 1 or 3 channel"),
    Case("ids without a channel axis", lambda: BlobLoss()(LOGITS, None, IDS[:, 0]), ValueError, r"^instances must be .*add a channel axis with instances\[:, None\]"),
    Case("ids of another size", lambda: BlobLoss()(LOGITS, MASK, IDS[:, :, 1:]), ValueError, r"^instances must be .*got \[2, 1, 3, 4\]"),
    Case("one channel of ids for three classes", lambda: blob_loss(LOGITS3, instances=IDS, activation="softmax"), ValueError, r"^instances must have 3 channel"),
    Case("cells without a channel axis", lambda: segment_stats(LOGITS, IDS[:, 0], 3), ValueError, r"^cells must be .*cells\[:, None\]"),
    Case("cells with other channels", lambda: segment_stats(LOGITS3, IDS3[:, :2], 3), ValueError, r"^cells must have 1 or 3 channel"),
    Case("mask without batch and channel", lambda: connected_components(MASK[0, 0]), ValueError, r"^mask must be .*mask\[None\] or mask\[:, None\]"),
    Case("mask without a voxel", lambda: connected_components(MASK[..., :0]), ValueError, r"^mask must have at least one voxel"),
    Case("softmax of one channel", lambda: blob_loss(LOGITS, MASK, activation="softmax"), ValueError, r"^logits must have at least two channels.*use activation='sigmoid'"),
    Case("softmax of one channel in the table", lambda: segment_stats(LOGITS, IDS, 3, activation="softmax"), ValueError, r"^logits must have at least two channels"),
    # kind and dtype
    Case("integer logits", lambda: blob_loss(MASK, MASK), TypeError, r"^logits must be float16.*got torch.int64: call logits.float\(\)"),
    Case("bool logits", lambda: blob_loss(MASK.bool(), MASK), TypeError, r"^logits must be float16.*got torch.bool"),
    Case("complex logits", lambda: blob_loss(LOGITS + 0j, MASK), TypeError, r"^logits must be float16.*got torch.complex128"),
    Case("logits from NumPy", lambda: blob_loss(LOGITS.numpy(), MASK), TypeError, r"^logits must be a torch.Tensor; got ndarray: convert it with torch.from_numpy"),
    Case("a list as logits", lambda: blob_loss([0.0], MASK), TypeError, r"^logits must be a torch.Tensor; got list"),
    Case("None as logits", lambda: blob_loss(None, MASK), TypeError, r"^logits must be a torch.Tensor; got NoneType"),
    Case("sparse logits", lambda: blob_loss(LOGITS.to_sparse(), MASK), TypeError, r"^logits must be a dense tensor.*call logits.to_dense\(\)"),
    Case("complex target", lambda: blob_loss(LOGITS, MASK + 0j), TypeError, r"^target must be bool, integer or floating point; got torch.complex"),
    Case("target from NumPy", lambda: blob_loss(LOGITS, MASK.numpy()), TypeError, r"^target must be a torch.Tensor; got ndarray: convert"),
    Case("a list as target", lambda: blob_loss(LOGITS, MASK.tolist()), TypeError, r"^target must be a torch.Tensor; got list"),
    Case("sparse target", lambda: blob_loss(LOGITS, MASK.to_sparse()), TypeError, r"^target must be a dense tensor.*target.to_dense"),
    Case("bool ids", lambda: blob_loss(LOGITS, instances=IDS.bool()), TypeError, r"^instances must hold integer ids; got .*bool: pass a binary mask as target"),
    Case("float ids", lambda: blob_loss(LOGITS, instances=IDS.float()), TypeError, r"^instances must hold integer ids; got torch.float32: call instances.long\(\)"),
    Case("ids from NumPy", lambda: blob_loss(LOGITS, instances=IDS.numpy()), TypeError, r"^instances must be a torch.Tensor; got ndarray"),
    Case("sparse ids", lambda: blob_loss(LOGITS, instances=IDS.to_sparse()), TypeError, r"^instances must be a dense tensor.*instances.to_dense"),
    Case("a criterion as third argument", lambda: blob_loss(LOGITS, MASK, criteria.dice()), TypeError, r"^instances must be a torch.Tensor; got Criterion"),
    Case("float cells", lambda: segment_stats(LOGITS, IDS.float(), 3), TypeError, r"^cells must hold integer.*call cells.long\(\)"),
    Case("bool cells", lambda: segment_stats(LOGITS, IDS.bool(), 3), TypeError, r"^cells must hold integer.*got .*bool"),
    Case("mask from NumPy", lambda: connected_components(MASK.numpy()), TypeError, r"^mask must be a torch.Tensor; got ndarray"),
    Case("None as mask", lambda: connected_components(None), TypeError, r"^mask must be a torch.Tensor; got NoneType"),
    Case("complex mask", lambda: connected_components(MASK + 0j), TypeError, r"^mask must be bool, integer or floating point"),
    # device
    Case("target elsewhere", lambda: blob_loss(LOGITS, MASK.to(META)), RuntimeError, r"^target must be on the device of the logits, cpu; got meta: call target.to\(logits.device\)"),
    Case("ids elsewhere", lambda: blob_loss(LOGITS, MASK, IDS.to(META)), RuntimeError, r"^instances must be on the device of the logits, cpu; got meta"),
    Case("logits elsewhere", lambda: blob_loss(LOGITS.to(META), MASK), RuntimeError, r"^target must be on the device of the logits, meta; got cpu"),
    Case("cells elsewhere", lambda: segment_stats(LOGITS, IDS.to(META), 3), RuntimeError, r"^cells must be on the device of the logits"),
    # range
    Case("target with a 2", lambda: blob_loss(LOGITS, MASK * 2), ValueError, r"^target .*must be 0 or 1 .*threshold it .*ignore_index"),
    Case("target with a 2, and ids", lambda: blob_loss(LOGITS, MASK * 2, IDS), ValueError, r"^target .*must be 0 or 1"),
    Case("target with a 2, main term alone", lambda: blob_loss(LOGITS, MASK * 2, blob_weight=0), ValueError, r"^target .*must be 0 or 1"),
    Case("target of 0.5", lambda: blob_loss(LOGITS, MASK * 0.5), ValueError, r"^target .*must be 0 or 1"),
    Case("target of 0.5, and ids", lambda: blob_loss(LOGITS, MASK * 0.5, IDS), ValueError, r"^target .*must be 0 or 1"),
    Case("target of -1", lambda: blob_loss(LOGITS, -MASK), ValueError, r"^target .*must be 0 or 1"),
    Case("NaN in the target", lambda: blob_loss(LOGITS, MASK * NAN), ValueError, r"^target .*must be 0 or 1"),
    Case("NaN in the target, and ids", lambda: blob_loss(LOGITS, MASK * NAN, IDS), ValueError, r"^target .*must be 0 or 1"),
    Case("255 in the target, not ignored", lambda: blob_loss(LOGITS, (MASK * 255).byte()), ValueError, r"^target .*name its ignored value"),
    Case("ids as target", lambda: blob_loss(LOGITS, IDS), ValueError, r"^target .*must be 0 or 1"),
    Case("class map with C", lambda: blob_loss(LOGITS3, MASK * 3, activation="softmax"), ValueError, r"^target must be a class map with values 0 .. C-1"),
    Case("class map with C, and ids", lambda: blob_loss(LOGITS3, MASK * 3, IDS3, activation="softmax"), ValueError, r"^target must be a class map"),
    Case("class map with -1", lambda: blob_loss(LOGITS3, -MASK, activation="softmax"), ValueError, r"^target must be a class map"),
    Case("class map with 1.5", lambda: blob_loss(LOGITS3, MASK * 1.5, activation="softmax"), ValueError, r"^target must be a class map"),
    Case("one-hot with a 2", lambda: blob_loss(LOGITS3, MASK.expand(2, 3, 4, 4) * 2, activation="softmax"), ValueError, r"^target .*must be 0 or 1"),
    Case("an id beyond max_instances", lambda: blob_loss(LOGITS, instances=IDS, max_instances=1), ValueError, r"^instances .*pass a larger max_instances"),
    Case("more instances found than max_instances", lambda: blob_loss(LOGITS, MASK, max_instances=1), ValueError, r"^instances .*pass a larger max_instances"),
    Case("an id, with room for none", lambda: blob_loss(LOGITS, instances=IDS, max_instances=0), ValueError, r"^instances .*pass a larger max_instances"),
    Case("an id that wraps to an ignored one", lambda: blob_loss(LOGITS, instances=torch.full(MASK.shape, 2**63 + 1, dtype=torch.uint64)), ValueError, r"^instances"),
    Case("a cell that is num_cells", lambda: segment_stats(LOGITS, IDS, 2), ValueError, r"cells.*hold a value beyond the capacity.*num_cells"),
    Case("a probability above 1", lambda: blob_loss(LOGITS.abs(), MASK, activation="none"), ValueError, r"^logits must lie in \[0, 1\] with activation='none'.*pass activation="),
    Case("a probability below 0", lambda: segment_stats(LOGITS.clamp_max(1), IDS, 3, activation="none"), ValueError, r"^logits must lie in \[0, 1\]"),
    Case("mask with a 2", lambda: connected_components(MASK * 2), ValueError, r"mask.* must be 0 or 1.*threshold it"),
    Case("NaN in the mask", lambda: connected_components(MASK * NAN), ValueError, r"mask.* must be 0 or 1"),
    # labels missing
    Case("neither target nor instances", lambda: blob_loss(LOGITS), ValueError, r"^target or instances must be given; got neither"),
    Case("neither, for the terms", lambda: BlobLoss().terms(LOGITS), ValueError, r"^target or instances must be given"),
    Case("neither, for the instances", lambda: BlobLoss().instance_losses(LOGITS), ValueError, r"^target or instances must be given"),
    # criteria
    Case("the name of a criterion", lambda: BlobLoss("dice"), TypeError, r"^criterion must come from blobloss_fast.criteria.*got str.*compat"),
    Case("a criterion that was not called", lambda: BlobLoss(criteria.dice), TypeError, r"^criterion must come from .*criteria.dice\(\); got function"),
    Case("a module as criterion", lambda: BlobLoss(torch.nn.BCEWithLogitsLoss()), TypeError, r"^criterion must come from .*got BCEWithLogitsLoss.*compat takes arbitrary callables"),
    Case("a function as criterion", lambda: blob_loss(LOGITS, MASK, criterion=a_loss_function), TypeError, r"^criterion must come from .*got function.*compat"),
    Case("None as criterion", lambda: BlobLoss(None), TypeError, r"^criterion must come from .*got NoneType"),
    Case("a string as main criterion", lambda: BlobLoss(main_criterion="bce"), TypeError, r"^main_criterion must come from"),
    Case("two focal gammas", lambda: criteria.focal(1) + criteria.focal(2), ValueError, r"one focal gamma; got \[1.0, 2.0\]"),
    Case("two focal gammas in two terms", lambda: BlobLoss(criteria.focal(1), main_criterion=criteria.focal(2)), ValueError, r"one focal gamma; got \[1.0, 2.0\]"),
    Case("focal gamma below 0", lambda: criteria.focal(-1), ValueError, r"^gamma must be finite and at least 0; got -1"),
    Case("focal gamma as a string", lambda: criteria.focal("2"), TypeError, r"^gamma must be a number; got str"),
    Case("focal alpha above 1", lambda: criteria.focal(alpha=1.5), ValueError, r"^alpha must be in \[0, 1\] or None; got 1.5"),
    Case("focal alpha below 0", lambda: criteria.focal(alpha=-0.1), ValueError, r"^alpha must be .*got -0.1"),
    Case("focal alpha per class", lambda: criteria.focal(alpha=[0.1, 0.9]), TypeError, r"^alpha must be a number; got list"),
    Case("Tversky's alpha below 0", lambda: criteria.tversky(-0.5), ValueError, r"^alpha must be finite and at least 0"),
    Case("Tversky's beta NaN", lambda: criteria.tversky(beta=NAN), ValueError, r"^beta must be finite and at least 0; got nan"),
    Case("smoothing below 0", lambda: criteria.dice(smooth_nr=-1), ValueError, r"^smooth_nr must be finite and at least 0; got -1"),
    Case("smoothing None", lambda: criteria.jaccard(smooth_dr=None), TypeError, r"^smooth_dr must be a number; got NoneType"),
    Case("smoothing where a flag is expected", lambda: criteria.dice(1e-5), TypeError, r"^squared must be True or False; got 1e-05"),
    Case("a criterion plus a number", lambda: criteria.dice() + 1, TypeError, r"\+: 'Criterion' and 'int'"),
    Case("a criterion times a criterion", lambda: criteria.dice() * criteria.bce(), TypeError, r"^the factor of a criterion must be a number; got Criterion"),
    Case("a criterion times NaN", lambda: NAN * criteria.dice(), ValueError, r"^the factor of a criterion must be finite; got nan"),
    Case("cross entropy, softmax of three", lambda: blob_loss(LOGITS3, CLASSES, activation="softmax", criterion=criteria.cross_entropy()), ValueError, r"^cross_entropy is not available .*got 3 channels: use criteria.bce\(\)"),
    Case("cross entropy in a compound main term", lambda: blob_loss(LOGITS3, CLASSES, activation="softmax", main_criterion=criteria.dice() + criteria.cross_entropy()), ValueError, r"^cross_entropy is not available"),
    # options
    Case("main weight below 0", lambda: BlobLoss(main_weight=-1), ValueError, r"^main_weight must be finite and at least 0; got -1"),
    Case("main weight NaN", lambda: BlobLoss(main_weight=NAN), ValueError, r"^main_weight must be finite"),
    Case("main weight as a string", lambda: BlobLoss(main_weight="1"), TypeError, r"^main_weight must be a number; got str"),
    Case("blob weight infinite", lambda: BlobLoss(blob_weight=INF), ValueError, r"^blob_weight must be finite"),
    Case("blob weight a tensor", lambda: blob_loss(LOGITS, MASK, blob_weight=torch.ones(2)), TypeError, r"^blob_weight must be a number; got Tensor"),
    Case("blob weight True", lambda: BlobLoss(blob_weight=True), TypeError, r"^blob_weight must be a number; got bool"),
    Case("both weights 0", lambda: BlobLoss(main_weight=0, blob_weight=0), ValueError, r"^main_weight and blob_weight must not both be 0"),
    Case("unknown activation", lambda: BlobLoss(activation="relu"), ValueError, r"^activation must be one of 'sigmoid', 'softmax', 'none'; got 'relu'"),
    Case("activation None", lambda: BlobLoss(activation=None), ValueError, r"^activation must be one of .*got None"),
    Case("a function as activation", lambda: BlobLoss(activation=torch.sigmoid), ValueError, r"^activation must be one of"),
    Case("include_background 1", lambda: BlobLoss(include_background=1), TypeError, r"^include_background must be True or False; got 1"),
    Case("unknown masking", lambda: BlobLoss(masking="all"), ValueError, r"^masking must be one of 'exclude', 'zero_prob', 'zero_logit', 'none'; got 'all'"),
    Case("masking True", lambda: BlobLoss(masking=True), ValueError, r"^masking must be one of .*got True"),
    Case("connectivity 7", lambda: BlobLoss(connectivity=7), ValueError, r"^connectivity must be one of 4, 8, 6, 18, 26; got 7"),
    Case("connectivity as a string", lambda: BlobLoss(connectivity="26"), ValueError, r"^connectivity must be one of .*got '26'"),
    Case("connectivity as a float", lambda: connected_components(MASK, 8.0), ValueError, r"^connectivity must be .*got 8.0"),
    Case("connectivity 8 in 3D", lambda: blob_loss(LOGITS_3D, MASK_3D, connectivity=8), ValueError, r"^connectivity must be 6 or 18 or 26 in 3D; got 8"),
    Case("connectivity 6 in 2D", lambda: connected_components(MASK, 6), ValueError, r"^connectivity must be 4 or 8 or 26 in 2D; got 6"),
    Case("connectivity 8 in 1D", lambda: connected_components(MASK[..., 0], 8), ValueError, r"^connectivity must be 26 in 1D; got 8"),
    Case("unknown reduction", lambda: BlobLoss(reduction="avg"), ValueError, r"^reduction must be one of 'mean', 'none', 'sum'; got 'avg'"),
    Case("reduction None", lambda: BlobLoss(reduction=None), ValueError, r"^reduction must be one of"),
    Case("a reduction of the operator's own", lambda: BlobLoss(reduction="terms"), ValueError, r"^reduction must be one of"),
    Case("ignore_index 1.5", lambda: BlobLoss(ignore_index=1.5), TypeError, r"^ignore_index must be an integer; got float"),
    Case("ignore_index True", lambda: BlobLoss(ignore_index=True), TypeError, r"^ignore_index must be an integer; got bool"),
    Case("ignore_index beyond any dtype", lambda: BlobLoss(ignore_index=2**70), ValueError, r"^ignore_index must be"),
    Case("max_instances -1", lambda: BlobLoss(max_instances=-1), ValueError, r"^max_instances must be at least 0; got -1"),
    Case("max_instances True", lambda: BlobLoss(max_instances=True), TypeError, r"^max_instances must be an integer; got bool"),
    Case("max_instances 1.5", lambda: BlobLoss(max_instances=1.5), TypeError, r"^max_instances must be an integer; got float"),
    Case("max_instances beyond any memory", lambda: blob_loss(LOGITS, MASK, IDS, max_instances=2**62), ValueError, r"^max_instances must be"),
    Case("unknown option", lambda: BlobLoss(weights=1), TypeError, r"unexpected keyword argument 'weights'"),
    Case("unknown option of the terms", lambda: blob_loss_terms(LOGITS, MASK, weights=1), TypeError, r"^unknown option weights; the options are criterion, "),
    Case("an option by position", lambda: BlobLoss(criteria.dice(), criteria.bce()), TypeError, r"takes from 1 to 2 positional arguments"),
    Case("num_cells 0", lambda: segment_stats(LOGITS, IDS, 0), ValueError, r"^num_cells must be at least 1; got 0"),
    Case("num_cells a float", lambda: segment_stats(LOGITS, IDS, 3.0), TypeError, r"^num_cells must be an integer; got float"),
    Case("num_cells beyond any memory", lambda: segment_stats(LOGITS, IDS, 2**62), ValueError, r"^num_cells must be"),
    Case("unknown feature", lambda: segment_stats(LOGITS, IDS, 3, ("probs",)), ValueError, r"^features must be one of 'prob', .*got 'probs'"),
    Case("features as a string", lambda: segment_stats(LOGITS, IDS, 3, "prob"), TypeError, r"^features must be a sequence of names; got 'prob': pass for example \('prob',\)"),
    Case("features None", lambda: segment_stats(LOGITS, IDS, 3, None), TypeError, r"^features must be"),
    Case("gamma below 0 in the table", lambda: segment_stats(LOGITS, IDS, 3, gamma=-1), ValueError, r"^gamma must be finite and at least 0"),
    Case("gamma NaN in the table", lambda: segment_stats(LOGITS, IDS, 3, gamma=NAN), ValueError, r"^gamma must be finite"),
    # gradients
    Case("second derivative of the loss", lambda: twice_differentiated(lambda x: blob_loss(x, MASK)), RuntimeError, r"no second derivative.*without create_graph=True"),
    Case("second derivative of the terms", lambda: twice_differentiated(lambda x: sum(blob_loss_terms(x, MASK))), RuntimeError, r"no second derivative"),
    Case("second derivative of the instances", lambda: twice_differentiated(lambda x: blob_loss_instances(x, MASK)[0].sum()), RuntimeError, r"no second derivative"),
    Case("second derivative of the table", lambda: twice_differentiated(lambda x: segment_stats(x, IDS, 3)[1].sum()), RuntimeError, r"no second derivative"),
]
# fmt: on


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wrong_call(case: Case):
    with pytest.raises(case.error, match=case.match) as caught:
        case.call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, f"not one readable line: {message}"


def test_there_are_enough_wrong_calls():
    assert len(CASES) >= 50
    assert len({case.name for case in CASES}) == len(CASES)
    assert len(_calls()) == len(set(_calls())) == len(CASES), "a wrong call is in the table twice"


ENTRIES = {
    "function": lambda *labels, **o: blob_loss(*labels, **o),
    "none": lambda *labels, **o: blob_loss(*labels, reduction="none", **o),
    "terms": lambda *labels, **o: blob_loss_terms(*labels, **o),
    "instances": lambda *labels, **o: blob_loss_instances(*labels, **o),
    "module": lambda *labels, **o: BlobLoss(**o)(*labels),
    "module terms": lambda *labels, **o: BlobLoss(**o).terms(*labels),
    "module instances": lambda *labels, **o: BlobLoss(**o).instance_losses(*labels),
    "main term alone": lambda *labels, **o: blob_loss(*labels, blob_weight=0, **o),
    "blob term alone": lambda *labels, **o: blob_loss(*labels, main_weight=0, **o),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_entry_lets_a_wrong_label_pass(entry):
    """One wrong voxel, whichever function is called, whichever term reads it, whatever other labels are given."""
    call = ENTRIES[entry]
    for wrong, dtype in (
        (2, torch.uint8),
        (-1, torch.int8),
        (255, torch.int64),
        (0.5, torch.float32),
        (NAN, torch.half),
    ):
        for place in ((0, 0, 0, 0), (1, 0, 3, 3)):  # in an instance, and in the background
            target = MASK.clone().to(dtype)
            target[place] = wrong
            for ids in (None, IDS):
                for activation in ("sigmoid", "none"):
                    with pytest.raises(ValueError, match=r"^target .*must be 0 or 1"):
                        call(LOGITS.sigmoid(), target, ids, activation=activation)
            classes = CLASSES.clone().to(dtype)
            classes[place] = 3 if wrong == 2 else wrong
            for ids in (None, IDS3):
                for include_background in (False, True):
                    with pytest.raises(ValueError, match=r"^target must be a class map"):
                        call(LOGITS3, classes, ids, activation="softmax", include_background=include_background)


# ---------------------------------------------------------------------------------------- the table, printed


def _calls() -> list[str]:
    """The wrong calls as they are written above."""
    tree = ast.parse(Path(inspect.getsourcefile(Case) or __file__).read_text(encoding="utf-8"))
    cases = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "Case"]
    return [ast.unparse(n.args[1].body) for n in cases if isinstance(n.args[1], ast.Lambda)]


def main() -> int:
    wrong = 0
    for number, (case, call) in enumerate(zip(CASES, _calls(), strict=True), 1):
        try:
            outcome = f"no error, but {case.call()!r}"
            as_expected = False
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
            as_expected = isinstance(error, case.error) and bool(re.search(case.match, str(error)))
        wrong += not as_expected
        print(f"{number:3}. {case.name}\n     {call}\n     -> {outcome}" + ("" if as_expected else "   (UNEXPECTED)"))
    print(f"{len(CASES)} wrong calls, {wrong} without the error that is expected")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
