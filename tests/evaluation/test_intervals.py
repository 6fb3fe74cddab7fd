"""Wilson's interval against values worked out by hand and scipy's."""

from __future__ import annotations

import pytest

from bifrost_cli.stats import wilson


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
