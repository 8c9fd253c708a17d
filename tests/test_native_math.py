"""The native kernels' own elementary functions, against the C library's in double precision.

Every instruction set that was compiled and that this machine has is tested: each rounds in its own way.
"""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest

from blobloss_fast.kernels import native
from blobloss_fast.kernels.layout import ACTIVATIONS, FEATURES

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library was not built")

ULPS = 2.0


def evaluate(library: ctypes.CDLL, feature: str, x: np.ndarray, activation: str = "sigmoid", gamma: float = 2.0):
    """(values, slopes) of a feature, in the dtype of x."""
    x = np.ascontiguousarray(x)
    value, slope = np.full_like(x, 7.0), np.full_like(x, 7.0)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (x, value, slope)]
    library.blobloss_evaluate(
        FEATURES.index(feature),
        ACTIVATIONS.index(activation),
        ctypes.c_double(gamma),
        int(x.dtype == np.float64),
        pointers[0],
        ctypes.c_int64(x.size),
        *pointers[1:],
    )
    return value, slope


def all_floats(step: int) -> np.ndarray:
    """Every step-th of the 2^32 floats, by their bits: all exponents, both signs, subnormals, infinities, NaN."""
    bits = np.arange(0, 2**32, step, dtype=np.uint64).astype(np.uint32)
    bits = bits[(bits & 0x7FFFFFFF) <= 0x7F800000]  # one NaN is enough, and a quiet one
    special = np.array([0.0, -0.0, 1e-45, -1e-45, np.inf, -np.inf, np.nan, 88.7, -88.7, -103.9, -104.1], np.float32)
    return np.concatenate([bits.view(np.float32), special])


