"""Compiles Triton kernels for real chips on a machine that has none, and reads what came out.

In a process of its own, without TRITON_INTERPRET: kernels that were imported for the interpreter cannot be compiled.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
# Without a ROCm device or its tools: what Triton's own assembler and linker make of the kernels, from 3.7 on.
HIP_ARCHITECTURE = "gfx942"
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
ALIGNED = 16  # what a pointer or a stride must be divisible by to count as aligned


def tool(name: str) -> str:
    """A CUDA binary tool out of Triton's own wheel."""
    for path in Path(triton.__file__).parent.rglob(name):
        if path.is_file():
            return str(path)
    raise FileNotFoundError(f"{name} is not in Triton's wheel")


def compiled(kernel, types, constants, divisible, warps: int, registers: int | None, chip: int | str):
    """Compile as a launch on contiguous tensors would, for a compute capability or an AMD architecture.

    Args:
        types: of the arguments that are neither constants nor int32.
        divisible: the arguments that are divisible by 16 beside pointers.
        registers: at most, where the chip has such an option.
    """
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
    is_hip = isinstance(chip, str)
    if registers is not None and not is_hip:
        options["maxnreg"] = registers
    target = GPUTarget("hip", chip, 64) if is_hip else GPUTarget("cuda", chip, 32)
    return triton.compile(ASTSource(kernel, signature, used, attributes), target=target, options=options)


def row(chip: int | str, binary, **names: str) -> dict:
    """A line of the table."""
    is_hip = isinstance(chip, str)
    return {**names, "gfx" if is_hip else "sm": chip, **(inspect_hip if is_hip else inspect)(binary)}


def inspect(binary) -> dict[str, int]:
    """Registers, stack, shared memory and instruction counts of a kernel for CUDA."""
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
        "ldg64": count(r"LDG\..*\b64\b.*"),
        "ldg": count(r"LDG(\..*)?"),
        "strong": count(r"LDG\..*STRONG.*"),
        "stg128": count(r"STG\..*\b128\b.*"),
        "stg64": count(r"STG\..*\b64\b.*"),
        "stg": count(r"STG(\..*)?"),
        "atomics": count(r"(ATOMG?|REDG?)(\..*)?"),
        "ex2": len(re.findall(r"\bex2\.approx", binary.asm["ptx"])),
        "reduced": len(re.findall(r"\badd\.(?:rn\.)?f32.*, 0fCB400000", binary.asm["ptx"])),
        "instructions": sum(opcodes.values()),
        "cvt_rn": len(re.findall(r"cvt\.rn\.(?:bf16|f16)", binary.asm["ptx"])),
    }


def inspect_hip(binary) -> dict[str, int]:
    """The size, the registers and the spills of a kernel for ROCm."""
    read = lambda name: int(re.search(rf"\.{name}:\s*(\d+)", binary.asm["amdgcn"])[1])  # noqa: E731
    return {"bytes": len(binary.asm["hsaco"]), "registers": read("vgpr_count"), "spills": read("vgpr_spill_count")}


def show(table: list[dict]) -> str:
    columns = list(table[0])
    cells = [columns, *([str(row[column]) for column in columns] for row in table)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in cells)


def main(rows: Callable[[tuple[int | str, ...]], list[dict]], description: str | None) -> None:
    """The command of a script whose table ``rows`` makes for some chips."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--sm", type=int, nargs="*", default=list(ARCHITECTURES), help="compute capabilities")
    parser.add_argument("--hip", action="store_true", help=f"{HIP_ARCHITECTURE} instead")
    arguments = parser.parse_args()
    table = rows((HIP_ARCHITECTURE,) if arguments.hip else tuple(arguments.sm))
    print(json.dumps({"triton": triton.__version__, "rows": table}) if arguments.json else show(table))
