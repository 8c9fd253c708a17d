"""Compile the kernels of nearest_instance for real chips on a machine that has none; as triton_offline.py does.

``python -m tests.triton_offline_zones`` prints a table; ``--json`` prints the rows for the test.
"""

from __future__ import annotations

import argparse
import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from blobloss_fast.kernels import triton_zones as module
from tests.triton_offline import ALIGNED, ARCHITECTURES, inspect, show

# name: dtype of the ids, voxels of a row at a time, then LONG, ONLY, LARGE
ROWS = {
    "i32 32": ("i32", 32, False, False, False),
    "i32 128": ("i32", 128, False, False, False),
    "i32 512": ("i32", 512, False, False, False),
    "i32 only": ("i32", 512, False, True, False),
    "i32 long": ("i32", 512, True, False, False),
    "u8 128": ("u8", 128, False, False, False),
    "i64 long only large": ("i64", 512, True, True, True),
}
# name: dtype of the ids, of the positions and of the output, then PLANE, LAST, WIDE, LARGE
LINES = {
    "y": ("i32", "i32", "i32", False, False, False, False),
    "z": ("i32", "i32", "i32", True, True, False, False),
    "2d": ("i32", "i32", "i32", False, True, False, False),
    "z i64": ("i64", "i32", "i32", True, True, False, False),
    "y wide": ("i32", "i32", "i32", False, False, True, False),
    "z wide": ("i32", "i32", "i32", True, True, True, False),
    "y wide i64 large": ("i64", "i32", "i64", False, False, True, True),
    "z wide i64 large": ("i64", "i64", "i32", True, True, True, True),
}


def compile_kernel(
    kernel, architecture: int, constants: dict, types: dict[str, str], aligned: set[str], registers: int
):
    """Compile as a launch on contiguous tensors would."""
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = types.get(name, "i32")
        if name.endswith("_ptr") or name in aligned:
            attributes[(position,)] = [["tt.divisibility", ALIGNED]]
    options = {"num_warps": 1, "enable_fp_fusion": False, "maxnreg": registers}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def compile_row(name: str, architecture: int):
    ids, block, long, only, large = ROWS[name]
    constants = {"ROWS": module.ROW_VOXELS // block, "BLOCK": block, "LONG": long, "ONLY": only, "LARGE": large}
    types = {"instances_ptr": f"*{ids}", "out_ptr": "*i32", "invalid_ptr": "*i32"}
    aligned = {"length", "stride_b", "stride_c"}
    registers = module.ROW_REGISTERS[long]
    return compile_kernel(module.nearest_in_row_kernel, architecture, constants, types, aligned, registers)


def compile_line(name: str, architecture: int):
    ids, positions, out, plane, last, wide, large = LINES[name]
    constants = {"TILE": module.TILE, "LINES": module.LINES, "PLANE": plane, "LAST": last, "WIDE": wide, "LARGE": large}
    constants["SHIFT"] = 32 if "i64" in (positions, out) else 16
    types = {"instances_ptr": f"*{ids}", "positions_ptr": f"*{positions}", "out_ptr": f"*{out}"}
    if wide:
        types |= dict.fromkeys(("weight", "weight_y", "weight_x"), "i64")
    if large:
        types["num_lines"] = "i64"
    aligned = {"stride_b", "stride_c"}
    registers = module.LINE_REGISTERS[wide]
    return compile_kernel(module.nearest_on_line_kernel, architecture, constants, types, aligned, registers)


def rows(architectures: tuple[int, ...]) -> list[dict]:
    table = []
    for kernel, names, compiled in (("row", ROWS, compile_row), ("line", LINES, compile_line)):
        for name in names:
            for architecture in architectures:
                found = inspect(compiled(name, architecture))
                table.append({"kernel": kernel, "case": name, "sm": architecture, **found})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--sm", type=int, nargs="*", default=list(ARCHITECTURES), help="compute capabilities")
    arguments = parser.parse_args()
    table = rows(tuple(arguments.sm))
    print(json.dumps({"triton": triton.__version__, "rows": table}) if arguments.json else show(table))


if __name__ == "__main__":
    sys.exit(main())
