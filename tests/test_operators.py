"""The operators that are registered with PyTorch: what it demands of them, and of tracing them."""

import pytest
import torch
import torch._dynamo

from blobloss_fast import criteria
from blobloss_fast.functional import Options
from blobloss_fast.kernels import finish
from blobloss_fast.kernels.finish import decode, encode
from blobloss_fast.kernels.layout import FEATURES

from .test_system import pytestmark, volume  # noqa: F401


def operator_options(reduction="mean", activation="sigmoid", channel0="class", masking="none"):
    options = Options(criteria.dice() + criteria.focal(1.5)).checked()
    rows = options.criterion.text
    return 1.0, 2.0, encode(activation, masking, channel0, reduction, rows, rows, "")


# PyTorch 2.14's opcheck reads the gradient of a tensor that has none, and warns of it.
opcheck_warns = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@opcheck_warns
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "none"])
def test_opcheck_segment_stats(activation):
    logits, ids = volume(2)
    logits = logits.sigmoid() if activation == "none" else logits
    arguments = (ids, 5, list(FEATURES), activation, 2.0)
    torch.library.opcheck(torch.ops.blobloss_fast.segment_stats.default, (logits.requires_grad_(), *arguments))
    grad_sums = torch.randn(2, 2, 5, len(FEATURES))
    backward = (grad_sums, logits.detach(), ids, list(FEATURES), activation, 2.0)
    torch.library.opcheck(torch.ops.blobloss_fast.segment_stats_backward.default, backward)


@opcheck_warns
@pytest.mark.parametrize("reduction", ["mean", "none", "sum", "terms", "instances"])
@pytest.mark.parametrize("with_target", [False, True])
def test_opcheck_blob_loss(reduction, with_target):
    logits, ids = volume()
    target = (ids > 1).float() if with_target else None
    weights = torch.rand(*logits.shape[:2], 6) if with_target else None
    options = operator_options(reduction)
    torch.library.opcheck(
        torch.ops.blobloss_fast.blob_loss.default, (logits.requires_grad_(), ids, target, weights, 6, *options)
    )
    loss, counts, sums = torch.ops.blobloss_fast.blob_loss(logits.detach(), ids, target, weights, 6, *options)
    backward = (torch.ones_like(loss), logits.detach(), ids, target, weights, counts, sums, *options)
    torch.library.opcheck(torch.ops.blobloss_fast.blob_loss_backward.default, backward)


def test_opcheck_labels():
    _, ids = volume(3)
    torch.library.opcheck(torch.ops.blobloss_fast.connected_components.default, ((ids > 2).float(), 26))
    class_map = ids[:, :1].clamp(0, 2)
    torch.library.opcheck(torch.ops.blobloss_fast.label_target.default, (class_map, 3, True, True, 26, None))
    two = (ids[:, :1] > 2).long()
    torch.library.opcheck(torch.ops.blobloss_fast.label_target.default, (two, 2, True, True, 6, None))


def test_a_compiled_graph_of_another_version_is_not_found(monkeypatch):
    """PyTorch looks for it by the options, which say the same in both."""
    own = operator_options()
    monkeypatch.setattr(finish, "_VERSION", "another")
    assert operator_options() != own
    assert decode(*operator_options()) == decode(*own)


def test_compile_the_operator_with_a_batch_that_only_the_data_tell():
    logits, ids = volume(3)
    options = operator_options()

    def chosen(logits, ids, keep):
        rows = keep.nonzero().squeeze(1)
        return torch.ops.blobloss_fast.blob_loss(logits[rows], ids[rows], None, None, 6, *options)[0]

    torch._dynamo.reset()
    keep = torch.arange(len(logits)) < len(logits) - 1
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        value = torch.compile(chosen, fullgraph=True, backend="aot_eager")(logits, ids, keep)
    torch.testing.assert_close(value, chosen(logits, ids, keep), rtol=0, atol=0)
