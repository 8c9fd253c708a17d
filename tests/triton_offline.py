"""Compile the Triton kernels of the volume and of the table for real chips, and read what came out.

``python -m tests.triton_offline`` prints a table; ``--json`` prints the rows for the test.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from blobloss_fast.kernels import triton_finish as finish
from blobloss_fast.kernels import triton_segment_stats as module
from blobloss_fast.kernels.layout import FEATURES

from .offline_compiler import compiled, main, row


class Case(NamedTuple):
    """What the kernels of the volume are compiled for."""

    dtype: str  # of the logits
    features: tuple[str, ...]
    activation: str = "sigmoid"  # "difference": a softmax over two channels
    gamma: float = 0.0
    target: str | None = None  # its dtype
    meaning: str = "binary"  # of a target
    cells: str = "i32"
    channel0: str = "class"
    # A row's number of voxels is divisible by 16, unless "odd": by nothing, of one row, or "odd rows": of several.
    # "2^31": offsets need 64 bits. "one": a row is a voxel, and what is 1 Triton makes a constant.
    volume: str = "even"
    upstream: bool = True  # whether the gradient is multiplied by an incoming one


DICE, DICE_BCE = ("prob",), ("prob", "nll_pos", "nll_neg")
CASES = {
    "sigmoid dice fp32": Case("fp32", DICE),
    "sigmoid dice+bce fp32 target": Case("fp32", DICE_BCE, target="u8"),
    "sigmoid dice+bce bf16": Case("bf16", DICE_BCE),
    "softmax dice+bce fp32": Case("fp32", DICE_BCE, "softmax"),
    "softmax all features fp32 target": Case("fp32", FEATURES, "softmax", 2.0, "u8"),
    "difference dice+bce fp32, channel 0 unused": Case("fp32", DICE_BCE, "difference", channel0="unused"),
    "sigmoid all features fp32 target": Case("fp32", FEATURES, gamma=2.0, target="u8"),
    "sigmoid all features fp64 target": Case("fp64", FEATURES, gamma=2.0, target="u8"),
    "difference all features fp32 target": Case("fp32", FEATURES, "difference", 2.0, "u8"),
    "none all features fp32": Case("fp32", FEATURES, "none", 2.0),
    "sigmoid focal fp32": Case("fp32", ("focal_pos", "focal_neg"), gamma=2.0),
    "sigmoid dice fp32, 2^31 voxels": Case("fp32", DICE, volume="2^31"),
}
# Compiled for one chip: what the first ones leave out. Counts alone, of the forward pass, are what weights are made of.
MORE = {
    "sigmoid dice fp32, odd": Case("fp32", DICE, volume="odd"),
    "sigmoid dice fp32, odd rows": Case("fp32", DICE, volume="odd rows"),
    "sigmoid dice fp32, one": Case("fp32", DICE, volume="one"),
    "sigmoid dice+bce fp32, no upstream": Case("fp32", DICE_BCE, upstream=False),
    "sigmoid counts fp32": Case("fp32", ()),
    "softmax counts fp32, channel 0 unused": Case("fp32", (), "softmax", channel0="unused"),
    "difference counts fp32, channel 0 unused": Case("fp32", (), "difference", channel0="unused"),
    "sigmoid dice fp16, bytes": Case("fp16", DICE, cells="i8"),
    "softmax dice+bce fp16, channel 0 unused": Case("fp16", DICE_BCE, "softmax", channel0="unused"),
    "softmax dice+bce fp32 class map, channel 0 background": Case(
        "fp32", DICE_BCE, "softmax", target="i64", meaning="class_map", cells="i64", channel0="background"
    ),
    "sigmoid dice+bce fp32 float target": Case("fp32", DICE_BCE, target="fp32", cells="i16"),
    "sigmoid dice+bce fp64 double target": Case("fp64", DICE_BCE, target="fp64", cells="u8"),
}
ONE_CHIP = 90


# name: compute dtype, number of features, has a target, has weights, masking, reduction, from the table
FINISHES = {
    "dice fp32": ("fp32", 1, False, False, "apart", "mean", True),
    "all features fp32 target weights": ("fp32", 6, True, True, "apart", "mean", True),
    "all features fp32 others stay": ("fp32", 6, True, True, "none", "mean", True),
    "dice+bce fp32 zones": ("fp32", 3, True, False, "zones", "mean", True),
    "dice fp32 terms": ("fp32", 1, False, False, "apart", "terms", True),
    "all features fp32 target terms, backward": ("fp32", 6, True, True, "none", "terms", False),
    "all features fp64 target instances, backward": ("fp64", 6, True, False, "apart", "instances", False),
}
MORE_FINISHES = {
    "counts fp32": ("fp32", 0, False, False, "apart", "mean", True),
    "dice fp32 none": ("fp32", 1, False, False, "apart", "none", True),
    "dice+bce fp32 target sum": ("fp32", 3, True, False, "apart", "sum", True),
    "dice+bce fp64 zones weights instances": ("fp64", 3, True, True, "zones", "instances", True),
}


def compile_kernel(kernel, case: Case, chip: int | str):
    """Compile as a launch on contiguous tensors would."""
    compute, dtype = ("fp64", torch.float64) if case.dtype == "fp64" else ("fp32", torch.float32)
    warps = module.NUM_WARPS[dtype]
    types = {
        "logits_ptr": f"*{case.dtype}",
        "cells_ptr": f"*{case.cells}",
        "target_ptr": f"*{case.target or case.cells}",
        "grad_ptr": f"*{case.dtype}",
        "table_ptr": "*i64",
        "real_ptr": "*fp64",
        "invalid_ptr": "*i32",
        "coefficients_ptr": "*fp64",
        "grad_sums_ptr": f"*{compute}",
        "upstream_ptr": f"*{compute}",
        "largest": "fp32",
    }
    constants = {
        "CODES": module.feature_codes(case.features),
        "NUM_FEATURES": len(case.features),
        "ACTIVATION": case.activation,
        "GAMMA": case.gamma,
        "TARGET": case.meaning if case.target else "none",
        "CHANNEL0": case.channel0,
        "HAS_UPSTREAM": case.upstream,
        "BLOCK": module.BLOCK,
        "PART": 32 * warps,
    }
    strides = {name for name in kernel.arg_names if "_stride" in name}
    divisible = {"even": {"num_voxels", *strides}, "odd": strides, "odd rows": set(), "one": set()}
    divisible["2^31"] = divisible["even"]
    if case.volume == "2^31":
        types |= dict.fromkeys(divisible["even"], "i64")
    if case.volume == "one":
        constants |= dict.fromkeys(("num_voxels", *(name for name in strides if not name.endswith("_b"))), 1)
    return compiled(kernel, types, constants, divisible[case.volume], warps, module.MAX_REGISTERS[dtype], chip)


def compile_reading(dtype: str, num_features: int, chip: int | str):
    """The kernel that makes counts and sums of a table."""
    stats = module.padded_stats(num_features)
    types = {"table_ptr": "*i64", "real_ptr": "*fp64", "counts_ptr": "*i64", "sums_ptr": f"*{dtype}"}
    constants = {"NUM_FEATURES": num_features, "STATS": stats, "LANES": module.READ_ELEMENTS // stats}
    return compiled(module.read_table_kernel, types, constants, set(), 4, None, chip)


def compile_finish(specialisation: str, chip: int | str):
    dtype, num_features, has_target, has_weights, masking, reduction, from_table = {**FINISHES, **MORE_FINISHES}[
        specialisation
    ]
    slots = finish.Slots.of(2, 50, num_features)
    other = f"*{dtype}"
    types = {
        "table_ptr": "*i64",
        "real_ptr": "*fp64",
        "counts_ptr": "*i64",
        "sums_ptr": "*fp64" if from_table else other,
        "weights_ptr": other,
        "grad_ptr": "*fp64" if from_table else other,
        "rows_ptr": "*fp64",
        "value_ptr": other,
        "out_ptr": other,
        **{f"{name}_weight{rest}": "fp32" for name in ("main", "blob") for rest in ("", "_rest")},
    }
    constants = {
        "NUM_FEATURES": num_features,
        "STATS": slots.stats,
        "LANES": slots.lanes,
        "HAS_TARGET": has_target,
        "HAS_WEIGHTS": has_weights,
        "MASKING": masking,
        "REDUCTION": reduction,
        "FROM_TABLE": from_table,
    }
    kernel, warps, registers = finish.finish_kernel, finish.NUM_WARPS, finish.MAX_REGISTERS
    return compiled(kernel, types, constants, set(), warps, registers, chip)


VOLUME = {"fwd": module.segment_stats_fwd_kernel, "bwd": module.segment_stats_bwd_kernel}
ON_HIP = (
    "sigmoid dice fp32",
    "softmax dice+bce fp32",
    "difference dice+bce fp32, channel 0 unused",
    "sigmoid all features fp64 target",
)


def rows(chips: tuple[int | str, ...]) -> list[dict]:
    on_hip = isinstance(chips[0], str)
    one = chips if on_hip else (ONE_CHIP,)
    cases = {name: CASES[name] for name in ON_HIP} if on_hip else CASES
    jobs = [
        (name, case, partial(compile_kernel, kernel, meaning), some)
        for name, kernel in VOLUME.items()
        for several, some in ((cases, chips), ({} if on_hip else MORE, one))
        for case, meaning in several.items()
        if meaning.features or name == "fwd"
    ]
    jobs += [("finish", case, partial(compile_finish, case), chips) for case in FINISHES]
    jobs += [("finish", case, partial(compile_finish, case), one) for case in MORE_FINISHES]
    jobs += [("read", dtype, partial(compile_reading, dtype, 6), chips) for dtype in ("fp32", "fp64")]
    return [
        row(chip, compile_for(chip), **{"pass": name, "case": case})
        for name, case, compile_for, some in jobs
        for chip in some
    ]


if __name__ == "__main__":
    main(rows, __doc__)
