"""The losses on a CUDA device: the CPU's in double precision, the same bits every time, no wait, one pass each way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu_contestants import Pass
from bench.gpu_rows import same_bits
from bench.gpu_timing import CudaClock
from blobloss_fast import BlobLoss, CCLoss, criteria, segment_stats

from . import oracle, oracle_zones, scenes
from .blob_loss_checks import CRITERIA, random_grad, translated
from .tolerances import FLOOR, assert_fp64, error, relative_to_largest

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

DEVICE = torch.device("cuda")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RUNS = 100
SHAPE = (2, 2, 23, 29, 31)
COUNT = 40  # ids of `volume`
SCALE = 2.0**12  # without it a gradient in float16 has few bits


def volume(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """fp64 logits, ids in boxes with ignored voxels, and a mask whose components are others."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    ids = torch.zeros(shape, dtype=torch.int32)
    for b in range(shape[0]):
        for c in range(shape[1]):
            for k in range(1, COUNT + 1 - b):
                low = [int(torch.randint(0, size, (), generator=generator)) for size in shape[2:]]
                ids[(b, c, *(slice(start, start + 1 + k % 6) for start in low))] = k
    ids[torch.rand(shape, generator=generator) < 0.02] = -1
    return logits, ids, torch.rand(shape, generator=generator) < 0.05


LOSSES: dict[str, Callable[[], tuple[BlobLoss | CCLoss, str]]] = {
    "ids": lambda: (BlobLoss(max_instances=COUNT), "instances"),
    "compound of ids": lambda: (BlobLoss(criteria.dice() + criteria.bce(), max_instances=COUNT), "instances"),
    "weighted": lambda: (BlobLoss(max_instances=COUNT, instance_weight="inverse_size"), "instances"),
    "mask": lambda: (BlobLoss(max_instances=2000), "target"),
    "zones": lambda: (CCLoss(max_instances=2000, spacing=(1, 1, 2.5)), "target"),
    "zones both ways": lambda: (CCLoss(max_instances=4000, bidirectional=True), "target"),
}


