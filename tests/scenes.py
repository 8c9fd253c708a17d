"""Small volumes that a person can check by eye: ids and targets drawn as text, for 1D, 2D and 3D, odd sizes.

A drawing has one character per voxel: ``.`` is background, a digit or a lower-case letter an id (a = 10, b = 11, ...),
``-`` an ignored voxel (id -1), ``?`` a voxel whose target is IGNORE. Rows are separated by blanks, slices by ``/``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE = 255

DIMS = (1, 2, 3)
CHANNELS = (1, 2, 3)
ACTIVATIONS = ("sigmoid", "softmax", "none")
MASKINGS = ("exclude", "zero_prob", "zero_logit", "none")
PROPERTIES = (
    "plain",
    "ignored",
    "ignored_sample",
    "all_ignored",
    "empty_sample",
    "no_instances",
    "one_voxel",
    "gaps",
    "disagree",
    "giant",
    "salt_and_pepper",
    "ignore_index",
    "target_only",
)

# Three drawings per dimension, so that samples and channels differ. Ids need not be connected (1D: 4, 2D: 4 and 2).
DRAWINGS = {
    1: ("11.22.3..4.44", "..1.....22...", ".3...1.2..333"),
    2: (
        "11....2 11..3.. ....3.. 4...... ....444",
        "....... ..11... ..1.... ......2 .....22",
        "1.2.... ..2.... ....... 3333... ......1",
    ),
    3: (
        "11... 11... ...2. ..... / 1.... ..... ..222 ..... / ..... 3.... ..... 4...4",
        "..... ..... .1... ..... / ..... ..1.. ..... ..... / ..... ..... ..1.. ....2",
        "2.... ..... ..... ....1 / ..3.. ..... ..... ...11 / ..3.. 33... ..... .....",
    ),
}


def draw(text: str) -> Tensor:
    """A drawing as int64 [*spatial]: 1D if it has one row, 2D if one slice."""

    def value(character: str) -> int:
        special = {".": 0, "-": -1, "?": IGNORE}
        return special[character] if character in special else int(character, 36)

    slices = [[[value(v) for v in row] for row in part.split()] for part in text.split("/")]
    drawn = torch.tensor(slices)
    return drawn[0, 0] if drawn.shape[:2] == (1, 1) else drawn[0] if drawn.shape[0] == 1 else drawn


@dataclass(frozen=True)
class Scene:
    """Input of the loss: logits (probabilities if `activation` is "none") fp64, and the labels."""

    name: str
    activation: str
    logits: Tensor
    target: Tensor | None
    instances: Tensor | None
    ignore_index: int | None = None

    @property
    def options(self) -> dict:
        return {"activation": self.activation, "ignore_index": self.ignore_index}

    def to(self, dtype: torch.dtype) -> Scene:
        return replace(self, logits=self.logits.to(dtype))


def random_logits(shape, seed: int = 0, scale: float = 2.0, activation: str = "sigmoid") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.sigmoid(logits) if activation == "none" else logits


def paint(dim: int, channels: int, prop: str) -> tuple[Tensor | None, Tensor | None]:
    """(target, instances) [2, channels, *spatial] int64 with the property asked for; either may be None."""
    drawings = [draw(text) for text in DRAWINGS[dim]]
    ids = torch.stack([torch.stack([drawings[(b + c) % 3] for c in range(channels)]) for b in range(2)])
    flat = ids.view(2, channels, -1)  # writes through to ids
    voxels = flat.shape[-1]
    foreground = (ids > 0).long()
    truth = foreground.view(2, channels, -1)

    if prop == "plain":
        return None, ids
    if prop == "ignored":  # some of the background, half of a blob, a whole blob
        flat[:, :, 2:4] = -1
        flat[0, -1, voxels // 2 :: 5] = -7
        flat[1][flat[1] == 2] = -1
        return foreground, ids
    if prop == "ignored_sample":  # sample 1, and one channel of sample 0, have nothing left
        flat[1] = -1
        if channels > 1:
            flat[0, 1] = -3
        return foreground, ids
    if prop == "all_ignored":
        return foreground, torch.full_like(ids, -1)
    if prop == "empty_sample":
        flat[1] = 0
        return (ids > 0).long(), ids
    if prop == "no_instances":
        return torch.zeros_like(ids), torch.zeros_like(ids)
    if prop == "one_voxel":
        flat[:] = 0
        flat[0, :, 0], flat[0, :, voxels // 2], flat[1, :, voxels - 1] = 1, 2, 1
        return None, ids
    if prop == "gaps":
        return None, torch.tensor([0, 4, 9, 2, 31])[ids]
    if prop == "disagree":
        flat[0][flat[0] == 1] = 0  # target 1 without an id: an instance that was dropped
        truth[1][flat[1] == 2] = 0  # an id with target 0
        truth[:, :, -2] = 1  # target 1 where there never was an instance
        truth[0, :, 0] = 0
        return foreground, ids
    if prop == "giant":  # no background left in sample 0
        flat[:] = 1
        flat[1, :, voxels // 2], flat[1, :, :3] = 2, 0
        return None, ids
    if prop == "salt_and_pepper":
        flat[:] = 0
        salt = torch.arange(0, voxels, 3)
        flat[:, :, salt] = salt // 3 + 1
        return None, ids
    if prop == "ignore_index":
        truth[:, :, 1::6] = IGNORE
        truth[1, 0, :4] = IGNORE
        return foreground, ids
    if prop == "target_only":
        truth[0, -1, 1:3] = IGNORE
        return foreground, None
    raise ValueError(prop)


def class_map(target: Tensor) -> Tensor:
    """Binary [B, C, ...] -> [B, 1, ...] with the highest class that is set; IGNORE wins."""
    classes = torch.zeros_like(target[:, :1])
    for c in range(1, target.shape[1]):
        classes[target[:, c : c + 1] == 1] = c
    classes[(target[:, 1:] == IGNORE).any(1, keepdim=True)] = IGNORE
    return classes


def one_hot(classes: Tensor, channels: int) -> Tensor:
    hot = torch.cat([(classes == c).long() for c in range(channels)], 1)
    return torch.where(classes == IGNORE, IGNORE, hot)


def scene(dim: int, channels: int, prop: str, activation: str = "sigmoid", seed: int = 0) -> Scene:
    """One scene. With a softmax, `channels` = 1 is the two-channel case with [B, 1] labels; 2D targets are one-hot."""
    target, instances = paint(dim, channels, prop)
    if activation == "softmax":
        if channels == 1:
            logit_channels = 2
            classes = target
        else:
            logit_channels = channels
            classes = None if target is None else class_map(target)
        target = classes if classes is None or dim != 2 else one_hot(classes, logit_channels)
    else:
        logit_channels = channels
    spatial = draw(DRAWINGS[dim][0]).shape
    logits = random_logits((2, logit_channels, *spatial), seed + 10 * dim + channels, activation=activation)
    # IGNORE is declared only where the target may hold it.
    ignore_index = IGNORE if prop in ("ignore_index", "target_only") else None
    return Scene(f"{dim}D-C{channels}-{prop}", activation, logits, target, instances, ignore_index)


def every_scene(activation: str) -> list[Scene]:
    return [scene(d, c, p, activation) for d in DIMS for c in CHANNELS for p in PROPERTIES]


def telling_scenes(activation: str) -> list[Scene]:
    """Every dimension x every property, with each C at each property and in each dimension, at a third of the cost."""
    return [scene(d, CHANNELS[(i + d) % 3], p, activation) for d in DIMS for i, p in enumerate(PROPERTIES)]


# ---------------- worked out by hand
#
# HALVES: 1D, one sample, one class, all logits 0 (p = 1/2 everywhere), ids 1 . 2 2, no smoothing.
#   main Dice: I = 3/2, S = 2, n = 3                                 1 - 3/5      = 2/5
#   exclude and zero_prob, blob 1: voxels 1 .   I = 1/2, S = 1,   n = 1    1 - 1/2      = 1/2
#                          blob 2: voxels . 2 2 I = 1,   S = 3/2, n = 2    1 - 2/(7/2)  = 3/7     mean 13/28
#   zero_logit (p = 1/2 again) and none, 1:     I = 1/2, S = 2,   n = 1    1 - 1/3      = 2/3
#                                        2:     I = 1,   S = 2,   n = 2    1 - 2/4      = 1/2     mean 7/12
#   BCE: every voxel log 2; zero_prob: blob 1 has two such voxels in four, blob 2 three in four: 5/8 log 2.
#   gradient of the main Dice: dL/dp = -2 y / 5 + 3/25: -7/25 in the blobs, 3/25 outside; dp/dx = 1/4.
HALVES = Scene("halves", "sigmoid", torch.zeros(1, 1, 4, dtype=torch.float64), None, draw("1.22")[None, None])
HALVES_DICE = {"exclude": 13 / 28, "zero_prob": 13 / 28, "zero_logit": 7 / 12, "none": 7 / 12}
HALVES_BCE_IN_LOG2 = {"exclude": 1.0, "zero_prob": 5 / 8, "zero_logit": 1.0, "none": 1.0}
HALVES_MAIN_DICE = 2 / 5
HALVES_MAIN_DICE_GRADIENT = [-7 / 100, 3 / 100, -7 / 100, -7 / 100]

# QUARTERS: 2D; logits are +-log 3 and 0, so p = 3/4, 1/4 and 1/2:
#   ids    1 - .      target  1 1 .      p  3/4 (3/4) 1/4
#          . 2 .              1 . .         1/4  3/4  1/2
#   The voxel with id - is ignored; (1,0) has a target and no id, (1,1) an id and no target.
#   main Dice: I = 3/4 + 1/4 = 1, S = 5/2, n = 2                     1 - 2/(9/2)  = 5/9
#   blob 1: voxels 3/4 | 1/4 1/4 1/2: I = 3/4, S = 7/4, n = 1        1 - (3/2)/(11/4) = 5/11, blob 2 the same
#   Jaccard: U = 7/4 + 1 - 3/4 = 2                                   1 - (3/4)/2  = 5/8
#   Tversky alpha 3/10, beta 7/10: TP = 3/4, FP = 1, FN = 1/4        1 - (3/4)/(49/40) = 19/49
#   BCE: blob: three voxels -log 3/4, one log 2; main: two -log 3/4, two log 4, one log 2.
QUARTERS = Scene(
    "quarters",
    "sigmoid",
    torch.tensor([[[[1.0, 1.0, -1.0], [-1.0, 1.0, 0.0]]]], dtype=torch.float64) * torch.tensor(3.0).double().log(),
    draw("11. 1..")[None, None],
    draw("1-. .2.")[None, None],
)
QUARTERS_MAIN_DICE, QUARTERS_BLOB_DICE = 5 / 9, 5 / 11
QUARTERS_BLOB_JACCARD, QUARTERS_BLOB_TVERSKY = 5 / 8, 19 / 49
