"""Draws of a shared batch: the parts are the whole, and the whole is what one process draws."""

from __future__ import annotations

import torch

from bifrost_cli.models.row_noise import RowSlice, normal


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_the_parts_are_the_whole():
    generator = seeded()
    whole = [normal((6, 3), generator), normal((6,), generator)]
    assert torch.equal(whole[0], torch.randn(6, 3, generator=seeded()))
    for world in (2, 3):
        count = 6 // world
        for rank in range(world):
            part = RowSlice(seeded(), rank * count, 6)
            mine = slice(rank * count, (rank + 1) * count)
            assert torch.equal(normal((count, 3), part), whole[0][mine])
            assert torch.equal(normal((count,), part), whole[1][mine])
