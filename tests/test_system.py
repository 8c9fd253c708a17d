"""The loss inside PyTorch: registration, compilation, autocast, worker processes, copies, second derivatives."""

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.data import DataLoader, Dataset

import blobloss_fast
from blobloss_fast import BlobLoss, CCLoss, blob_loss, criteria, segment_stats

# raised inside PyTorch's own compiler
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.usefixtures("cpu_backend"),
]


def volume(channels=1, *, seed=0, dtype=torch.float32, size=(7, 6, 5)):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, channels, *size, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.randint(-1, 5, (2, channels, *size), generator=generator)
    return logits, ids


def loss_and_grad(loss, logits, *labels, **keywords):
    logits = logits.clone().requires_grad_()
    value = loss(logits, *labels, **keywords)
    value.backward()
    return value.detach(), logits.grad


@pytest.mark.parametrize("labels", ["mask", "ids", "both"])
def test_compile_fullgraph_equals_eager(labels):
    """Without a graph break, although the ids are found on the fly; and again for another size without an error."""
    torch._dynamo.reset()
    module = BlobLoss(criteria.dice() + criteria.bce(), max_instances=64)
    compiled = torch.compile(module, fullgraph=True)
    for seed, size in enumerate([(9, 8, 7), (6, 5, 4), (9, 8, 7)]):
        logits, ids = volume(seed=seed, size=size)
        given = {
            "mask": {"target": (ids > 2).float()},
            "ids": {"instances": ids},
            "both": {"target": (ids > 1), "instances": ids},
        }[labels]
        for got, expected in zip(
            loss_and_grad(compiled, logits, **given), loss_and_grad(module, logits, **given), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True, "spacing": (1, 1.5, 3)}, {"instance_weight": lambda n: n >= 2, "empty_sample": 9.0}],
    ids=["zones", "bidirectional", "weights"],
)
def test_compile_cc_loss_from_a_mask(options):
    """Labels, zones, table and finish in one graph."""
    torch._dynamo.reset()
    module = CCLoss(criteria.dice() + criteria.bce(), max_instances=300, **options)
    compiled = torch.compile(module, fullgraph=True)
    for seed, size in enumerate([(9, 8, 7), (6, 5, 4)]):
        logits, ids = volume(seed=seed, size=size)
        for got, expected in zip(
            loss_and_grad(compiled, logits, ids > 2), loss_and_grad(module, logits, ids > 2), strict=True
        ):
            torch.testing.assert_close(got, expected)


