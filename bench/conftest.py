"""The option of the benchmarks."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data", type=Path, metavar="DIR", help="also measure the npz files there that hold a `label`")
