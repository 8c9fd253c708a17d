"""The authors' functions, so that one changed import makes an existing training script fast.

Same arguments and values as github.com/neuronflow/blob_loss, its surprises included. A criterion known here costs one
pass over the volume, whatever the number of blobs. Anything else runs the authors' loop, correct and slow, and a
``SlowPathWarning`` says once which criterion and why. For new code use ``BlobLoss``: it masks as the paper does.

Which path a criterion takes, with outputs ``[B, 1, *spatial]`` of float32 or float64, 1-3 spatial axes, and ids >= 0:

| criterion, by exact type | fast | loop |
|---|---|---|
| ``torch.nn.BCEWithLogitsLoss`` | ``reduction="mean"`` | other reductions, ``weight``, ``pos_weight`` |
| ``monai.losses.DiceLoss`` | ``squared_pred`` or ``jaccard``, any smoothing >= 0 | these two together; (a) |
| ``monai.losses.TverskyLoss`` | any ``alpha``, ``beta``, smoothing >= 0 | (a) |
| ``monai.losses.FocalLoss`` | any ``gamma``, a number ``alpha`` | a sequence, ``weight``, ``use_softmax``; (a) |
| ``monai.losses.DiceCELoss`` | ``sigmoid=True``, any ``lambda_*`` | ``sigmoid=False``, ``weight``, sum; (a) of Dice |
| ``monai.losses.DiceFocalLoss`` | ``sigmoid=True``, any ``lambda_*`` | ``sigmoid=False``, ``weight``; (a) of both |
| anything else: ``torch.nn.BCELoss``, a function, a subclass | | always |

(a) is ``reduction="none"``, ``other_act``, ``soft_label``, ``ignore_index``. The loop also runs for several channels,
half precision, negative ids, ids that are not whole numbers, a criterion with hooks or with attributes unknown here.
A criterion that takes probabilities (``sigmoid`` not set) is fast where its entry says ``"sigmoid": True``, and on
outputs in [0, 1]. With one channel and one sample at a time ``batch``, ``include_background``, ``to_onehot_y``,
``softmax``, ``label_smoothing`` and the class weights of ``DiceLoss`` change nothing, in MONAI neither.

What differs from the authors' code on purpose:

1. Without any blob the blob loss is a 0 that is connected to the outputs (theirs: the Python int 0, no ``backward``).
2. Weights that select no term (0 and 0, negative, NaN) raise ValueError (theirs: UnboundLocalError).
3. Only an error that an int target can cause leads to the second call with a float target (theirs: any exception).
4. A masked voxel is not read, so an infinite or NaN output harms only the terms it belongs to (theirs: ``inf * 0``).

Less of a difference: the loss of float64 outputs is float64 on the fast path, where ``BCEWithLogitsLoss`` (float32
target) and MONAI's ``FocalLoss`` round to float32; and the fast path has no second derivative (a function around the
criterion selects the loop, which has).

Reference: Kofler et al., arXiv 2205.08209, and the code they published with it.
"""

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import criteria
from .functional import blob_loss, blob_loss_instances

Loss = Callable[[Tensor, Tensor], Any]
Entries = Mapping[str, Mapping[str, Any]]


class SlowPathWarning(UserWarning):
    """A criterion runs as a loop over the blobs: the result is right, the time grows with their number."""


