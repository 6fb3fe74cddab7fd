"""KID, Inception score and PRDC: closed forms, plain loops, torch-fidelity's own arithmetic, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from bifrost_cli.errors import DataError
from bifrost_cli.evaluation.formulas import (
    inception_scores,
    jackknife_error,
    kernel_distance,
    prdc,
    subset_distances,
)


def normal(count: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)) + shift


# ---- kernel distance ----


def test_kid_is_the_plain_double_sum():
    x, y = normal(7, 5, 0), normal(6, 5, 1)
    kernel = lambda a, b: (a @ b / 5 + 1) ** 3  # noqa: E731
    within = lambda z: np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])  # noqa: E731
    expected = within(x) + within(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-12)


def test_kid_subsets_are_torch_fidelitys():
    x, y = normal(90, 16, 2), normal(80, 16, 3, 0.2)
    theirs = kid_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), kid_subsets=12, kid_subset_size=40, rng_seed=2020, verbose=False
    )
    ours = subset_distances(x, y, subsets=12, size=40)
    assert ours.mean() == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    assert ours.std() == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-8)


def test_kid_of_equal_distributions_has_no_bias():
    values = [kernel_distance(normal(20, 8, 2 * i), normal(20, 8, 2 * i + 1)) for i in range(200)]
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * error and min(values) < 0


def test_kid_of_shifted_gaussians():
    """E k over N(0, I) and N(m, I), D = 1: E(xy + 1)^3 in closed form."""
    shift = 0.7
    within_0, within_m = 1 + 3, (1 + shift**2) ** 3 + 3 * (1 + shift**2) * (1 + 2 * shift**2) + 6 * shift**2
    across = 1 + 3 * (1 + shift**2)
    exact = within_0 + within_m - 2 * across
    found = [kernel_distance(normal(400, 1, 2 * i), normal(400, 1, 2 * i + 1, shift)) for i in range(120)]
    assert np.mean(found) == pytest.approx(exact, abs=3.5 * np.std(found) / np.sqrt(len(found)))


def test_kid_jackknife_is_near_the_true_spread():
    reference = normal(300, 4, 0)
    spread = np.std([kernel_distance(normal(100, 4, 1 + i, 0.5), reference) for i in range(60)])
    error = np.mean(
        [jackknife_error(normal(100, 4, 1 + i, 0.5), lambda x: kernel_distance(x, reference)) for i in range(10)]
    )
    assert 0.6 < error / spread < 1.6


# ---- Inception score ----


def test_is_is_torch_fidelitys():
    logits = 3 * normal(57, 11, 4)
    theirs = isc_features_to_metric(torch.from_numpy(logits))
    ours = inception_scores(logits)
    assert ours.mean() == pytest.approx(theirs["inception_score_mean"], rel=1e-10)
    assert ours.std() == pytest.approx(theirs["inception_score_std"], rel=1e-8)


def test_is_of_constant_and_of_certain_answers():
    np.testing.assert_allclose(inception_scores(np.tile(normal(1, 9, 0), (40, 1))), 1.0, rtol=1e-12)
    certain = 1e3 * np.eye(20)[np.arange(400) % 20]
    assert inception_scores(certain, splits=1, seed=None)[0] == pytest.approx(20, rel=1e-9)
    assert inception_scores(certain, splits=100, seed=None).max() <= 4 + 1e-9, "a split of 4 cannot score above 4"


# ---- precision, recall, density, coverage ----


def test_pr_are_torch_fidelitys():
    made, real = normal(60, 6, 5), normal(50, 6, 6, 0.4)
    theirs = prc_features_to_metric(
        torch.from_numpy(made),
        torch.from_numpy(real),
        prc_neighborhood=3,
        prc_batch_size=99,
        save_cpu_ram=False,
        verbose=False,
    )
    ours = prdc(made, real, neighbours=3)
    assert (ours["precision"], ours["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-7)


def test_density_and_coverage_are_the_plain_loops():
    made, real, k = normal(30, 3, 7), normal(25, 3, 8, 0.3), 4
    far = lambda a, b: float(np.linalg.norm(a - b))  # noqa: E731
    radius = [sorted(far(r, other) for other in real)[k] for r in real]
    inside = np.array([[far(m, r) <= limit for r, limit in zip(real, radius, strict=True)] for m in made])
    found = prdc(made, real, neighbours=k)
    assert found["density"] == pytest.approx(inside.sum() / (k * len(made)))
    assert found["coverage"] == pytest.approx(inside.any(axis=0).mean())


def test_prdc_of_equal_far_and_collapsed_sets():
    real = normal(80, 4, 9)
    assert {round(value, 6) for name, value in prdc(real, real).items() if name != "density"} == {1.0}
    assert set(prdc(real + 1e3, real).values()) == {0.0}
    collapsed = real[:1] + 1e-6 * normal(80, 4, 10)
    found = prdc(collapsed, real)
    assert found["precision"] == 1.0 and found["recall"] < 0.1 and found["coverage"] < 0.3


# ---- refusals ----


@pytest.mark.parametrize("call", [
    lambda: kernel_distance(normal(1, 4, 0), normal(9, 4, 1)),
    lambda: kernel_distance(np.full((4, 4), np.nan), normal(9, 4, 1)),
    lambda: subset_distances(normal(9, 4, 0), normal(99, 4, 1), size=10),
    lambda: inception_scores(normal(9, 4, 0)),
    lambda: inception_scores(np.full((20, 4), np.inf)),
    lambda: prdc(normal(5, 4, 0), normal(9, 4, 1)),
    lambda: prdc(normal(9, 4, 0), np.full((9, 4), np.nan)),
])  # fmt: skip
def test_too_few_or_not_finite(call):
    with pytest.raises(DataError):
        call()
