"""Threads that work ahead: in order, no further than they may, and their errors arrive in their place."""

from __future__ import annotations

import pytest

from bifrost_cli.runtime.ahead import map_ahead


def test_results_come_in_order_and_no_more_are_begun_than_may_wait():
    begun: list[int] = []
    results = map_ahead(lambda number: begun.append(number) or 10 * number, range(1000), ahead=4)
    assert [next(results) for _ in range(3)] == [0, 10, 20]
    assert len(begun) <= 3 + 5
    assert list(results) == [10 * number for number in range(3, 1000)]


def test_an_error_arrives_in_its_place():
    def work(number: int) -> int:
        if number == 2:
            raise ValueError("two")
        return number

    results = map_ahead(work, range(5), ahead=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)
