"""The Triton kernels of the labels compiled for three generations of chips, without one, as test_triton_offline.py."""

from __future__ import annotations

import pytest

from .offline_checks import MARKS, compiled_by, spilled

pytest.importorskip("triton")
pytestmark = MARKS
BYTES = {"bool": 1, "class map": 1, "one-hot": 1, "bf16": 2, "fp32": 4, "int64": 8, "fp64": 8}
THREAD = 16  # voxels of a thread in a tile


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    return compiled_by("triton_offline_labels", tmp_path_factory.mktemp("triton"))


def label(row: dict) -> str:
    return f"{row['case']}, {row['voxels']} sm_{row['sm']}"


def cases(compiled: list[dict], kernel: str, *volumes: str) -> list[dict]:
    found = [row for row in compiled if row["case"].split()[0] == kernel and (row["voxels"] in volumes or not volumes)]
    assert found
    return found


def test_everything_was_compiled(compiled):
    assert {row["sm"] for row in compiled} == {80, 90, 100}
    assert {row["voxels"] for row in compiled} == {"even", "odd", "wide", "one"}
    assert len(compiled) == len({label(row) for row in compiled}) == 3 * (15 + 3 * 4)


def test_no_spills(compiled):
    assert not spilled(compiled)


def test_registers_leave_room_for_many_programs(compiled):
    """For 16 warps at least on a multiprocessor of 64 Ki registers; for 12 where parents are of 64 bits."""
    assert not [label(row) for row in compiled if row["registers"] > (168 if row["voxels"] == "wide" else 128)]


def test_masks_are_read_and_labels_written_16_bytes_at_a_time(compiled):
    """Both in a full tile and in the tail; channel 1 of one-hot channels reads channel 0 as well."""
    for row in cases(compiled, "start", "even", "wide"):
        mask = row["case"].removeprefix("start ")
        loads = 2 * THREAD * BYTES[mask] // 16 * (2 if mask == "one-hot" else 1)
        assert row["ldg128"] == row["ldg"] == loads, label(row)
        assert row["stg128"] == 2 * THREAD * slot(row) // 16, label(row)


def slot(row: dict) -> int:
    """Bytes of a label."""
    return 8 if row["voxels"] == "wide" else 4


def test_full_tiles_of_an_odd_volume_are_read_and_written_16_bytes_at_a_time(compiled):
    for row in cases(compiled, "start", "odd"):
        assert row["ldg128"] == THREAD // 16, label(row)
        assert row["stg128"] == THREAD * 4 // 16, label(row)
    for kernel, labels in (("join", 4), ("rank", THREAD), ("number", THREAD)):
        for row in cases(compiled, kernel, "odd"):
            assert row["ldg128"] == labels * 4 // 16, label(row)


def test_labels_are_read_16_bytes_at_a_time(compiled):
    """Of a listed tile or block, 16 or 4 labels per thread; what is looked up elsewhere goes one by one."""
    for kernel, labels in (("join", 4), ("rank", THREAD), ("number", THREAD)):
        for row in cases(compiled, kernel, "even", "wide"):
            assert row["ldg128"] == 2 * labels * slot(row) // 16, label(row)


def test_atomics(compiled):
    """Joins link with one per voxel of a thread; a tile puts itself on the list with one, in full and as the tail."""
    for kernel, atomics in (("start", 2), ("join", 4), ("rank", 0), ("scan", 0), ("number", 0)):
        for row in cases(compiled, kernel, "even", "odd", "wide"):
            assert row["atomics"] == atomics, label(row)


def test_shared_memory_limits_nothing(compiled):
    assert not [label(row) for row in compiled if row["shared"] > 16 * 1024]


def test_joins_load_parents_past_the_first_level_cache_and_store_nothing(compiled):
    """Parents that other multiprocessors have made are seen in time: a load for either side of a thread's 4 voxels."""
    for row in cases(compiled, "join"):
        assert row["strong"] >= 2 * 4, label(row)
        assert row["stg"] == 0, label(row)
