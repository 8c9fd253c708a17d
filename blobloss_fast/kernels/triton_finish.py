"""The finish in Triton: from the table of sums to the loss and to its gradient, ``finish.py`` in one launch, in double.

Every pair (a sample and a class) has up to ``MOST_CHUNKS`` programs. Each adds up its pair's table by itself, which is
cheaper than to wait for others, and then evaluates a share of the pair's instances, a tile at a time. What it finds of
the loss and of the background's gradient it leaves in a slot of its own; the program that is done last adds up the
slots in their order, so that the result does not depend on the order of the programs.

One loop serves every criterion, whose rows are vectors of coefficients on the device, and one compiled kernel all that
have as many features: another weight, or another criterion, compiles nothing.

Bytes: the table once for every program of its pair, and once more; counts and gradient written. With some 50 instances
nothing of that counts: one tile, and the chain of loads that wait for one another, perhaps 6 us. Every program also
asks every pair whether it has instances, one after the other, perhaps 2 us each: a few pairs are meant, not hundreds.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .finish import LossSpec
from .layout import ZONES
from .triton_coefficients import Coefficients, coefficients, in_two
from .triton_domains import (
    evaluate,
    evaluate_instances,
    is_finite,
    poison_of_sums,
    read_bits,
    store_cells,
    terms_of_pair,
    weights_of,
)
from .triton_launch import compute_dtype, divide_up, padded_stats
from .triton_table import DONE, HEAD

MOST_CHUNKS = 16
LANES = {1: 1024, 2: 512, 4: 256, 8: 64}  # instances of a tile, by padded stats: what fits into the registers
NUM_WARPS = 8
MAX_REGISTERS = 255

_DONE = tl.constexpr(DONE)
_MOST_CHUNKS = tl.constexpr(MOST_CHUNKS)

# Argument lists this long fill lines instead of making columns.
# fmt: off


@triton.jit
def _add_up(
    slots_ptr, value_ptr, out_ptr, poison, num_pairs, num_chunks, num_cells, stat, used, NUM_FEATURES: tl.constexpr,
    STATS: tl.constexpr, HAS_TARGET: tl.constexpr, REDUCTION: tl.constexpr, FROM_TABLE: tl.constexpr,
    GRADIENT: tl.constexpr
):
    """What all programs have found; it lies in the L2 cache, and nowhere nearer."""
    SLOTS: tl.constexpr = 2 + 3 * STATS
    scalar = tl.zeros([1, 1], tl.int32)
    main = tl.zeros([1, 1], tl.float64)
    blob = tl.zeros([1, 1], tl.float64)
    program = tl.arange(0, _MOST_CHUNKS)[None, :]
    there = program < num_chunks
    for q in range(num_pairs):
        cell = (tl.zeros([1, 1], tl.int64) + q) * num_cells
        slot_ptrs = slots_ptr + q * num_chunks * SLOTS
        main_of_pair = tl.load(slot_ptrs + scalar, cache_modifier=".cg")
        blobs = tl.load(slot_ptrs + 1 + program * SLOTS, mask=there, other=0.0, cache_modifier=".cg")
        blob_of_pair = tl.sum(blobs, 1)[:, None]
        main += main_of_pair
        blob += blob_of_pair
        if REDUCTION == "none" and FROM_TABLE:
            value = (main_of_pair + blob_of_pair + poison).to(value_ptr.dtype.element_ty)
            tl.store(value_ptr + q + scalar, value)
        if GRADIENT:
            slope_ptrs = slot_ptrs + 2 + program * SLOTS + stat
            slopes = tl.load(slope_ptrs, mask=(there & used).to(tl.int1), other=0.0, cache_modifier=".cg")
            slopes = tl.sum(slopes, 1)[:, None] + poison
            main_slope0 = tl.load(slot_ptrs + 2 + STATS + stat, cache_modifier=".cg")
            store_cells(out_ptr, cell, stat, main_slope0 + slopes, used, NUM_FEATURES)
            if HAS_TARGET:
                main_slope1 = tl.load(slot_ptrs + 2 + 2 * STATS + stat, cache_modifier=".cg")
                store_cells(out_ptr, cell + 1, stat, main_slope1 + slopes, used, NUM_FEATURES)
    if FROM_TABLE:
        if REDUCTION == "terms":
            tl.store(value_ptr + scalar, (main + poison).to(value_ptr.dtype.element_ty))
            tl.store(value_ptr + 1 + scalar, (blob + poison).to(value_ptr.dtype.element_ty))
        elif (REDUCTION == "mean") | (REDUCTION == "sum"):
            tl.store(value_ptr + scalar, (main + blob + poison).to(value_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=[
    "partial_offset", "rows_offset", "num_pairs", "num_channels", "num_cells", "num_chunks", "num_main", "num_blob",
    "num_empty", "main_terms", "first_channel"
])
def finish_kernel(
    table_ptr, real_ptr, counts_ptr, sums_ptr, weights_ptr, grad_ptr, rows_ptr, value_ptr, out_ptr, partial_offset,
    rows_offset, num_pairs, num_channels, num_cells, num_chunks, num_main, num_blob, num_empty, main_terms,
    first_channel, main_weight, main_weight_rest, blob_weight, blob_weight_rest,
    NUM_FEATURES: tl.constexpr, STATS: tl.constexpr, LANES: tl.constexpr, HAS_TARGET: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, MASKING: tl.constexpr, REDUCTION: tl.constexpr, FROM_TABLE: tl.constexpr
):
    """FROM_TABLE: fill value, counts and ``out``: the gradient of the sums, or the sums where that has to wait.

    Otherwise read counts and sums as that left them, and fill ``out`` with the gradient, given that of the value.

    table, real: the table twice, as integers and as doubles, with a slot per program behind it; without FROM_TABLE it
    has no cells. rows: the coefficients, from an offset on. Floats arrive in float32: a weight, and what that leaves
    over.
    """
    AVERAGED: tl.constexpr = (REDUCTION == "mean") | (REDUCTION == "terms")
    GRADIENT: tl.constexpr = (not FROM_TABLE) or (REDUCTION != "terms" and REDUCTION != "instances")
    ZONES: tl.constexpr = MASKING == "zones"
    BITS: tl.constexpr = 2 if HAS_TARGET else 1
    program = tl.program_id(0)
    pair = (program // num_chunks).to(tl.int64)
    chunk = program % num_chunks
    num_instances = num_cells // BITS - 1
    num_tiles = (num_instances + LANES - 1) // LANES
    lanes = tl.arange(0, LANES)[None, :]
    stat = tl.arange(0, STATS)[:, None]
    used = stat <= NUM_FEATURES
    one = tl.full([1, 1], 1.0, tl.float64)
    nothing = tl.zeros([STATS, 1], tl.float64)
    first_empty = num_main + num_blob
    last_empty = first_empty + num_empty
    rows_ptr += rows_offset
    per_voxel = tl.load(rows_ptr + stat)  # of a masked voxel of the others; the count's comes first
    rows_ptr += STATS
    if FROM_TABLE:
        poison = tl.load(real_ptr)
    else:
        poison = poison_of_sums(sums_ptr, num_cells.to(tl.int64) * num_pairs * NUM_FEATURES, LANES)

    # How many pairs share the blob term, and whether this one is empty.
    first_pair = pair if not AVERAGED else 0
    last_pair = pair + 1 if not AVERAGED else num_pairs
    with_blobs = 0
    is_empty = 0
    for q in range(first_pair, last_pair):
        may_be_empty = ((num_empty > 0) & (q % num_channels >= first_channel)).to(tl.int32)
        if ZONES:
            may_be_empty = may_be_empty * 0
        has_terms, found_empty = terms_of_pair(
            table_ptr, real_ptr, counts_ptr, sums_ptr, weights_ptr, pair * 0 + q, num_cells, num_instances, num_tiles,
            may_be_empty, NUM_FEATURES, HAS_TARGET, HAS_WEIGHTS, FROM_TABLE, LANES
        )
        with_blobs += has_terms
        is_empty = tl.where(q == pair, found_empty, is_empty)

    # The totals of this pair.
    total0 = tl.zeros([STATS, LANES], tl.float64)
    total1 = tl.zeros([STATS, LANES], tl.float64)
    finite = tl.zeros([STATS, LANES], tl.float64)
    bad = tl.zeros([STATS, LANES], tl.float64)
    num_bad = tl.zeros([STATS, LANES], tl.int32)
    weight = tl.zeros([1, LANES], tl.float64)
    for tile in range(num_tiles):
        ids = 1 + tile * LANES + lanes
        bit0, bit1 = read_bits(
            table_ptr, real_ptr, counts_ptr, sums_ptr, poison, pair, ids, stat, num_cells,
            (ids <= num_instances) & used, NUM_FEATURES, HAS_TARGET, FROM_TABLE
        )
        own = bit0 + bit1
        exist = tl.sum(tl.where(stat == 0, own, 0.0), 0)[None, :] > 0.0
        weight += weights_of(weights_ptr, pair, ids, num_instances, exist, HAS_WEIGHTS)
        total0 += bit0
        total1 += bit1
        if MASKING == "none":
            is_bad = is_finite(own) == 0
            finite += tl.where(is_bad, 0.0, own)
            bad += tl.where(is_bad, own, 0.0)
            num_bad += is_bad.to(tl.int32)
    negative = tl.sum(total0, 1)[:, None]
    positive = tl.sum(total1, 1)[:, None]
    others = tl.sum(tl.where(stat == 0, negative + positive, 0.0), 0)[None, :]  # voxels of all instances
    background0, background1 = read_bits(
        table_ptr, real_ptr, counts_ptr, sums_ptr, poison, pair, stat * 0, stat, num_cells, used, NUM_FEATURES,
        HAS_TARGET, FROM_TABLE
    )
    background = background0 + background1
    if HAS_TARGET:
        negative += background0
        positive += background1
    else:
        negative += background
    total_weight = tl.sum(tl.sum(weight, 1), 0)
    total_weight = tl.where(total_weight > 0.0, total_weight, 1.0)

    main_scale = one * main_weight + main_weight_rest
    blob_scale = one * blob_weight + blob_weight_rest
    if AVERAGED:
        main_scale = main_scale / main_terms.to(tl.float64)
        blob_scale = blob_scale / tl.maximum(with_blobs, 1).to(tl.float64)
    main_grad = main_scale
    blob_grad = blob_scale
    if REDUCTION == "instances":  # neither of these is one
        main_grad = main_scale * 0.0
        blob_grad = blob_scale * 0.0
    elif REDUCTION == "terms" and not FROM_TABLE:
        main_grad = main_scale * tl.load(grad_ptr).to(tl.float64)
        blob_grad = blob_scale * tl.load(grad_ptr + 1).to(tl.float64)

    # The main term, and what stands for the instances of a pair without any.
    inhabited = tl.sum(tl.where(stat == 0, positive + negative, 0.0), 0)[None, :] > 0.0
    main, main_slope1, main_slope0 = evaluate(
        rows_ptr, 0, num_main, positive, negative, main_grad, inhabited, stat, STATS
    )
    value0, _, slope0 = evaluate(
        rows_ptr, first_empty, last_empty, nothing, background, blob_grad, (one > 0.0) & (is_empty != 0), stat, STATS
    )

    # The instances; where they see one another, first what slope all of them have with respect to the others.
    slopes_of_all = nothing
    finite = tl.sum(finite, 1)[:, None]
    bad = tl.sum(bad, 1)[:, None]
    num_bad = tl.sum(num_bad, 1)[:, None]
    if GRADIENT and MASKING == "none":
        _, slopes = evaluate_instances(
            table_ptr, real_ptr, counts_ptr, sums_ptr, weights_ptr, grad_ptr, rows_ptr, value_ptr, out_ptr, poison,
            pair, 0, 1, num_cells, num_instances, num_tiles, num_main, first_empty, last_empty, total_weight, blob_grad,
            background, others, finite, bad, num_bad, per_voxel, main_slope0, main_slope1, slopes_of_all, stat, used,
            NUM_FEATURES, STATS, LANES, HAS_TARGET, HAS_WEIGHTS, MASKING, REDUCTION, FROM_TABLE, GRADIENT, False
        )
        slopes_of_all = tl.sum(slopes, 1)[:, None]
    blob, slopes = evaluate_instances(
        table_ptr, real_ptr, counts_ptr, sums_ptr, weights_ptr, grad_ptr, rows_ptr, value_ptr, out_ptr, poison, pair,
        chunk, num_chunks, num_cells, num_instances, num_tiles, num_main, first_empty, last_empty, total_weight,
        blob_grad, background, others, finite, bad, num_bad, per_voxel, main_slope0, main_slope1, slopes_of_all, stat,
        used, NUM_FEATURES, STATS, LANES, HAS_TARGET, HAS_WEIGHTS, MASKING, REDUCTION, FROM_TABLE, GRADIENT, True
    )

    # The background, which is the first program's.
    is_first = chunk == 0
    of_first = used & (stat * 0 + chunk == 0)
    cell = pair * num_cells
    bit0 = background0 if HAS_TARGET else background
    if FROM_TABLE:
        tl.store(counts_ptr + cell + stat, bit0.to(tl.int64), mask=(of_first & (stat == 0)).to(tl.int1))
        if HAS_TARGET:
            tl.store(counts_ptr + cell + 1 + stat, background1.to(tl.int64), mask=(of_first & (stat == 0)).to(tl.int1))
    if not GRADIENT:
        store_cells(out_ptr, cell, stat, bit0, of_first, NUM_FEATURES)
        if HAS_TARGET:
            store_cells(out_ptr, cell + 1, stat, background1, of_first, NUM_FEATURES)

    slots_ptr = real_ptr + partial_offset
    slot_ptr = slots_ptr + program.to(tl.int64) * (2 + 3 * STATS)
    scalar = tl.zeros([1, 1], tl.int32)
    blob = tl.sum(blob, 1)[:, None] + tl.where(is_first, value0, 0.0)
    tl.store(slot_ptr + scalar, main_scale * main)
    tl.store(slot_ptr + 1 + scalar, blob_scale * blob)
    tl.store(slot_ptr + 2 + stat, tl.sum(slopes, 1)[:, None] + tl.where(is_first, slope0, 0.0))
    tl.store(slot_ptr + 2 + STATS + stat, main_slope0)
    tl.store(slot_ptr + 2 + 2 * STATS + stat, main_slope1)
    tl.debug_barrier()  # all threads have stored
    done = tl.atomic_add(table_ptr + _DONE, 1, sem="acq_rel")
    if done == num_pairs * num_chunks - 1:
        _add_up(
            slots_ptr, value_ptr, out_ptr, poison, num_pairs, num_chunks, num_cells, stat, used, NUM_FEATURES, STATS,
            HAS_TARGET, REDUCTION, FROM_TABLE, GRADIENT
        )


# ---------------------------------------------------------------- launchers


class Slots(NamedTuple):
    """How the finish divides a table: padded stats, instances of a tile, programs of a pair, and their slots."""

    stats: int
    lanes: int
    chunks: int
    doubles: int

    @staticmethod
    def of(pairs: int, instances: int, num_features: int) -> "Slots":
        stats = padded_stats(num_features)
        lanes = LANES[stats]
        chunks = min(max(divide_up(instances, lanes), 1), MOST_CHUNKS)
        return Slots(stats, lanes, chunks, pairs * chunks * (2 + 3 * stats))


def finish(
    integers: Tensor, table: Tensor, num_cells: int, slots: Slots, criterion: Coefficients, logits: Tensor,
    features: tuple[str, ...], has_target: bool, spec: LossSpec, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce the table to the loss.

    Args:
        integers: the table, as in ``triton_table``; behind it room for ``slots``, all 0, and the numbers of
            ``criterion``.
        table: the same memory as float64.

    Returns:
        The value and what the backward pass needs, as ``finish.finish``, and the counts: value, counts, saved.
    """
    device, dtype, shape = logits.device, compute_dtype(logits), (*logits.shape[:2], num_cells)
    instances = num_cells // (1 + has_target) - 1
    values = {"none": shape[:2], "terms": (2,), "instances": (*shape[:2], instances)}.get(spec.reduction, ())
    value = torch.empty(values, dtype=dtype, device=device)
    counts = torch.empty(shape, dtype=torch.int64, device=device)
    saved = torch.empty((*shape, len(features)), dtype=dtype, device=device)
    rows_offset = table.numel() - criterion.numbers.numel()
    offsets = rows_offset - slots.doubles, rows_offset
    _launch(
        integers, table, counts, table, weights, table, table, value, saved, offsets, slots, criterion, features,
        has_target, spec, True
    )
    return value, counts, saved


