"""Imports go one way, the package imports nothing heavy, and files stay small enough to be read."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import blobloss_fast

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "blobloss_fast"

# A module may import what stands in an earlier row; the kernels also one another. "" is blobloss_fast/__init__.py.
ROWS = (
    {"kernels"},
    {"_checks", "_ops"},
    {"_backends", "labelling"},
    {"criteria", "stats"},
    {"options"},
    {"partition"},
    {"compute"},
    {"functional"},
    {"losses"},
    {"compat", "integrations"},
    {""},
    {"demo_volume"},
    {"demo_picture"},
    {"demo"},
    {"__main__"},
)
OPTIONAL = ("triton", "matplotlib", "monai", "nibabel", "nnunetv2", "rich", "scipy")


def module_name(path: Path) -> str:
    """kernels/layout.py -> "kernels.layout", kernels/__init__.py -> "kernels", __init__.py -> ""."""
    parts = path.relative_to(SOURCES).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(SOURCES.rglob("*.py"))}


def row_of(module: str) -> int:
    """The row of a module, or of the package that it lies in."""
    top = module.partition(".")[0]
    return next((index for index, row in enumerate(ROWS) if top in row), len(ROWS))


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node, inside functions too, but not what only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from (child, *runtime_nodes(child))
        else:
            yield from (node, *runtime_nodes(node))


def imported_modules(module: str, source: str, is_package: bool) -> set[str]:
    """The full names of all modules that a source imports, relative imports resolved."""
    here = ["blobloss_fast", *module.split(".")] if module else ["blobloss_fast"]
    package = here if is_package else here[:-1]
    found = set()
    for node in runtime_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = [*package[: len(package) - node.level + 1], *base]
            origin = ".".join(base)
            for alias in node.names:  # `from . import layout` imports a module, `from .layout import FEATURES` a name
                inside = f"{origin}.{alias.name}"
                is_module = inside.removeprefix("blobloss_fast.") in FILES
                found.add(inside if is_module or origin == "torch" else origin)
    return found


def own_imports(module: str, source: str, is_package: bool = False) -> set[str]:
    names = imported_modules(module, source, is_package)
    return {name.removeprefix("blobloss_fast").lstrip(".") for name in names if name.split(".")[0] == "blobloss_fast"}


def wrong_arrows(module: str, source: str, is_package: bool = False) -> set[str]:
    """What a module imports although it stands in the same or a later row."""
    row = row_of(module)
    within_kernels = {name for name in own_imports(module, source, is_package) if row == row_of(name) == 0}
    package_itself = {module}  # integrations/__init__.py and its like
    allowed = {name for name in FILES if row_of(name) < row} | within_kernels | package_itself
    return own_imports(module, source, is_package) - allowed


def test_every_module_has_its_row() -> None:
    assert [module for module in FILES if row_of(module) == len(ROWS)] == []


@pytest.mark.parametrize("module", FILES, ids=lambda module: module or "__init__")
def test_imports_point_one_way(module: str) -> None:
    path = FILES[module]
    assert wrong_arrows(module, path.read_text(encoding="utf-8"), path.name == "__init__.py") == set()


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("kernels.reference", "from .. import _checks", {"_checks"}),
        ("kernels.reference", "def f():\n    from blobloss_fast._ops import segment_stats", {"_ops"}),
        ("criteria", "from .stats import segment_stats", {"stats"}),
        ("functional", "import blobloss_fast.losses", {"losses"}),
        ("losses", "from blobloss_fast import blob_loss", {""}),
        ("kernels.reference", "from .layout import FEATURES\nfrom . import finish", set()),
        ("functional", "if TYPE_CHECKING:\n    from .losses import BlobLoss", set()),
    ],
)
def test_the_arrow_check_sees_what_it_should(module: str, source: str, wrong: set[str]) -> None:
    assert wrong_arrows(module, source) == wrong


def test_only_ops_knows_torch_library() -> None:
    def uses_torch_library(module: str) -> bool:
        source = FILES[module].read_text(encoding="utf-8")
        attributes = {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
        names = attributes | imported_modules(module, source, FILES[module].name == "__init__.py")
        return any(f"{name}.".startswith("torch.library.") for name in names)

    assert [module for module in FILES if uses_torch_library(module)] == ["_ops"]


def test_only_the_triton_kernels_import_triton() -> None:
    users = []
    for module, path in FILES.items():
        names = imported_modules(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
        if any(name.split(".")[0] == "triton" for name in names) and not module.startswith("kernels.triton_"):
            users.append(module)
    assert users == []


def run_python(code: str, folder: Path) -> str:
    """Run code in a fresh interpreter that finds the package under test, and nothing else of the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(Path(blobloss_fast.__file__).parents[1])}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light(tmp_path: Path) -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import blobloss_fast; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    imported = run_python(code, tmp_path).split()
    assert "blobloss_fast" in imported
    assert sorted(set(imported) & set(OPTIONAL)) == []


def test_works_without_triton_and_the_extras(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))  # None: importing any of these raises ModuleNotFoundError
import torch
from blobloss_fast import BlobLoss
mask = torch.zeros(1, 1, 4, 4)
mask[..., 1, 1] = 1
logits = torch.zeros(1, 1, 4, 4, requires_grad=True)
loss = BlobLoss()(logits, mask)
loss.backward()
print(loss.item(), logits.grad[0, 0, 1, 1].item())
"""
    loss, gradient = map(float, run_python(code, tmp_path).split())
    # Main and blob term alike: 1 - 2 s / (S + n) with s = 1/2, S = 8, n = 1; p of the blob's voxel is in s and in S, so
    # the derivative is -(2 (S + n) - 2 s) / (S + n)^2 = -17/81, times dp/dx = 1/4.
    assert loss == pytest.approx(2 * (1 - 1 / 9), abs=1e-5)
    assert gradient == pytest.approx(-2 * (17 / 81) / 4, abs=1e-5)


def source_files() -> list[Path]:
    folders = (ROOT / name for name in ("blobloss_fast", "bench", "tests", "csrc"))
    return sorted(
        path for folder in folders for path in folder.rglob("*") if path.suffix in {".py", ".cpp", ".c", ".hpp", ".h"}
    )


def test_files_are_short() -> None:
    limits = {SOURCES / "__init__.py": 50, ROOT / "setup.py": 100}
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in [*source_files(), *limits]}
    assert len(lines) > 20
    too_long = {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > limits.get(path, 400)}
    assert too_long == {}
