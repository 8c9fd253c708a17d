"""The native library as such: that it is found or a reason given, its interface, wrong input.

Its threads have test_native_threads.py; what its kernels compute is tested where every backend's kernels are.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import blobloss_fast
from blobloss_fast.kernels import native, native_labels, reference, structs
from blobloss_fast.kernels.layout import (
    ACTIVATIONS,
    BLOCK,
    CHANNEL0,
    FEATURES,
    MASKINGS,
    NOT_A_CLASS,
    NOT_A_PROBABILITY,
    NOT_BINARY,
    TOO_LARGE,
    ZONES,
)
from tests.tolerances import assert_fp64

PACKAGE = Path(blobloss_fast.__file__).parent
HEADER = Path(__file__).parents[1] / "csrc" / "blobloss.h"

needs_library = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))


def assert_same_bits(some: list[Tensor], others: list[Tensor]) -> None:
    for a, b in zip(some, others, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.numpy().tobytes() == b.numpy().tobytes()


# ---------------------------------------------------------------- found, or a reason


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    assert "was not built when blobloss_fast was installed" in native.open_library(tmp_path / native.PATH.name)


def test_what_is_no_library_is_said(tmp_path: Path) -> None:
    path = tmp_path / native.PATH.name
    path.write_text("this is no library")
    assert re.match(
        r"the native library cannot be loaded \(.*\): install blobloss_fast again", native.open_library(path)
    )


def test_what_is_another_library_is_said() -> None:
    assert re.match(
        r"the native library cannot be loaded \(.*blobloss_abi", native.open_library(Path(torch._C.__file__))
    )


@needs_library
def test_another_version_of_the_interface_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ABI", 99)
    reason = native.open_library(native.PATH)
    assert reason.startswith(f"the native library has version {blobloss_abi()} of its interface, this package needs 99")


def blobloss_abi() -> int:
    return ctypes.CDLL(str(native.PATH)).blobloss_abi()


@pytest.mark.parametrize("content", [None, "garbage"])
def test_the_reference_takes_over(tmp_path: Path, content: str | None) -> None:
    shutil.copytree(PACKAGE, tmp_path / "blobloss_fast", ignore=shutil.ignore_patterns("_native.*", "__pycache__"))
    if content is not None:
        (tmp_path / "blobloss_fast" / native.PATH.name).write_text(content)
    code = """
import torch
from blobloss_fast import backends, blob_loss
mask = torch.zeros(1, 1, 4, 4)
mask[..., 1, 1] = 1
print(backends()["cpu"])
print(blob_loss(torch.zeros(1, 1, 4, 4), mask).item())
"""
    backend, loss = run_python(code, tmp_path).splitlines()
    assert backend.startswith("reference (pure PyTorch): the native library ")
    assert float(loss) == pytest.approx(2 * (1 - 1 / 9), abs=1e-5)  # as in test_imports.py


def run_python(code: str, path: Path, *options: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-W", "error", *options, "-c", code]
    done = subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_library
def test_backends_names_the_instruction_set() -> None:
    assert blobloss_fast.backends()["cpu"] == f"native ({native.isa()})"


@needs_library
@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc/cpuinfo")
def test_the_best_instruction_set_is_chosen() -> None:
    flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    needed = {
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx2": {"avx2", "fma", "bmi2"},
        "baseline": set(),
    }
    assert native.isa() == next(name for name, names in needed.items() if names <= flags)


def test_calling_what_is_not_there_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_load", lambda: native.open_library(tmp_path / "none"))
    assert not native.available()
    with pytest.raises(RuntimeError, match="was not built"):
        native.isa()


# ---------------------------------------------------------------- the interface


def header() -> str:
    return re.sub(r"//.*", "", HEADER.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("enum", "prefix", "names"),
    [
        ("feature", "BL_", FEATURES),
        ("activation", "BL_", ACTIVATIONS),
        ("masking", "BL_", [name.replace("none", "mask_none") for name in (*MASKINGS, ZONES)]),
        ("channel0", "BL_", CHANNEL0),
        ("reduction", "BL_", [name.replace("none", "no_reduction") for name in structs.REDUCTIONS]),
        ("type", "BL_", ["f16", "bf16", "f32", "f64", "bool", "u8", "i8", "i16", "i32", "i64"]),
    ],
)
def test_enumerators_have_the_order_of_the_names(enum: str, prefix: str, names: list[str]) -> None:
    found = re.search(rf"enum bl_{enum} {{([^}}]*)}}", header())
    assert found is not None
    assert [name.strip() for name in found[1].split(",")] == [prefix + name.upper() for name in names]


def test_types_have_the_order_of_their_enumerators() -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool)
    dtypes += (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    assert tuple(structs.TYPES) == dtypes
    assert tuple(structs.TYPES.values()) == tuple(range(10))


def fields(name: str) -> str:
    """The fields of a struct in the header as the codes of Python's struct module."""
    body = re.search(rf"struct {name} {{([^}}]*)}}", header())
    assert body is not None
    codes = {"int64_t": "q", "int32_t": "i", "double": "d", "bl_parallel_for": "P"}
    found = ""
    for declaration in filter(None, map(str.strip, body[1].split(";"))):
        kind, _, _ = declaration.rpartition(" ")
        if "*" in declaration:
            found += "P"
        elif kind.startswith("struct "):
            found += fields(kind.removeprefix("struct "))
        else:
            found += codes[kind] * (structs.MOST_FEATURES if "[BLOBLOSS_MAX_FEATURES]" in declaration else 1)
    return found


