"""Criteria: segmentation losses written as rows of coefficients on the table of sums.

Every criterion compares a prediction with a binary label on a domain, and needs only sums over the label's voxels
(the positive side) and over the rest of the domain (the negative side). For a blob the positive side is the instance
and the negative side the background; for the main term they are the target and its complement. A criterion is a ratio
of two affine forms in those sums, so a new overlap loss is one function here: its numerator and its denominator.

Every function returns a :class:`Criterion`, raises TypeError for an argument that is no number and ValueError for one
out of range, and touches no tensor. What an empty domain, masked and ignored voxels mean is said in :class:`BlobLoss`.

Example:
    >>> from blobloss_fast import criteria
    >>> criteria.dice() + 0.5 * criteria.bce()
    dice() + 0.5 * bce()
"""

from __future__ import annotations

from dataclasses import dataclass, field

from . import _checks
from .kernels.layout import COLUMNS, COUNT, ROW_SIZE, rows_as_text

Terms = dict[tuple[str, str], float]

TRUE_POSITIVE = ("pos", "prob")  # sum of p over the positive voxels
FALSE_POSITIVE = ("neg", "prob")  # sum of p over the negative voxels
POSITIVES = ("pos", COUNT)
NEGATIVES = ("neg", COUNT)


@dataclass(frozen=True, repr=False)
class Criterion:
    """A weighted sum of coefficient rows; made by the functions of this module, added and scaled like a number.

    Attributes:
        rows: the coefficients, flat, as ``kernels.layout`` describes them.
        gamma: the focal exponent, None where no row is focal.
        own_class: whether the criterion is -log p of a voxel's own class (``cross_entropy``).
        text: the rows and the exponent as one line, for the operators.
    """

    name: str
    rows: tuple[float, ...]
    gamma: float | None = None
    own_class: bool = False
    text: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", rows_as_text(self.rows, self.gamma))  # frozen

    def __add__(self, other: Criterion) -> Criterion:
        if not isinstance(other, Criterion):
            return NotImplemented
        return Criterion(
            f"{self.name} + {other.name}",
            self.rows + other.rows,
            common_gamma(self, other),
            self.own_class or other.own_class,
        )

    def __mul__(self, factor: float) -> Criterion:
        factor = _checks.number("the factor of a criterion", factor)
        rows = tuple(factor * a if i % ROW_SIZE == 0 else a for i, a in enumerate(self.rows))  # the row's weight
        rows = rows if factor else ()  # 0 times an infinite loss is meant as 0
        name = f"({self.name})" if " + " in self.name else self.name
        return Criterion(f"{factor:g} * {name}", rows, self.gamma, self.own_class)

    def __truediv__(self, divisor: float) -> Criterion:
        return self * (1 / _checks.number("the divisor of a criterion", divisor))

    def __radd__(self, other: object) -> Criterion:
        return self if other == 0 else NotImplemented  # the start of sum([...])

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return self.name


def common_gamma(*criteria: Criterion) -> float | None:
    """Return the one focal exponent of several criteria.

    Raises:
        ValueError: if they have different ones.
    """
    gammas = {c.gamma for c in criteria} - {None}
    if len(gammas) > 1:
        raise ValueError(f"one loss can have one focal gamma; got {sorted(g for g in gammas if g is not None)}")
    return gammas.pop() if gammas else None


def dice(squared: bool = False, smooth_nr: float = 1e-5, smooth_dr: float = 1e-5) -> Criterion:
    r"""Soft Dice loss, :math:`1 - (2 \sum p y + s_n) / (\sum p^q + \sum y + s_d)`, q = 1, or 2 if ``squared``.

    Args:
        squared: square the probabilities in the denominator (V-Net; MONAI's ``squared_pred``).
        smooth_nr: added to the numerator, as in MONAI.
        smooth_dr: added to the denominator; with 0 the loss is NaN where both a prediction and its label are empty.

    Reference:
        Milletari et al. 2016, V-Net, arXiv 1606.04797.
    """
    _checks.flag("squared", squared)
    stat = "prob_sq" if squared else "prob"
    return _overlap(
        _call("dice", squared=(squared, False), smooth_nr=(smooth_nr, 1e-5), smooth_dr=(smooth_dr, 1e-5)),
        {TRUE_POSITIVE: 2.0},
        {("pos", stat): 1.0, ("neg", stat): 1.0, POSITIVES: 1.0},
        smooth_nr,
        smooth_dr,
    )


def jaccard(smooth_nr: float = 1e-5, smooth_dr: float = 1e-5) -> Criterion:
    r"""Soft Jaccard (IoU) loss, :math:`1 - (2 I + s_n) / (2 U + s_d)`, I the sum of p y, U of p + y - p y.

    The smoothing is MONAI's (``DiceLoss(jaccard=True)``).

    Args:
        smooth_nr: added to the numerator.
        smooth_dr: added to the denominator.

    Reference:
        Rahman and Wang 2016, Optimizing Intersection-Over-Union.
    """
    name = _call("jaccard", smooth_nr=(smooth_nr, 1e-5), smooth_dr=(smooth_dr, 1e-5))
    return _overlap(name, {TRUE_POSITIVE: 2.0}, {FALSE_POSITIVE: 2.0, POSITIVES: 2.0}, smooth_nr, smooth_dr)


