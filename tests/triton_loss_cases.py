"""The whole loss on the Triton kernels, as a CUDA tensor takes it: operator, autograd function, finish, kernels.

Run by test_triton_interpreter.py in a process of its own, like triton_interpreter_cases.py.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import pytest
import torch

from blobloss_fast import BlobLoss, CCLoss, _ops, compute, connected_components, criteria, segment_stats
from blobloss_fast.kernels import reference, triton_components, triton_finish, triton_segment_stats, triton_zones

from . import oracle_zones, scenes
from .blob_loss_checks import COMPOUND, CRITERIA, check, random_grad, translated, value_and_gradient
from .interpreter_checks import MARKS
from .quick_interpreter import quick_interpreter  # noqa: F401
from .test_native_finish import spec_of
from .tolerances import assert_fp64
from .triton_interpreter_cases import nothing_invalid_left_behind  # noqa: F401
from .triton_launcher_cases import Operations, Quietly, SeeInside

pytestmark = MARKS
# Logits and ids that are read as they are.
NARROW = ((torch.bfloat16, torch.int8), (torch.float16, torch.int16), (torch.float32, torch.uint8))
FORWARD, BACKWARD = ("segment_stats_fwd_kernel", "finish_kernel"), ("segment_stats_bwd_kernel",)


@pytest.fixture(autouse=True)
def launches(monkeypatch) -> list:
    """Have CPU tensors take the kernels of CUDA tensors, and list them."""
    assert _ops._triton("triton_segment_stats", reference) is triton_segment_stats
    monkeypatch.setattr(_ops, "_for_cpu", lambda: triton_segment_stats)
    found: list = []
    list_launches(monkeypatch, found, triton_segment_stats, triton_finish)
    return found


def list_launches(monkeypatch, found: list, *modules) -> None:
    """Append the name of each kernel of these modules that is launched from now on."""
    for module in modules:
        for name in vars(module):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Quietly(getattr(module, name), found))


def test_cuda_tensors_are_registered_for_triton():
    for name in ("segment_stats", "segment_stats_backward", "blob_loss", "blob_loss_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"blobloss_fast::{name}", "CUDA")


@pytest.mark.parametrize("masking", scenes.MASKINGS)
@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_value_and_gradient_against_the_oracle(activation, masking):
    for scene in scenes.every_scene(activation)[::9]:
        check(scene, criterion=COMPOUND, masking=masking)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_value_for_every_sample_and_channel_against_the_oracle(activation):
    """And its gradient, which comes in as [B, C], whatever the strides of that."""
    for channels, prop in ((1, "plain"), (2, "disagree"), (3, "ignored")):
        scene = scenes.scene(2, channels, prop, activation)
        check(scene, criterion=COMPOUND, reduction="none")
    logits = scene.logits.clone().requires_grad_()
    value = BlobLoss(**scene.options, reduction="none")(logits, scene.target, scene.instances)
    assert value.shape == (2, 3)
    wide = random_grad((3, 4))
    for incoming in (wide[:, :2].mT, wide[:2, 1:], wide[:2, :1].expand(2, 3), wide[0, :3].expand(2, 3)):
        assert incoming.stride() != value.stride()
        found = [torch.autograd.grad(value, logits, g, retain_graph=True)[0] for g in (incoming, incoming.contiguous())]
        assert torch.equal(*found)


def test_two_launches_forward_and_one_backward(launches):
    """Beside the clearing of the table, which is a call of PyTorch's."""
    scene = scenes.scene(3, 1, "plain")
    logits = scene.logits.clone().requires_grad_()
    loss = BlobLoss(criteria.dice() + criteria.bce(), main_criterion=criteria.jaccard())
    value = loss(logits, scene.instances > 1, scene.instances)
    assert launches == [*FORWARD]
    value.backward()
    assert launches == [*FORWARD, *BACKWARD]


