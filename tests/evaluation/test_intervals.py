"""Wilson's interval against values worked out by hand and scipy's; clustered intervals against simulations."""

from __future__ import annotations

import numpy as np
import pytest

from bifrost_cli.stats import clustered_error, clustered_interval, wilson


def test_hand_values():
    assert wilson(5, 10) == pytest.approx((0.236593090512564, 0.763406909487436), abs=1e-12)
    assert wilson(0, 10) == (0.0, pytest.approx(0.277532799862889, abs=1e-12))
    assert wilson(10, 10) == (pytest.approx(0.722467200137111, abs=1e-12), 1.0)


@pytest.mark.parametrize(("right", "count"), [(0, 1), (1, 1), (1, 3), (17, 20), (190, 200), (200, 200), (3, 10_000)])
def test_equals_scipy(right, count):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert wilson(right, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("right", "count"), [(0, 0), (-1, 3), (4, 3)])
def test_no_share_is_refused(right, count):
    with pytest.raises(ValueError, match="not a share"):
        wilson(right, count)


# ---- clustered ------------------------------------------------------------------------------------------------------


def test_one_value_a_cluster_is_wilson():
    assert clustered_interval([1, 0, 1, 1], range(4)) == wilson(3, 4)
    assert clustered_interval([0] * 192, range(192)) == wilson(0, 192) and wilson(0, 192)[1] > 0.019


@pytest.mark.parametrize("value", [0, 1])
def test_where_all_agree_a_cluster_is_one_trial_and_no_interval_has_no_width(value):
    """Three prompts of 64 images, all wrong: 0 is the value, and an upper bound far above it the knowledge."""
    clusters = [index // 64 for index in range(192)]
    assert clustered_interval([value] * 192, clusters) == pytest.approx(wilson(3 * value, 3))
    low, high = clustered_interval([0.5] * 8, [0, 0, 1, 1, 2, 2, 3, 3])
    assert low < 0.2 and high > 0.8, "scores that happen to be equal are not certain either"


def test_twins_count_once():
    """Every value twice is not twice the knowledge: as the same prompts with one image, but for G against G - 1."""
    values = [1] * 30 + [0] * 10
    twins = clustered_interval(values * 4, list(range(40)) * 4)
    assert twins == pytest.approx(wilson(30, 40), abs=0.004)
    assert clustered_interval(values * 4, range(160)) == wilson(120, 160)


@pytest.mark.parametrize("agreement", [0.0, 0.5, 1.0])
def test_coverage_is_95_percent_whatever_the_images_of_a_prompt_have_in_common(agreement):
    """Fours of a prompt at 80 % right: where they agree, Wilson's holds the truth in two thirds of the cases."""
    rng, rate, held, plain, runs = np.random.default_rng(0), 0.8, 0, 0, 600
    clusters = np.repeat(np.arange(80), 4)
    for _ in range(runs):
        common = np.repeat(rng.random(80) < rate, 4)
        right = np.where(rng.random(320) < agreement, common, rng.random(320) < rate).astype(int).tolist()
        low, high = clustered_interval(right, clusters.tolist())
        held += low <= rate <= high
        plain += wilson(sum(right), 320)[0] <= rate <= wilson(sum(right), 320)[1]
    assert 0.92 <= held / runs <= 0.98
    assert (plain / runs < 0.75) == (agreement == 1.0)


def test_scores_between_0_and_1_have_their_own_error():
    rng = np.random.default_rng(0)
    scores, prompts = rng.beta(8, 2, 400).tolist(), [index // 4 for index in range(400)]
    low, high = clustered_interval(scores, prompts)
    assert (high - low) / 2 == pytest.approx(1.96 * clustered_error(scores, prompts), rel=0.02)
