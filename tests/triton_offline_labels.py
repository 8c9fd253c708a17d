"""Compile the Triton kernels of the labels for real chips on a machine that has none, and read what came out.

``python -m tests.triton_offline_labels`` prints a table; ``--json`` prints the rows for the test.
"""

from __future__ import annotations

import torch

from blobloss_fast.kernels import triton_components as module

from .offline_compiler import compiled, main, row

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


def compile_case(name: str, volume: str, chip: int | str):
    kernel, warps, mask, meaning = CASES[name]
    constants = {**meaning, **SIZES, **({"num_voxels": 1, "stride_row": 1} if volume == "one" else {})}
    integer = "i64" if volume == "wide" else "i32"
    types = {name: "*i32" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= dict.fromkeys(("num_voxels", "plane", "stride_b", "stride_c", "stride_row"), integer)
    types |= {"mask_ptr": f"*{mask}", "labels_ptr": f"*{integer}", "counts_ptr": "*i64"}
    divisible = {name for name in kernel.arg_names if name.startswith("stride_")}
    if volume != "odd":
        divisible.add("num_voxels")
    registers = module.MAX_REGISTERS[torch.int64 if volume == "wide" else torch.int32]
    return compiled(kernel, types, constants, divisible, warps, registers, chip)


def rows(chips: tuple[int | str, ...]) -> list[dict]:
    volumes = VOLUMES if isinstance(chips[0], int) else {name: VOLUMES[name] for name in ("even", "wide")}
    return [
        row(chip, compile_case(name, volume, chip), case=name, voxels=volume)
        for volume, names in volumes.items()
        for name in names
        for chip in chips
    ]


if __name__ == "__main__":
    main(rows, __doc__)
