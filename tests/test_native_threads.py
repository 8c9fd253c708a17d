"""The native library's threads: the result has the same bits with any number of them, whoever they belong to.

With PyTorch's pool, with its own threads, inside a parallel region, under several Python threads, in a forked child.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import blobloss_fast
from blobloss_fast import criteria
from blobloss_fast.kernels import native
from blobloss_fast.kernels.finish import LossSpec
from blobloss_fast.kernels.layout import features_of

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
needs_pool = pytest.mark.skipif(native._pool() == 0, reason="PyTorch before 2.10 has no torch_parallel_for")

BODY = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
POOL = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p
)


def make(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, ids with gaps and an ignored part, and a target that knows nothing of them; enough for many threads."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 2, 45, 40, 43, generator=generator)
    ids = torch.randint(-90, 30, logits.shape, generator=generator, dtype=torch.int32)
    return logits, 7 * (ids + 88).clamp_(min=-1) // 88, torch.rand(logits.shape, generator=generator) > 0.9


def compute(logits: Tensor, ids: Tensor, target: Tensor) -> list[bytes]:
    """Call every function of the library; return the bits of all that comes back."""
    rows = (criteria.dice() + criteria.bce()).rows
    spec = LossSpec("sigmoid", 2.0, rows, rows, (), 0.5, 2.0, "none", "class", "terms")
    features = features_of(rows)
    options = (features, "sigmoid", 2.0, "class")
    most = int(ids.numpy().max())  # PyTorch would hang in a forked child
    counts, sums = native.segment_stats_forward(logits, ids, target, 2 * (most + 1), *options)
    value, saved = native.finish(counts, sums, features, True, spec)
    grad_sums = native.finish_backward(torch.ones_like(value), counts, saved, features, True, spec)
    grad = native.segment_stats_backward(grad_sums, logits, ids, target, *options)
    return [result.numpy().tobytes() for result in (counts, sums, value, grad_sums, grad)]


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def expected(set_threads: Callable[[int], None]) -> list[bytes]:
    """What one thread computes; two are allowed afterwards."""
    set_threads(1)
    result = compute(*make())
    set_threads(2)
    return result


def test_the_volume_has_what_it_should() -> None:
    _, ids, target = make()
    assert set(ids.unique().tolist()) >= {-1, 0, 7}
    assert 0.05 < target.float().mean().item() < 0.2


def test_the_pool_is_found_where_pytorch_has_one() -> None:
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    assert (native._pool() != 0) == (version >= (2, 10))


def test_a_pytorch_that_has_no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "__file__", str(native.PATH))  # has no torch_parallel_for either
    assert native._pool.__wrapped__() == 0


@pytest.mark.parametrize("own", [False, True], ids=["pool", "own threads"])
@pytest.mark.parametrize("threads", [2, 3, 16])
def test_any_number_of_threads(
    threads: int,
    own: bool,
    expected: list[bytes],
    set_threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "_forked", own)
    set_threads(threads)
    assert compute(*make()) == expected


def refuses(begin: int, end: int, grain: int, body: int, context: int) -> int:
    return 1


def stops_halfway(begin: int, end: int, grain: int, body: int, context: int) -> int:
    BODY(body)(begin, begin + (end - begin) // 2, context)
    return 1


def goes_one_by_one(begin: int, end: int, grain: int, body: int, context: int) -> int:
    for i in reversed(range(begin, end)):
        BODY(body)(i, i + 1, context)
    return 0


@pytest.mark.parametrize("pool", [refuses, stops_halfway, goes_one_by_one])
def test_a_pool_that_does_as_it_likes(
    pool: Callable[..., int], expected: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    c_pool = POOL(lambda *arguments: calls.append(arguments) or pool(*arguments))
    monkeypatch.setattr(native, "_pool", lambda: ctypes.cast(c_pool, ctypes.c_void_p).value)
    assert compute(*make()) == expected
    assert len(calls) >= 2  # both passes


@pytest.mark.parametrize("own", [False, True], ids=["pool", "own threads"])
@pytest.mark.parametrize("threads", [2, 3, 16])
def test_tables_that_go_from_thread_to_thread(
    threads: int, own: bool, set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four tables for 65 chunks: of three threads one has two, of which those that are done take parts."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1, 64 * 8192 + 100, generator=generator)
    ids = torch.randint(-200, 4000, logits.shape, generator=generator, dtype=torch.int32).clamp_(min=-1)
    arguments = (logits, ids, None, 4000, ("prob", "nll_neg"), "sigmoid", 0.0, "class")
    set_threads(1)
    expected = native.segment_stats_forward(*arguments)
    monkeypatch.setattr(native, "_forked", own)
    set_threads(threads)
    for _ in range(5):
        for found, right in zip(native.segment_stats_forward(*arguments), expected, strict=True):
            assert torch.equal(found, right)
    known = ids >= 0
    cells, probs = ids[known].long(), logits[known].double().sigmoid()
    assert torch.equal(expected[0][0, 0], cells.bincount())
    exact = torch.zeros(4000, dtype=torch.float64).index_add_(0, cells, probs)
    assert torch.allclose(expected[1][0, 0, :, 0].double(), exact, rtol=1e-6, atol=0)


@needs_pool
def test_inside_a_parallel_region(expected: list[bytes]) -> None:
    found: list[list[bytes] | None] = [None, None]

    def body(begin: int, end: int, _: int | None) -> None:
        for i in range(begin, end):
            found[i] = compute(*make())

    function = POOL(native._pool())
    assert function(0, 2, 1, ctypes.cast(c_body := BODY(body), ctypes.c_void_p), None) == 0
    assert c_body is not None
    assert found == [expected, expected]


def test_several_python_threads(set_threads: Callable[[int], None]) -> None:
    set_threads(2)
    problems = [make(seed) for seed in range(4)]
    expected = [compute(*problem) for problem in problems]
    assert len({result[-1] for result in expected}) == 4
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda problem: compute(*problem), 3 * problems)) == 3 * expected


FORK = """
import os, signal, torch
from tests.test_native_threads import compute, make, native
torch.set_num_threads(2)
problem = make()
before = compute(*problem)  # PyTorch's pool has threads now
child = os.fork()
if child == 0:
    signal.alarm(30)  # ends a child that hangs
    os._exit(0 if compute(*problem) == before else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child(tmp_path: Path) -> None:
    # Python 3.12 warns of forks in a process with threads; DataLoader does it all the same.
    roots = (Path(blobloss_fast.__file__).parents[1], Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots))}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK]
    # Not in the checkout, whose package would come before the installed one.
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0"
