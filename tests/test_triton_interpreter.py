"""Runs triton_*_cases.py where the kernels can be interpreted: in a process of its own.

TRITON_INTERPRET is read when Triton is first imported, and whoever imported Triton before in this process
(torch.compile does) did so without it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
# How many tests of each file are to pass at least, somewhat fewer than there are: a file that skips fails nothing else.
LEAST = {
    "interpreter": 240, "launcher": 35, "table": 65, "finish": 85, "loss": 85, "components": 50, "label_target": 90,
    "zones": 100, "quick": 5,
}  # fmt: skip
NEED_SCIPY = ("components", "label_target")


def test_all_files_are_run():
    assert {path.name for path in HERE.glob("triton_*_cases.py")} == {f"triton_{name}_cases.py" for name in LEAST}


@pytest.mark.slow
def test_kernels_in_the_interpreter(tmp_path):
    assert too_few(HERE, HERE.parent, tmp_path / "report.xml") == {}


def too_few(folder: Path, root: Path, report: Path) -> dict[str, int]:
    """Run the files of a folder; return how many tests passed of each of which not enough did."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:  # options and workers of this session
        del environment[name]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "--import-mode=append"]
    command += [f"--junitxml={report}", *map(str, (folder / f"triton_{name}_cases.py" for name in LEAST))]
    found = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1800)
    print(found.stdout, found.stderr, sep="\n")
    assert found.returncode == 0
    has_scipy = importlib.util.find_spec("scipy") is not None
    passed = Counter(
        case.get("classname", "").rpartition(".")[2]
        for case in ET.parse(report).iter("testcase")
        if all(part.tag not in ("skipped", "failure", "error") for part in case)
    )
    counts = {name: passed[f"triton_{name}_cases"] for name in LEAST if has_scipy or name not in NEED_SCIPY}
    return {name: count for name, count in counts.items() if count < LEAST[name]}


def test_a_file_that_skips_is_noticed(tmp_path):
    """All of it, or nearly all of its tests."""
    many = "import pytest\n@pytest.mark.parametrize('i', range(250))\ndef test(i):\n    assert i >= 0\n"
    for name in LEAST:
        (tmp_path / f"triton_{name}_cases.py").write_text(many)
    assert too_few(tmp_path, tmp_path, tmp_path / "report.xml") == {}
    (tmp_path / "triton_loss_cases.py").write_text(many + "    if i:\n        pytest.skip('no')\n")
    (tmp_path / "triton_zones_cases.py").write_text("import pytest\npytest.skip('no', allow_module_level=True)\n")
    assert too_few(tmp_path, tmp_path, tmp_path / "report.xml") == {"loss": 1, "zones": 0}
