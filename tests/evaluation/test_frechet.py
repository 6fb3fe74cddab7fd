"""The Frechet distance: closed forms, scipy's formula, the hard cases, the small-sample bias."""

from __future__ import annotations

import numpy as np
import pytest

from bifrost_cli.errors import DataError
from bifrost_cli.evaluation.formulas import (
    frechet,
    frechet_at_infinity,
    from_moments,
    gaussian,
    jackknife_error,
    shown,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def normal(covariance_DD, mean_D=None, count: int = 100):
    covariance_DD = np.asarray(covariance_DD, dtype=np.float64)
    mean_D = np.zeros(len(covariance_DD)) if mean_D is None else np.asarray(mean_D, dtype=np.float64)
    return from_moments(mean_D, covariance_DD, count)


def random_covariance(width: int, seed: int):
    factor = rng(seed).standard_normal((width, 2 * width))
    return factor @ factor.T / (2 * width)


def rotation(width: int, seed: int):
    return np.linalg.qr(rng(seed).standard_normal((width, width)))[0]


# ---------------------------------------------------------------- closed forms


def test_diagonal_covariances():
    first, second = rng(1).uniform(0.1, 9, 64), rng(2).uniform(0.1, 9, 64)
    expected = np.sum((np.sqrt(first) - np.sqrt(second)) ** 2)
    assert frechet(normal(np.diag(first)), normal(np.diag(second))) == pytest.approx(expected, rel=1e-12)


def test_commuting_covariances():
    turn, first, second = rotation(48, 3), rng(1).uniform(0.1, 9, 48), rng(2).uniform(0.1, 9, 48)
    expected = np.sum((np.sqrt(first) - np.sqrt(second)) ** 2)
    value = frechet(normal(turn * first @ turn.T), normal(turn * second @ turn.T))
    assert value == pytest.approx(expected, rel=1e-12)


def test_identity_against_a_squared():
    """FD(N(0, I), N(0, A^2)) = |A - I|^2_F for a positive symmetric A."""
    a = random_covariance(64, 4)
    assert frechet(normal(np.eye(64)), normal(a @ a)) == pytest.approx(np.sum((a - np.eye(64)) ** 2), rel=1e-12)


def test_one_dimension():
    assert frechet(normal([[1.0]]), normal([[4.0]], [3.0])) == pytest.approx(10.0, rel=1e-14)
    assert gaussian(rng().standard_normal((9, 1))).covariance_DD.shape == (1, 1)


def test_disjoint_supports_are_exact():
    """Singular covariances with nothing in common: the trace term is exactly zero."""
    first, second = np.zeros(64), np.zeros(64)
    first[:32], second[32:] = rng(5).uniform(0.5, 4, 32), rng(6).uniform(0.5, 4, 32)
    turn = rotation(64, 7)
    value = frechet(normal(turn * first @ turn.T), normal(turn * second @ turn.T))
    assert value == pytest.approx(first.sum() + second.sum(), rel=1e-12)


def test_translation_rotation_and_scale():
    first, second, shift = random_covariance(16, 1), random_covariance(16, 2), rng(3).standard_normal(16)
    plain = frechet(normal(first), normal(second))
    turn = rotation(16, 4)
    assert frechet(normal(first), normal(second, shift)) == pytest.approx(plain + shift @ shift, rel=1e-12)
    assert frechet(normal(turn @ first @ turn.T), normal(turn @ second @ turn.T)) == pytest.approx(plain, rel=1e-10)
    assert frechet(normal(9 * first), normal(9 * second)) == pytest.approx(9 * plain, rel=1e-10)


def test_symmetric_in_its_arguments():
    first, second = gaussian(rng(1).standard_normal((40, 64))), gaussian(3 * rng(2).standard_normal((90, 64)))
    assert frechet(first, second) == pytest.approx(frechet(second, first), rel=1e-12)


@pytest.mark.parametrize(("count", "width"), [(50, 512), (300, 20), (2, 3)])
def test_a_set_against_itself_is_zero(count, width):
    features = rng(8).standard_normal((count, width))
    assert abs(frechet(gaussian(features), gaussian(features))) < 1e-9
    saved = from_moments(gaussian(features).mean_D, gaussian(features).covariance_DD, count)
    assert abs(frechet(gaussian(features), saved)) < 1e-9


# ---------------------------------------------------------------- against scipy's matrix square root


@pytest.mark.parametrize("width", [2, 17, 96])
def test_equals_the_formula_with_sqrtm(width):
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    first = gaussian(rng(1).standard_normal((4 * width, width)) @ random_covariance(width, 2))
    second = gaussian(rng(3).standard_normal((3 * width, width)) + 0.3)
    root = sqrtm(first.covariance_DD @ second.covariance_DD).real
    expected = np.sum((first.mean_D - second.mean_D) ** 2) + np.trace(
        first.covariance_DD + second.covariance_DD - 2 * root
    )
    assert frechet(first, second) == pytest.approx(expected, rel=1e-9)


def test_fewer_samples_than_features():
    """The cross-Gram form |Xc Yc'|_* / sqrt((n-1)(m-1)), and the same from saved moments."""
    x, y = rng(1).standard_normal((60, 256)), rng(2).standard_normal((45, 256)) * 2
    first, second = gaussian(x), gaussian(y)
    overlap = np.linalg.svd((x - x.mean(0)) @ (y - y.mean(0)).T, compute_uv=False).sum() / np.sqrt(59 * 44)
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum() - 2 * overlap
    assert frechet(first, second) == pytest.approx(expected, rel=1e-12)
    saved = from_moments(second.mean_D, second.covariance_DD, second.count)
    assert frechet(first, saved) == pytest.approx(expected, rel=1e-9)


def test_moments_equal_numpy():
    features = rng(1).standard_normal((30, 7)).astype(np.float32)
    np.testing.assert_allclose(gaussian(features).covariance_DD, np.cov(features.astype(float), rowvar=False))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    features = rng().standard_normal((9, 4))
    features[3, 2] = bad
    with pytest.raises(DataError, match="1 values that are not finite"):
        gaussian(features)
    with pytest.raises(DataError, match="not finite"):
        from_moments(np.full(2, bad), np.eye(2), 9)


@pytest.mark.parametrize(
    ("mean", "covariance", "reason"),
    [
        (np.zeros(3), np.eye(2), "do not fit"),
        (np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
        (np.zeros(2), np.diag([1.0, -0.1]), "negative eigenvalue"),
        (np.zeros(1), -np.eye(1), "negative eigenvalue"),
    ],
)
def test_what_is_no_covariance_is_refused(mean, covariance, reason):
    with pytest.raises(DataError, match=reason):
        from_moments(mean, covariance, 10)


def test_one_sample_and_other_widths_are_refused():
    with pytest.raises(DataError, match="at least 2"):
        gaussian(np.ones((1, 4)))
    with pytest.raises(ValueError, match="different widths"):
        frechet(normal(np.eye(2)), normal(np.eye(3)))
    with pytest.raises(DataError, match="overflowed"):
        frechet(normal(np.eye(1), [1e200]), normal(np.eye(1), [-1e200]))


def test_a_constant_set_is_a_point():
    point = gaussian(np.ones((5, 3)))
    assert frechet(point, normal(np.eye(3), np.ones(3))) == pytest.approx(3.0)


def test_no_negative_zero_is_shown():
    assert str(shown(-0.0)) == "0.0" and str(shown(-2e-13)) == "0.0" and shown(1.5) == 1.5


# ---------------------------------------------------------------- how sure it is


def test_bias_law():
    """E[FD_N] = (d + (d^2 + d) / 4) / N for N(0, I_d) against the exact moments."""
    width, draws = 32, 20
    for count in (1000, 2000, 4000):
        values = [
            frechet(gaussian(rng(100 * count + i).standard_normal((count, width))), normal(np.eye(width)))
            for i in range(draws)
        ]
        expected = (width + (width**2 + width) / 4) / count
        assert abs(np.mean(values) - expected) < 3 * np.std(values) / np.sqrt(draws) + 0.02 * expected


def test_limit_removes_the_bias():
    features, exact = rng(1).standard_normal((20_000, 32)), normal(np.eye(32))
    assert frechet(gaussian(features), exact) > 0.01
    assert abs(frechet_at_infinity(features, exact)) < 0.005
    assert frechet_at_infinity(features, exact) == frechet_at_infinity(features, exact, seed=0)


def test_jackknife_error_is_the_spread_of_new_draws():
    exact = normal(np.eye(8), np.ones(8))
    draws = [rng(i).standard_normal((800, 8)) for i in range(60)]
    spread = np.std([frechet(gaussian(draw), exact) for draw in draws])
    assert np.mean(
        [jackknife_error(draw, lambda some: frechet(gaussian(some), exact)) for draw in draws[:10]]
    ) == pytest.approx(spread, rel=0.35)


def test_too_few_samples_for_an_error_or_a_limit():
    with pytest.raises(DataError, match="at least 4"):
        jackknife_error(np.ones((3, 2)), lambda some: frechet(gaussian(some), normal(np.eye(2))))
    with pytest.raises(DataError, match="needs more"):
        frechet_at_infinity(np.ones((2, 2)), normal(np.eye(2)))