def test_compile_follows_a_weight_schedule():
    torch._dynamo.reset()
    module = BlobLoss(max_instances=64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    logits, ids = volume()
    for weight in (1.0, 0.5, 0.1, 0.0):
        module.blob_weight = weight
        for got, expected in zip(
            loss_and_grad(compiled, logits, ids > 2), loss_and_grad(module, logits, ids > 2), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_compile_with_dynamic_shapes():
    torch._dynamo.reset()
    module = BlobLoss(criteria.dice() + criteria.bce(), max_instances=64)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed, size in enumerate([(9, 8, 7), (6, 5, 4), (3, 8, 5), (9, 8, 7)]):
        logits, ids = volume(seed=seed, size=size)
        for got, expected in zip(
            loss_and_grad(compiled, logits, instances=ids), loss_and_grad(module, logits, instances=ids), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("loss", [BlobLoss, CCLoss])
@pytest.mark.parametrize("labels", ["mask", "ids"])
def test_no_recompilation_for_another_patch_or_number_of_instances(loss, labels):
    """With dynamic shapes one compilation; left to itself, the compiler adds one for every axis that proves to vary."""
    patches = [((2, 5, 6, 7), 1), ((2, 6, 7, 8), 3), ((3, 9, 8, 7), 0), ((4, 12, 5, 6), 9), ((2, 10, 11, 12), 5)]
    for dynamic, expected in ((True, 5 * [1]), (None, [1, 2, 3, 3, 3])):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(loss(max_instances=9), fullgraph=True, dynamic=dynamic, backend=counter)
        found = []
        for (batch, *size), largest in patches:
            logits = torch.randn(batch, 1, *size, requires_grad=True)
            ids = torch.randint(0, largest + 1, logits.shape)
            compiled(logits, instances=ids if labels == "ids" else None, target=ids > 0 if labels == "mask" else None)
            found.append(counter.frame_count)
        assert found == expected


def test_a_growing_capacity_recompiles_once():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(blob_loss, fullgraph=True, backend=counter)
    logits, ids = volume()
    for capacity in (4, 5, 8, 20, 100):
        compiled(logits, instances=ids, max_instances=capacity)
    assert counter.frame_count <= 2


def test_compile_softmax_terms_and_instances():
    torch._dynamo.reset()
    logits, ids = volume(2)
    target = (ids[:, :1] > 1).long()
    module = BlobLoss(activation="softmax", include_background=True, max_instances=8)

    def logged(logits):
        main, blob = module.terms(logits, target, ids[:, :1])
        losses, _ = module.instance_losses(logits, target, ids[:, :1])
        return main + 2 * blob + losses.sum()

    compiled = torch.compile(logged, fullgraph=True)
    for got, expected in zip(loss_and_grad(compiled, logits), loss_and_grad(logged, logits), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_reads_the_logits_as_they_are(dtype):
    """A half-precision logit gives the fp32 loss of that logit, and a gradient in its own dtype."""
    logits, ids = volume(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, grad = loss_and_grad(BlobLoss(), logits, instances=ids)
    expected, expected_grad = loss_and_grad(BlobLoss(), logits.float(), instances=ids)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    torch.testing.assert_close(grad, expected_grad.to(dtype), rtol=0, atol=0)


def test_autocast_behind_a_convolution():
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 1, 3, padding=1)
    images, ids = volume()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(images)
        assert logits.dtype == torch.bfloat16
        loss = BlobLoss()(logits, instances=ids)
    loss.backward()
    expected, expected_grad = loss_and_grad(BlobLoss(), logits.detach(), instances=ids)
    torch.testing.assert_close(loss.detach(), expected, rtol=0, atol=0)
    bias = expected_grad.float().sum((0, 2, 3, 4))
    torch.testing.assert_close(network.bias.grad, bias, rtol=2e-2, atol=1e-4)


class _Losses(Dataset):
    """A data set whose items are losses: what hard-example mining in a worker does."""

    def __init__(self, with_gradient):
        self.with_gradient = with_gradient

    def __len__(self):
        return 4

    def __getitem__(self, index):
        logits, ids = volume(seed=index)
        losses = BlobLoss()(logits, (ids > 2)), BlobLoss()(logits, instances=ids)
        return (*losses, *(loss_and_grad(BlobLoss(), logits, instances=ids) if self.with_gradient else ()))


@pytest.mark.parametrize("with_gradient", [False, True])
def test_dataloader_worker_after_fork(with_gradient):
    losses = _Losses(with_gradient)
    expected = [losses[i] for i in range(4)]  # PyTorch's thread pool is warm when the workers are forked
    loader = DataLoader(losses, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    try:
        found = list(loader)
    except RuntimeError as error:
        if "autograd's threading" not in str(error):
            raise
        pytest.skip("this build of PyTorch runs no backward pass in a forked child")
    for got, item in zip(found, expected, strict=True):
        for a, b in zip(got, item, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_second_derivative_is_refused():
    logits, ids = volume()
    logits.requires_grad_()
    for value in (blob_loss(logits, instances=ids), segment_stats(logits, ids, 5)[1].sum()):
        (grad,) = torch.autograd.grad(value, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()


def test_module_is_copied_and_pickled():
    module = BlobLoss(criteria.dice() + 0.5 * criteria.focal(1.5), masking="none", max_instances=7)
    logits, ids = volume()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(twin(logits, instances=ids), module(logits, instances=ids), rtol=0, atol=0)
    assert repr(module) == "BlobLoss(dice() + 0.5 * focal(1.5), masking='none', max_instances=7)"
    assert repr(BlobLoss()) == "BlobLoss(dice())"


def test_options_are_attributes_that_a_schedule_may_change():
    logits, ids = volume()
    module = BlobLoss()
    module.blob_weight, module.masking = 0.25, "none"
    expected = blob_loss(logits, instances=ids, blob_weight=0.25, masking="none")
    torch.testing.assert_close(module(logits, instances=ids), expected, rtol=0, atol=0)
    module.blob_weight = float("nan")
    with pytest.raises(ValueError, match="blob_weight must be finite"):
        module(logits, instances=ids)


@pytest.mark.parametrize("criterion", [criteria.dice(), criteria.bce(), criteria.focal()], ids=repr)
def test_invalid_labels_poison_loss_and_gradient_where_they_cannot_raise(monkeypatch, criterion):
    """What a device does whose values the host must not read: a gradient scaler has to notice, too."""
    monkeypatch.setattr(blobloss_fast._ops, "_for_cpu", lambda: blobloss_fast.kernels.reference)
    monkeypatch.setattr(blobloss_fast.kernels.reference, "_on_host", lambda tensor: False)
    logits, _ = volume()
    ids = torch.zeros(logits.shape, dtype=torch.int64)
    ids[0, 0, 0, 0, 0], ids[0, 0, 3, 3, 3], ids[1, 0, 0, 0, 0] = 1, 5, -1
    value, grad = loss_and_grad(BlobLoss(criterion, max_instances=1), logits, instances=ids)
    assert value.isnan() and grad[ids >= 0].isnan().all() and grad[ids < 0] == 0


def test_without_a_blob_term_no_instance_is_looked_for(monkeypatch):
    logits, ids = volume()
    target = torch.where(ids > 2, 1, 0)
    target[0, 0, 0] = 255
    options = {"blob_weight": 0.0, "ignore_index": 255}
    expected = loss_and_grad(blob_loss, logits, target, torch.zeros_like(ids), **options)
    monkeypatch.setattr(blobloss_fast._ops, "label_target", None)
    monkeypatch.setattr(blobloss_fast._ops, "run_label_target", None)
    for got, want in zip(loss_and_grad(blob_loss, logits, target, **options), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    with pytest.raises(ValueError, match="target"):
        blob_loss(logits, target, blob_weight=0.0)  # 255 is neither 0 nor 1


def test_no_grad_and_frozen_logits():
    logits, ids = volume()
    with torch.no_grad():
        value = blob_loss(logits.requires_grad_(), instances=ids)
    assert not value.requires_grad
    assert not blob_loss(logits.detach(), instances=ids).requires_grad
    torch.testing.assert_close(value, blob_loss(logits, instances=ids).detach(), rtol=0, atol=0)


def test_one_pass_over_the_volume_each_way(monkeypatch):
    """Whatever the compound and the weights, the kernels run once forward and once backward."""
    calls = []
    backend = blobloss_fast._ops._for_cpu()
    passes = {
        "segment_stats_forward": "forward",
        "segment_stats_backward": "backward",
        "blob_loss": "forward",  # of a backend that has the whole loss
        "blob_loss_backward": "backward",
    }
    for name in passes.keys() & set(dir(backend)):
        kernel = getattr(backend, name)
        monkeypatch.setattr(
            backend,
            name,
            lambda *args, _kernel=kernel, _name=name: calls.append(passes[_name]) or _kernel(*args),
        )
    logits, ids = volume()
    loss = BlobLoss(criteria.dice() + criteria.bce() + criteria.focal(), main_criterion=criteria.jaccard())
    loss_and_grad(loss, logits, ids > 2, ids)
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize(("size", "max_instances"), [((7, 6, 5), 5), ((64, 64, 64), None)], ids=["told", "large"])
def test_vmap_over_the_loss(size, max_instances, cpu_backend):
    """It goes through the operator, sample by sample; past the operator there would be no rule for it."""
    if max_instances is None and cpu_backend == "reference":
        pytest.skip("reads the largest id, which vmap does not allow")
    logits, ids = volume(size=size)
    loss = BlobLoss(max_instances=max_instances)
    mapped = torch.vmap(lambda x, i: loss(x[None], instances=i[None]))(logits, ids)
    expected = torch.stack([loss(x[None], instances=i[None]) for x, i in zip(logits, ids, strict=True)])
    torch.testing.assert_close(mapped, expected, rtol=0, atol=0)


def test_tensors_without_values(cpu_backend):
    """Nothing is read from ids that a fake tensor stands for, unless their largest has to be known."""
    if cpu_backend == "reference":
        pytest.skip("reads the largest id")
    with FakeTensorMode() as mode:
        logits, ids = (mode.from_tensor(tensor) for tensor in volume(size=(64, 64, 64)))
        loss = BlobLoss()(logits, instances=ids)
    assert isinstance(loss, FakeTensor)
    assert loss.shape == ()


def test_backends_names_every_kind_of_device():
    found = blobloss_fast.backends()
    native = blobloss_fast.kernels.native
    assert found["cpu"] == (
        f"native ({native.isa()})" if native.available() else f"reference (pure PyTorch): {native.why_not()}"
    )
    assert set(found) == {"cpu", "cuda", "other"}
    assert ("Triton is not installed" in found["cuda"]) != found["cuda"].startswith("triton")


def test_backends_of_a_tensor_says_what_it_takes_and_why():
    everywhere = blobloss_fast.backends()
    dense, meta = torch.zeros(2, 3, 4, 5, 6), torch.zeros(2, 3, 4, 5, 6, device="meta")
    found = blobloss_fast.backends(dense)
    assert list(found) == ["losses", "components", "zones", "layout"]
    assert found["losses"] == everywhere["cpu"]
    native = blobloss_fast.kernels.native.available()
    assert ("connected-components-3d" in found["components"]) != native
    assert found["layout"] == blobloss_fast.backends(dense[:, 1:])["layout"] == "read as it is"
    for strided in (dense.to(memory_format=torch.channels_last_3d), dense[..., 1:]):
        assert ("copied" in blobloss_fast.backends(strided)["layout"]) == native
    assert blobloss_fast.backends(meta)["losses"].endswith("no kernels for meta devices")
    assert "connected-components-3d" in blobloss_fast.backends(meta)["components"]
    half = blobloss_fast.backends(dense.half())
    assert half["losses"] == everywhere["cpu"] and "connected-components-3d" in half["components"]
    assert ("does not label torch.float16" in half["components"]) == native
    with pytest.raises(ValueError, match=r"tensor must be \[B, C, \*spatial\]"):
        blobloss_fast.backends(torch.zeros(3))
    with pytest.raises(TypeError, match=r"a real dtype; got torch\.complex64"):
        blobloss_fast.backends(torch.zeros(1, 1, 2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor"):
        blobloss_fast.backends("cpu")