def compute_loss(
    blob_loss_dict: Mapping[str, Any],
    criterion_dict: Entries,
    blob_criterion_dict: Entries,
    raw_network_outputs: Tensor,
    binary_label: Tensor,
    multi_label: Tensor,
) -> tuple[Any, Any, Any]:
    """Compute the main term, the blob term and their weighted sum.

    If one weight is 0, the loss is the other term alone, and *its weight is not applied*, as in the authors' code.

    Args:
        blob_loss_dict: ``{"main_weight": float, "blob_weight": float}``, one of them positive, none negative.
        criterion_dict: the main term, see ``compute_compound_loss``.
        blob_criterion_dict: the blob term, likewise.
        raw_network_outputs: floating point ``[B, C, *spatial]``, before the sigmoid.
        binary_label: what the main criteria take, usually ``[B, C, *spatial]`` of 0 and 1.
        multi_label: ``[B, 1, *spatial]`` instance ids, 0 the background; need not agree with ``binary_label``.

    Returns:
        ``(loss, main_loss, blob_loss)``, the terms unweighted; one with weight 0 is not computed, but the int 0.

    Raises:
        ValueError: if the weights are 0 and 0, or negative, or NaN.

    Synchronises: reads the smallest and the largest id, and with the loop every id.

    Example:
        >>> import torch
        >>> bce = {"bce": {"name": "bce", "loss": torch.nn.BCEWithLogitsLoss(), "weight": 1.0, "sigmoid": False}}
        >>> ids = torch.tensor([[[[1, 1, 0, 0], [0, 0, 0, 2]]]])
        >>> weights = {"main_weight": 1, "blob_weight": 2}
        >>> loss, main, blob = compute_loss(weights, bce, bce, torch.zeros(1, 1, 2, 4), (ids > 0).float(), ids)
        >>> f"{main:.4f} + 2 * {blob:.4f} = {loss:.4f}"
        '0.6931 + 2 * 0.6931 = 2.0794'
    """
    main_weight, blob_weight = blob_loss_dict["main_weight"], blob_loss_dict["blob_weight"]
    if not (main_weight >= 0 and blob_weight >= 0 and main_weight + blob_weight > 0):
        weights = f"got {main_weight} and {blob_weight}"
        raise ValueError(f"main_weight and blob_weight must not be negative, and one of them positive; {weights}")
    outputs = raw_network_outputs
    main = compute_compound_loss(criterion_dict, outputs, binary_label) if main_weight > 0 else 0
    blob = compute_compound_loss(blob_criterion_dict, outputs, multi_label, True) if blob_weight > 0 else 0
    if main_weight > 0 and blob_weight > 0:
        return main * main_weight + blob * blob_weight, main, blob
    return main if main_weight > 0 else blob, main, blob


def compute_compound_loss(
    criterion_dict: Entries,
    raw_network_outputs: Tensor,
    label: Tensor,
    blob_loss_mode: bool = False,
    masked: bool = True,
) -> Any:
    """Compute the weighted sum of several criteria, over the volume or over its blobs.

    Known criteria that read the outputs and the masked voxels in the same way share one pass over the volume.

    Args:
        criterion_dict: entries ``{"name": str, "loss": callable(outputs, label), "weight": float, "sigmoid": bool}``;
            ``"sigmoid": True`` applies a sigmoid to the outputs first, and so turns what a masked voxel counts as from
            logit 0 (probability 1/2) into probability 0.
        raw_network_outputs: floating point ``[B, C, *spatial]``, before the sigmoid.
        label: what the criteria take, or instance ids ``[B, 1, *spatial]`` with ``blob_loss_mode``.
        blob_loss_mode: False calls each criterion once; True is ``compute_blob_loss_multi`` for each.
        masked: False is ``compute_no_masking_multi`` for each instead.

    Returns:
        Scalar; the int 0 where ``criterion_dict`` is empty.

    Raises:
        ValueError: if ``blob_loss_mode`` or ``masked`` is neither True nor False (theirs: UnboundLocalError).

    Synchronises: with ``blob_loss_mode`` as ``compute_loss``.
    """
    for name, flag in (("blob_loss_mode", blob_loss_mode), ("masked", masked)):
        if flag not in (False, True):
            raise ValueError(f"{name} must be True or False; got {flag!r}")
    outputs = raw_network_outputs
    entries = [(entry["loss"], entry["weight"], entry["sigmoid"] in (True,)) for entry in criterion_dict.values()]
    if blob_loss_mode:
        return sum(_blob_losses(entries, outputs, label, bool(masked)))
    return sum(loss(outputs.sigmoid() if sigmoid else outputs, label) * weight for loss, weight, sigmoid in entries)


def compute_blob_loss_multi(criterion: Loss, network_outputs: Tensor, multi_label: Tensor) -> Any:
    """Compute the blob loss: the mean over samples that have blobs of the mean over their blobs.

    Blob k's loss is ``criterion(outputs * keep, label == k)``, where ``keep`` is 0 on the voxels of all other blobs:
    they still count, as background. In this package's words that is ``masking="zero_logit"`` if the criterion applies
    the sigmoid, ``"zero_prob"`` if the outputs are probabilities. A negative id is a blob, and background for others.

    Args:
        criterion: callable ``(outputs [1, C, *spatial], label)``, called with an int32 label, and with float32 if it
            raises TypeError, ValueError, RuntimeError or AssertionError.
        network_outputs: floating point ``[B, C, *spatial]``.
        multi_label: instance ids ``[B, 1, *spatial]`` of any dtype, 0 the background; gaps are fine.

    Returns:
        Scalar (with a criterion that does not reduce: what it returns); a connected 0 where there is no blob.

    Synchronises: as ``compute_loss``.
    """
    return _blob_losses([(criterion, 1, False)], network_outputs, multi_label, True)[0]