def loss_of(name: str, ids: Tensor, mask: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A loss of logits, times what a gradient scaler may choose, and the labels that it reads."""
    module, argument = LOSSES[name]()
    labels = (ids if argument == "instances" else mask).clone()
    return lambda logits: SCALE * module(logits, **{argument: labels}), labels


def value_and_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf, random_grad(value.shape).to(value))
    return value.detach(), gradient


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


@pytest.fixture(autouse=True)
def nothing_invalid_left_behind() -> Iterator[None]:
    """The call after the one that met something invalid raises: it is not to be in another test."""
    yield
    torch.cuda.synchronize()
    zeros = torch.zeros(1, 1, 2, device=DEVICE)
    BlobLoss(max_instances=1)(zeros, instances=zeros.int())
    torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------------- values


def check(scene: scenes.Scene, **options: Any) -> None:
    """Value and gradient in double precision, where only the labels' side and the device differ from the oracle."""
    options = {"criterion": CRITERIA["dice"], **scene.options, **options}
    labels = [None if label is None else label.to(DEVICE) for label in (scene.target, scene.instances)]
    module = BlobLoss(**translated(options))
    ours = value_and_gradient(lambda x: module(x, *labels), scene.logits.to(DEVICE))
    truth = value_and_gradient(lambda x: oracle.blob_loss(x, scene.target, scene.instances, **options), scene.logits)
    for got, expected, what in zip(ours, truth, ("value", "gradient"), strict=True):
        assert_fp64(got.cpu(), expected, f"{what} of {scene.name} {options}")


@pytest.mark.parametrize(
    ("activation", "criterion"), [("sigmoid", "dice"), *((activation, "compound") for activation in scenes.ACTIVATIONS)]
)
def test_against_the_oracle(activation: str, criterion: str) -> None:
    for scene in scenes.telling_scenes(activation):
        check(scene, criterion=CRITERIA[criterion])


@pytest.mark.parametrize("masking", scenes.MASKINGS)
@pytest.mark.parametrize("prop", ["ignored", "disagree", "target_only"])
def test_maskings_and_reductions_against_the_oracle(prop: str, masking: str) -> None:
    scene = scenes.scene(3, 2, prop)
    for reduction in ("mean", "none"):
        check(scene, criterion=CRITERIA["dice+bce"], masking=masking, reduction=reduction, main_weight=0.5)


def test_zones_against_the_oracle() -> None:
    for scene in scenes.telling_scenes("sigmoid"):
        if scene.instances is None or scene.target is None or scene.ignore_index is not None:
            continue
        module = CCLoss()
        labels = on_device(scene.target, scene.instances)
        ours = value_and_gradient(lambda x, m=module, own=labels: m(x, *own), scene.logits.to(DEVICE))
        truth = value_and_gradient(
            lambda x, s=scene: oracle_zones.cc_loss(x, s.target, s.instances, criterion=CRITERIA["dice"]), scene.logits
        )
        for got, expected in zip(ours, truth, strict=True):
            assert_fp64(got.cpu(), expected, scene.name)


def assert_close(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """The gradient's last bit is its own."""
    allowed = 1e-12 if dtype == torch.float64 else FLOOR
    assert got[1].dtype == dtype
    assert error(got[0].cpu(), expected[0]) <= allowed
    last_bit = 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    assert relative_to_largest(got[1].cpu(), expected[1]) <= allowed + last_bit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(LOSSES))
def test_every_precision_against_the_cpu(name: str, dtype: torch.dtype) -> None:
    logits, ids, mask = volume()
    logits = logits.to(dtype)
    expected = value_and_gradient(loss_of(name, ids, mask)[0], logits.double())
    got = value_and_gradient(loss_of(name, *on_device(ids, mask))[0], logits.to(DEVICE))
    assert_close(got, expected, dtype)


def spread(tensor: Tensor) -> Tensor:
    """The same values, every second voxel of a larger tensor."""
    wide = torch.zeros([*tensor.shape[:-1], 2 * tensor.shape[-1]], dtype=tensor.dtype, device=tensor.device)
    wide[..., ::2] = tensor
    return wide[..., ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last_3d),
    "transposed": lambda t: t.transpose(2, 4).contiguous().transpose(2, 4),
    "every second voxel": spread,
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("name", ["ids", "mask"])
def test_strides(name: str, layout: str) -> None:
    logits, ids, mask = volume()
    expected = value_and_gradient(loss_of(name, ids, mask)[0], logits.float().double())
    change = LAYOUTS[layout]
    for changes in ((True, False), (False, True), (True, True)):
        x, labels = on_device(logits.float(), ids if name == "ids" else mask)
        x, labels = (change(t) if changed else t for t, changed in zip((x, labels), changes, strict=True))
        module, argument = LOSSES[name]()
        leaf = x.detach().requires_grad_()  # no clone: that may be contiguous
        value = SCALE * module(leaf, **{argument: labels})
        (gradient,) = torch.autograd.grad(value, leaf, random_grad(()).to(value))
        assert_close((value.detach(), gradient), expected, torch.float32)


# ------------------------------------------------------------------------------------- streams, devices, waits, graphs


@pytest.mark.parametrize("name", list(LOSSES))
def test_another_stream(name: str) -> None:
    """On input that the stream has not made yet when the loss is called."""
    logits, ids, mask = on_device(*volume())
    loss, _ = loss_of(name, ids, mask)
    x = torch.zeros_like(logits, dtype=torch.float32)
    expected = value_and_gradient(loss, logits.float())
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # cycles, about 10 ms
        x.copy_(logits)
        got = value_and_gradient(loss, x)
    stream.synchronize()
    assert same_bits(got, expected)


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_device_that_is_not_the_current_one(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    logits, ids, mask = volume()
    expected = value_and_gradient(loss_of(name, ids, mask)[0], logits.float().double())
    with torch.cuda.device(0):
        other = [tensor.to("cuda:1") for tensor in (logits.float(), ids, mask)]
        got = value_and_gradient(loss_of(name, *other[1:])[0], other[0])
        assert torch.cuda.current_device() == 0
        assert got[1].device == torch.device("cuda:1")
    assert_close(got, expected, torch.float32)


@pytest.mark.parametrize("name", list(LOSSES))
def test_nothing_waits(name: str) -> None:
    logits, ids, mask = on_device(*volume())
    loss, _ = loss_of(name, ids, mask)
    step = Pass(loss, logits.float())
    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_graph_replays_on_new_input(name: str) -> None:
    logits, ids, mask = on_device(*volume())
    loss, labels = loss_of(name, ids, mask)
    step = Pass(loss, logits.float())
    (replay,) = CudaClock().capture(step)
    for run in range(1, 4):
        labels.copy_(labels.roll(7 * run, -1).flip(2))
        with torch.no_grad():
            step.logits.copy_(step.logits.roll(run, 3) * 0.9)
        replay()
        got = tuple(result.clone() for result in step.results())
        eager = Pass(loss, step.logits)
        eager()
        assert same_bits(got, eager.results()), f"replay {run}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(LOSSES))
def test_the_same_bits_every_time(name: str, dtype: torch.dtype) -> None:
    """Beside a second stream that is busy with other work, and in memory that held something else."""
    if dtype != torch.float32 and name not in ("ids", "mask"):
        pytest.skip("one precision is enough of this loss")
    logits, ids, mask = on_device(*volume())
    step = Pass(loss_of(name, ids, mask)[0], logits.to(dtype))
    step()
    first = tuple(result.clone() for result in step.results())
    clock = CudaClock()
    for run in range(RUNS):
        clock.disturb(run)
        [torch.full_like(step.logits, float("nan")) for _ in range(4)]
        step()
        assert same_bits(first, step.results()), f"run {run}"


def test_launches_and_memory() -> None:
    """Of fp32 logits with ids: four launches forward, one backward, and no memory but the gradient to speak of."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 1, 96, 96, 96)
    logits, ids = torch.randn(shape, generator=generator), (torch.rand(shape, generator=generator) * 51).int()
    logits, ids = on_device(logits, ids)
    module = BlobLoss(max_instances=50)
    step = Pass(lambda x: module(x, instances=ids), logits)
    clock = CudaClock()
    step.forward()
    assert clock.launches(step.forward) <= 4
    assert clock.launches(step.backward) <= 1
    step()
    step.clear()
    size = logits.numel() * 4
    assert size <= clock.peak_bytes(step) < 1.01 * size


# ------------------------------------------------------------------------------------------------------ invalid, large


@pytest.mark.parametrize("name", ["ids", "mask"])
def test_too_many_instances_are_nan_and_then_raise(name: str) -> None:
    logits, ids, mask = on_device(*volume())
    argument = {"instances": ids} if name == "ids" else {"target": mask}
    module = BlobLoss(max_instances=COUNT - 1)
    value, gradient = value_and_gradient(lambda x: module(x, **argument), logits.float())
    assert value.isnan()
    assert gradient.isnan().any()
    if name == "ids":
        assert (gradient[ids < 0] == 0).all()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="max_instances"):
        module(logits, instances=ids.clamp(max=1))
    assert module(logits, instances=ids.clamp(max=1)).isfinite()


@pytest.mark.slow
def test_more_voxels_than_31_bits_count() -> None:
    """2 x 1088^3 logits, all 0 in bfloat16: a slab, a row and the last voxel are instances."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB")
    size = 1088
    shape, voxels = (2, 1, size, size, size), size**3
    logits = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    ids = torch.zeros(shape, dtype=torch.int8, device=DEVICE)
    ids[0, 0, 0], ids[0, 0, -1, -1], ids[1, 0, -1, -1, -1] = 1, 2, 1
    assert logits.numel() > 2**31
    counts, sums = segment_stats(logits.detach(), ids, 3)
    plane = size**2
    expected = [[voxels - plane - size, plane, size], [voxels - 1, 1, 0]]
    assert counts[:, 0].tolist() == expected
    torch.testing.assert_close(sums[:, 0, :, 0].cpu(), torch.tensor(expected) * 0.5, rtol=1e-6, atol=0)

    value = BlobLoss(max_instances=2)(logits, instances=ids)
    (gradient,) = torch.autograd.grad(value, logits)
    true_value, true_gradient = of_cells(torch.tensor(expected))
    assert float(value.detach()) == pytest.approx(float(true_value), rel=1e-6)
    for b, of_sample in enumerate(true_gradient.tolist()):
        for k, slope in enumerate(of_sample):
            if expected[b][k]:
                found = gradient[b][ids[b] == k] if k else torch.stack([gradient[b, 0, 1], gradient[b, 0, -2]])
                assert found.numel() == (expected[b][k] if k else 2 * plane)
                assert float(found.min()) == pytest.approx(slope, rel=2**-8)
                assert float(found.max()) == pytest.approx(slope, rel=2**-8)


def of_cells(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Blob loss with Dice of logits 0 from the numbers of voxels [B, K], and its gradient at a voxel of each cell."""
    n = counts.double()
    x = torch.zeros_like(n, requires_grad=True)  # one for all voxels of a cell
    s = n * x.sigmoid()
    main = 1 - (2 * s[:, 1:].sum(1) + 1e-5) / (s.sum(1) + n[:, 1:].sum(1) + 1e-5)
    dice = 1 - (2 * s[:, 1:] + 1e-5) / (s[:, :1] + s[:, 1:] + n[:, 1:] + 1e-5)
    exists = n[:, 1:] > 0
    value = main.mean() + ((dice * exists).sum(1) / exists.sum(1)).mean()
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient / n.clamp(min=1)


# ------------------------------------------------------------------------------------------------------------ training


def test_a_step_with_autocast_and_a_gradient_scaler() -> None:
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 2, 3, padding=1).to(DEVICE)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12)
    _, ids, _ = volume()
    images = torch.randn(2, 1, *SHAPE[2:], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    before = network.bias.detach().clone()
    with torch.autocast("cuda", dtype=torch.float16):
        logits = network(images)
        loss = BlobLoss(max_instances=COUNT)(logits, instances=ids.to(DEVICE))
    assert logits.dtype == torch.float16 and loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    module = BlobLoss(max_instances=COUNT)
    truth = Pass(lambda x: module(x, instances=ids), logits.detach().cpu().double())
    truth()
    expected, gradient = truth.results()
    assert error(loss.detach().cpu(), expected) <= FLOOR
    torch.testing.assert_close(network.bias.grad.cpu().double(), gradient.sum((0, 2, 3, 4)), rtol=2e-2, atol=1e-5)
    scaler.step(optimizer)
    scaler.update()
    assert (network.bias != before).all() and network.bias.isfinite().all() and scaler.get_scale() == 2.0**12

    optimizer.zero_grad()
    too_small = BlobLoss(max_instances=COUNT - 10)
    with torch.autocast("cuda", dtype=torch.float16):  # NaN: the scaler leaves the step out
        loss = too_small(network(images), instances=ids.to(DEVICE))
    before = network.bias.detach().clone()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(network.bias, before) and scaler.get_scale() < 2.0**12
    with pytest.raises(RuntimeError, match="max_instances"):
        too_small(logits, instances=ids.to(DEVICE))


@pytest.mark.parametrize("name", list(LOSSES))
def test_compile_fullgraph_equals_eager(name: str) -> None:
    torch._dynamo.reset()
    logits, ids, mask = on_device(*volume())
    module, argument = LOSSES[name]()
    labels = ids if argument == "instances" else mask
    compiled = torch.compile(module, fullgraph=True)
    for x in (logits.float(), logits.float().flip(2)):
        got = value_and_gradient(lambda y: compiled(y, **{argument: labels}), x)
        expected = value_and_gradient(lambda y: module(y, **{argument: labels}), x)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
