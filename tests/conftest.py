"""What the test files share: asserts that explain themselves, and both backends of the CPU."""

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
