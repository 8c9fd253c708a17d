"""Lower precisions, extreme and non-finite logits, large volumes, and devices without fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from blobloss_fast import BlobLoss, blob_loss, blob_loss_instances, blob_loss_terms, criteria, segment_stats
from blobloss_fast.kernels.layout import FEATURES

from . import oracle, scenes
from .blob_loss_checks import CRITERIA, criterion_of
from .tolerances import FLOOR, TIMES_PLAIN, assert_fp64, error, relative_to_largest

pytestmark = pytest.mark.usefixtures("cpu_backend")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INF, NAN = math.inf, math.nan
OVERLAPS = ("dice", "squared_dice", "jaccard", "tversky")
LOGARITHMS = ("bce", "focal", "focal_gamma0", "dice+bce")


def value_and_gradient(function, logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    value = function(leaf)
    value.sum().backward()
    return value.detach(), leaf.grad


# ---------------- no worse than plain PyTorch in fp32


def head_of_blobs(channels: int, giant: bool = False) -> Tensor:
    """Ids [1, channels, 17, 19, 21] with one large blob (nearly everything if `giant`), small ones, ignored voxels."""
    ids = torch.zeros(1, channels, 17, 19, 21, dtype=torch.int64)
    for c in range(channels):
        if giant:
            ids[0, c] = 5
            ids[0, c, :2] = 0
        ids[0, c, 3 : 10 + c, 2:9, 4:11] = 1
        ids[0, c, 12:14, 12:14, 3:5] = 2
        ids[0, c, 15, 15, 15 + c] = 3
        ids[0, c, 2:4, 14:16, 15:18] = 4
    ids[0, :, :, 0, :3] = -1
    return ids


def logits_of_size(scale: float, shape, activation: str, dtype: torch.dtype) -> Tensor:
    """Logits between +-0.5 and +-1.5 times the scale (probabilities of these if the activation is "none")."""
    noise = scenes.random_logits(shape, seed=3, scale=1.0)
    logits = scale * (noise.sign() * 0.5 + noise.sigmoid() - 0.5).clamp(-1.5, 1.5)
    return (torch.sigmoid(logits) if activation == "none" else logits).to(dtype)


def three_ways(logits: Tensor, ids: Tensor, **options):
    """(ours, plain PyTorch in fp32, fp64 truth), each a value and a gradient, on the same numbers."""
    package = {k: criterion_of(v) if k == "criterion" else v for k, v in options.items()}
    ours = value_and_gradient(lambda x: blob_loss(x, instances=ids, **package), logits)
    plain = value_and_gradient(lambda x: oracle.blob_loss(x.float(), instances=ids, **options), logits)
    truth = value_and_gradient(lambda x: oracle.blob_loss(x, instances=ids, **options), logits.double())
    return ours, plain, truth


def check_no_worse(logits: Tensor, ids: Tensor, what: str, **options) -> None:
    ours, plain, truth = three_ways(logits, ids, **options)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == logits.dtype
    for name, measure in (("error", error), ("error relative to the largest element", relative_to_largest)):
        for part, i in (("value", 0), ("gradient", 1)):
            off, allowed = measure(ours[i], truth[i]), TIMES_PLAIN * measure(plain[i], truth[i]) + FLOOR
            assert off <= allowed, f"{what}: {name} of the {part} is {off:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 3.0, 30.0, 1e4])
@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_no_worse_than_plain_pytorch(activation, scale, dtype):
    ids = head_of_blobs(channels=2)
    logits = logits_of_size(scale, ids.shape, activation, dtype)
    for name in ("dice", "squared_dice", "jaccard", "tversky", "bce", "focal", "focal_alpha", "compound"):
        # Halves are read and then computed as fp32 is: two maskings show that.
        for masking in scenes.MASKINGS if dtype == torch.float32 else ("exclude", "none"):
            options = {"criterion": CRITERIA[name], "masking": masking, "activation": activation}
            check_no_worse(logits, ids, f"{name} {masking}", **options)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("masking", scenes.MASKINGS)
def test_a_giant_instance_does_not_spoil_the_small_ones(masking, activation):
    """`none` needs the sum over all other blobs: taken as total minus own, it would lose the small blobs' digits."""
    ids = head_of_blobs(channels=2, giant=True)
    for scale in (3.0, 30.0, 1e4):
        logits = logits_of_size(scale, ids.shape, activation, torch.float32)
        logits = torch.where(ids == 5, logits.abs() + scale, logits)
        for name in ("dice", "bce", "focal"):
            options = {"criterion": CRITERIA[name], "masking": masking, "activation": activation}
            check_no_worse(logits, ids, f"{name} {scale}", **options)
            losses, found = blob_loss_instances(
                logits, instances=ids, criterion=criterion_of(CRITERIA[name]), masking=masking, activation=activation
            )
            truth = oracle.losses(logits.double(), None, ids, **options).instances
            plain = oracle.losses(logits, None, ids, **options).instances
            for (b, c, k), expected in truth.items():
                off, allowed = error(losses[b, c, k - 1], expected), error(plain[b, c, k], expected)
                assert int(found[b, c, k - 1]) == k
                assert off <= TIMES_PLAIN * allowed + FLOOR, f"{name} {scale} blob {k}: {off:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_a_large_background_is_summed_exactly(activation, dtype):
    """A running fp32 sum over 128^3 voxels is off by 1e-5."""
    generator = torch.Generator().manual_seed(1)
    channels = 2 if activation == "softmax" else 1
    logits = 3 * torch.randn(1, channels, 128, 128, 128, generator=generator)
    logits = (torch.sigmoid(logits) if activation == "none" else logits).to(dtype)
    ids = torch.zeros(1, 1, 128, 128, 128, dtype=torch.int32)
    ids[..., 40:44, 50:54, 60:64] = 1
    counts, sums = segment_stats(logits, ids, 2, FEATURES, activation)
    assert counts[0, 0].tolist() == [128**3 - 64, 64]
    for c in range(channels):
        for k in (0, 1):
            x = logits[0].flatten(1)[:, (ids == k).flatten()].double()
            prediction = oracle.predict(x, c, activation)
            for f, name in enumerate(FEATURES):
                expected = oracle.feature(name, prediction, 2.0).sum()
                assert abs(float(sums[0, c, k, f]) / float(expected) - 1) <= 1e-6, f"{name}, cell {k}"


