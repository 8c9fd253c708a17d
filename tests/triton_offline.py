"""Compile the Triton kernels for real chips on a machine that has none, and read what came out.

``python tests/triton_offline.py`` prints a table; ``--json`` prints the rows for the test. Runs in a process of its
own, without TRITON_INTERPRET: kernels that were imported for the interpreter cannot be compiled.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from blobloss_fast.kernels import triton_finish as finish
from blobloss_fast.kernels import triton_segment_stats as module
from blobloss_fast.kernels.layout import FEATURES

ARCHITECTURES = (80, 90, 100)
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
ALIGNED = 16  # what a pointer or a stride must be divisible by to count as aligned

# name: logits dtype, features, activation, gamma, target dtype (None: no target)
SPECIALISATIONS = {
    "sigmoid dice fp32": ("fp32", ("prob",), "sigmoid", 0.0, None),
    "sigmoid dice+bce fp32 target": ("fp32", ("prob", "nll_pos", "nll_neg"), "sigmoid", 0.0, "u8"),
    "sigmoid dice+bce bf16": ("bf16", ("prob", "nll_pos", "nll_neg"), "sigmoid", 0.0, None),
    "softmax dice+bce fp32": ("fp32", ("prob", "nll_pos", "nll_neg"), "softmax", 0.0, None),
    "softmax all features fp32 target": ("fp32", FEATURES, "softmax", 2.0, "u8"),
    "sigmoid all features fp32 target": ("fp32", FEATURES, "sigmoid", 2.0, "u8"),
    "none all features fp32": ("fp32", FEATURES, "none", 2.0, None),
    "sigmoid all features fp64 target": ("fp64", FEATURES, "sigmoid", 2.0, "u8"),
    "sigmoid focal fp32": ("fp32", ("focal_pos", "focal_neg"), "sigmoid", 2.0, None),
    "sigmoid dice fp32, 2^31 voxels": ("fp32", ("prob",), "sigmoid", 0.0, None),
}


def tool(name: str) -> str:
    """A CUDA binary tool out of Triton's own wheel."""
    for path in Path(triton.__file__).parent.rglob(name):
        if path.is_file():
            return str(path)
    raise FileNotFoundError(f"{name} is not in Triton's wheel")


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


def compile_kernel(kernel, specialisation: str, architecture: int, aligned: bool, backend: str = "cuda"):
    """Compile as a launch on contiguous tensors would; ``aligned``: the number of voxels is divisible by 16."""
    dtype, features, activation, gamma, target = SPECIALISATIONS[specialisation]
    compute = "fp64" if dtype == "fp64" else "fp32"
    types = {
        "logits_ptr": f"*{dtype}",
        "cells_ptr": "*i32",
        "target_ptr": f"*{target or 'i32'}",
        "grad_ptr": f"*{dtype}",
        "table_ptr": "*i64",
        "real_ptr": "*fp64",
        "invalid_ptr": "*i32",
        "coefficients_ptr": "*fp64",
        "grad_sums_ptr": f"*{compute}",
        "upstream_ptr": f"*{compute}",
        "largest": "fp32",
    }
    constants = {
        "CODES": module.feature_codes(features),
        "NUM_FEATURES": len(features),
        "ACTIVATION": activation,
        "GAMMA": gamma,
        "TARGET": "binary" if target else "none",
        "CHANNEL0": "class",
        "HAS_UPSTREAM": True,
        "BLOCK": module.BLOCK,
        "PART": 32 * module.NUM_WARPS,
    }
    sizes = {name for name in kernel.arg_names if name == "num_voxels" or "_stride_" in name}
    if "2^31" in specialisation:
        types |= dict.fromkeys(sizes, "i64")
    divisible = sizes if aligned else set()
    registers = module.MAX_REGISTERS[torch.float64 if dtype == "fp64" else torch.float32]
    return compiled(kernel, types, constants, divisible, module.NUM_WARPS, registers, architecture, backend)


def compile_finish(specialisation: str, architecture: int, backend: str = "cuda"):
    dtype, num_features, has_target, has_weights, masking, reduction, from_table = FINISHES[specialisation]
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
    return compiled(kernel, types, constants, set(), warps, registers, architecture, backend)


def compiled(kernel, types, constants, divisible, warps: int, registers: int, architecture, backend: str):
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = types.get(name, "i32")
        if name.endswith("_ptr") or name in divisible:
            attributes[(position,)] = [["tt.divisibility", ALIGNED]]
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    options = {"num_warps": warps, "enable_fp_fusion": False}
    if backend == "cuda":
        options["maxnreg"] = registers
    target = GPUTarget(backend, architecture, 32 if backend == "cuda" else 64)
    return triton.compile(ASTSource(kernel, signature, used, attributes), target=target, options=options)


