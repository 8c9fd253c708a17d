"""Names and column order shared by every backend: the features of the table and the layout of a criterion row.

The table holds, per (sample, class, cell), a voxel count and the sum of some features, each a function of the logit
alone. A criterion row is a ratio of two affine forms in the count and the feature sums of the positive voxels and of
the negative voxels of a domain::

    value = offset + (n_0 + sum_j n_j * stat_j) / (d_0 + sum_j d_j * stat_j)

and is stored as ``ROW_SIZE`` floats: weight, offset, n_0, d_0, two factors of the slopes, then n_j for every column,
then d_j for every column. The factors multiply the derivative of the numerator and of the denominator: they are 1, and
something else where a loss stops the gradient (``criteria.false_positives``).
"""

from __future__ import annotations

from collections.abc import Sequence

FEATURES = ("prob", "prob_sq", "nll_pos", "nll_neg", "focal_pos", "focal_neg")
ACTIVATIONS = ("sigmoid", "softmax", "none")
MASKINGS = ("exclude", "zero_prob", "zero_logit", "none")
ZONES = "zones"  # in place of a masking: the domain of an instance is its zone
CONNECTIVITIES = {1: (26,), 2: (4, 8, 26), 3: (6, 18, 26)}  # by the number of spatial axes; 26: all neighbours
CHANNEL0 = ("class", "background", "unused")
BLOCK = 512  # voxels on which the native library takes a note

COUNT = "count"
SIDES = ("pos", "neg")
COLUMNS = tuple((side, stat) for side in SIDES for stat in (COUNT, *FEATURES))
ROW_HEAD = 6
ROW_SIZE = ROW_HEAD + 2 * len(COLUMNS)

# What every backend says about values that only a pass over the volume can find.
TOO_LARGE = (
    "instances (given or found in the target; or cells) hold a value beyond the capacity: pass a larger max_instances "
    "(num_cells for segment_stats), or max_instances=None to read the largest id"
)
NOT_BINARY = (
    "target (or mask) must be 0 or 1 wherever it is not ignored: threshold it (target > 0.5), or name its ignored "
    "value with ignore_index"
)
NOT_A_CLASS = (
    "target must be a class map with values 0 .. C-1 wherever it is not ignored (C = channels of the logits): name its "
    "ignored value with ignore_index"
)
NOT_A_PROBABILITY = (
    "logits must lie in [0, 1] with activation='none', which takes them as probabilities: pass activation='sigmoid' or "
    "'softmax' for raw network outputs"
)


class IdTooLargeError(ValueError):
    """What a backend raises for ``TOO_LARGE``, where it may raise: the caller may know a way out."""


def rows_of(flat: Sequence[float]) -> list[Sequence[float]]:
    """Split the flat rows that an operator receives."""
    return [flat[i : i + ROW_SIZE] for i in range(0, len(flat), ROW_SIZE)]


def row_terms(row: Sequence[float]) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], float]]:
    """Return the non-zero coefficients of a row's numerator and denominator, by (side, stat).

    Only these are ever read: an unread sum may be infinite, and 0 * inf would poison the loss.
    """
    width = len(COLUMNS)
    numerator, denominator = row[ROW_HEAD : ROW_HEAD + width], row[ROW_HEAD + width :]
    return (
        {column: a for column, a in zip(COLUMNS, numerator, strict=True) if a != 0.0},
        {column: a for column, a in zip(COLUMNS, denominator, strict=True) if a != 0.0},
    )


def rows_as_text(rows: Sequence[float], gamma: float | None) -> str:
    """Write rows, and the focal exponent that they mean, as one line: how an operator is given them.

    A string costs an operator call a fraction of what a list of numbers does.
    """
    return ",".join(map(repr, (0.0 if gamma is None else gamma, *rows)))


def rows_from_text(text: str) -> tuple[float, tuple[float, ...]]:
    """Return the focal exponent and the flat rows of a line; an empty one has no row."""
    gamma, *rows = map(float, text.split(",")) if text else (0.0,)
    return gamma, tuple(rows)


def features_of(*rows: Sequence[float]) -> tuple[str, ...]:
    """Return the features that a set of flat row lists reads, in table order."""
    read = {stat for flat in rows for row in rows_of(flat) for terms in row_terms(row) for _, stat in terms}
    return tuple(feature for feature in FEATURES if feature in read)