def spelled_out(layout: struct.Struct) -> str:
    """The format of a Struct with its repetitions written out and its padding left out."""
    flat = layout.format.replace(f"{structs.OPTIONS.size}s", structs.OPTIONS.format.lstrip("@"))
    codes = re.findall(r"(\d*)([a-zA-Z])", flat)
    return "".join(code * int(times or 1) for times, code in codes if code != "x")


def test_structs_have_the_fields_of_the_header() -> None:
    for name, layout in (
        ("bl_volume", structs.VOLUME),
        ("bl_problem", structs.PROBLEM),
        ("bl_finish", structs.FINISH),
        ("bl_labelling", native_labels._LABELLING),
    ):
        assert spelled_out(layout) == fields(name)
        assert layout.size == struct.calcsize("@" + fields(name))  # the padding is where a C compiler puts it


def test_numbers_are_those_of_the_header() -> None:
    constants = dict(re.findall(r"#define (\w+) (\d+)", header()))
    assert int(constants["BLOBLOSS_ABI"]) == native.ABI
    assert int(constants["BLOBLOSS_MAX_FEATURES"]) == structs.MOST_FEATURES
    assert int(constants["BLOBLOSS_BLOCK"]) == BLOCK
    bits = dict(re.findall(r"BL_(\w+) = (\d+)", header()))
    messages = {"TOO_LARGE": TOO_LARGE, "NOT_BINARY": NOT_BINARY, "NOT_A_CLASS": NOT_A_CLASS}
    messages["NOT_A_PROBABILITY"] = NOT_A_PROBABILITY
    assert {int(bits[name]): message for name, message in messages.items()} == native._STATUS
    assert int(bits["NO_MEMORY"]) == native._NO_MEMORY


# ---------------------------------------------------------------- input


PAIR = torch.tensor([[[0.25, 0.5]]])
INVALID = {  # logits, cells, target, activation: what is wrong, the first of which is said
    "too large": (PAIR, [[[0, 2]]], None, "sigmoid", TOO_LARGE),
    "not binary": (PAIR, [[[0, 1]]], [[[0, 3]]], "sigmoid", NOT_BINARY),
    "not a class": (PAIR.expand(1, 3, 2), [[[0, 1]]], [[[0, 3]]], "sigmoid", NOT_A_CLASS),
    "not a probability": (2 * PAIR + 1, [[[0, 1]]], [[[0, 1]]], "none", NOT_A_PROBABILITY),
    "not binary, too large": (PAIR, [[[0, 2]]], [[[3, 0]]], "sigmoid", NOT_BINARY),
    "not a class, too large": (PAIR.expand(1, 3, 2), [[[2, 1]]], [[[0, -1]]], "softmax", NOT_A_CLASS),
    "too large, not a probability": (-PAIR, [[[2, 1]]], None, "none", TOO_LARGE),
    "not binary, not a probability": (-PAIR, [[[0, 0]]], [[[0, 9]]], "none", NOT_BINARY),
}


@needs_library
@pytest.mark.parametrize("name", INVALID)
def test_invalid_values_are_said_as_the_reference_says_them(name: str) -> None:
    logits, cells, target, activation, message = INVALID[name]
    label = None if target is None else torch.tensor(target)
    num_cells = 2 if target is None else 4
    for backend in (reference, native):
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            backend.segment_stats_forward(
                logits, torch.tensor(cells), label, num_cells, ("prob",), activation, 2.0, "class"
            )


def test_no_memory_comes_first() -> None:
    with pytest.raises(MemoryError, match="got no memory for its tables"):
        native._raise(native._NO_MEMORY | 1)


