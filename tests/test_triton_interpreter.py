"""Runs triton_*_cases.py where the kernels can be interpreted: in a process of its own.

TRITON_INTERPRET is read when Triton is first imported, and whoever imported Triton before in this process
(torch.compile does) did so without it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
NAMES = ("interpreter", "launcher", "table", "finish", "loss", "components", "label_target", "zones")
CASES = [str(HERE / f"triton_{name}_cases.py") for name in NAMES]


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:  # options and workers of this session
        del environment[name]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "--import-mode=append"]
    found = subprocess.run(
        [*command, *CASES], cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=1200
    )
    print(found.stdout, found.stderr, sep="\n")
    assert found.returncode == 0
    assert int(re.search(r"(\d+) passed", found.stdout)[1]) >= 200  # it did run them
