"""The table of sums in plain PyTorch: the fallback on every device and the truth for every other backend.

O(voxels) time whatever the number of cells. Cell 0, the background, owns nearly all voxels: it is summed densely. Only
the voxels of other cells are listed and scattered into the table. The list is cut into rows of a few
thousand voxels, each row adds into its own line of a small table, and the lines are summed at the end, which lets
PyTorch work on the rows in parallel. Within a line a large cell is summed as a tree: a running sum in fp32 is off by
3e-5 after 4,096 equal terms, because equal terms are all rounded the same way, and by 2e-7 after 32. No fp64 is used
for fp32 input, since not every device has it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import NOT_A_CLASS, NOT_A_PROBABILITY, NOT_BINARY, TOO_LARGE

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
    z = _pre_activation(_flatten(logits), activation, channel0)
    batch, channels, voxels = z.shape
    listed, index, per_row, slot, invalid = _list(cells, target, num_cells, logits.shape[1], channel0)
    if activation == "none":
        valid = _flatten(cells)[:, -channels:] >= 0
        invalid = invalid | _check(((z < 0) | (z > 1)) & valid, NOT_A_PROBABILITY)
    num_slots = 1 + batch * channels * num_cells
    slot = _in_rows(slot, num_slots, 0)
    line_counts = _add_up(slot, slot.new_ones(1, dtype=torch.int32), num_slots)
    levels = _levels(slot, line_counts)

    def by_cell(lines: Tensor) -> Tensor:
        return lines[:, 1:].sum(0).view(batch, channels, num_cells)

    counts = by_cell(line_counts)
    counts[:, :, 0] += voxels - per_row.view(batch, channels)
    sums = []
    for name in features:
        feature = _feature(name, z, activation, gamma)
        entries = _in_rows(feature.flatten().index_select(0, index), num_slots, 0.0)
        for part, num_parts in levels:
            entries = _add_up(part, entries, num_parts)
        total = by_cell(entries)
        total[:, :, 0] += feature.masked_fill_(listed, 0.0).sum(2)
        sums.append(total)
    table = torch.stack(sums, -1) if sums else z.new_empty(*counts.shape, 0)
    table.masked_fill_(invalid, float("nan"))
    unused = logits.shape[1] - channels
    return _with_unused(counts, unused), _with_unused(table, unused)


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
    x = _flatten(logits)
    z = _pre_activation(x, activation, channel0)
    unused = x.shape[1] - z.shape[1]
    _, index, _, slot, _ = _list(cells, target, num_cells, x.shape[1], channel0, check=False)
    grad_sums = grad_sums[:, unused:]
    of_slots = F.pad(grad_sums.flatten(0, 2), (0, 0, 1, 0))  # 0 for what is ignored

    grad: Tensor | None = None
    grad_listed = of_slots.new_zeros(())
    for j, slope in enumerate(_slopes(features, z, activation, gamma)):
        grad_listed = grad_listed + of_slots[:, j].index_select(0, slot) * slope.flatten().index_select(0, index)
        slope.mul_(grad_sums[:, :, :1, j])
        grad = slope if grad is None else grad.add_(slope)
    if grad is None:
        return torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    grad.view(-1).index_copy_(0, index, grad_listed)
    grad = _with_unused(grad, unused)
    if activation == "softmax":
        grad = _softmax_backward(x.to(grad.dtype), grad)
    if not _on_host(slot) or bool((slot == 0).any()):  # a NaN that is ignored must not reach the gradient
        ignored = _flatten(cells) < 0
        if activation == "softmax":
            ignored = ignored[:, min(unused, ignored.shape[1] - 1) :].all(1, keepdim=True)
        grad.masked_fill_(ignored, 0.0)
    return grad.reshape(logits.shape).to(logits.dtype)


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


def _list(
    cells: Tensor, target: Tensor | None, num_cells: int, channels: int, channel0: str, check: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """List the voxels that lie in another cell than 0; all of them where counting them would be a wait.

    Channel 0 is left out if it is unused.

    Returns:
        Whether a voxel is listed, ``[B, C, V]``; the place of each in the flattened volume, ``[L]``; how many there are
        of every sample and channel, ``[B * C]``; the slot of each in a line of the table, int64 ``[L]``: 0 for what is
        ignored, then the cells of all samples and channels in their order; and whether any label was invalid.
    """
    unused = int(channel0 == "unused")
    ids = _flatten(cells).expand(-1, channels, -1)[:, unused:]
    channels, voxels = ids.shape[1:]
    listed = ids != 0
    if channel0 == "background":
        listed[:, 0] = ids[:, 0] < 0
    invalid = torch.zeros((), dtype=torch.bool, device=ids.device)
    label = one_hot = None
    if target is not None:
        label = _flatten(target)
        if label.shape[1] == 1 and channels + unused > 1:
            one_hot = label == torch.arange(channels + unused, device=label.device).view(1, -1, 1)
            if check:
                unknown = ~one_hot.any(1, keepdim=True) & (ids >= 0)
                invalid = _check(unknown, NOT_A_CLASS)
            label = None  # checked
        else:
            one_hot = label != 0
            label = label[:, unused:]
        one_hot = one_hot[:, unused:]
        listed = listed | one_hot
    if _on_host(listed):
        index = listed.flatten().nonzero().squeeze(1)
    else:
        listed = torch.ones_like(listed)
        index = torch.arange(listed.numel(), device=listed.device)

    def at(volume: Tensor) -> Tensor:
        return volume.flatten().index_select(0, index)

    cell = at(ids).to(torch.int64)
    rows = torch.arange(ids.shape[0] * channels + 1, device=index.device)  # sample and channel
    per_row = torch.searchsorted(index, rows * voxels).diff()
    row = torch.repeat_interleave(rows[:-1], per_row, output_size=len(index))
    if channel0 == "background":
        cell = torch.where(row % channels == 0, cell.clamp_max(0), cell)
    capacity = num_cells
    if one_hot is not None:
        capacity //= 2
        bit = at(one_hot)
        if check and label is not None and label.dtype != torch.bool:
            invalid = _check(bit & (at(label) != 1) & (cell >= 0), NOT_BINARY)
    if check:
        invalid = invalid | _check(cell >= capacity, TOO_LARGE)
    cell.clamp_(-1, capacity - 1)
    slot = 1 + row * num_cells + (cell if one_hot is None else 2 * cell + bit)
    return listed, index, per_row, slot.masked_fill_(cell < 0, 0), invalid


def _flatten(volume: Tensor) -> Tensor:
    return volume.reshape(volume.shape[0], volume.shape[1], -1)


def _with_unused(tensor: Tensor, unused: int) -> Tensor:
    """Put back the channel that was left out, filled with 0."""
    return F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (unused, 0)) if unused else tensor


def _in_rows(entries: Tensor, num_slots: int, fill: float) -> Tensor:
    """Cut ``[L]`` into ``[rows, row length]``, the last row padded with ``fill``.

    Rows hold many times as many entries as there are slots, so that the table of lines stays small beside the list.
    """
    rows = max(1, len(entries) // max(_ROW_ENTRIES, 16 * num_slots))
    length = -(-len(entries) // rows)
    return F.pad(entries, (0, rows * length - len(entries)), value=fill).view(rows, length)


def _add_up(slot: Tensor, values: Tensor, num_slots: int) -> Tensor:
    """Sum the values of every row by slot: ``[rows, num_slots]``."""
    return values.new_zeros(slot.shape[0], num_slots).scatter_add_(1, slot, values.expand(slot.shape))


def _levels(slot: Tensor, counts: Tensor) -> list[tuple[Tensor, int]]:
    """Plan the sum of a line as a tree, in which no sum has more than about ``_PART_SIZE`` terms.

    On every level a slot with many entries is split into parts, a power of two, over which a hash of the position
    spreads the entries; the parts are the entries of the next level.

    Args:
        slot: of every entry, ``[rows, row length]``.
        counts: of every slot in its row, ``[rows, slots]``.

    Returns:
        For each level, from the entries to the slots: the sum that an entry goes into, and the number of sums.
    """
    levels = []
    num_slots, most = counts.shape[1], slot.shape[1]
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
