"""The table of sums in plain PyTorch: the fallback on every device and the truth for every other backend.

O(voxels) time whatever the number of cells. On a CPU the volume is worked on in spans that stay in the cache: a fresh
full-size temporary costs more in page faults than in arithmetic. Cell 0, the background, owns nearly all voxels: it is
summed densely. Only the voxels of other cells are listed and scattered into the table. The list is cut into rows of a
few thousand voxels, each row adds into its own line of a small table, and the lines are summed at the end, which lets
PyTorch work on the rows in parallel. Within a line a large cell is summed as a tree: a running sum in fp32 is off by
3e-5 after 4,096 equal terms, because equal terms are all rounded the same way, and by 2e-7 after 32. No fp64 is used
for fp32 input, since not every device has it. The backward pass reads the gradient of every voxel's cell.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import NOT_A_CLASS, NOT_A_PROBABILITY, NOT_BINARY, TOO_LARGE

_SPAN_SIZE = 2**19
_ROW_ENTRIES = 4096
_PART_SIZE = 32
_LOG_FLOOR = -100.0  # of a probability, as in torch.nn.BCELoss
_SLOPE_FLOOR = 1e-12  # of p (1 - p), likewise


def segment_stats_forward(
    logits: Tensor,
    cells: Tensor,
    target: Tensor | None,
    num_cells: int,
    features: tuple[str, ...],
    activation: str,
    gamma: float,
    channel0: str,
) -> tuple[Tensor, Tensor]:
    """Sum the features over every cell.

    Args:
        logits: ``[B, C, *spatial]`` floating point, any strides.
        cells: ``[B, C or 1, *spatial]`` integers; below 0 is ignored.
        target: None, or ``[B, C or 1, *spatial]``: the cell is then ``2 * cells + bit``.
        num_cells: K, one more than the largest cell.
        features: names out of ``layout.FEATURES``.
        activation: one of ``layout.ACTIVATIONS``.
        gamma: focal exponent.
        channel0: one of ``layout.CHANNEL0``.

    Returns:
        counts int64 ``[B, C, K]`` and sums ``[B, C, K, F]`` in the compute dtype.
    """
    slots, invalid = [], []
    parts: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in features]  # the listed voxels; the others' sum
    for _, x, labels in _spans(logits, cells, target, num_cells, channel0):
        z = _pre_activation(x, activation, channel0)
        invalid.append(labels.invalid)
        if activation == "none":
            invalid.append(_check(((z < 0) | (z > 1)) & (labels.ids >= 0), NOT_A_PROBABILITY))
        index = _listed(labels)
        slots.append(_slots(labels, num_cells).index_select(0, index).to(torch.int64).add_(1 - labels.first))
        for name, (listed, rest) in zip(features, parts, strict=True):
            feature = _feature(name, z, activation, gamma).view(-1)
            listed.append(feature.index_select(0, index))
            rest.append(feature.index_fill_(0, index, 0.0).view(z.shape).sum(2))

    shape = *z.shape[:2], num_cells + 1
    num_slots = math.prod(shape) + 1  # the last for padding
    slot = _in_rows(torch.cat(slots), num_slots, num_slots - 1)
    line_counts = _add_up(slot, slot.new_ones(1, dtype=torch.int32), num_slots)
    levels = _levels(slot, line_counts)
    counts = line_counts.sum(0)[:-1].view(shape)
    counts[:, :, 1] += logits[0, 0].numel() - counts.sum(2)
    table = z.new_empty(*shape, len(features))
    for j, (listed, rest) in enumerate(parts):
        lines = _in_rows(torch.cat(listed), num_slots, 0.0)
        for place, num_places in levels:
            lines = _add_up(place, lines, num_places)
        table[..., j] = lines.sum(0)[:-1].view(shape)
        table[:, :, 1, j] += torch.stack(rest).sum(0)
    table.masked_fill_(torch.stack(invalid).any(), float("nan"))
    unused = logits.shape[1] - shape[1]
    return _with_unused(counts[:, :, 1:], unused).contiguous(), _with_unused(table[:, :, 1:], unused).contiguous()


def segment_stats_backward(
    grad_sums: Tensor,
    logits: Tensor,
    cells: Tensor,
    target: Tensor | None,
    features: tuple[str, ...],
    activation: str,
    gamma: float,
    channel0: str,
) -> Tensor:
    """Gradient of ``segment_stats_forward`` with respect to the logits; arguments as there.

    Args:
        grad_sums: ``[B, C, K, F]``, the gradient of the loss with respect to the sums.

    Returns:
        ``[B, C, *spatial]``, contiguous, in the dtype of the logits; exactly 0 where a voxel is ignored.
    """
    num_cells = grad_sums.shape[2]
    if not features:
        return torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    unused = int(channel0 == "unused")
    of_slots = [F.pad(grad_sums[:, unused:], (0, 0, first, 1 - first)).flatten(0, 2) for first in (0, 1)]
    grad = torch.empty(_flatten(logits).shape, dtype=logits.dtype, device=logits.device)
    for span, x, labels in _spans(logits, cells, target, num_cells, channel0, check=False):
        z, slot = _pre_activation(x, activation, channel0), _slots(labels, num_cells)
        coefficients = (column.index_select(0, slot).view(z.shape) for column in of_slots[labels.first].unbind(1))
        terms = map(Tensor.mul_, coefficients, _slopes(features, z, activation, gamma))
        part = _with_unused(functools.reduce(Tensor.add_, terms), unused)
        if activation == "softmax":
            part = _softmax_backward(x.to(part.dtype), part)
        if labels.first:  # a NaN that is ignored must not reach the gradient
            ignored = labels.ids < 0
            ignored = ignored.all(1, keepdim=True) if activation == "softmax" else _with_unused(ignored, unused)
            part.masked_fill_(ignored, 0.0)
        grad[:, :, span] = part
    return grad.view(logits.shape)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are computed and returned: fp64 for fp64 logits, fp32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------- cells


def _on_host(tensor: Tensor) -> bool:
    """Whether a value may be read without waiting for a device."""
    return tensor.device.type == "cpu"


def _check(wrong: Tensor, message: str) -> Tensor:
    """Raise on the CPU if anything is wrong; elsewhere return the answer, to poison the table unseen by the host."""
    found = wrong.any()
    if _on_host(found) and bool(found):
        raise ValueError(message)
    return found


class _Labels(NamedTuple):
    """The labels of some voxels, without channel 0 if that is unused."""

    ids: Tensor  # int32 or int64 [B, C, V]
    bit: Tensor | None  # whether the target is 1
    first: int  # the slot of cell 0: 1 if slot 0 is for ignored voxels, 0 if it is known that there are none
    invalid: Tensor  # bool, a scalar


def _spans(
    logits: Tensor, cells: Tensor, target: Tensor | None, num_cells: int, channel0: str, check: bool = True
) -> Iterator[tuple[slice, Tensor, _Labels]]:
    """Cut the volume into spans of voxels (on a device it is one): where, the logits ``[B, C, V]``, and the labels."""
    x, cells, target = _flatten(logits), _flatten(cells), None if target is None else _flatten(target)
    batch, channels, voxels = x.shape
    step = max(1, _SPAN_SIZE // max(1, batch * channels) if _on_host(x) else voxels)
    for start in range(0, max(1, voxels), step):
        span = slice(start, start + step)
        of_target = None if target is None else target[:, :, span]
        yield span, x[:, :, span], _read(cells[:, :, span], of_target, num_cells, channels, channel0, check)


def _read(cells: Tensor, target: Tensor | None, num_cells: int, channels: int, channel0: str, check: bool) -> _Labels:
    unused = int(channel0 == "unused")
    ids = cells.expand(-1, channels, -1)[:, unused:]
    wide = ids.dtype == torch.int64 or ids.shape[0] * channels * (num_cells + 1) >= 2**31
    ids = ids.to(torch.int64 if wide else torch.int32)
    if channel0 == "background":
        ids = ids.clone()
        ids[:, 0].clamp_(max=0)
    bit, invalid = None, torch.zeros((), dtype=torch.bool, device=ids.device)
    if target is not None:
        bit, invalid = _bits(target, ids, unused, check)
        num_cells //= 2
    low, high = ids.aminmax() if ids.numel() else ids.new_zeros(2).unbind()
    if check:
        invalid = invalid | _check(high >= num_cells, TOO_LARGE)
    return _Labels(ids, bit, int(not _on_host(low) or bool(low < 0)), invalid)


def _bits(label: Tensor, ids: Tensor, unused: int, check: bool) -> tuple[Tensor, Tensor]:
    """Return the target of every voxel, bool ``[B, C, V]``, and whether any was invalid where it is not ignored."""
    channels = ids.shape[1] + unused
    invalid = torch.zeros((), dtype=torch.bool, device=label.device)
    if label.shape[1] < channels:
        one_hot = label == torch.arange(channels, device=label.device).view(1, -1, 1)
        bit = one_hot[:, unused:]
        if check:
            invalid = _check(~one_hot.any(1, keepdim=True) & (ids >= 0), NOT_A_CLASS)
    else:
        label = label[:, unused:]
        bit = label.to(torch.bool)
        if check and not (_on_host(label) and torch.equal(label, bit.to(label.dtype))):
            invalid = _check((label != bit) & (ids >= 0), NOT_BINARY)
    return bit, invalid


def _slots(labels: _Labels, num_cells: int) -> Tensor:
    """Return the slot of every voxel, int32 or int64 ``[B * C * V]``: the cells of all samples and channels in one row.

    Every sample and channel has one slot more than cells: one for ignored voxels, or one that stays empty.
    So ids of one sample and channel are slots as they are, if nothing is ignored and there is no target.
    """
    slot, bit, first, _ = labels
    if first:
        slot = slot.clamp(-1, num_cells // (1 if bit is None else 2) - 1)
    if bit is not None:
        slot = (2 * slot).add_(bit)
    if first:
        slot.clamp_(min=-1).add_(1)
    batch, channels, _ = slot.shape
    if batch * channels > 1:
        rows = torch.arange(batch * channels, dtype=slot.dtype, device=slot.device).view(batch, channels, 1)
        slot = slot + (num_cells + 1) * rows
    return slot.flatten()


def _listed(labels: _Labels) -> Tensor:
    """Return where the voxels of other cells than 0 are in ``[B * C * V]``; where all are, if counting is a wait.

    Where more than a tenth of a mask is set, NumPy lists it without branches, in a time that does not depend on it. Its
    loop for emptier masks is slower than that if they are scattered: hence the padding.
    """
    ids, bit, *_ = labels
    voxels, padding = ids.numel(), ids.numel() // 8
    if not _on_host(ids):
        return torch.arange(voxels, device=ids.device)
    mask = torch.ones(voxels + padding, dtype=torch.bool)
    listed = mask[:voxels].view(ids.shape).copy_(ids)
    if bit is not None:
        listed.logical_or_(bit)
    index = np.flatnonzero(mask.numpy())
    return torch.from_numpy(index[: len(index) - padding])


def _flatten(volume: Tensor) -> Tensor:
    return volume.reshape(volume.shape[0], volume.shape[1], -1)


def _with_unused(tensor: Tensor, unused: int) -> Tensor:
    """Put back the channel that was left out, filled with 0."""
    return F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (unused, 0)) if unused else tensor


def _in_rows(entries: Tensor, num_slots: int, fill: float) -> Tensor:
    """Cut ``[L]`` into ``[rows, row length]``, the last row padded with ``fill``.

    Rows hold several times as many entries as there are slots, so that the table of lines stays small beside the list.
    """
    rows = max(1, len(entries) // max(_ROW_ENTRIES, 4 * num_slots))
    length = -(-len(entries) // rows)
    if rows * length > len(entries):
        entries = F.pad(entries, (0, rows * length - len(entries)), value=fill)
    return entries.view(rows, length)


def _add_up(slot: Tensor, values: Tensor, num_slots: int) -> Tensor:
    """Sum the values of every row by slot: ``[rows, num_slots]``."""
    return values.new_zeros(slot.shape[0], num_slots).scatter_add_(1, slot, values.expand(slot.shape))


def _levels(slot: Tensor, counts: Tensor) -> list[tuple[Tensor, int]]:
    """Plan the sum of a line as a tree, in which no sum has more than about ``_PART_SIZE`` terms.

    On every level a slot with many entries is split into parts, a power of two, over which a hash of the position
    spreads the entries; the parts are the entries of the next level. For each level, from the entries to the slots,
    this returns which sum an entry goes into, ``[rows, row length]``, and the number of sums.
    """
    levels = []
    num_slots, most = counts.shape[1], int(counts.max()) if _on_host(counts) else slot.shape[1]
    while most > _PART_SIZE:
        length = slot.shape[1]
        last_part = (counts - 1).clamp_(min=0).div_(_PART_SIZE, rounding_mode="floor")
        shift = 1
        while shift < (most // _PART_SIZE).bit_length():  # fill up to a power of two less one, to "and" a hash with
            last_part |= last_part >> shift
            shift *= 2
        first_part = (last_part + 1).cumsum(1) - last_part - 1
        hashed = (torch.arange(length, device=slot.device) * 0x9E3779B1) >> 13
        part = last_part.to(torch.int64).gather(1, slot).bitwise_and_(hashed).add_(first_part.gather(1, slot))
        num_parts = num_slots + 2 * length // _PART_SIZE
        levels.append((part, num_parts))
        slot = part.new_zeros(part.shape[0], num_parts).scatter_(1, first_part, 1).cumsum(1) - 1
        counts, most = last_part + 1, 2 * most // _PART_SIZE
    return [*levels, (slot, num_slots)]


# ---------------------------------------------------------------- features of one voxel


def _prob(z: Tensor, activation: str) -> Tensor:
    return z if activation == "none" else torch.sigmoid(z)


def _nll(z: Tensor, side: str, activation: str) -> Tensor:
    """-log p ("pos") or -log(1 - p) ("neg")."""
    if activation == "none":
        return -(torch.log(z) if side == "pos" else torch.log1p(-z)).clamp_min(_LOG_FLOOR)
    return -F.logsigmoid(z if side == "pos" else -z)


def _focus(z: Tensor, side: str, activation: str, gamma: float) -> Tensor:
    """The focal modulation: (1 - p)^gamma ("pos") or p^gamma ("neg")."""
    if activation == "none":
        return (1 - z if side == "pos" else z) ** gamma
    exponent = _nll(z, "neg" if side == "pos" else "pos", activation)
    return torch.exp(-gamma * exponent.clamp_max(torch.finfo(z.dtype).max))  # finite: gamma may be 0


def _feature(name: str, z: Tensor, activation: str, gamma: float) -> Tensor:
    """Return a feature as a tensor of its own, which the caller may overwrite."""
    kind, _, side = name.partition("_")
    if kind == "prob":
        p = _prob(z, activation)
        return p * p if side == "sq" else p.clone() if activation == "none" else p
    nll = _nll(z, side, activation)
    return _focus(z, side, activation, gamma) * nll if kind == "focal" else nll


def _slopes(features: tuple[str, ...], z: Tensor, activation: str, gamma: float) -> Iterator[Tensor]:
    """Yield the derivative of each feature with respect to z (to the probability for activation "none")."""
    p = _prob(z, activation)
    q = 1 - p
    for name in features:
        kind, _, side = name.partition("_")
        if kind == "prob":
            slope = torch.ones_like(p) if activation == "none" else p * q
            yield 2 * p * slope if side == "sq" else slope
            continue
        other, sign = (q, -1.0) if side == "pos" else (p, 1.0)
        d_nll = sign * (other / (p * q).clamp_min(_SLOPE_FLOOR) if activation == "none" else other)
        if kind == "nll":
            yield d_nll
            continue
        focus = _focus(z, side, activation, gamma)
        nll = _nll(z, side, activation).clamp_max(torch.finfo(z.dtype).max)  # 0 * inf is meant as 0 below
        if activation == "none":
            d_focus_nll = torch.where(nll == 0, 0.0, sign * gamma * other ** (gamma - 1) * nll)
        else:
            d_focus_nll = sign * gamma * focus * ((p if side == "pos" else q) * nll)
        yield focus * d_nll + d_focus_nll


# ---------------------------------------------------------------- softmax


def _pre_activation(x: Tensor, activation: str, channel0: str) -> Tensor:
    """The logit whose sigmoid is the probability: x itself, or for a softmax x_c - logsumexp of the other channels.

    Without channel 0 if that is unused.
    """
    unused = int(channel0 == "unused")
    x = x.to(compute_dtype(x.dtype))
    if activation == "softmax":
        x = x - (x.flip(1) if x.shape[1] == 2 else _log_others(x)[0])
    return x[:, unused:].contiguous()


def _difference(u: Tensor, w: Tensor) -> Tensor:
    """u - w, and 0 where they are equal, also at infinity."""
    return torch.where(u == w, 0.0, u - w)


def _log_others(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logsumexp over the other channels, ``[B, C, V]``, the largest logit and its channel, ``[B, 1, V]``.

    The largest channel needs the sum without itself, which is never found by a difference; for every other channel the
    difference below is harmless, since what is left of the sum is at least the largest term, 1.
    """
    largest, winner = x.max(1, keepdim=True)
    others = x.scatter(1, winner, -torch.inf)
    second = others.amax(1, keepdim=True)
    exp_others = torch.exp(_difference(others, second)).scatter_(1, winner, 0.0)
    sum_others = exp_others.sum(1, keepdim=True)
    rest = sum_others * torch.exp(_difference(second, largest)) - torch.exp(_difference(x, largest))
    log_others = (largest + torch.log1p(rest)).scatter_(1, winner, second + torch.log(sum_others))
    return log_others, largest, winner


def _softmax_backward(x: Tensor, grad_z: Tensor) -> Tensor:
    """Chain a gradient with respect to z_c = x_c - log_others_c back to the logits, in O(C)."""
    if x.shape[1] == 2:
        return grad_z - grad_z.flip(1)
    log_others, largest, winner = _log_others(x)
    share = (grad_z * torch.exp(_difference(largest, log_others))).scatter_(1, winner, 0.0)
    total = share.sum(1, keepdim=True)
    grad_winner = grad_z.gather(1, winner)
    grad = grad_z - torch.exp(_difference(x, largest)) * (total - share)
    grad -= grad_winner * torch.exp(_difference(x, log_others.gather(1, winner)))
    return grad.scatter_(1, winner, grad_winner - total)
