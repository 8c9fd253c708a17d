"""What is built, installed and declared."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

import blobloss_fast

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def requirements(extra: str, **environment: str) -> set[str]:
    """Names of everything an extra brings on a machine, extras of our own resolved."""
    found = set()
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.marker is None or requirement.marker.evaluate({**default_environment(), **environment}):
            inner = requirement.extras if requirement.name == PROJECT["name"] else ()
            found |= (
                set().union(*(requirements(name, **environment) for name in inner)) if inner else {requirement.name}
            )
    return found


def test_extras() -> None:
    assert set(EXTRAS) == {"triton", "demo", "bench", "monai", "nnunet", "test", "dev"}
    assert requirements("test") >= requirements("demo") | requirements("bench") | {"pytest-xdist", "scipy"}
    assert {"ruff", "mypy", "build", "pre-commit"} <= requirements("dev")


@pytest.mark.parametrize(
    ("system", "processor", "has_wheels"),
    [
        ("Linux", "x86_64", True),
        ("Linux", "aarch64", True),
        ("Darwin", "arm64", False),
        ("Windows", "AMD64", False),
    ],
)
@pytest.mark.parametrize("extra", ["triton", "test"])
def test_triton_only_where_it_has_wheels(extra: str, system: str, processor: str, has_wheels: bool) -> None:
    names = requirements(extra, platform_system=system, platform_machine=processor)
    assert ("triton" in names) is has_wheels


def test_hard_dependencies() -> None:
    """No Triton: CUDA builds of torch bring it, and it would overwrite what ROCm and XPU builds bring."""
    names = {requirement.name: str(requirement.specifier) for requirement in map(Requirement, PROJECT["dependencies"])}
    assert names == {"torch": ">=2.7", "numpy": "", "connected-components-3d": ">=4.1.1"}


def test_version_agrees() -> None:
    newest = re.search(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["version"] == blobloss_fast.__version__


def test_the_installed_package_is_the_one_under_test() -> None:
    try:
        distribution = importlib.metadata.distribution("blobloss_fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("blobloss_fast is not installed here, only on the path")
    assert distribution.version == PROJECT["version"]
    if any(str(file) == "blobloss_fast/__init__.py" for file in distribution.files or ()):  # not an editable install
        installed = distribution.locate_file("blobloss_fast/__init__.py")
        assert Path(blobloss_fast.__file__).resolve() == Path(str(installed)).resolve()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that building neither sees nor leaves anything in the checkout."""
    copy = tmp_path_factory.mktemp("checkout") / "blobloss_fast"
    leave_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "*.so")
    shutil.copytree(ROOT, copy, ignore=leave_out)
    return copy


def build(kind: str, checkout: Path) -> Path:
    """Call the build backend as pip does, but in this environment: an isolated build needs the network."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return checkout / "dist" / done.stdout.splitlines()[-1]


def test_wheel(checkout: Path) -> None:
    with zipfile.ZipFile(build("wheel", checkout)) as wheel:
        names = set(wheel.namelist())
        entry_points = next(wheel.read(name).decode() for name in names if name.endswith("/entry_points.txt"))
    package = {name for name in names if ".dist-info/" not in name}
    sources = {str(path.relative_to(ROOT).as_posix()) for path in (ROOT / "blobloss_fast").rglob("*.py")}
    data = {"blobloss_fast/py.typed", "blobloss_fast/data/README.md", "blobloss_fast/data/ms_lesions.npz"}
    assert package == sources | data
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert "blobloss-fast = blobloss_fast.demo:main" in entry_points


def test_sdist(checkout: Path) -> None:
    with tarfile.open(build("sdist", checkout)) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    needed = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "csrc/README.md"}
    needed |= {
        "blobloss_fast/py.typed",
        "blobloss_fast/data/ms_lesions.npz",
        "bench/table.py",
        "tests/test_packaging.py",
    }
    assert needed - names == set()
    assert [name for name in names if "__pycache__" in name or name.startswith((".git", "build/"))] == []
