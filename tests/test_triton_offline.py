"""The Triton kernels compiled for three generations of chips, without one: no spills, 16-byte loads and stores."""

from __future__ import annotations

import pytest

from .offline_checks import MARKS, compiled_by, spilled

triton = pytest.importorskip("triton")
pytestmark = MARKS
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    return compiled_by("triton_offline", tmp_path_factory.mktemp("triton"))


def label(row: dict) -> str:
    return f"{row['pass']} {row['case']} sm_{row['sm']}"


def test_everything_was_compiled(compiled):
    assert {row["sm"] for row in compiled} == {80, 90, 100}
    assert {row["pass"] for row in compiled} == {"fwd", "bwd", "finish", "read"}
    assert len(compiled) == len({label(row) for row in compiled}) == 3 * (2 * 12 + 7 + 2) + (2 * 9 + 3) + 4


def test_no_spills(compiled):
    assert not spilled(compiled)


def test_registers_leave_room_for_enough_programs(compiled):
    """Of 65,536 registers a multiprocessor has; a program of four warps has 4 KiB of logits and ids under way, and 18
    KiB cover the latency of an H100's memory. A difference has 6 KiB; a softmax over more than two channels has no
    block under way while it computes, and it is arithmetic that bounds it. Triton 3.9 takes 113 for a difference and
    117 for a softmax; older ones were seen to take up to 130 and 147."""
    for row in [row for row in compiled if "fp64" not in row["case"]]:
        if "dice fp32" in row["case"] and row["pass"] == "fwd":
            assert row["registers"] <= (96 if VERSION < (3, 8) else 80), label(row)  # five programs, six
        if "dice+bce" in row["case"] and row["pass"] == "fwd":
            if row["case"].startswith("softmax"):
                assert row["registers"] <= (152 if VERSION < (3, 8) else 128), label(row)  # three, four
            elif row["case"].startswith("difference"):
                assert row["registers"] <= (136 if VERSION < (3, 6) else 128), label(row)  # three, four
            else:
                assert row["registers"] <= (128 if VERSION < (3, 8) else 112), label(row)  # four
        if row["pass"] == "bwd" and row["case"].startswith("sigmoid dice"):
            assert row["registers"] <= 48, label(row)


def of_volumes(compiled: list[dict], dtype: str, *, odd: bool = False) -> list[dict]:
    """Of the passes over a volume, but for counts alone; "odd": of one row whose length is not divisible by 16."""
    found = [row for row in compiled if row["pass"] in ("fwd", "bwd") and dtype in row["case"]]
    found = [row for row in found if row["case"].endswith(", odd") == odd and " counts " not in row["case"]]
    found = [row for row in found if not row["case"].endswith((", odd rows", ", one"))]
    assert {row["pass"] for row in found} == {"fwd", "bwd"}
    return found


def test_volumes_are_read_16_bytes_at_a_time(compiled):
    """Logits and ids in a full block and in the tail: four such loads, six of a difference, and as many of the first
    block where the next is under way; more where a softmax sweeps twice or thrice. In the forward pass crowded blocks
    are read otherwise."""
    for row in of_volumes(compiled, "fp32"):
        sweeps = 2 if row["pass"] == "fwd" and not row["case"].startswith("softmax") else 1
        volumes = 3 if row["case"].startswith("difference") else 2
        assert row["ldg128"] >= 2 * volumes * sweeps, label(row)


def test_gradients_are_written_16_bytes_at_a_time(compiled):
    for row in of_volumes(compiled, "fp32") + of_volumes(compiled, "fp64"):
        if row["pass"] == "bwd":
            volumes = 2 if row["case"].startswith("difference") else 1
            assert row["stg"] == row["stg128"] == 2 * volumes, label(row)