def compute_no_masking_multi(criterion: Loss, network_outputs: Tensor, multi_label: Tensor) -> Any:
    """Compute the blob loss without masking: the other blobs stay in, as background (an ablation of the paper).

    The authors' value is kept, and it is not a plain mean: blob losses ``l_1, l_2, ...`` in ascending order of the ids
    give running means ``(l_1 + ... + l_k) / k``; the result is the mean of the running means of all samples, so early
    ids weigh more. A negative id adds one, at id 0. Arguments and result: as ``compute_blob_loss_multi``.
    """
    return _blob_losses([(criterion, 1, False)], network_outputs, multi_label, False)[0]


def get_loss_value(loss: Any) -> Any:
    """Return a loss as a Python number: the int 0 for 0, else ``loss.item()``. Synchronises."""
    return 0 if loss == 0 else loss.item()


# ---------------------------------------------------------------- the two paths


@dataclass(frozen=True)
class _Pass:
    """One pass over the volume: coefficient rows, and how the outputs and the masked voxels are read."""

    rows: criteria.Criterion
    logits: bool  # the criterion applies a sigmoid
    sigmoid: bool = False  # the entry asks for a sigmoid

    def join(self, other: _Pass) -> _Pass | None:
        """Return both in one, or None: a pass reads its input and its masked voxels in one way and has one gamma."""
        if len({self.rows.gamma, other.rows.gamma} - {None}) > 1 or replace(self, rows=other.rows) != other:
            return None
        return replace(self, rows=self.rows + other.rows)


class _Refused(Exception):
    """Why a criterion has to run in the loop."""


def _blob_losses(entries: list[tuple[Loss, Any, bool]], outputs: Tensor, label: Tensor, masked: bool) -> list[Any]:
    """Return the weighted losses of (criterion, weight, sigmoid) entries, those that share a pass already added up."""
    losses: list[Any] = []
    passes: list[_Pass] = []
    inputs = None
    for criterion, weight, sigmoid in entries:
        try:
            entry = replace(_translate(criterion), sigmoid=sigmoid)
            inputs = inputs or _fast_inputs(outputs, label)
            if not (entry.logits or sigmoid) and not ((outputs >= 0) & (outputs <= 1)).all():
                raise _Refused('it takes probabilities, the outputs are not (should its entry say "sigmoid": True?)')
        except _Refused as refusal:
            named = criterion if hasattr(criterion, "__qualname__") else type(criterion)
            _warn_slow(f"{named.__module__}.{named.__qualname__}", str(refusal))
            losses.append(_loop(criterion, torch.sigmoid(outputs) if sigmoid else outputs, label, masked) * weight)
            continue
        if weight not in _FINITE:  # a tensor may be learned, so it stays outside of the rows
            losses.append(_run(entry, *inputs, masked) * weight)
            continue
        entry = replace(entry, rows=float(weight) * entry.rows)
        for i, other in enumerate(passes):
            if (joined := other.join(entry)) is not None:
                passes[i] = joined
                break
        else:
            passes.append(entry)
    if inputs is not None:
        losses += [_run(entry, *inputs, masked) for entry in passes]
    return losses


def _run(entry: _Pass, outputs: Tensor, ids: Tensor, largest_id: int | None, masked: bool) -> Tensor:
    """The fast path: the blob term of this package with the authors' masking."""
    if entry.logits and entry.sigmoid:  # one each, for instance BCEWithLogitsLoss with "sigmoid": True
        outputs = torch.sigmoid(outputs)
    options: dict[str, Any] = {"criterion": entry.rows, "max_instances": largest_id}
    options["activation"] = "sigmoid" if entry.logits or entry.sigmoid else "none"
    if masked:
        masking = "zero_logit" if entry.logits else "zero_prob"
        return blob_loss(outputs, instances=ids, main_weight=0.0, masking=masking, **options)
    losses, blobs = blob_loss_instances(outputs, instances=ids, masking="none", **options)
    present = blobs > 0  # in ascending order of the ids; where there is no blob the loss is 0
    running_means = losses.cumsum(-1) / present.cumsum(-1).clamp(min=1)
    return torch.where(present, running_means, 0).sum() / present.sum().clamp(min=1)