def inspect(binary) -> dict[str, int]:
    """Registers, stack, shared memory and instruction counts of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [tool("cuobjdump"), "-res-usage", "-sass", file.name]
        read = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    opcodes = Counter(INSTRUCTION.findall(read))
    count = lambda pattern: sum(n for code, n in opcodes.items() if re.fullmatch(pattern, code))  # noqa: E731
    if not opcodes["EXIT"]:
        raise RuntimeError(f"cannot read the disassembly:\n{read[:2000]}")
    return {
        "registers": int(re.search(r"REG:(\d+)", read)[1]),
        "stack": int(re.search(r"STACK:(\d+)", read)[1]),
        "local": int(re.search(r"LOCAL:(\d+)", read)[1]),
        "spills": count(r"(STL|LDL)(\..*)?"),
        "shared": binary.metadata.shared,
        "ldg128": count(r"LDG\..*\b128\b.*"),
        "ldg": count(r"LDG(\..*)?"),
        "strong": count(r"LDG\..*STRONG.*"),
        "stg128": count(r"STG\..*\b128\b.*"),
        "stg": count(r"STG(\..*)?"),
        "atomics": count(r"(ATOMG?|REDG?)(\..*)?"),
        "ex2": len(re.findall(r"\bex2\.approx", binary.asm["ptx"])),
        "floor": len(re.findall(r"\bcvt\.rmi\.(?:ftz\.)?f32\.f32", binary.asm["ptx"])),
        "instructions": sum(opcodes.values()),
        "cvt_rn": len(re.findall(r"cvt\.rn\.(?:bf16|f16)", binary.asm["ptx"])),
    }


def rows(architectures: tuple[int, ...], aligned: bool = True) -> list[dict]:
    table = []
    for kernel in (module.segment_stats_fwd_kernel, module.segment_stats_bwd_kernel):
        for specialisation in SPECIALISATIONS:
            for architecture in architectures:
                found = inspect(compile_kernel(kernel, specialisation, architecture, aligned))
                pass_name = kernel.fn.__name__.split("_")[2]
                table.append({"pass": pass_name, "case": specialisation, "sm": architecture, **found})
    for specialisation in FINISHES:
        for architecture in architectures:
            found = inspect(compile_finish(specialisation, architecture))
            table.append({"pass": "finish", "case": specialisation, "sm": architecture, **found})
    return table


# Without a ROCm device or its tools: what Triton's own assembler and linker make of the kernels, from 3.7 on.
HIP_ARCHITECTURE = "gfx942"
ON_HIP = ("sigmoid dice fp32", "softmax dice+bce fp32", "sigmoid all features fp64 target")


def rows_of_hip() -> list[dict]:
    def row(pass_name: str, case: str, binary) -> dict:
        read = lambda name: int(re.search(rf"\.{name}:\s*(\d+)", binary.asm["amdgcn"])[1])  # noqa: E731
        return {
            "pass": pass_name,
            "case": case,
            "gfx": HIP_ARCHITECTURE,
            "bytes": len(binary.asm["hsaco"]),
            "registers": read("vgpr_count"),
            "spills": read("vgpr_spill_count"),
        }

    kernels = {"fwd": module.segment_stats_fwd_kernel, "bwd": module.segment_stats_bwd_kernel}
    table = [
        row(name, case, compile_kernel(kernel, case, HIP_ARCHITECTURE, True, "hip"))
        for name, kernel in kernels.items()
        for case in ON_HIP
    ]
    return table + [row("finish", case, compile_finish(case, HIP_ARCHITECTURE, "hip")) for case in list(FINISHES)[:3]]


def show(table: list[dict]) -> str:
    columns = list(table[0])
    cells = [columns, *([str(row[column]) for column in columns] for row in table)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--sm", type=int, nargs="*", default=list(ARCHITECTURES), help="compute capabilities")
    parser.add_argument("--hip", action="store_true", help=f"{HIP_ARCHITECTURE} instead")
    parser.add_argument("--unaligned", action="store_true", help="a number of voxels that is not divisible by 16")
    arguments = parser.parse_args()
    table = rows_of_hip() if arguments.hip else rows(tuple(arguments.sm), aligned=not arguments.unaligned)
    print(json.dumps({"triton": triton.__version__, "rows": table}) if arguments.json else show(table))


if __name__ == "__main__":
    sys.exit(main())