def ulps(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The distance in units of the last place of the true value as a float; infinite where one is NaN, or infinite."""
    with np.errstate(invalid="ignore", over="ignore"):
        nearest = np.abs(expected).astype(np.float32)
        unit = np.spacing(np.where(np.isfinite(nearest), nearest, np.float32(1))).astype(np.float64)
        same = (actual.astype(np.float64) == expected) | (np.isnan(actual) & np.isnan(expected))
        overflowed = np.isinf(actual) & np.isinf(expected.astype(np.float32)) & (actual * expected > 0)
        distance = np.abs(actual.astype(np.float64) - expected) / unit
    return np.where(same | overflowed, 0.0, np.nan_to_num(distance, nan=np.inf, posinf=np.inf))


def sigmoid(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        t = np.exp(-np.abs(z))
        return np.where(z < 0, t, 1.0) / (1.0 + t)


def softplus(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.maximum(z, 0.0) + np.log1p(np.exp(-np.abs(z)))


TRUTH = {
    "prob": (sigmoid, lambda z: sigmoid(z) * sigmoid(-z)),
    "nll_pos": (lambda z: softplus(-z), lambda z: -sigmoid(-z)),
    "nll_neg": (softplus, sigmoid),
}


@pytest.mark.parametrize("feature", TRUTH)
def test_within_two_ulp_over_the_whole_range(library, feature):
    x = all_floats(step=2003)  # a prime: all kinds of mantissas
    value, slope = evaluate(library, feature, x)
    z = x.astype(np.float64)
    true_value, true_slope = (function(z) for function in TRUTH[feature])
    worst = ulps(value, true_value)
    assert worst.max() <= ULPS, f"{feature}({x[worst.argmax()]!r}) = {value[worst.argmax()]!r}: {worst.max()} ulp"
    allowed = (
        5.0 if feature == "prob" else ULPS
    )  # p (1 - p) is t r r: three factors that are rounded, two roundings more
    worst = ulps(slope, true_slope)
    assert worst.max() <= allowed, f"{feature}'({x[worst.argmax()]!r}) = {slope[worst.argmax()]!r}: {worst.max()} ulp"


@pytest.mark.parametrize("feature", FEATURES)
def test_infinities_and_nan(library, feature):
    value, slope = evaluate(library, feature, np.array([-np.inf, np.inf, np.nan], np.float32))
    positive = feature.endswith("pos")
    p = np.array([0.0, 1.0])
    if feature in ("prob", "prob_sq"):
        expected, expected_slope = p, np.zeros(2)
    else:
        expected = np.where(p == (0.0 if positive else 1.0), math.inf, 0.0)
        expected_slope = -(1 - p) if positive else p
    np.testing.assert_array_equal(value[:2], expected)
    np.testing.assert_array_equal(np.abs(slope[:2]), np.abs(expected_slope))
    assert np.isnan(value[2])
    assert np.isnan(slope[2])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("feature", ["focal_pos", "focal_neg", "prob_sq"])
def test_composed_features(library, feature, gamma):
    x = np.linspace(-40, 40, 20011).astype(np.float32)
    z = x.astype(np.float64)
    sign = -1.0 if feature == "focal_pos" else 1.0
    p, q, nll = sigmoid(sign * z), sigmoid(-sign * z), softplus(sign * z)
    expected = sigmoid(z) ** 2 if feature == "prob_sq" else p**gamma * nll
    expected_slope = (
        2 * sigmoid(z) ** 2 * sigmoid(-z) if feature == "prob_sq" else sign * p**gamma * (p + gamma * q * nll)
    )
    value, slope = evaluate(library, feature, x, gamma=gamma)
    relative = 5e-7 + 1.2e-7 * gamma * softplus(-sign * z)  # p^gamma is e^-(gamma softplus)
    assert (np.abs(value - expected) <= relative * np.abs(expected) + 1e-12).all()
    assert (np.abs(slope - expected_slope) <= relative * np.abs(expected_slope) + 1e-12).all()


@pytest.mark.parametrize("feature", FEATURES)
def test_double(library, feature):
    z = np.linspace(-60, 60, 4001)
    sign = -1.0 if feature.endswith("pos") else 1.0
    p, q, nll = sigmoid(sign * z), sigmoid(-sign * z), softplus(sign * z)
    expected = {"prob": p, "prob_sq": p * p, "nll": nll, "focal": p**2 * nll}
    expected_slope = {
        "prob": p * q,
        "prob_sq": 2 * p * p * q,
        "nll": sign * p,
        "focal": sign * p**2 * (p + 2 * q * nll),
    }
    kind = feature if feature.startswith("prob") else feature.partition("_")[0]
    value, slope = evaluate(library, feature, z)
    np.testing.assert_allclose(value, expected[kind], rtol=1e-13, atol=0)
    np.testing.assert_allclose(slope, expected_slope[kind], rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("feature", FEATURES)
def test_probabilities(library, feature, dtype):
    p = np.linspace(0, 1, 1025).astype(dtype)  # exact in both dtypes
    value, slope = evaluate(library, feature, p, activation="none")
    own = p.astype(np.float64)
    base = 1 - own if feature.endswith("pos") else own
    sign = -1.0 if feature.endswith("pos") else 1.0
    with np.errstate(divide="ignore"):
        nll = np.minimum(-np.log1p(-base), 100.0)
    d_nll = sign * base / np.maximum(base * (1 - base), 1e-12)
    with np.errstate(invalid="ignore"):
        d_focal = base**2 * d_nll + np.where(nll == 0, 0.0, sign * 2 * base * nll)
    expected = {"prob": own, "prob_sq": own**2, "nll": nll, "focal": base**2 * nll}
    expected_slope = {"prob": np.ones_like(own), "prob_sq": 2 * own, "nll": d_nll, "focal": d_focal}
    kind = feature if feature.startswith("prob") else feature.partition("_")[0]
    relative = 1e-13 if dtype == np.float64 else 2e-6
    np.testing.assert_allclose(value, expected[kind], rtol=relative, atol=1e-30)
    np.testing.assert_allclose(slope, expected_slope[kind], rtol=relative, atol=1e-30)