def tversky(alpha: float = 0.5, beta: float = 0.5, smooth_nr: float = 1e-5, smooth_dr: float = 1e-5) -> Criterion:
    r"""Tversky loss, :math:`1 - (TP + s_n) / (TP + \alpha FP + \beta FN + s_d)`.

    Args:
        alpha: weight of false positives, at least 0.
        beta: weight of false negatives, at least 0.
        smooth_nr: added to the numerator.
        smooth_dr: added to the denominator.

    Reference:
        Salehi et al. 2017, arXiv 1706.05721.
    """
    alpha, beta = _checks.number("alpha", alpha, minimum=0), _checks.number("beta", beta, minimum=0)
    return _overlap(
        _call(f"tversky({alpha:g}, {beta:g}", smooth_nr=(smooth_nr, 1e-5), smooth_dr=(smooth_dr, 1e-5)),
        {TRUE_POSITIVE: 1.0},
        {TRUE_POSITIVE: 1.0 - beta, FALSE_POSITIVE: alpha, POSITIVES: beta},
        smooth_nr,
        smooth_dr,
    )


def bce() -> Criterion:
    """Binary cross-entropy, the mean of -log p over positive and -log(1 - p) over negative voxels; one-vs-rest.

    With ``activation="none"`` the logarithms are clamped at -100, as in ``torch.nn.BCELoss``.
    """
    return _mean("bce()", {("pos", "nll_pos"): 1.0, ("neg", "nll_neg"): 1.0})


def cross_entropy() -> Criterion:
    """Cross-entropy, the mean of -log p of every voxel's own class.

    The same as ``bce`` with a sigmoid and with a two-channel softmax; not available with three or more channels.
    """
    return _mean("cross_entropy()", {("pos", "nll_pos"): 1.0, ("neg", "nll_neg"): 1.0}, own_class=True)


def focal(gamma: float = 2.0, alpha: float | None = None) -> Criterion:
    r"""Focal loss, the mean of :math:`-(1 - p)^\gamma \log p` (positive voxels) and :math:`-p^\gamma \log(1 - p)`.

    Args:
        gamma: focusing exponent, at least 0. One loss can have one gamma.
        alpha: weight of the positive voxels in [0, 1], ``1 - alpha`` of the others; None weighs both with 1.

    Reference:
        Lin et al. 2017, arXiv 1708.02002.
    """
    gamma = _checks.number("gamma", gamma, minimum=0)
    positive = negative = 1.0
    if alpha is not None:
        positive = _checks.number("alpha", alpha, minimum=0)
        if positive > 1:
            raise ValueError(f"alpha must be in [0, 1] or None; got {alpha}")
        negative = 1.0 - positive
    name = f"focal({gamma:g})" if alpha is None else f"focal({gamma:g}, {alpha:g})"
    return _mean(name, {("pos", "focal_pos"): positive, ("neg", "focal_neg"): negative}, gamma=gamma)


def lesion_free(c: float) -> Criterion:
    r"""The term of a sample without instances, :math:`s / (s + c)` with s the sum of p.

    Args:
        c: the sum of p, in voxels, at which the term is 1/2; above 0.
    """
    c = _checks.number("c", c, minimum=0)
    if c == 0:
        raise ValueError("c must be above 0; got 0: the term would be 1 whatever the prediction")
    return _row(f"lesion_free({c:g})", 0.0, {FALSE_POSITIVE: 1.0}, 0.0, {FALSE_POSITIVE: 1.0}, c)


def false_positives() -> Criterion:
    r"""The term of a predicted zone without ground truth, :math:`\sum p\,sg(p) / sg(\sum p)`, sg the stopped gradient.

    The value is that of :math:`\sum p^2 / \sum p` (0 where p is 0 everywhere); the slope of the numerator is half that
    of the squares, and the denominator has none.

    Reference:
        BiCC, arXiv 2609.30223.
    """
    squares = {("neg", "prob_sq"): 1.0}
    return _row("false_positives()", 0.0, squares, 0.0, {FALSE_POSITIVE: 1.0}, 1e-30, slopes=(0.5, 0.0))


def _call(function: str, **arguments: tuple[float, float]) -> str:
    """Return the call that made a criterion, with the arguments (value, default) that are not the default."""
    changed = [f"{name}={value!r}" for name, (value, default) in arguments.items() if value != default]
    opened, _, first = function.partition("(")
    return f"{opened}({', '.join([first] * bool(first) + changed)})"


def _overlap(name: str, numerator: Terms, denominator: Terms, smooth_nr: float, smooth_dr: float) -> Criterion:
    """Return 1 - (numerator + smooth_nr) / (denominator + smooth_dr)."""
    smooth_nr = _checks.number("smooth_nr", smooth_nr, minimum=0)
    smooth_dr = _checks.number("smooth_dr", smooth_dr, minimum=0)
    return _row(name, 1.0, {stat: -a for stat, a in numerator.items()}, -smooth_nr, denominator, smooth_dr)


def _mean(name: str, numerator: Terms, gamma: float | None = None, own_class: bool = False) -> Criterion:
    """Return the numerator divided by the number of voxels of the domain."""
    return _row(name, 0.0, numerator, 0.0, {POSITIVES: 1.0, NEGATIVES: 1.0}, 0.0, gamma, own_class)


def _row(
    name: str,
    offset: float,
    numerator: Terms,
    numerator_constant: float,
    denominator: Terms,
    denominator_constant: float,
    gamma: float | None = None,
    own_class: bool = False,
    slopes: tuple[float, float] = (1.0, 1.0),
) -> Criterion:
    head = (1.0, offset, numerator_constant, denominator_constant, *slopes)
    coefficients = tuple(terms.get(column, 0.0) for terms in (numerator, denominator) for column in COLUMNS)
    return Criterion(name, head + coefficients, gamma, own_class)