@pytest.mark.parametrize("num_cells", [600, 20_000])
def test_many_cells_do_not_spoil_the_large_ones(num_cells):
    """The table's size limits how a sum can be cut into blocks: the background and a giant must stay accurate."""
    generator = torch.Generator().manual_seed(4)
    logits = 0.01 * torch.randn(1, 1, 64, 64, 64, generator=generator) + 1e-3  # near one value: errors do not cancel
    ids = torch.zeros(logits.shape, dtype=torch.int32)
    ids[..., 20:, :] = 1
    ids.view(-1)[::20] = torch.randint(0, num_cells, (64**3 // 20 + 1,), generator=generator, dtype=torch.int32)
    counts, sums = segment_stats(logits, ids, num_cells, FEATURES)
    prediction = oracle.predict(logits.flatten()[None].double(), 0, "sigmoid")
    for f, name in enumerate(FEATURES):
        values = oracle.feature(name, prediction, 2.0)
        expected = torch.zeros(num_cells, dtype=torch.float64).index_add_(0, ids.flatten().long(), values)
        assert error(sums[0, 0, :, f], expected) <= FLOOR, name
    assert torch.equal(counts.flatten(), ids.flatten().bincount(minlength=num_cells))


def test_a_large_volume_end_to_end():
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(1, 1, 128, 128, 128, generator=generator) - 4
    ids = torch.zeros(1, 1, 128, 128, 128, dtype=torch.uint8)
    ids[..., 40:44, 50:54, 60:64], ids[..., 90:120, 10:40, 30:60] = 1, 2
    criterion = (*CRITERIA["dice"], *CRITERIA["bce"])
    ours = value_and_gradient(lambda x: blob_loss(x, instances=ids, criterion=criterion_of(criterion)), logits)
    truth = value_and_gradient(lambda x: oracle.blob_loss(x, None, ids, criterion=criterion), logits.double())
    assert error(ours[0], truth[0]) <= 1e-6
    assert relative_to_largest(ours[1], truth[1]) <= 1e-6


# ---------------- infinities
#
# An infinite logit is the limit of a huge one: in fp64 p is exactly 0 or 1 at +-1e4, so the oracle at 1e4 gives the
# value and gradient of every overlap, the gradient of every criterion, and (where it is huge) the losses that are
# infinite.


def infinite(activation: str, x: float, at: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(logits with x at one voxel of 2D, the same with +-1e4 in place of +-inf)"""
    logits = scenes.scene(2, 2, "plain", activation).logits.clone()
    twin = logits.clone()
    logits[at], twin[at] = x, math.copysign(1e4, x)
    return logits, twin


IDS = scenes.scene(2, 2, "plain").instances
IN_BLOB_1, IN_BACKGROUND = (0, 1, 1, 2), (0, 1, 0, 0)  # of sample 0, channel 1
assert int(IDS[IN_BLOB_1]) == 1
assert int(IDS[IN_BACKGROUND]) == 0


@pytest.mark.parametrize("x", [INF, -INF])
@pytest.mark.parametrize("at", [IN_BLOB_1, IN_BACKGROUND], ids=["in a blob", "in the background"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("masking", scenes.MASKINGS)
class TestInfiniteLogits:
    def test_overlaps_stay_finite(self, masking, activation, at, x):
        logits, twin = infinite(activation, x, at)
        for name in OVERLAPS:
            options = {"masking": masking, "activation": activation}
            ours = value_and_gradient(
                lambda v, o=options, n=name: blob_loss(v, instances=IDS, criterion=criterion_of(CRITERIA[n]), **o),
                logits,
            )
            truth = value_and_gradient(
                lambda v, o=options, n=name: oracle.blob_loss(v, None, IDS, criterion=CRITERIA[n], **o), twin
            )
            assert_fp64(ours[0], truth[0], name)
            assert_fp64(ours[1], truth[1], name)

    def test_logarithms_are_infinite_where_the_logit_is_wrong_and_never_nan(self, masking, activation, at, x):
        logits, twin = infinite(activation, x, at)
        for name in LOGARITHMS:
            options = {"masking": masking, "activation": activation}
            package = {"criterion": criterion_of(CRITERIA[name]), **options}
            losses, ids = blob_loss_instances(logits, instances=IDS, **package)
            truth = oracle.losses(twin, None, IDS, criterion=CRITERIA[name], **options)
            for (b, c, k), expected in truth.instances.items():
                n = ids[b, c].tolist().index(k)
                expected = torch.where(expected > 50, INF, expected)
                assert_fp64(losses[b, c, n], expected, f"{name} of blob {k} in {b, c}")
            for term, expected in zip(
                blob_loss_terms(logits, instances=IDS, **package), (truth.main_mean(), truth.blob_mean()), strict=True
            ):
                assert_fp64(term, torch.where(expected > 5, INF, expected), f"{name}: terms")
            # The slope of a logarithm is finite everywhere, so the gradient is.
            ours = value_and_gradient(lambda v, p=package: blob_loss(v, instances=IDS, **p), logits)
            expected = value_and_gradient(
                lambda v, n=name, o=options: oracle.blob_loss(v, None, IDS, criterion=CRITERIA[n], **o), twin
            )
            assert_fp64(ours[1], expected[1], f"{name}: gradient")

    def test_an_infinite_term_leaves_the_other_alone(self, masking, activation, at, x):
        logits, twin = infinite(activation, x, at)
        options = {"masking": masking, "activation": activation}
        dice, bce = CRITERIA["dice"], CRITERIA["bce"]
        truth = oracle.losses(twin, None, IDS, criterion=dice, **options)
        for criterion, main, i, expected in (
            (bce, dice, 0, truth.main_mean()),
            (dice, bce, 1, truth.blob_mean()),
        ):
            package = {"criterion": criterion_of(criterion), "main_criterion": criterion_of(main)}
            terms = blob_loss_terms(logits, instances=IDS, **package, **options)
            assert_fp64(terms[i], expected)
            assert not terms[1 - i].isnan()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_infinities_in_every_precision(activation, dtype):
    logits, twin = infinite(activation, INF, IN_BACKGROUND)
    logits = logits.to(dtype)
    options = {"instances": IDS, "activation": activation}
    value, gradient = value_and_gradient(lambda v: blob_loss(v, **options), logits)
    expected, expected_gradient = value_and_gradient(lambda v: blob_loss(v, **options), twin)
    assert abs(float(value) - float(expected)) <= 4 * torch.finfo(dtype).eps
    assert relative_to_largest(gradient, expected_gradient) <= 8 * torch.finfo(dtype).eps
    value, gradient = value_and_gradient(lambda v: blob_loss(v, criterion=criteria.bce(), **options), logits)
    assert float(value) == INF
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("at", [IN_BLOB_1, IN_BACKGROUND], ids=["in a blob", "in the background"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_nan_always_gives_nan(activation, at, dtype):
    scene = scenes.scene(2, 2, "plain", activation)
    logits = scene.logits.to(dtype)
    logits[at] = NAN
    for name in CRITERIA:
        for masking in scenes.MASKINGS:
            module = BlobLoss(criterion_of(CRITERIA[name]), masking=masking, activation=activation)
            value, gradient = value_and_gradient(lambda v, m=module: m(v, instances=IDS), logits)
            assert value.isnan(), f"{name} {masking}"
            assert gradient[at].isnan(), f"{name} {masking}"
            for term in module.terms(logits, instances=IDS):
                assert term.isnan(), f"{name} {masking}"


def test_with_exclude_a_broken_blob_breaks_no_other():
    for x in (NAN, INF, -INF):
        clean = scenes.scene(2, 2, "plain").logits
        logits = clean.clone()
        logits[IN_BLOB_1] = x
        for name in CRITERIA:
            package = {"instances": IDS, "criterion": criterion_of(CRITERIA[name])}
            before, ids = blob_loss_instances(clean, **package)
            after, _ = blob_loss_instances(logits, **package)
            others = ids > 0
            others[0, 1, 0] = False
            assert torch.equal(before[others], after[others]), f"{name} {x}"
            assert not torch.equal(before[0, 1, 0], after[0, 1, 0])


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4, INF, NAN])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_nothing_in_an_ignored_voxel_matters(dtype, sign, scale):
    for activation in ("sigmoid", "softmax"):
        scene = scenes.scene(3, 2, "ignored", activation)
        logits = scene.logits.to(dtype)
        where = scene.instances < 0
        if activation == "softmax":
            where = where.all(1, keepdim=True).expand_as(where)
        changed = torch.where(where, sign * scale, logits)
        module = BlobLoss(criterion_of(CRITERIA["compound"]), activation=activation)
        clean = value_and_gradient(lambda v, m=module, s=scene: m(v, s.target, s.instances), logits)
        dirty = value_and_gradient(lambda v, m=module, s=scene: m(v, s.target, s.instances), changed)
        assert torch.equal(clean[0], dirty[0])
        assert torch.equal(clean[1], dirty[1])
        assert (dirty[1][where] == 0).all()


# ---------------- a device without fp64


class NoDouble(TorchDispatchMode):
    """Fails when an operator makes an fp64 tensor, also inside the package's own operators."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []
        self.inside = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.seen.append(str(function))
        if function.namespace == "blobloss_fast":
            self.inside += 1
            with self:  # a mode does not see what runs below an operator unless it is entered again
                made = function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        else:
            made = function(*args, **kwargs)
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{function} made a {tensor.dtype} tensor")
        return made


def test_the_watch_for_fp64_works():
    with NoDouble(), pytest.raises(TypeError, match="float64"):
        torch.zeros(2).double()
    logits = torch.zeros(1, 1, 4, dtype=torch.float64)
    with NoDouble() as watch, pytest.raises(TypeError, match="float64"):
        segment_stats(logits, torch.zeros(1, 1, 4, dtype=torch.int64), 1)
    assert len(watch.seen) > 1  # it looked into the operator


@pytest.mark.parametrize("cpu_backend", ["reference"], indirect=True)  # C++ adds up in fp64: no device is in its way
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_no_fp64_for_lower_precision(activation, dtype):
    variants = [{"masking": m} for m in scenes.MASKINGS]
    variants += [{"reduction": "none"}, {"reduction": "sum", "include_background": True}]
    for prop in ("plain", "disagree", "gaps", "ignore_index", "target_only", "no_instances", "all_ignored"):
        scene = scenes.scene(2, 2, prop, activation)
        for variant in variants if prop in ("disagree", "target_only") else variants[-2:]:
            options = {"main_weight": 0.3, **variant, **scene.options}
            module = BlobLoss(criterion_of(CRITERIA["compound"]), **options)
            logits = scene.logits.to(dtype).requires_grad_()
            with NoDouble() as watch:
                module(logits, scene.target, scene.instances).sum().backward()
                main, blob = module.terms(logits, scene.target, scene.instances)
                (main + blob).backward()
                module.instance_losses(logits, scene.target, scene.instances)[0].sum().backward()
            assert watch.inside >= 6
            assert len(watch.seen) > 100 * watch.inside / 6
            assert logits.grad.isfinite().all()


@pytest.mark.parametrize("cpu_backend", ["reference"], indirect=True)
@pytest.mark.parametrize("activation", scenes.ACTIVATIONS)
def test_no_fp64_in_segment_stats(activation):
    scene = scenes.scene(3, 2, "ignored", activation).to(torch.float32)
    logits = scene.logits.clone().requires_grad_()
    with NoDouble() as watch:
        segment_stats(logits, scene.instances, 5, FEATURES, activation)[1].sum().backward()
    assert watch.inside == 2
    assert len(watch.seen) > 20
