"""What the Triton kernels do with one voxel: read it, find its cell, compute its features and their derivatives.

Device functions, run unchanged by Triton's interpreter, from Triton 3.3 on: no libdevice, no block pointers.
"""

import triton
import triton.language as tl

from .layout import FEATURES

# Marks in place of a cell. Ignored: counted nowhere, gradient 0. Invalid: beyond the table, or a target that is none.
IGNORED = tl.constexpr(-1)
INVALID = tl.constexpr(-2)
# What is added to it in fp32 is rounded to an integer, which its last bits then hold: 1.5 * 2^23.
_ROUNDS = tl.constexpr(12582912.0)
# Features by code: position in FEATURES plus 1.
_PROB = tl.constexpr(FEATURES.index("prob") + 1)
_PROB_SQ = tl.constexpr(FEATURES.index("prob_sq") + 1)
_NLL_POS = tl.constexpr(FEATURES.index("nll_pos") + 1)
_NLL_NEG = tl.constexpr(FEATURES.index("nll_neg") + 1)
_FOCAL_POS = tl.constexpr(FEATURES.index("focal_pos") + 1)
_FOCAL_NEG = tl.constexpr(FEATURES.index("focal_neg") + 1)


def feature_codes(features: tuple[str, ...]) -> int:
    """The features in their order as one integer, three bits each: what the kernels are specialised on."""
    return sum((FEATURES.index(name) + 1) << (3 * j) for j, name in enumerate(features))


# ---------------------------------------------------------------- loads and cells


@triton.jit
def load(ptr, lanes, remaining, TAIL: tl.constexpr):
    if TAIL:
        values = tl.load(ptr + lanes, mask=lanes < remaining, other=0)
    else:
        values = tl.load(ptr + lanes)
    return values


@triton.jit
def place(programs_of_a_row, num_channels, first, ALL: tl.constexpr):
    """Which part of which sample and channel is this program's, of the channels from the first on.

    Neighbours have the same part in all channels. ALL: a program has it in all of them itself.
    """
    at = tl.program_id(0)
    channel = at * 0 + first
    if not ALL:
        at = at // (num_channels - first)
        channel = tl.program_id(0) - at * (num_channels - first) + first
    sample = at // programs_of_a_row
    part = at - sample * programs_of_a_row
    return part.to(tl.int64), sample.to(tl.int64), channel


@triton.jit
def to_real(values):
    """Read as stored, compute in fp32 (fp64 stays fp64)."""
    if values.dtype != tl.float64:
        values = values.to(tl.float32)
    return values


@triton.jit
def load_real(ptr, lanes, remaining, TAIL: tl.constexpr):
    return to_real(load(ptr, lanes, remaining, TAIL))


@triton.jit
def load_labels(cells_ptr, target_ptr, lanes, remaining, TARGET: tl.constexpr, TAIL: tl.constexpr):
    """Ids and target as they are; without a target the ids twice."""
    ids = load(cells_ptr, lanes, remaining, TAIL)
    label = ids
    if TARGET != "none":
        label = load(target_ptr, lanes, remaining, TAIL)
    return ids, label


@triton.jit
def to_cells(
    ids, label, lanes, remaining, channel, num_channels, num_cells, TARGET: tl.constexpr, CHANNEL0: tl.constexpr,
    TAIL: tl.constexpr
):  # fmt: skip
    """The cell of every voxel of a block, or a mark; int32, whatever integers the ids are."""
    if ids.dtype != tl.int64:
        ids = ids.to(tl.int32)
    ignored = ids < 0
    if TAIL:
        ignored = ignored | (lanes >= remaining)
    if CHANNEL0 == "background":
        ids = tl.where((ids > 0) & (tl.zeros_like(lanes) + channel == 0), 0, ids)
    if CHANNEL0 == "unused":
        ignored = ignored | (tl.zeros_like(lanes) + channel == 0)
    invalid = ids >= num_cells  # before the cast: an id of 2^40 must not wrap into the table
    cell = tl.where(invalid, 0, ids).to(tl.int32)
    if TARGET != "none":
        if label.dtype.is_floating():
            if label.dtype != tl.float64:
                label = label.to(tl.float32)
        else:
            if label.dtype != tl.int64:
                label = label.to(tl.int32)
        if TARGET == "class_map":
            positive = label == channel
            known = (label >= 0) & (label < num_channels)  # False for NaN
            if label.dtype.is_floating():
                known = known & (tl.floor(label) == label)
        else:
            positive = label != 0
            known = (label == 0) | (label == 1)
        cell = 2 * cell + positive.to(tl.int32)
        invalid = invalid | (cell >= num_cells) | (known == 0)
    cell = tl.where(invalid, INVALID, cell)
    return tl.where(ignored, IGNORED, cell)


