"""The kernels of nearest_instance compiled for three generations of chips, without one: no spills, 16-byte loads."""

from __future__ import annotations

import pytest

from .offline_checks import MARKS, compiled_by, spilled

pytest.importorskip("triton")
pytestmark = MARKS
ROW_VOXELS, TILE = 512, 16


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    return compiled_by("triton_offline_zones", tmp_path_factory.mktemp("triton"))


def label(row: dict) -> str:
    return f"{row['kernel']} {row['case']} sm_{row['sm']}"


def test_everything_was_compiled(compiled):
    assert {row["sm"] for row in compiled} == {80, 90, 100}
    assert {row["kernel"] for row in compiled} == {"row", "line"}
    assert len(compiled) == len({label(row) for row in compiled}) >= 40


def test_no_spills(compiled):
    assert not spilled(compiled)


def test_enough_programs_fit_on_a_multiprocessor(compiled):
    """A program is one warp: 112 registers a thread leave room for 18 of them."""
    for row in compiled:
        if row["kernel"] == "line" and "wide" not in row["case"]:
            assert row["registers"] <= 112, label(row)


def test_rows_are_read_and_written_16_bytes_at_a_time(compiled):
    """What remains are look-ups of single ids, for ties and in 1D for the answer, which most threads skip."""
    for row in compiled:
        if row["kernel"] == "row":
            size = {"u8": 1, "i32": 4, "i64": 8}[row["case"].split()[0]]
            passes = 2 if "long" in row["case"] else 1
            ids = passes * ROW_VOXELS * size // 32 // 16
            left = (passes - 1) * ROW_VOXELS * 4 // 32 // 16
            look_ups = ROW_VOXELS // 32 * (3 if "only" in row["case"] else 2)
            assert row["ldg128"] == ids + left, label(row)
            assert row["ldg"] - row["ldg128"] == look_ups, label(row)
            assert row["stg128"] == passes * ROW_VOXELS * 4 // 32 // 16, label(row)
            assert row["stg"] - row["stg128"] == ("i64" in row["case"]), label(row)  # the flag of invalid input


def test_a_row_is_loaded_once_for_a_tile(compiled):
    """Six rows of two (first, next, and outward), an id for the four that are tried; the ids of the tile at the end."""
    for row in compiled:
        if row["kernel"] == "line":
            last = row["case"][0] in "z2"
            assert row["ldg"] == 12 + (TILE if last else 0), label(row)
            assert row["stg"] == TILE, label(row)


def test_shared_memory_limits_nothing(compiled):
    assert not [label(row) for row in compiled if row["shared"] > 16 * 1024]


def test_no_atomics(compiled):
    assert not [label(row) for row in compiled if row["atomics"]]
