"""How much memory the native library takes: next to nothing, and nothing that stays.

Measured in a child process whose malloc counts (PyTorch's tensors and the library's tables alike come from it), and
once more by the kernel's own account of resident pages. The reference, measured in the same way, takes sixty times the
bound and more, which shows that the measurement can fail.

Measured on x86-64 with PyTorch 2.13, Dice alone, one sample and class: of a 128^3 volume with 50 instances 80 kB
forward, 0.96 % of its fp32 logits (25 kB with max_instances=50: otherwise there is room for the usual number), and 11
kB backward. Of these 8 kB are notes on blocks of voxels, two bytes each, which the backward pass needs. One more of
max_instances takes 269 bytes: a row of 16 (the count and one sum, as doubles) in each of 16 tables that are summed
apart, and 12 in the result. There are fewer tables where there are many instances, so that all of them take no more
than a row for every 32 voxels; from 33,000 on there is one, and one more takes 28 bytes.

Finding the labels of a mask takes 12 bytes for every 64 voxels, and 4 for every stretch of foreground voxels.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import mmap
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

import blobloss_fast
from blobloss_fast import BlobLoss
from blobloss_fast.kernels import native

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=str(native.why_not())),
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts what glibc allocates"),
]

SIDE = 128
LOGITS = 4 * SIDE**3  # bytes, and those of the gradient
BOUND = LOGITS // 100
NOTES = 2 * SIDE**3 // 512  # bytes
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # freed pages go back at once
SPARSE = 2_000_000  # rows of a table, of which hardly any has a voxel
PAGES = 1 << 20  # for the account of pages, which every thread keeps to 64 pages of its own

COUNTER = r"""
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);

static atomic_llong live, peak;

static void* add(void* p) {
  const long long size = p ? (long long)malloc_usable_size(p) : 0, now = atomic_fetch_add(&live, size) + size;
  long long seen = atomic_load(&peak);
  while (now > seen && !atomic_compare_exchange_weak(&peak, &seen, now)) {
  }
  return p;
}

static void drop(void* p) {
  if (p) atomic_fetch_sub(&live, (long long)malloc_usable_size(p));
}

