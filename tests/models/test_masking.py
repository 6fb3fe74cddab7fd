"""Orders, mask ratios and the decode schedule against scipy and plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from bifrost_cli.models.branch.masking import (
    draw_masks,
    mask_from_orders,
    mask_schedule,
    random_orders,
    raster_orders,
    sample_mask_ratio,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("mean", "sd", "low", "high"), [(1.0, 0.25, 0.7, 1.0), (0.5, 0.1, 0.2, 0.9)])
def test_ratios_follow_the_truncated_normal(mean, sd, low, high):
    ratios = sample_mask_ratio(20_000, generator(), mean, sd, low, high).numpy()
    wanted = stats.truncnorm((low - mean) / sd, (high - mean) / sd, loc=mean, scale=sd)
    assert ratios.min() >= low and ratios.max() <= high
    assert stats.kstest(ratios, wanted.cdf).pvalue > 0.01


def test_ratios_refuse_impossible_ranges():
    with pytest.raises(ValueError, match="low"):
        sample_mask_ratio(1, generator(), low=0.9, high=0.1)


def test_orders_are_permutations_and_repeat_with_the_seed():
    orders_BP = random_orders(5, 9, generator())
    assert (orders_BP.sort(dim=1).values == torch.arange(9)).all()
    assert torch.equal(orders_BP, random_orders(5, 9, generator()))
    assert len({tuple(order.tolist()) for order in orders_BP}) > 1


def test_the_order_of_reading_reveals_the_first_patch_first():
    orders_BP = raster_orders(2, 4)
    masked = [mask_from_orders(orders_BP, torch.full((2,), kept)).tolist()[1] for kept in (4, 3, 1)]
    assert masked == [[True] * 4, [False, True, True, True], [False, False, False, True]]


def test_the_first_entries_of_an_order_are_masked():
    orders_BP = torch.tensor([[2, 0, 1, 3], [3, 1, 0, 2]])
    masked_BP = mask_from_orders(orders_BP, torch.tensor([2, 1]))
    assert masked_BP.tolist() == [[True, False, True, False], [False, False, False, True]]


def test_training_masks_hide_a_share_in_range():
    masked_BP = draw_masks(200, 16, generator())
    counts = masked_BP.sum(dim=1)
    assert counts.min() >= math.ceil(0.7 * 16) and counts.max() <= 16
    assert masked_BP.float().mean(dim=0).std() < 0.05


def test_training_masks_hide_at_least_one_patch():
    assert (draw_masks(10, 4, generator(), mean=0.0, low=0.0, high=0.01).sum(dim=1) == 1).all()


@pytest.mark.parametrize(("patches", "steps"), [(256, 64), (256, 256), (16, 16), (16, 8), (16, 1), (7, 3), (1, 1)])
def test_the_schedule_is_the_published_loop(patches, steps):
    wanted, previous = [], patches
    for step in range(steps):
        previous = max(1, min(previous - 1, math.floor(patches * math.cos(math.pi / 2 * (step + 1) / steps))))
        wanted.append(previous)
    wanted[-1] = 0
    assert mask_schedule(patches, steps) == wanted


def test_more_steps_than_patches_still_end_with_nothing_masked():
    kept = mask_schedule(4, 9)
    assert len(kept) == 9 and kept[-1] == 0 and kept == sorted(kept, reverse=True)


@pytest.mark.parametrize(("patches", "steps"), [(0, 4), (4, 0)])
def test_the_schedule_refuses_nothing(patches, steps):
    with pytest.raises(ValueError, match="at least one"):
        mask_schedule(patches, steps)