@needs_library
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_strides(activation: str) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 4, 10, 9, generator=generator)
    ids = torch.randint(-1, 4, (2, 3, 4, 10, 9), generator=generator)
    grad_sums = torch.randn(2, 3, 4, 2, generator=generator)
    options = (("prob", "nll_neg"), activation, 2.0, "class")

    def both(logits: Tensor, ids: Tensor) -> list[Tensor]:
        counts, sums = native.segment_stats_forward(logits, ids, None, 4, *options)
        return [counts, sums, native.segment_stats_backward(grad_sums, logits, ids, None, *options)]

    def strided(volume: Tensor) -> Iterator[Tensor]:
        yield volume.to(memory_format=torch.channels_last_3d)
        yield volume.transpose(2, 4).contiguous().transpose(2, 4)
        yield volume.repeat_interleave(2, 1)[:, ::2]  # dense spatial axes: read in place
        yield torch.cat([volume, volume], 4)[..., :9]

    expected = both(logits, ids)
    for some_logits, some_ids in zip(strided(logits), strided(ids), strict=True):
        assert_same_bits(both(some_logits, ids), expected)
        assert_same_bits(both(logits, some_ids), expected)
    one = ids[:, :1]
    assert_same_bits(both(logits, one), both(logits, one.expand(-1, 3, -1, -1, -1).contiguous()))


@needs_library
def test_more_features_than_the_library_takes() -> None:
    features = (*FEATURES[::-1], "prob", "nll_pos")
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 2, 50, generator=generator, dtype=torch.float64)
    ids = torch.randint(-1, 3, logits.shape, generator=generator)
    grad_sums = torch.randn(1, 2, 3, len(features), generator=generator, dtype=torch.float64)
    options = (features, "sigmoid", 2.0, "class")
    counts, sums = native.segment_stats_forward(logits, ids, None, 3, *options)
    true_counts, true_sums = reference.segment_stats_forward(logits, ids, None, 3, *options)
    assert torch.equal(counts, true_counts)
    assert_fp64(sums, true_sums)
    gradients = [
        module.segment_stats_backward(grad_sums, logits, ids, None, *options) for module in (native, reference)
    ]
    assert_fp64(*gradients)


@needs_library
def test_what_would_be_read_out_of_bounds_is_refused() -> None:
    logits, options = torch.zeros(2, 3, 4, 5), (2, ("prob",), "sigmoid", 2.0, "class")
    for shape in ((2, 3, 4, 4), (1, 3, 4, 5), (2, 2, 4, 5)):
        wrong = torch.zeros(shape, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"^cells must be \[2, 1 or 3, \*spatial\] with 20 voxels"):
            native.segment_stats_forward(logits, wrong, None, *options)
        with pytest.raises(ValueError, match=r"^target must be .*got \["):
            native.segment_stats_forward(logits, torch.zeros(2, 1, 4, 5, dtype=torch.int8), wrong, *options)
    with pytest.raises(TypeError, match=r"^cells must be one of torch.uint8, .*got torch.float32"):
        native.segment_stats_forward(logits, logits, None, *options)
    for ids in (logits, torch.zeros(2, 3, 4, 5, dtype=torch.int64, device="meta")):
        with pytest.raises(TypeError, match=r"^ids must be integers on the CPU; got torch.\w+ on (cpu|meta)$"):
            native.largest_in_grid(ids, (1, 1))


@needs_library
@pytest.mark.parametrize("dtype", structs.INTEGERS, ids=str)
@pytest.mark.parametrize("steps", [(3,), (1, 4), (5, 3, 2), (9, 1, 40)], ids=str)
def test_the_largest_id_in_a_grid(steps: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(len(steps))
    for lowest, largest in ((-100, 0), (-5, 120), (0, 3), (0, 255)):
        shape = (2, 3, *(17, 8, 40)[-len(steps) :])
        ids = torch.randint(lowest, largest + 1, shape, generator=generator)
        ids = ids.clamp_(torch.iinfo(dtype).min, torch.iinfo(dtype).max).to(dtype)
        grid = (slice(None), slice(None), *(slice(step // 2, None, step) for step in steps))
        strided = ids.transpose(1, -1).contiguous().transpose(1, -1)
        for view in (ids, ids.transpose(0, 1), strided, ids[:, :, 1:], ids[:, :1].expand_as(ids)):
            assert native.largest_in_grid(view, steps) == int(view[grid].max())


@needs_library
def test_ids_of_64_bits_in_a_grid() -> None:
    ids = torch.full((1, 1, 9), -(2**62))
    assert native.largest_in_grid(ids, (3,)) == -(2**62)
    ids[..., 4] = 2**62
    assert native.largest_in_grid(ids, (3,)) == 2**62
    assert native.largest_in_grid(ids, (5,)) == -(2**62)
    assert native.largest_in_grid(ids[:0], (3,)) == -(2**63)