void* malloc(size_t n) { return add(__libc_malloc(n)); }
void* calloc(size_t n, size_t size) { return add(__libc_calloc(n, size)); }
void* memalign(size_t alignment, size_t n) { return add(__libc_memalign(alignment, n)); }
void* aligned_alloc(size_t alignment, size_t n) { return memalign(alignment, n); }
int posix_memalign(void** p, size_t alignment, size_t n) {
  void* found = memalign(alignment, n);
  if (!found) return ENOMEM;
  *p = found;
  return 0;
}
void free(void* p) {
  drop(p);
  __libc_free(p);
}
void* realloc(void* p, size_t n) {
  drop(p);
  void* found = __libc_realloc(p, n);
  if (!found && n) add(p);
  return add(found);
}
int counter_live(void) { return (int)atomic_load(&live); }
int counter_peak(void) { return (int)atomic_load(&peak); }
void counter_reset(void) { atomic_store(&peak, atomic_load(&live)); }
"""


# ---------------------------------------------------------------- in the child process


def balls(count: int = 50) -> tuple[Tensor, Tensor]:
    """Logits and ids of small cubes that do not touch, 1 to `count`."""
    ids = torch.zeros(1, 1, SIDE, SIDE, SIDE, dtype=torch.int32)
    for i in range(count):
        z, y, x = (24 * (i // n % 4) for n in (1, 4, 16))
        ids[0, 0, z : z + 9, y : y + 9, x : x + 9] = i + 1
    logits = torch.randn(ids.shape, generator=torch.Generator().manual_seed(0))
    return logits.requires_grad_(), ids


def allocated(call: Callable[[], None]) -> int:
    """The most bytes that were allocated at once beyond those before, by anyone in this process."""
    counter = ctypes.CDLL(None)
    before = counter.counter_live()
    counter.counter_reset()
    call()
    return counter.counter_peak() - before


def status(name: str) -> int:
    """A number of bytes that the kernel states of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def resident(call: Callable[[], None]) -> int | None:
    """The most bytes of pages beyond those before; None where the kernel does not say."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        return None
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def measure_child(backend: str) -> None:
    """Print everything that is measured of a backend, as JSON."""
    from blobloss_fast import _ops

    module = import_module(f"blobloss_fast.kernels.{backend}")
    _ops._for_cpu = lambda: module
    torch.set_num_threads(2)
    logits, ids = balls()
    found: dict[str, object] = {}

    def measure(by: Callable[[Callable[[], object]], int | None], max_instances: int | None = None) -> list[int | None]:
        """Of the forward pass, and of the backward pass, whose gradient is not counted."""
        loss, grad = BlobLoss(max_instances=max_instances), 4 * logits.numel()
        values: list[Tensor] = []
        for _ in range(2):  # what is made once is there at the second time
            logits.grad = None
            values.clear()
            forward = by(lambda: values.append(loss(logits, instances=ids)))
            backward = by(values[0].backward)
        return [forward, None if backward is None else backward - grad]

    found["allocated"], found["resident"] = measure(allocated), measure(resident)
    if backend == "native":
        for most in (50, 1050, 40_000, 50_000):
            found[str(most)] = measure(allocated, most)
        found["sparse"] = measure(resident, SPARSE)
        found["growth"] = [growth(16, 5000), growth(33, 200)]  # with one thread and with two
        masks = (ids > 0).to(torch.uint8), (torch.arange(SIDE) % 2).to(torch.uint8).expand(1, 1, SIDE, SIDE, SIDE)
        found["labels"] = [labels(mask.contiguous()) for mask in masks]
    print(json.dumps(found))


def labels(mask: Tensor) -> tuple[int, int]:
    """Bytes that finding the labels takes beside them, and how many stretches of foreground there are."""
    kept = []

    def call() -> None:
        kept[:] = blobloss_fast.connected_components(mask)

    runs = int((mask.diff(prepend=torch.zeros_like(mask[..., :1])) == 1).sum())
    call()
    kept.clear()
    return allocated(call) - 4 * mask.numel(), runs


def growth(side: int, repetitions: int) -> list[int]:
    """Bytes that many calls leave behind: allocated, and of pages."""
    logits, ids = (volume[..., :side, :side, :side].detach().contiguous() for volume in balls())
    logits.requires_grad_()

    def repeat(times: int) -> list[int]:
        for _ in range(times):
            logits.grad = None
            BlobLoss()(logits, instances=ids).backward()
        gc.collect()
        return [ctypes.CDLL(None).counter_live(), status("VmRSS")]

    before = repeat(repetitions // 10)
    return [after - first for after, first in zip(repeat(repetitions), before, strict=True)]


# ---------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library whose malloc counts."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("there is no C compiler for a malloc that counts")
    folder = tmp_path_factory.mktemp("counter")
    (folder / "counter.c").write_text(COUNTER)
    command = [compiler, "-O2", "-shared", "-fPIC", "-fno-builtin", "-o", "counter.so", "counter.c"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return folder / "counter.so"


@pytest.fixture(scope="module")
def measured(counter: Path) -> Callable[[str], dict]:
    """What a child process measures of a backend, once for all tests."""

    @functools.cache
    def measure(backend: str) -> dict:
        roots = (Path(blobloss_fast.__file__).parents[1], Path(__file__).parents[1])
        environment = {
            # Thresholds of malloc may let it keep pages, which then are nobody's growth.
            **{name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")},
            "PYTHONPATH": os.pathsep.join(map(str, roots)),
            "LD_PRELOAD": str(counter),
        } | AT_ONCE
        code = f"from tests.test_native_memory import measure_child; measure_child({backend!r})"
        command = [sys.executable, "-W", "error", "-c", code]
        # Not in the checkout, whose package would come before the installed one.
        done = subprocess.run(command, cwd=counter.parent, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return measure


def test_one_percent_of_the_logits(measured: Callable[[str], dict]) -> None:
    """Of a forward and a backward pass, beyond logits, ids and gradient."""
    assert BOUND == 83_886
    assert all(0 < most < BOUND for most in measured("native")["allocated"])


def test_the_reference_takes_far_more(measured: Callable[[str], dict]) -> None:
    assert min(measured("reference")["allocated"]) > 20 * BOUND


def test_pages(measured: Callable[[str], dict]) -> None:
    native_pages, reference_pages = (measured(backend)["resident"] for backend in ("native", "reference"))
    if None in (*native_pages, *reference_pages):
        pytest.skip("the kernel does not let a process reset its peak")
    assert max(native_pages) < PAGES
    assert min(reference_pages) > 2 * PAGES


def test_an_instance_more(measured: Callable[[str], dict]) -> None:
    few, more, many, most = (measured("native")[count][0] for count in ("50", "1050", "40000", "50000"))
    assert NOTES < few < BOUND / 4 + NOTES
    assert 250 < (more - few) / 1000 <= 16 * 16 + 16
    assert 24 < (most - many) / 10_000 <= 32
    assert max(more, many) < LOGITS / 7


def test_rows_without_voxels_are_not_written(measured: Callable[[str], dict]) -> None:
    """Counts, sums and a copy of these take 16 bytes a row; the table's 16 are zeros that nobody has touched."""
    forward, _ = measured("native")["sparse"]
    if forward is None:
        pytest.skip("the kernel does not let a process reset its peak")
    assert 12 * SPARSE < forward < 20 * SPARSE


def test_labels(measured: Callable[[str], dict]) -> None:
    """Bits, counts before each word and parents, and little besides: of cubes, and of as many stretches as can be.

    malloc rounds each, and the labels, up to pages where it maps it, which depends on what the heap has room for.
    """
    voxels, little = SIDE**3, 4 * mmap.PAGESIZE + 4096
    for (most, runs), expected in zip(measured("native")["labels"], (50 * 81, voxels // 2), strict=True):
        assert runs == expected
        assert 12 * voxels // 64 + 4 * runs < most < 12 * voxels // 64 + 4 * runs + little


def test_nothing_stays(measured: Callable[[str], dict]) -> None:
    for heap, pages in measured("native")["growth"]:
        assert heap < 4096
        assert pages < 1 << 20
