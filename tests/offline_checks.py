"""Runs a script that compiles Triton kernels for chips that are not there, and reads its answer.

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

ROOT = Path(__file__).resolve().parents[1]
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.system() != "Linux", reason="Triton's wheels and CUDA's tools are for Linux"),
]


def compiled_by(script: str, cache: Path, *options: str) -> list[dict]:
    """The rows that ``tests/<script>.py --json`` prints, one for every kernel and chip; printed as well."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    path = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    command = [sys.executable, "-m", f"tests.{script}", "--json", *options]
    found = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert found.returncode == 0, found.stderr
    answer = json.loads(found.stdout)
    print(f"\nTriton {answer['triton']}", *answer["rows"], sep="\n")
    return answer["rows"]


def spilled(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["spills"] or row["local"] or row["stack"]]
