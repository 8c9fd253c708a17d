"""What the test files share: asserts that explain themselves, both backends of the CPU, and its instruction sets."""

import ctypes
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("tests.blob_loss_checks", "tests.tolerances")


# Takes minutes, the longest first.
LONG = (
    "test_kernels_in_the_interpreter",
    "test_triton_offline.py",
    "test_triton_offline_labels.py",
    "test_triton_offline_zones.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes minutes: of several processes, none then waits for another at the end, and as work is
    taken over from a process's end, each table of compiled kernels is made by one process, not by two."""
    items.sort(key=lambda item: next((i for i, name in enumerate(LONG) if name in item.nodeid), len(LONG)))


@pytest.fixture(params=["native", "reference"])
def cpu_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on the native library and on its fallback: `pytestmark = pytest.mark.usefixtures("cpu_backend")`."""
    from blobloss_fast import _ops
    from blobloss_fast.kernels import native, reference

    if request.param == "native" and not native.available():
        pytest.skip(native.why_not() or "")
    module = {"native": native, "reference": reference}[request.param]
    monkeypatch.setattr(_ops, "_for_cpu", lambda: module)
    return request.param


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def library(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    """The native library, on each instruction set that it was compiled for and that this machine has."""
    from blobloss_fast.kernels import native

    if not native.available():
        pytest.skip(native.why_not() or "")
    library = ctypes.CDLL(str(native.PATH))
    usual = native.isa().encode()
    if not library.blobloss_use_isa(request.param.encode()):
        pytest.skip(f"{request.param} is not in this build or not on this machine")
    yield library
    assert library.blobloss_use_isa(usual)
