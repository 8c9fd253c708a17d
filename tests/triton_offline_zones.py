"""Compile the kernels of nearest_instance for real chips on a machine that has none, and read what came out.

``python -m tests.triton_offline_zones`` prints a table; ``--json`` prints the rows for the test.
"""

from __future__ import annotations

from blobloss_fast.kernels import triton_zones as module

from .offline_compiler import compiled, main, row

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


def compile_row(name: str, chip: int | str):
    ids, block, long, only, large = ROWS[name]
    constants = {"ROWS": module.ROW_VOXELS // block, "BLOCK": block, "LONG": long, "ONLY": only, "LARGE": large}
    types = {"instances_ptr": f"*{ids}", "out_ptr": "*i32", "invalid_ptr": "*i32"}
    aligned = {"length", "stride_b", "stride_c"}
    registers = module.ROW_REGISTERS[long]
    return compiled(module.nearest_in_row_kernel, types, constants, aligned, 1, registers, chip)


def compile_line(name: str, chip: int | str):
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
    return compiled(module.nearest_on_line_kernel, types, constants, aligned, 1, registers, chip)


def rows(chips: tuple[int | str, ...]) -> list[dict]:
    return [
        row(chip, compile_for(name, chip), kernel=kernel, case=name)
        for kernel, names, compile_for in (("row", ROWS, compile_row), ("line", LINES, compile_line))
        for name in names
        for chip in chips
    ]


if __name__ == "__main__":
    main(rows, __doc__)
