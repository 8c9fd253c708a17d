"""The Triton kernels compiled for three generations of chips, without one: no spills, 16-byte loads and stores.

In a process of its own: the interpreter's switch must not be set when Triton is imported.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.system() != "Linux", reason="Triton's wheels and CUDA's tools are for Linux"),
]
SCRIPT = Path(__file__).with_name("triton_offline.py")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    path = [str(SCRIPT.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    found = subprocess.run(
        [sys.executable, str(SCRIPT), "--json"], env=environment, capture_output=True, text=True, timeout=1200
    )
    assert found.returncode == 0, found.stderr
    answer = json.loads(found.stdout)
    rows = answer["rows"]
    columns = list(rows[0])
    print(
        f"\nTriton {answer['triton']}",
        *[" ".join(f"{column}={row[column]}" for column in columns) for row in rows],
        sep="\n",
    )
    return rows


def label(row: dict) -> str:
    return f"{row['pass']} {row['case']} sm_{row['sm']}"


def test_everything_was_compiled(compiled):
    assert {row["sm"] for row in compiled} == {80, 90, 100}
    assert {row["pass"] for row in compiled} == {"fwd", "bwd"}
    assert len(compiled) == len({label(row) for row in compiled}) >= 30


def test_no_spills(compiled):
    spilled = [label(row) for row in compiled if row["spills"] or row["local"] or row["stack"]]
    assert not spilled


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