def finish_backward(
    grad: Tensor, counts: Tensor, saved: Tensor, features: tuple[str, ...], has_target: bool, spec: LossSpec,
    weights: Tensor | None
) -> Tensor:
    """Return the gradient with respect to the sums of the reductions that have to wait for that of their values."""
    pairs, num_cells = counts.shape[0] * counts.shape[1], counts.shape[2]
    slots = Slots.of(pairs, num_cells // (1 + has_target) - 1, len(features))
    table = torch.zeros(HEAD + slots.doubles, dtype=torch.float64, device=grad.device)
    out = torch.empty_like(saved)
    criterion = coefficients_of(spec, counts.shape[1], features, grad.device)
    _launch(
        table.view(torch.int64), table, counts, saved, weights, grad.contiguous(), criterion.numbers, out, out,
        (HEAD, 0), slots, criterion, features, has_target, spec, False
    )
    return out


def coefficients_of(spec: LossSpec, channels: int, features: tuple[str, ...], device: torch.device) -> Coefficients:
    parts = (spec.main_rows, spec.blob_rows, spec.empty_rows)
    return coefficients(spec.activation, spec.gamma, parts, spec.masking, channels, features, device)


def _launch(
    integers: Tensor, table: Tensor, counts: Tensor, sums: Tensor, weights: Tensor | None, grad: Tensor, rows: Tensor,
    value: Tensor, out: Tensor, offsets: tuple[int, int], slots: Slots, criterion: Coefficients,
    features: tuple[str, ...], has_target: bool, spec: LossSpec, from_table: bool
) -> None:
    """On the current device."""
    batch, channels, num_cells = counts.shape
    if weights is not None:
        weights = weights.contiguous()
    unused = int(spec.channel0 == "unused")
    static = _static(len(features), slots.stats, slots.lanes, has_target, spec.masking, spec.reduction, from_table)
    finish_kernel[(batch * channels * slots.chunks,)](
        integers, table, counts, sums, sums if weights is None else weights, grad, rows, value, out,
        *offsets, batch * channels, channels, num_cells, slots.chunks, *criterion.rows,
        batch * (channels - unused), int(spec.channel0 != "class"), *in_two(spec.main_weight),
        *in_two(spec.blob_weight),
        HAS_WEIGHTS=weights is not None, **static,
    )


@functools.lru_cache
def _static(
    num_features: int, stats: int, lanes: int, has_target: bool, masking: str, reduction: str, from_table: bool
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {
        "NUM_FEATURES": num_features,
        "STATS": stats,
        "LANES": lanes,
        "HAS_TARGET": has_target,
        "MASKING": masking if masking in ("none", ZONES) else "apart",
        "REDUCTION": reduction,
        "FROM_TABLE": from_table,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": False,
        **({} if torch.version.hip else {"maxnreg": MAX_REGISTERS}),  # an option that only CUDA's backend knows
    }