def test_half_precision_is_read_and_written_8_bytes_at_a_time(compiled):
    """Four voxels as well, so with as many loads as in fp32; and so are ids of one byte, 4 bytes at a time."""
    found = {(row["pass"], row["case"]): row for row in compiled if row["sm"] == 90}
    half, single = found["fwd", "sigmoid dice+bce bf16"], found["fwd", "sigmoid dice+bce fp32, no upstream"]
    assert half["ldg"] == single["ldg"]
    assert half["ldg64"] - single["ldg64"] == single["ldg128"] - half["ldg128"] == 4
    assert found["bwd", "sigmoid dice fp16, bytes"]["ldg"] == found["bwd", "sigmoid dice fp32"]["ldg"]
    for case in ("sigmoid dice+bce bf16", "sigmoid dice fp16, bytes"):
        row = found["bwd", case]
        assert row["ldg64"] == row["stg64"] == row["stg"] == 2, label(row)


def test_full_blocks_of_an_odd_volume_are_read_and_written_16_bytes_at_a_time(compiled):
    """In the tail there is no such access."""
    for row in of_volumes(compiled, "fp32", odd=True):
        assert row["ldg128"] == {"fwd": 4, "bwd": 2}[row["pass"]], label(row)
        assert row["stg128"] == {"fwd": 0, "bwd": 1}[row["pass"]], label(row)


def test_atomics(compiled):
    """The finish counts its programs; the backward pass has none. The forward pass has one for the count of a cell and
    three for each of its sums, of which one or two are taken: in at most nine places, which are the background, home,
    the search and the crowd, each in full blocks and in the tail, and what the compiler writes out twice; of a softmax
    the channels beyond its lanes as well, where the two pieces of code have ends in common. Of counts alone also the
    crowd's loop over four parts is written out.
    """
    for row in compiled:
        if row["pass"] != "fwd":
            assert row["atomics"] == (row["pass"] == "finish"), label(row)
        else:
            features = {"counts": 0, "dice": 1, "dice+bce": 3, "focal": 2, "all": 6}[row["case"].split()[1]]
            assert row["atomics"] <= (9 if features else 16) * (1 + 3 * features), label(row)


def test_the_exponential_is_not_left_to_the_compiler(compiled):
    """Its own rounds x / log(2) once, which the interpreter's does not show: 2e-6 of the result at x = -40. Every 2^x
    in the code stands for one of ours, so that they come with the step that makes an integer of x / log(2)."""
    for row in of_volumes(compiled, "fp32"):
        if not row["case"].startswith("none"):
            assert 0 < row["ex2"] <= row["reduced"], label(row)


def test_a_softmax_over_two_channels_takes_no_more_exponentials_than_a_sigmoid(compiled):
    """One of a voxel, though it has two logits."""
    found = {(row["pass"], row["case"]): row["ex2"] for row in compiled if row["sm"] == 90}
    for name in ("fwd", "bwd"):
        softmax = found[name, "difference dice+bce fp32, channel 0 unused"]
        assert softmax == found[name, "sigmoid dice+bce fp32 target"], name


def test_shared_memory_limits_nothing(compiled):
    for row in compiled:
        assert row["shared"] <= 16 * 1024, label(row)


def test_half_precision_gradients_are_rounded_to_nearest(compiled):
    """The interpreter cuts bf16 off, so its test cannot tell."""
    for dtype in ("bf16", " fp16"):
        for row in of_volumes(compiled, dtype):
            assert (row["cvt_rn"] > 0) == (row["pass"] == "bwd"), label(row)


@pytest.mark.parametrize(("script", "count"), [("", 21), ("_labels", 15 + 4), ("_zones", 15)])
def test_kernels_compile_for_an_amd_chip(tmp_path, script, count):
    """Nothing in them is CUDA's alone. Nothing has run on such a chip either."""
    if VERSION < (3, 7):
        pytest.skip("Triton links for AMD by itself from 3.7 on")
    table = compiled_by(f"triton_offline{script}", tmp_path, "--hip")
    assert len(table) == count
    assert {row["gfx"] for row in table} == {"gfx942"}
    assert all(row["bytes"] > 1000 and row["spills"] == 0 for row in table)