@triton.jit
def load_cells(
    cells_ptr, target_ptr, lanes, remaining, channel, num_channels, num_cells, TARGET: tl.constexpr,
    CHANNEL0: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    ids, label = load_labels(cells_ptr, target_ptr, lanes, remaining, TARGET, TAIL)
    return to_cells(ids, label, lanes, remaining, channel, num_channels, num_cells, TARGET, CHANNEL0, TAIL)


# ---------------------------------------------------------------- features of one voxel


@triton.jit
def exp(x):
    """e^x for x <= 0, to a few ulp also where x is large; NaN stays NaN. For x > 0 it may be anything.

    In fp32 Triton's own rounds x / log(2) once, which at x = -40 is 2e-6 of the result. Here x is reduced first: what
    is taken away, k log(2) in two parts, is exact.
    """
    if x.dtype == tl.float64:
        value = tl.exp(x)
    else:
        x = tl.maximum(x, -104.0, propagate_nan=tl.PropagateNan.ALL)  # beyond, 0
        shifted = tl.fma(x, 1.4426950408889634, _ROUNDS)
        k = shifted - _ROUNDS
        r = tl.fma(k, -1.428606765330187e-06, tl.fma(k, -0.693145751953125, x))
        bits = (shifted.to(tl.int32, bitcast=True) << 23) + ((127 + 64) << 23)  # of 2^(k + 64): k itself may be -150
        value = tl.exp2(r * 1.4426950408889634) * bits.to(tl.float32, bitcast=True) * 5.421010862427522e-20
    return value


@triton.jit
def log1p(y):
    """log(1 + y) for finite y >= -1 to a few ulp: the rounding of 1 + y is undone by the factor y / ((1 + y) - 1)."""
    u = 1.0 + y
    d = u - 1.0
    return tl.where(d == 0.0, y, tl.log(u) * (y / d))


@triton.jit
def prob_and_logs(z, ACTIVATION: tl.constexpr):
    """p, 1 - p, log p and log(1 - p), each accurate in its own right; what nobody uses is not compiled."""
    if ACTIVATION == "none":
        p = z
        q = 1.0 - z
        log_p = tl.log(z)
        log_q = log1p(-z)
    else:
        e = exp(-tl.abs(z))
        larger = 1.0 / (1.0 + e)
        smaller = e * larger
        p = tl.where(z >= 0.0, larger, smaller)
        q = tl.where(z >= 0.0, smaller, larger)
        # log(1 + e); what the rounding of 1 + e lost is added in first order, and is all there is where e is tiny.
        u = 1.0 + e
        tail = tl.log(u) + (e - (u - 1.0)) * larger
        log_p = -(tl.where(z < 0.0, -z, 0.0) + tail)
        log_q = -(tl.where(z > 0.0, z, 0.0) + tail)
    return p, q, log_p, log_q


@triton.jit
def nll(log_p, ACTIVATION: tl.constexpr):
    if ACTIVATION == "none":
        nll = -tl.where(log_p < -100.0, -100.0, log_p)  # as in torch.nn.BCELoss; NaN stays NaN
    else:
        nll = -log_p
    return nll


@triton.jit
def power(log_base, EXPONENT: tl.constexpr):
    """base ** EXPONENT; exponent 0 gives 1, also for base 0."""
    if EXPONENT == 0.0:
        power = tl.where(log_base == log_base, 1.0, log_base)
    elif EXPONENT < 0.0:
        power = 1.0 / exp(-EXPONENT * log_base)
    else:
        power = exp(EXPONENT * log_base)
    return power


@triton.jit
def feature(CODE: tl.constexpr, p, log_p, log_q, GAMMA: tl.constexpr, ACTIVATION: tl.constexpr):
    if CODE == _PROB:
        value = p
    elif CODE == _PROB_SQ:
        value = p * p
    elif CODE == _NLL_POS:
        value = nll(log_p, ACTIVATION)
    elif CODE == _NLL_NEG:
        value = nll(log_q, ACTIVATION)
    elif CODE == _FOCAL_POS:
        value = power(log_q, GAMMA) * nll(log_p, ACTIVATION)
    else:
        value = power(log_p, GAMMA) * nll(log_q, ACTIVATION)
    return value


@triton.jit
def focal_slope(p, q, d_nll, log_p, log_q, GAMMA: tl.constexpr, ACTIVATION: tl.constexpr):
    """Derivative of q^gamma * nll(p), up to the sign of its second part: the two parts of the product rule."""
    loss = nll(log_p, ACTIVATION)
    focus = power(log_q, GAMMA)
    if GAMMA == 0.0:
        through_focus = 0.0 * p
    elif ACTIVATION == "none":
        through_focus = tl.where(loss == 0.0, 0.0, GAMMA * power(log_q, GAMMA - 1.0) * loss)
    else:
        through_focus = GAMMA * focus * tl.where(p == 0.0, 0.0, p * loss)  # 0 * inf is meant as 0
    return focus * d_nll, through_focus


@triton.jit
def slope(CODE: tl.constexpr, p, q, log_p, log_q, GAMMA: tl.constexpr, ACTIVATION: tl.constexpr):
    """Derivative of a feature with respect to z (with respect to p for activation "none")."""
    if ACTIVATION == "none":
        d_prob = tl.full([1], 1.0, p.dtype)
        pq = p * q
        pq = tl.maximum(pq, tl.full([1], 1e-12, p.dtype))  # a bare 1e-12 would be an fp32 one
        d_nll_pos = -(q / pq)
        d_nll_neg = p / pq
    else:
        d_prob = p * q
        d_nll_pos = -q
        d_nll_neg = p
    if CODE == _PROB:
        value = d_prob
    elif CODE == _PROB_SQ:
        value = 2.0 * p * d_prob
    elif CODE == _NLL_POS:
        value = d_nll_pos
    elif CODE == _NLL_NEG:
        value = d_nll_neg
    elif CODE == _FOCAL_POS:
        direct, through_focus = focal_slope(p, q, d_nll_pos, log_p, log_q, GAMMA, ACTIVATION)
        value = direct - through_focus
    else:
        direct, through_focus = focal_slope(q, p, d_nll_neg, log_q, log_p, GAMMA, ACTIVATION)
        value = direct + through_focus
    return value


# ---------------------------------------------------------------- softmax


@triton.jit
def difference(u, w):
    """u - w, and 0 where they are equal, also at infinity."""
    return tl.where(u == w, 0.0, u - w)


@triton.jit
def softmax_parts(logits_ptr, stride_c, lanes, remaining, num_channels, TAIL: tl.constexpr):
    """One sweep over the channels: the largest logit, its channel, and logsumexp of all others in two forms.

    Returns (largest, winner, log_rest, rest): log_rest is the logsumexp of the channels but the winner, rest the sum of
    their exp(x - largest). The winner's own term never enters, so nothing is lost by a difference.
    """
    largest = load_real(logits_ptr, lanes, remaining, TAIL)
    winner = tl.zeros_like(lanes)
    second = tl.zeros_like(largest) + float("-inf")
    total = tl.zeros_like(largest)  # of exp(x - second)
    for channel in range(1, num_channels):
        logits_ptr += stride_c
        x = load_real(logits_ptr, lanes, remaining, TAIL)
        wins = x > largest  # False for NaN, which then joins the others and poisons their total
        loser = tl.where(wins, largest, x)
        smaller = exp(-tl.abs(difference(loser, second)))  # NaN joins as well
        leads = loser > second
        total = tl.where(leads, total * smaller + 1.0, total + smaller)
        second = tl.where(leads, loser, second)
        largest = tl.where(wins, x, largest)
        winner = tl.where(wins, channel, winner)
    log_rest = second + tl.log(total)
    rest = total * exp(difference(second, largest))
    return largest, winner, log_rest, rest


@triton.jit
def log_others(x, is_winner, largest, log_rest, rest):
    """logsumexp of the channels other than that of x."""
    return tl.where(is_winner, log_rest, largest + log1p(rest - exp(difference(x, largest))))