def _loop(criterion: Loss, outputs: Tensor, label: Tensor, masked: bool) -> Any:
    """The authors' algorithm: one criterion call per blob, any criterion, any channels."""
    zero = torch.zeros((), dtype=outputs.dtype, device=outputs.device)
    means: list[Any] = []
    for b in range(label.shape[0]):
        output, ids = outputs[b : b + 1], label[b : b + 1]
        total, count, running_means = 0, 0, []
        for blob in torch.unique(ids).tolist():
            if blob != 0:
                is_blob = ids == blob
                # `where` and not a product with the mask: inf * 0 is NaN.
                kept = torch.where(is_blob | ~(ids > 0), output, zero) if masked else output
                total, count = total + _call(criterion, kept, is_blob), count + 1
            if count:  # at id 0 too, if a negative one came before it
                running_means.append(total / count)
        means += running_means[-1:] if masked else running_means
    return sum(means) / len(means) if means else outputs[:0].sum()


def _call(criterion: Loss, output: Tensor, is_blob: Tensor) -> Any:
    """Call the criterion with an int target, and with a float target if that is not to its taste."""
    try:
        return criterion(output, is_blob.int())
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AssertionError):
        return criterion(output, is_blob.float())


@functools.cache  # once per criterion and reason; where warnings are errors it is not cached, and raised again
def _warn_slow(name: str, reason: str) -> None:
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__") == __name__:
        level, frame = level + 1, frame.f_back
    warnings.warn(f"{name} loops over the blobs, correct but slow: {reason}", SlowPathWarning, stacklevel=level)


# ---------------------------------------------------------------- which path: what is below raises _Refused


def _fast_inputs(outputs: Tensor, label: Tensor) -> tuple[Tensor, Tensor, int | None]:
    """Return outputs, integer ids, and the largest id if the table has room for it."""
    for name, tensor in (("outputs", outputs), ("label", label)):
        if type(tensor) not in (Tensor, torch.nn.Parameter, _loaded("monai.data.meta_tensor", "MetaTensor")):
            raise _Refused(f"the {name} are a {type(tensor).__qualname__}")
    outputs, label = outputs.as_subclass(Tensor), label.as_subclass(Tensor).detach()
    if outputs.dtype not in (torch.float32, torch.float64):
        raise _Refused(f"the outputs are {outputs.dtype} (`.float()` makes it fast)")
    if not 3 <= outputs.ndim <= 5 or outputs.shape[1] != 1:
        raise _Refused("the outputs are not [B, 1, *spatial], with one channel and one to three spatial axes")
    if label.shape != outputs.shape or label.device != outputs.device or outputs.numel() == 0:
        raise _Refused("outputs and label differ in shape or device, or are empty")
    ids = label
    if label.dtype == torch.bool or label.is_floating_point():
        ids = label.to(torch.int64)
        if not torch.equal(ids.to(label.dtype), label):
            raise _Refused("an id is not a whole number")
    elif label.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise _Refused(f"the label is {label.dtype}")
    lowest, largest = torch.stack(ids.aminmax()).tolist()
    if lowest < 0:
        raise _Refused("an id is negative, which makes it a blob of its own")
    return outputs, ids, largest if largest <= outputs[0].numel() else None


class _Between(NamedTuple):
    low: float
    high: float
    optional: bool = False

    def __contains__(self, value: object) -> bool:
        if value is None:
            return self.optional
        return isinstance(value, int | float) and math.isfinite(value) and self.low <= value <= self.high