@pytest.mark.parametrize(
    ("reduction", "again"), [("mean", []), ("none", []), ("terms", ["empty_like", "zeros"]), ("instances", ["zeros"])]
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.int32), *NARROW], ids=str)
def test_what_else_a_step_asks_of_pytorch(launches, dtypes, device, reduction, again):
    """One clearing forward, and memory: no copy, nothing that would wait. Where the gradient has to wait for the
    weights of several values, the table is finished, and so cleared, once more. On "meta" there is no data.
    """
    spec = spec_of(criteria.dice(), criteria.dice(), reduction, channel0="class")
    logits, ids = (torch.ones(2, 1, 3, 4, dtype=dtype, device=device) for dtype in dtypes)
    step = triton_segment_stats.blob_loss, triton_segment_stats.blob_loss_backward
    step[0](logits, ids, None, None, 3, ("prob",), spec)  # makes the coefficients on the device
    launches.clear()
    with Operations() as mode:
        value, counts, saved = step[0](logits, ids, None, None, 3, ("prob",), spec)
        forward, mode.called = mode.called, []
        grad = step[1](torch.ones_like(value), logits, ids, None, None, counts, saved, ("prob",), spec)
    assert grad.dtype == logits.dtype
    harmless = {"view", "detach"}
    assert sorted(set(forward) - harmless) == ["empty", "zeros"]
    assert forward.count("zeros") == 1
    mode.called.remove("ones_like")
    assert sorted(set(mode.called) - harmless) == sorted({"empty_like", *again})
    assert launches == [*FORWARD, *([FORWARD[1]] if again else []), *BACKWARD]


def test_an_id_beyond_max_instances_is_never_merged():
    """NaN loss, then an error at the next call that names the option, then all is well again."""
    scene = scenes.scene(3, 1, "plain")
    loss = BlobLoss(max_instances=1)
    assert int(scene.instances.max()) > 1
    assert torch.isnan(loss(scene.logits, instances=scene.instances))
    with pytest.raises(RuntimeError, match="max_instances"):
        loss(scene.logits, instances=scene.instances.clamp(max=1))
    assert torch.isfinite(loss(scene.logits, instances=scene.instances.clamp(max=1)))


# ---------------------------------------------------------------------------------- from a bare mask


@pytest.fixture
def all_of_it(monkeypatch, launches) -> list:
    """Labels and zones as well; the names of all kernels that are launched."""
    monkeypatch.setattr(_ops, "_labels_for_cpu", lambda: triton_components)
    monkeypatch.setattr(_ops, "_zones_for_cpu", lambda: triton_zones)
    list_launches(monkeypatch, launches, triton_components, triton_zones)
    return launches


OPTIONS = ({}, {"bidirectional": True}, {"instance_weight": "inverse_size", "empty_sample": 2.0})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_cc_loss_from_a_target_against_the_oracle(all_of_it, activation, options):
    for scene in (scenes.scene(3, 1, "target_only", activation), scenes.scene(2, 2, "ignore_index", activation)):
        spec = {"criterion": CRITERIA["dice+bce"], **scene.options, **options}
        module = CCLoss(**translated(spec), max_instances=12)
        ours = value_and_gradient(lambda x, m=module, s=scene: m(x, s.target), scene.logits)
        truth = value_and_gradient(lambda x, k=spec, s=scene: oracle_zones.cc_loss(x, s.target, **k), scene.logits)
        assert_fp64(ours[0], truth[0], scene.name)
        assert_fp64(ours[1], truth[1], scene.name)


def one_step(launches, call, logits) -> tuple[torch.Tensor, tuple[int, list[str]], tuple[int, list[str]]]:
    """The gradient of all that `call` returns; forward and backward, our launches and PyTorch's operations.

    Nothing may wait.
    """
    with SeeInside():
        call(logits)  # makes the flag of the device, and coefficients
    launches.clear()
    with Operations() as mode:
        values = call(logits)
    forward = len(launches), mode.take_kernels()
    values = values if isinstance(values, tuple) else (values,)
    assert {value.device for value in values} == {logits.device}
    incoming = [torch.ones_like(value) for value in values]
    with mode:
        (grad,) = torch.autograd.grad(values, logits, incoming)
    assert grad.shape == logits.shape
    return grad, forward, (len(launches) - forward[0], mode.take_kernels())


