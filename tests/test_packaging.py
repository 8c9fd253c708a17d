"""What is built, installed and declared."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

import blobloss_fast
from blobloss_fast.kernels import native

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


def call_backend(kind: str, checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Call the build backend as pip does, but in this environment: an isolated build needs the network."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    inherited = {name: value for name, value in os.environ.items() if name != "BLOBLOSS_FAST_NATIVE"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=checkout,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def build(kind: str, checkout: Path, **environment: str) -> Path:
    done = call_backend(kind, checkout, **environment)
    assert done.returncode == 0, done.stderr
    return checkout / "dist" / done.stdout.splitlines()[-1]


def tag_and_files(wheel: Path) -> tuple[str, bool, set[str]]:
    """The tag of a wheel, which its name and its metadata agree on; whether it is pure; the files of the package."""
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        metadata = next(opened.read(name).decode() for name in names if name.endswith(".dist-info/WHEEL"))
    tag = wheel.stem.removeprefix(f"blobloss_fast-{PROJECT['version']}-")
    assert f"Tag: {tag}\n" in metadata
    return tag, "Root-Is-Purelib: true" in metadata, {name for name in names if ".dist-info/" not in name}


def package_files() -> set[str]:
    sources = {str(path.relative_to(ROOT).as_posix()) for path in (ROOT / "blobloss_fast").rglob("*.py")}
    return sources | {"blobloss_fast/py.typed", "blobloss_fast/data/README.md", "blobloss_fast/data/ms_lesions.npz"}


@pytest.fixture(scope="module")
def compiler() -> str:
    """The C++ compiler that setuptools would take."""
    command = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    found = shutil.which(command.split()[0])
    if found is None or sys.platform == "win32":
        pytest.skip(f"there is no C++ compiler {command}: the native library cannot be built")
    return found


@pytest.fixture(scope="module")
def native_wheel(checkout: Path, compiler: str) -> Path:
    return build("wheel", checkout, BLOBLOSS_FAST_NATIVE="1")


def test_wheel_with_the_native_library(native_wheel: Path) -> None:
    """For one platform, but for any version of Python: the library knows nothing of it."""
    tag, is_pure, files = tag_and_files(native_wheel)
    assert re.fullmatch(r"py3-none-(linux|macosx)_\w+", tag)
    assert not is_pure
    assert files == package_files() | {f"blobloss_fast/{native.PATH.name}"}
    with zipfile.ZipFile(native_wheel) as wheel:
        names = set(wheel.namelist())
        entry_points = next(wheel.read(name).decode() for name in names if name.endswith("/entry_points.txt"))
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert "blobloss-fast = blobloss_fast.demo:main" in entry_points


def test_the_library_in_the_wheel_works(native_wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(native_wheel) as wheel:
        opened = native.open_library(Path(wheel.extract(f"blobloss_fast/{native.PATH.name}", tmp_path)))
    assert not isinstance(opened, str), opened
    assert opened.isa in ("baseline", "avx2", "avx512")


@pytest.mark.parametrize(
    "environment",
    [{"BLOBLOSS_FAST_NATIVE": "0"}, {"CC": "/no/compiler", "CXX": "/no/compiler", "LDSHARED": "/no/compiler"}],
    ids=["left out", "no compiler"],
)
def test_wheel_without_the_native_library(checkout: Path, environment: dict[str, str]) -> None:
    tag, is_pure, files = tag_and_files(build("wheel", checkout, **environment))
    assert tag == "py3-none-any"
    assert is_pure
    assert files == package_files()


def test_a_must_that_cannot_be_built_fails_in_one_line(checkout: Path) -> None:
    environment = {"CC": "/no/compiler", "CXX": "/no/compiler", "BLOBLOSS_FAST_NATIVE": "1"}
    done = call_backend("wheel", checkout, **environment)
    assert done.returncode != 0
    assert re.fullmatch(
        "error: the native library needs GCC or Clang and was not built: .*No such file or directory.*; "
        "unset BLOBLOSS_FAST_NATIVE to install without it",
        done.stderr.splitlines()[-1],
    )


def test_a_choice_that_does_not_exist_is_refused(checkout: Path) -> None:
    done = call_backend("wheel", checkout, BLOBLOSS_FAST_NATIVE="yes")
    assert done.returncode != 0
    assert "BLOBLOSS_FAST_NATIVE must be 1 (a must), 0 (leave out) or not set; got 'yes'" in done.stderr


PER_SET = ("label_rows.cpp", "nearest_lines.cpp", "segment_stats.cpp")


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for a compiler is a shell script")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the baseline is all that is built here")
@pytest.mark.parametrize(
    ("refused", "environment", "expected"),
    [
        ("nothing", {}, {"baseline", "avx2", "avx512"}),
        ("-mavx512bw", {}, {"baseline", "avx2"}),
        ("-mavx2", {}, {"baseline"}),
        ("nothing", {"ARCHFLAGS": "-arch x86_64 -arch arm64"}, {"baseline"}),
    ],
)
def test_instruction_sets_that_are_built(
    checkout: Path, tmp_path: Path, refused: str, environment: dict[str, str], expected: set[str]
) -> None:
    """Those whose flags the compiler knows; this one writes down what it is asked for and leaves empty files."""
    compiler, log = tmp_path / "c++", tmp_path / "log"
    compiler.write_text(
        f"""#!/bin/sh
case " $* " in *" {refused} "*) exit 1;; esac
echo "$*" >> "{log}"
for argument; do [ "$before" = -o ] && : > "$argument"; before="$argument"; done
""",
        encoding="utf-8",
    )
    compiler.chmod(0o755)
    tag, _, _ = tag_and_files(build("wheel", checkout, CXX=str(compiler), **environment))
    assert tag != "py3-none-any"
    commands = log.read_text(encoding="utf-8").splitlines()
    assert {name for line in commands for name in re.findall(r"-DBLOBLOSS_ISA=(\w+)", line)} == expected
    for source in (ROOT / "csrc").glob("*.cpp"):
        times = [line for line in commands if f"csrc/{source.name}" in line]
        assert len(times) == (len(expected) if source.name in PER_SET else 1)
    (dispatch,) = (line for line in commands if "csrc/library.cpp" in line)
    assert set(re.findall(r"-DBLOBLOSS_HAS_(\w+)", dispatch)) == {name.upper() for name in expected}
    assert [line for line in commands if "-ffast-math" in line or "-fopenmp" in line] == []


def test_sdist(checkout: Path) -> None:
    with tarfile.open(build("sdist", checkout)) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    needed = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"}
    needed |= {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir() if path.suffix in (".cpp", ".h")}
    needed |= {
        "blobloss_fast/py.typed",
        "blobloss_fast/data/ms_lesions.npz",
        "bench/table.py",
        "tests/install_matrix.sh",
        "tests/test_packaging.py",
    }
    assert needed - names == set()
    unwanted = ("__pycache__", ".so", ".dylib", ".o")
    assert [name for name in names if name.endswith(unwanted) or name.startswith((".git", "build/"))] == []
