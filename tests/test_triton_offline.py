"""The Triton kernels compiled for three generations of chips, without one: no spills, 16-byte loads and stores."""

from __future__ import annotations

import pytest

from .offline_checks import MARKS, compiled_by, spilled

pytest.importorskip("triton")
pytestmark = MARKS


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    return compiled_by("triton_offline", tmp_path_factory.mktemp("triton"))


def label(row: dict) -> str:
    return f"{row['pass']} {row['case']} sm_{row['sm']}"


def test_everything_was_compiled(compiled):
    assert {row["sm"] for row in compiled} == {80, 90, 100}
    assert {row["pass"] for row in compiled} == {"fwd", "bwd"}
    assert len(compiled) == len({label(row) for row in compiled}) >= 30


def test_no_spills(compiled):
    assert not spilled(compiled)


def test_volumes_are_read_16_bytes_at_a_time(compiled):
    """Logits and ids in a full block and in the tail: four such loads, more where a softmax sweeps twice or thrice."""
    for row in compiled:
        if "fp32" in row["case"]:
            assert row["ldg128"] >= 4, label(row)
            if (
                row["pass"] == "fwd"
            ):  # nothing else is loaded but targets: one byte per voxel, in the full block and the tail
                assert row["ldg"] - row["ldg128"] == (2 if "target" in row["case"] else 0), label(row)


def test_gradients_are_written_16_bytes_at_a_time(compiled):
    for row in compiled:
        if row["pass"] == "bwd" and "fp32" in row["case"]:
            assert row["stg"] == row["stg128"] == 2, label(row)


def test_only_the_forward_pass_uses_atomics(compiled):
    for row in compiled:
        assert (row["atomics"] > 0) == (row["pass"] == "fwd"), label(row)


def test_half_precision_gradients_are_rounded_to_nearest(compiled):
    """The interpreter cuts bf16 off, so its test cannot tell."""
    for row in compiled:
        if row["pass"] == "bwd" and "bf16" in row["case"]:
            assert row["cvt_rn"] > 0, label(row)