# The values that an attribute of a criterion may have. One that is not listed is refused: a later release may have
# added it. One that is listed may be missing: an earlier release did not have it.
_FINITE, _AMOUNT = _Between(-math.inf, math.inf), _Between(0, math.inf)
_ANY, _NONE, _OFF, _FLAG, _REDUCED = None, (None,), (False,), (False, True), ("mean", "sum")
_Options = dict[str, "Container[Any] | None"]
_CHANNELS: _Options = {"include_background": _ANY, "to_onehot_y": _ANY, "ignore_index": _NONE, "reduction": _REDUCED}
_OVERLAP: _Options = {**_CHANNELS, "softmax": _ANY, "sigmoid": _FLAG, "other_act": _NONE, "soft_label": _OFF}
_OVERLAP |= {"batch": _ANY, "smooth_nr": _AMOUNT, "smooth_dr": _AMOUNT}
_FOCAL: _Options = {**_CHANNELS, "gamma": _AMOUNT, "alpha": _Between(0, 1, optional=True), "use_softmax": _OFF}
_PARTS: _Options = {"reduction": _ANY, "dice": _ANY, "lambda_dice": _AMOUNT, "old_pt_ver": _OFF}  # torch < 1.10
_DICE_CE: _Options = {**_PARTS, "lambda_ce": _AMOUNT, "cross_entropy": _ANY, "binary_cross_entropy": _ANY}
_BCE: _Options = {"reduction": ("mean",), "weight": _NONE, "pos_weight": _NONE}
_KNOWN: dict[str, tuple[str, _Options]] = {
    "BCEWithLogitsLoss": ("torch.nn.modules.loss", _BCE),
    "DiceLoss": ("monai.losses.dice", {**_OVERLAP, "squared_pred": _FLAG, "jaccard": _FLAG, "class_weight": _ANY}),
    "TverskyLoss": ("monai.losses.tversky", {**_OVERLAP, "alpha": _AMOUNT, "beta": _AMOUNT}),
    "FocalLoss": ("monai.losses.focal_loss", {**_FOCAL, "weight": _NONE, "class_weight": _NONE}),
    "DiceCELoss": ("monai.losses.dice", _DICE_CE),
    "DiceFocalLoss": ("monai.losses.dice", {**_PARTS, "lambda_focal": _AMOUNT, "focal": _ANY, "to_onehot_y": _ANY}),
}


def _loaded(module: str, name: str) -> Any:
    """Return a class if somebody has imported it: MONAI is never imported here."""
    return getattr(sys.modules.get(module), name, None)


def _translate(criterion: Any) -> _Pass:
    """Return the criterion as coefficient rows, by exact type and configuration."""
    kind = type(criterion).__qualname__
    module, options = _KNOWN.get(kind, ("", {}))
    if _loaded(module, kind) is not type(criterion):
        raise _Refused("it is not one of the types with a fast path")
    _check_options(criterion, options)
    if kind == "BCEWithLogitsLoss":
        return _Pass(criteria.bce(), logits=True)
    if kind == "FocalLoss":
        return _Pass(criteria.focal(float(criterion.gamma), getattr(criterion, "alpha", None)), logits=True)
    if kind in ("DiceCELoss", "DiceFocalLoss"):  # with one channel the cross-entropy is the binary one
        ce = kind == "DiceCELoss"
        dice, other = _translate(criterion.dice), _translate(criterion.binary_cross_entropy if ce else criterion.focal)
        weight = float(criterion.lambda_ce if ce else criterion.lambda_focal)
        if dice.logits != other.logits:
            raise _Refused("with sigmoid=False its two parts read the outputs differently")
        return replace(dice, rows=float(criterion.lambda_dice) * dice.rows + weight * other.rows)

    smooth_nr, smooth_dr = float(criterion.smooth_nr), float(criterion.smooth_dr)
    if kind == "TverskyLoss":
        rows = criteria.tversky(float(criterion.alpha), float(criterion.beta), smooth_nr, smooth_dr)
    elif not criterion.jaccard:
        rows = criteria.dice(bool(criterion.squared_pred), smooth_nr, smooth_dr)
    elif not criterion.squared_pred:
        rows = criteria.jaccard(smooth_nr, smooth_dr)
    else:
        raise _Refused("it has jaccard together with squared_pred")
    return _Pass(rows, logits=bool(criterion.sigmoid))


def _check_options(criterion: Any, known: _Options) -> None:
    inside = vars(criterion)
    if any(inside[f"_{kind}_hooks"] for kind in ("forward", "forward_pre", "backward", "backward_pre")):
        raise _Refused("it has hooks")
    state = {name: value for name, value in inside.items() if not name.startswith("_") and name != "training"}
    for name, value in {**state, **inside["_parameters"], **inside["_buffers"], **inside["_modules"]}.items():
        if name not in known:
            raise _Refused(f"its attribute {name!r} is not known here")
        allowed, plain = known[name], isinstance(value, str | int | float | None)
        if allowed is not None and not (plain and value in allowed):
            raise _Refused(
                f"its option {name} is {value!r}" if plain else f"its option {name} is a {type(value).__name__}"
            )