BICC, SOFTMAX = partial(CCLoss, bidirectional=True), partial(BlobLoss, activation="softmax")
# What PyTorch launches besides: it clears the list of tiles with foreground, and the table.
CLEARS = ["zeros", "zeros"]
IN_ZONES = [*CLEARS, "gt"]  # the target is where there are instances
BOTH_WAYS = [*IN_ZONES, *CLEARS, *("lt", "gt", "bitwise_not", "bitwise_and", "masked_fill_"), "add"]
IS_FINITE = ["eq", "abs", "ne", "mul"]
WEIGHTS = ["zeros", "_to_copy", "reciprocal", "mul", *("gt", "scalar_tensor", "where")]
WEIGHTS += ["ge", *IS_FINITE, "bitwise_and", "scalar_tensor", "where"]
# The loss, how many of our kernels it launches forward and backward, and PyTorch's forward. Of ours, labels are five,
# zones one for each axis, the table two; backward one for each table with a loss.
STEPS = {
    "blob": (BlobLoss, 5 + 2, 1, CLEARS),
    "cc": (CCLoss, 5 + 3 + 2, 1, IN_ZONES),
    "bidirectional": (BICC, 2 * (5 + 3 + 2), 2, BOTH_WAYS),
    "weighted": (partial(BlobLoss, instance_weight="inverse_size"), 5 + 2 + 2, 1, [*CLEARS, *WEIGHTS]),
    "weighted both ways": (
        partial(BICC, instance_weight="inverse_size"), 2 * (5 + 3 + 2) + 2, 2, [*BOTH_WAYS, *WEIGHTS],
    ),
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", STEPS)
def test_a_loss_from_a_bare_mask_never_waits(all_of_it, monkeypatch, name, device):
    """And launches nothing but this. On "meta" there is no data: whatever reads some is refused, `.cpu()` as well."""
    if device == "cpu":
        monkeypatch.setattr(compute, "_may_be_read", lambda tensor: False)  # as of a CUDA tensor
    loss, launched, backward, others = STEPS[name]
    scene = scenes.scene(3, 1, "plain")
    mask, logits = (scene.instances > 0).to(device), scene.logits.to(device).requires_grad_()
    module = loss(max_instances=12)
    _, (count, called), after = one_step(all_of_it, lambda x: module(x, mask), logits)
    assert (count, sorted(called)) == (launched, sorted(others))
    assert after == (backward, ["add"] * (backward - 1))


OF_INSTANCES = [*("zeros", "arange", "gt", "scalar_tensor", "where")]
# With ids, three channels: the module, how it is called, and PyTorch's operations forward and backward.
WITH_IDS = {
    "ids": (BlobLoss, lambda f, x, y, ids: f(x, instances=ids), ["zeros"], []),
    "and target": (BlobLoss, lambda f, x, y, ids: f(x, y, ids), ["zeros"], []),
    "and ignore_index": (
        partial(BlobLoss, ignore_index=scenes.IGNORE), lambda f, x, y, ids: f(x, y, ids),
        ["eq", "scalar_tensor", "where", "zeros"], [],
    ),
    "and class map": (SOFTMAX, lambda f, x, y, ids: f(x, y[:, :1], ids), ["zeros"], []),
    "class map alone": (SOFTMAX, lambda f, x, y, ids: f(x, y[:, :1]), CLEARS, []),
    "background class": (
        partial(SOFTMAX, include_background=True), lambda f, x, y, ids: f(x, instances=ids),
        [*("clone", "gt", "gt", "any", "bitwise_not", "copy_", "lt", "all", "masked_fill_"), "zeros"], [],
    ),
    "none": (partial(BlobLoss, reduction="none"), lambda f, x, y, ids: f(x, y, ids), ["zeros"], []),
    "terms": (BlobLoss, lambda f, x, y, ids: f.terms(x, instances=ids), ["zeros"], ["stack", "zeros"]),
    "instances": (BlobLoss, lambda f, x, y, ids: f.instance_losses(x, instances=ids)[0], OF_INSTANCES, ["zeros"]),
    "cc": (CCLoss, lambda f, x, y, ids: f(x, instances=ids), ["gt", "zeros"], []),
    "cc terms": (CCLoss, lambda f, x, y, ids: f.terms(x, y, ids), ["zeros"], ["stack", "zeros"]),
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", WITH_IDS)
def test_a_loss_from_ids_never_waits(all_of_it, name, device):
    loss, call, forward, backward = WITH_IDS[name]
    scene, module = scenes.scene(1, 3, "disagree"), loss(max_instances=12)
    logits, target, ids = (tensor[:1].to(device) for tensor in (scene.logits, scene.target, scene.instances))
    _, *steps = one_step(all_of_it, lambda x: call(module, x, target, ids), logits.requires_grad_())
    assert [called for _, called in steps] == [forward, backward]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtypes", NARROW, ids=str)
def test_narrow_volumes_are_read_as_they_are(launches, dtypes, device):
    logits, ids = (torch.ones(2, 1, 3, 4, dtype=dtype, device=device) for dtype in dtypes)
    module, logits = BlobLoss(max_instances=3), logits.requires_grad_()
    for target in (None, ids, ids > 0):
        grad, *steps = one_step(launches, lambda x, y=target: module(x, y, ids), logits)
        assert steps == [(len(FORWARD), ["zeros"]), (len(BACKWARD), [])]
        assert grad.dtype == logits.dtype


def test_every_launch_is_on_the_device_of_its_tensors(all_of_it, monkeypatch):
    """Whichever is the current one. What lies in pinned memory, which is on "cpu", does not decide."""
    inside, found = [], []

    @contextmanager
    def device_of(tensor):
        inside.append(tensor.device)
        yield
        inside.pop()

    def launch(quietly, grid):
        return lambda *args, **kwargs: found.append((quietly.kernel.fn.__name__, args[0].device, *inside))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(Quietly, "__getitem__", launch)
    logits = torch.zeros(1, 1, 3, 4, 5, device="meta", requires_grad=True)
    mask = torch.ones_like(logits, requires_grad=False)
    with SeeInside():
        module = BICC(max_instances=2)
        module(logits, mask).backward()
        sum(module.terms(logits, mask)).backward()
        segment_stats(logits, mask.long(), 2)[1].sum().backward()
    modules = triton_segment_stats, triton_finish, triton_components, triton_zones
    every = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {launched[0] for launched in found} == every
    assert {launched[1:] for launched in found} == {(torch.device("meta"), torch.device("meta"))}


def assert_loud(loss, logits, mask) -> None:
    """A NaN loss and gradient, and an error at the next call; then all is well again where there is room."""
    logits = logits.clone().requires_grad_()
    value = loss(logits, mask)
    value.backward()
    assert torch.isnan(value)
    assert logits.grad.isnan().any()
    loss.max_instances = 9
    with pytest.raises(RuntimeError, match="max_instances"):
        loss(logits, mask)
    assert torch.isfinite(loss(logits, mask))


def test_more_instances_than_there_is_room_for_are_loud(all_of_it):
    scene = scenes.scene(3, 1, "plain")
    mask = scene.instances > 0
    for loss in (BlobLoss, CCLoss):
        assert_loud(loss(max_instances=1), scene.logits, mask)
    with pytest.raises(RuntimeError, match="max_instances"):  # here its first half is over when the second begins
        BICC(max_instances=1)(scene.logits, mask)
    assert torch.isfinite(BICC(max_instances=9)(scene.logits, mask))


def test_more_predicted_components_than_there_is_room_for_are_as_loud(all_of_it):
    """One instance, five components: only a loss that looks at these can be short of room."""
    mask, logits = torch.zeros(1, 1, 9, 10), torch.full((1, 1, 9, 10), -4.0, dtype=torch.float64)
    mask[..., 2:4, 2:4] = 1
    logits[..., ::2, 1] = 4.0
    assert connected_components(logits > 0)[1].item() == 5
    assert torch.isfinite(CCLoss(max_instances=1)(logits, mask))
    for room in (1, 4):
        assert_loud(BICC(max_instances=room), logits, mask)
    truth = oracle_zones.cc_loss(logits, mask, criterion=CRITERIA["dice"], bidirectional=True)
    assert_fp64(BICC(max_instances=5)(logits, mask), truth, "five components")
