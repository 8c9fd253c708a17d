"""The table of sums in plain PyTorch: the fallback on every device and the truth for every other backend.

O(voxels) time whatever the number of cells. The volume is cut into rows of a few thousand voxels, each row adds into
its own line of a small table, and the lines are summed at the end, which lets PyTorch work on the rows in parallel.
Within a line a large cell is summed as a tree: a running sum in fp32 is off by 3e-5 after 4,096 equal terms, because
equal terms are all rounded the same way, and by 2e-7 after 32. No fp64 is used for fp32 input, since not every device
has it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import NOT_A_CLASS, NOT_A_PROBABILITY, NOT_BINARY, TOO_LARGE

_ROW_VOXELS = 4096
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
    x = _flatten(logits).to(compute_dtype(logits.dtype))
    slot, first, invalid = _slots(cells, target, num_cells, logits.shape[1], channel0)
    z = _in_rows(_pre_activation(x, activation, channel0), num_cells, 0.5)
    if activation == "none":
        invalid = invalid | _check(((z < 0) | (z > 1)) & (slot >= first), NOT_A_PROBABILITY)

    line_counts = _add_up(slot, slot.new_ones(1, dtype=torch.int32), first + num_cells)
    levels = _levels(slot, line_counts)
    sums = []
    for name in features:
        entries = _feature(name, z, activation, gamma)
        for part, num_parts in levels:
            entries = _add_up(part, entries, num_parts)
        sums.append(entries[..., first:].sum(2))
    counts = line_counts[..., first:].sum(2)
    table = torch.stack(sums, -1) if sums else z.new_empty(*counts.shape, 0)
    table.masked_fill_(invalid, float("nan"))
    unused = logits.shape[1] - counts.shape[1]
    return _with_unused(counts, unused, 0), _with_unused(table, unused, 0.0)


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
    x = _flatten(logits).to(compute_dtype(logits.dtype))
    slot, first, _ = _slots(cells, target, num_cells, logits.shape[1], channel0, check=False)
    z = _in_rows(_pre_activation(x, activation, channel0), num_cells, 0.5)

    unused = x.shape[1] - z.shape[1]
    coefficients = F.pad(grad_sums[:, unused:], (0, 0, first, 0)).unsqueeze(2)  # 0 for what is ignored
    grad = None
    for j, slope in enumerate(_slopes(features, z, activation, gamma)):
        coefficient = coefficients[..., j].expand(-1, -1, slot.shape[2], -1).gather(3, slot)
        grad = coefficient.mul_(slope) if grad is None else grad.addcmul_(coefficient, slope)
    if grad is None:
        return torch.zeros_like(logits, memory_format=torch.contiguous_format)
    grad = _with_unused(grad.flatten(2)[..., : x.shape[2]], unused, 0.0)
    if activation == "softmax":
        grad = _softmax_backward(x, grad)
    if first:  # a NaN that is ignored must not reach the gradient
        ignored = _with_unused((slot == 0).flatten(2)[..., : x.shape[2]], unused, True)
        grad.masked_fill_(ignored.all(1, keepdim=True) if activation == "softmax" else ignored, 0.0)
    return grad.reshape(logits.shape).to(logits.dtype).contiguous()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are computed and returned: fp64 for fp64 logits, fp32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------- cells


def _check(wrong: Tensor, message: str) -> Tensor:
    """Raise on the CPU if anything is wrong; elsewhere return the answer, to poison the table unseen by the host."""
    found = wrong.any()
    if found.device.type == "cpu" and bool(found):
        raise ValueError(message)
    return found


def _slots(
    cells: Tensor, target: Tensor | None, num_cells: int, channels: int, channel0: str, check: bool = True
) -> tuple[Tensor, int, Tensor]:
    """Compose the cell of every voxel, as its slot in a line of the table.

    Returns:
        The slots, int64, in rows (without channel 0 if that is unused); the slot of cell 0, which is 1 where slot 0 is
        for ignored voxels and padding, or 0 where it is known that there are none; and whether any label was invalid.
    """
    unused = int(channel0 == "unused")
    on_host = cells.device.type == "cpu"
    capacity = num_cells if target is None else num_cells // 2
    cells = _flatten(cells)
    instances = cells[:, min(1, cells.shape[1] - 1) :] if channel0 != "class" else cells
    rows, length = _row_shape(cells.shape[2], num_cells)
    first = int(not on_host or rows * length != cells.shape[2] or bool(cells.amin() < 0))
    invalid = _check(instances.amax() >= capacity, TOO_LARGE) if check else cells.new_zeros((), dtype=torch.bool)
    slot = cells.expand(-1, channels, -1)[:, unused:].to(torch.int64, copy=True)
    if channel0 == "background":
        slot[:, 0].clamp_(max=0)
    if first:
        slot.clamp_(-1, capacity - 1)
    if target is not None:
        t = _flatten(target)
        if t.shape[1] < channels:
            one_hot = t == torch.arange(channels, device=t.device).view(1, -1, 1)
            wrong = ~one_hot.any(1, keepdim=True)
            message = NOT_A_CLASS
        else:
            one_hot = t != 0
            wrong = one_hot & (t != 1)
            message = NOT_BINARY
        if check and t.dtype != torch.bool:
            invalid = invalid | _check(wrong[:, unused * (wrong.shape[1] > 1) :] & (slot >= 0), message)
        slot.mul_(2).add_(one_hot[:, unused:])
        if first:
            slot.clamp_(min=-1)
    if first:
        slot.add_(1)
    return _in_rows(slot, num_cells, 0), first, invalid


def _flatten(volume: Tensor) -> Tensor:
    return volume.reshape(volume.shape[0], volume.shape[1], -1)


def _with_unused(tensor: Tensor, unused: int, fill: float) -> Tensor:
    """Put back the channel that was left out, filled with a constant."""
    return F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (unused, 0), value=fill) if unused else tensor


def _row_shape(voxels: int, num_cells: int) -> tuple[int, int]:
    """Return the number of rows that a volume is cut into and their length.

    Rows hold many times as many voxels as there are cells, so that the table of lines stays small beside the volume. A
    power of two divides the usual volumes; others are padded.
    """
    most_rows = max(1, voxels // max(_ROW_VOXELS, 32 * num_cells))
    rows = 1 << (most_rows.bit_length() - 1)
    return rows, -(-voxels // rows)


def _in_rows(volume: Tensor, num_cells: int, fill: float) -> Tensor:
    """Cut ``[B, C, V]`` into ``[B, C, rows, row length]``, the last row padded with ``fill``."""
    rows, length = _row_shape(volume.shape[2], num_cells)
    if rows * length != volume.shape[2]:
        volume = F.pad(volume, (0, rows * length - volume.shape[2]), value=fill)
    return volume.unflatten(2, (rows, length))


def _add_up(slot: Tensor, values: Tensor, num_slots: int) -> Tensor:
    """Sum the values of every row by slot: ``[B, C, rows, num_slots]``."""
    return values.new_zeros(*slot.shape[:3], num_slots).scatter_add_(3, slot, values.expand(slot.shape))


def _levels(slot: Tensor, counts: Tensor) -> list[tuple[Tensor, int]]:
    """Plan the sum of a line as a tree, in which no sum has more than about ``_PART_SIZE`` terms.

    On every level a slot with many entries is split into parts, a power of two, over which a hash of the position
    spreads the entries; the parts are the entries of the next level.

    Args:
        slot: of every voxel, ``[B, C, rows, row length]``.
        counts: of every slot in its row, ``[B, C, rows, slots]``.

    Returns:
        For each level, from the voxels to the slots: the sum that an entry goes into, and the number of sums.
    """
    levels = []
    num_slots, most = counts.shape[3], slot.shape[3]
    while most > _PART_SIZE:
        length = slot.shape[3]
        last_part = (counts - 1).clamp_(min=0).div_(_PART_SIZE, rounding_mode="floor")
        shift = 1
        while shift < (most // _PART_SIZE).bit_length():  # fill up to a power of two less one, to "and" a hash with
            last_part |= last_part >> shift
            shift *= 2
        first_part = (last_part + 1).cumsum(3) - last_part - 1
        hashed = (torch.arange(length, device=slot.device) * 0x9E3779B1) >> 13
        part = last_part.to(torch.int64).gather(3, slot).bitwise_and_(hashed).add_(first_part.gather(3, slot))
        num_parts = num_slots + 2 * length // _PART_SIZE
        levels.append((part, num_parts))
        slot = part.new_zeros(*part.shape[:3], num_parts).scatter_(3, first_part, 1).cumsum(3) - 1
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
    kind, _, side = name.partition("_")
    if kind == "prob":
        p = _prob(z, activation)
        return p * p if side == "sq" else p
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
    if activation != "softmax":
        return x[:, unused:]
    if x.shape[1] == 2:
        return x[:, unused:] - x.flip(1)[:, unused:]
    return (x - _log_others(x)[0])[:, unused:]


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
