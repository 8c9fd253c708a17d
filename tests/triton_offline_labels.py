"""Compile the Triton kernels of the labels for real chips on a machine that has none, and read what came out.

``python -m tests.triton_offline_labels`` prints a table; ``--json`` prints the rows for the test. In a process of its
own, without TRITON_INTERPRET, as triton_offline.py.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from blobloss_fast.kernels import triton_components as module

from .triton_offline import ALIGNED, ARCHITECTURES, inspect, show

SIZES = {"TILE": module.TILE, "BLOCK": module.BLOCK, "CHUNK": module.CHUNK}
# What a mask is: its dtype, and whether it is a class map, one-hot channels, with an ignored value.
MASKS = {
    "bool": ("u8", False, False, False),
    "fp32": ("fp32", False, False, False),
    "int64": ("i64", False, False, True),
    "fp64": ("fp64", False, False, True),
    "bf16": ("bf16", False, False, True),
    "class map": ("u8", True, False, True),
    "one-hot": ("u8", False, True, True),
}
LINES = {"2D 4": (1, False), "2D 8": (2, False), "3D 6": (1, True), "3D 18": (2, True), "3D 26": (3, True)}
# name: kernel, warps, type of the mask, constants
CASES = {
    f"start {name}": (
        *(module.components_start_kernel, module.WARPS, dtype),
        dict(zip(("CLASS_MAP", "ONE_HOT", "HAS_IGNORE"), meaning, strict=True)),
    )
    for name, (dtype, *meaning) in MASKS.items()
}
for name, (reach, planes) in LINES.items():
    CASES[f"join {name}"] = (module.components_join_kernel, 1, None, {"REACH": reach, "PLANES": planes})
CASES["rank"] = (module.components_rank_kernel, module.WARPS, None, {})
CASES["scan"] = (module.components_scan_kernel, module.SCAN_WARPS, None, {})
CASES["number"] = (module.components_number_kernel, module.WARPS, None, {})
# What a volume is. "even": its number of voxels is divisible by 16; "odd": it is not, and there is one volume; "wide":
# it has more voxels than 32 bits can count; "one": it has one voxel, which Triton makes a constant.
VOLUMES = {
    "even": tuple(CASES),
    **dict.fromkeys(("odd", "wide", "one"), ("start bool", "join 3D 26", "rank", "number")),
}


def compile_case(name: str, volume: str, architecture: int):
    """Compile as a launch on contiguous tensors would."""
    kernel, warps, mask, meaning = CASES[name]
    constants = {**meaning, **SIZES, **({"num_voxels": 1, "stride_row": 1} if volume == "one" else {})}
    integer = "i64" if volume == "wide" else "i32"
    types = dict.fromkeys(("num_voxels", "plane", "stride_b", "stride_c", "stride_row"), integer)
    types |= {"mask_ptr": f"*{mask}", "labels_ptr": f"*{integer}", "counts_ptr": "*i64"}
    signature, attributes, used = {}, {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            used[argument] = constants[argument]
            continue
        signature[argument] = types.get(argument, "*i32" if argument.endswith("_ptr") else "i32")
        divisible = argument.endswith("_ptr") or argument.startswith("stride_")
        if divisible or (argument == "num_voxels" and volume != "odd"):
            attributes[(position,)] = [["tt.divisibility", ALIGNED]]
    source = ASTSource(kernel, signature, used, attributes)
    registers = module.MAX_REGISTERS[torch.int64 if volume == "wide" else torch.int32]
    options = {"num_warps": warps, "maxnreg": registers, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def rows(architectures: tuple[int, ...]) -> list[dict]:
    return [
        {"case": name, "voxels": volume, "sm": architecture, **inspect(compile_case(name, volume, architecture))}
        for volume, names in VOLUMES.items()
        for name in names
        for architecture in architectures
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--sm", type=int, nargs="*", default=list(ARCHITECTURES), help="compute capabilities")
    arguments = parser.parse_args()
    table = rows(tuple(arguments.sm))
    print(json.dumps({"triton": triton.__version__, "rows": table}) if arguments.json else show(table))


if __name__ == "__main__":
    sys.exit(main())
