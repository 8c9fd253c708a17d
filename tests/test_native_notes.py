"""What the native forward pass notes for the backward pass: in which cell each block of 512 voxels lies.

The gradient must be the same as without, bit for bit, and the labels of a block that has a note are not read again.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blobloss_fast import criteria
from blobloss_fast.kernels import native
from blobloss_fast.kernels.finish import LossSpec
from blobloss_fast.kernels.layout import BLOCK, features_of

from .test_native_finish import spec_of

NONE = 0  # the note on a block of several cells
VOXELS = 40 * BLOCK + 70
CRITERION = criteria.dice() + criteria.bce()
FEATURES = features_of(CRITERION.rows)

pytestmark = pytest.mark.usefixtures("library")


class Step:
    """A forward pass, and as many backward passes as wanted."""

    def __init__(self, logits: Tensor, ids: Tensor, target: Tensor | None, num_cells: int, spec: LossSpec) -> None:
        self.volumes = logits, ids, target, None
        self.spec = spec
        self.value, self.counts, self.saved = native.blob_loss(*self.volumes, num_cells, FEATURES, spec)
        table = self.counts.numel() * len(FEATURES)
        blocks = -(-logits[0, 0].numel() // BLOCK)
        pairs = logits.shape[0] * logits.shape[1]
        room = self.saved[table:].view(torch.int16)
        assert (room[pairs * blocks :] == 0).all()
        self.notes = room[: pairs * blocks].view(*logits.shape[:2], blocks)  # shares memory with what was saved

    def gradient(self) -> Tensor:
        arguments = *self.volumes, self.counts, self.saved, FEATURES, self.spec
        return native.blob_loss_backward(torch.ones_like(self.value), *arguments)


def runs(values: Tensor, generator: torch.Generator) -> Tensor:
    """Values that go on for a few blocks, some of them from the middle of a block on."""
    lengths = torch.randint(1, 9, (len(values),), generator=generator) * (BLOCK // 2)
    return values.repeat_interleave(lengths)[:VOXELS]


def expected_notes(ids: Tensor, target: Tensor | None, channels: int, channel0: str) -> Tensor:
    cells = ids.long().expand(-1, channels, -1).clone()
    if channel0 == "background":
        cells[:, 0].clamp_(max=0)
    if target is not None:
        own = torch.arange(channels).view(1, -1, 1)
        bit = target == own if target.shape[1] < channels else target != 0
        cells = torch.where(cells < 0, -1, 2 * cells + bit)
    cells = F.pad(cells, (0, -cells.shape[-1] % BLOCK), value=-1).unflatten(-1, (-1, BLOCK))
    first = cells[..., 0]
    notes = torch.where((cells == first[..., None]).all(-1), first.clamp(min=-1) + 2, NONE)
    if channel0 == "unused":
        notes[:, 0] = NONE
    return notes


@pytest.mark.parametrize("reduction", ["mean", "none", "terms", "instances"])
@pytest.mark.parametrize("ids_dtype", [torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("channels", "activation", "channel0", "kind"),
    [
        (1, "sigmoid", "class", "ids"),
        (2, "sigmoid", "class", "target"),
        (2, "softmax", "background", "class map"),
        (3, "softmax", "unused", "class map"),
        (3, "softmax", "class", "ids"),
    ],
)
def test_with_notes_and_without(
    channels: int,
    activation: str,
    channel0: str,
    kind: str,
    dtype: torch.dtype,
    ids_dtype: torch.dtype,
    reduction: str,
) -> None:
    generator = torch.Generator().manual_seed(channels)
    logits = torch.randn(2, channels, VOXELS, generator=generator, dtype=torch.float64).to(dtype)
    pool = torch.randint(-2, 4, (60,), generator=generator).clamp(min=-1)
    ids = torch.stack([runs(pool.roll(b), generator) for b in range(2)])[:, None].to(ids_dtype)
    target = None
    if kind != "ids":
        classes = torch.stack([runs(torch.arange(60).roll(b) % channels, generator) for b in range(2)])[:, None]
        target = classes if kind == "class map" else (classes > 0).expand(-1, channels, -1).float()
    spec = spec_of(CRITERION, CRITERION, reduction, activation=activation, channel0=channel0)
    step = Step(logits, ids, target, 4 if target is None else 8, spec)
    expected = expected_notes(ids, target, channels, channel0)
    assert torch.equal(step.notes, expected.to(torch.int16))
    assert {NONE, 1} < set(expected.flatten().tolist())
    gradient = step.gradient()
    step.notes.fill_(NONE)
    assert torch.equal(step.gradient(), gradient)
    assert (gradient != 0).any()


def test_labels_of_a_noted_block_are_not_read_again() -> None:
    ids = torch.zeros(1, 1, 3 * BLOCK, dtype=torch.int32)
    ids[..., 2 * BLOCK + 7] = 1
    step = Step(torch.ones(1, 1, 3 * BLOCK), ids, None, 3, spec_of(CRITERION, CRITERION))
    before = step.gradient()
    ids[..., [5, 2 * BLOCK + 5]] = 1  # nobody may do that; it shows what is read
    changed = (step.gradient() != before).flatten().nonzero().flatten()
    assert changed.tolist() == [2 * BLOCK + 5]


@pytest.mark.parametrize("note", [-(2**15), -1, 5, 2**15 - 1])
def test_a_note_that_names_no_cell_is_not_believed(note: int) -> None:
    ids = torch.zeros(1, 1, 2 * BLOCK, dtype=torch.int32)
    step = Step(torch.ones(1, 1, 2 * BLOCK), ids, None, 3, spec_of(CRITERION, CRITERION))
    before = step.gradient()
    step.notes[..., 0] = note
    assert torch.equal(step.gradient(), before)


def test_ids_that_no_note_can_hold() -> None:
    last = 2**15 - 3  # of the cells that a note can name
    ids = torch.arange(last - 1, last + 3).repeat_interleave(BLOCK)[None, None]
    logits = torch.randn(ids.shape, generator=torch.Generator().manual_seed(0))
    step = Step(logits, ids, None, last + 3, spec_of(CRITERION, CRITERION))
    assert step.notes.flatten().tolist() == [last + 1, last + 2, NONE, NONE]
    gradient = step.gradient()
    step.notes.fill_(NONE)
    assert torch.equal(step.gradient(), gradient) and (gradient != 0).all()


def test_what_is_ignored_is_so_under_any_id() -> None:
    ids = torch.tensor([-1, -2, -(2**31)], dtype=torch.int32).repeat_interleave(BLOCK)[None, None]
    step = Step(torch.full(ids.shape, torch.nan), ids, None, 2, spec_of(CRITERION, CRITERION))
    assert step.notes.flatten().tolist() == [1, 1, 1]
    assert (step.gradient() == 0).all()


@pytest.mark.parametrize(
    "wrong", [lambda saved: saved[1:], lambda saved: saved.double(), lambda saved: saved.repeat_interleave(2)[::2]]
)
def test_what_was_not_saved_by_the_forward_pass_is_refused(wrong) -> None:
    step = Step(
        torch.ones(1, 1, BLOCK), torch.zeros(1, 1, BLOCK, dtype=torch.int32), None, 2, spec_of(CRITERION, CRITERION)
    )
    step.saved = wrong(step.saved)
    with pytest.raises(ValueError, match="saved must be what blob_loss returned"):
        step.gradient()
