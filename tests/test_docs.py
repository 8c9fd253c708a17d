"""Documentation that runs: the examples of the docstrings, the code of the README, the parts every docstring owes."""

import doctest
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest

import blobloss_fast
from blobloss_fast import criteria

README = Path(__file__).parents[1] / "README.md"
KERNELS = "blobloss_fast.kernels."
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(blobloss_fast.__path__, "blobloss_fast.")
    if not name.startswith(KERNELS + "triton")
    and not name.endswith(("__main__", "_native"))  # the native library is no module
]
PUBLIC = [getattr(blobloss_fast, name) for name in blobloss_fast.__all__ if name not in ("criteria", "compat")]
CRITERIA = [criteria.dice, criteria.jaccard, criteria.tversky, criteria.bce, criteria.cross_entropy, criteria.focal]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    assert sum(len(test.examples) for name in MODULES for test in doctest.DocTestFinder().find(_module(name))) >= 15


def _module(name):
    return importlib.import_module(name)


@pytest.mark.parametrize("function", PUBLIC, ids=lambda f: f.__name__)
def test_public_docstrings_say_what_they_owe(function):
    owed = ["Synchronises:", "Example:"]
    if function is not blobloss_fast.backends:  # which takes nothing and computes nothing
        owed += ["Args:", "Raises:", "Reference:"]
    assert [part for part in owed if part not in function.__doc__] == []


@pytest.mark.parametrize("function", CRITERIA, ids=lambda f: f.__name__)
def test_criteria_document_their_arguments(function):
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
    for name in arguments:
        assert re.search(rf"^ +{name}: ", function.__doc__, re.MULTILINE), name


@pytest.mark.skipif(not README.exists(), reason="the README is not beside the installed tests")
def test_python_code_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["loss"].ndim == 0 and namespace["logits"].grad is not None


@pytest.mark.skipif(not README.exists(), reason="the README is not beside the installed tests")
def test_numbers_of_the_readme_are_those_of_the_results():
    results = README.parent / "bench" / "results" / "cpu.json"
    table = importlib.import_module("bench.table")
    text = README.read_text(encoding="utf-8")
    assert table.replace_between_markers(text, table.as_markdown(json.loads(results.read_text())), "README.md") == text
