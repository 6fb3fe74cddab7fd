"""The flow formulas against diffusers' scheduler and against plain arithmetic."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from bifrost_cli.models.diffusion import rectified_flow


def test_the_path_runs_from_clean_to_noise_at_constant_velocity() -> None:
    clean, noise = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, -2.0], [0.0, 1.0]])
    assert torch.equal(rectified_flow.noisy(clean, noise, torch.tensor([0.0, 1.0])), torch.stack([clean[0], noise[1]]))
    here, there = (rectified_flow.noisy(clean, noise, torch.full((2,), s)) for s in (0.25, 0.75))
    torch.testing.assert_close((there - here) / 0.5, rectified_flow.flow_target(clean, noise))


@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096])
def test_shift_mu_is_the_stock_pipelines(tokens: int) -> None:
    assert rectified_flow.shift_mu(tokens) == pytest.approx(calculate_shift(tokens), abs=1e-12)


def test_shifts_are_the_schedulers() -> None:
    sigma = torch.linspace(0.05, 1.0, 20)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    torch.testing.assert_close(rectified_flow.shift_exponential(sigma, 0.9), dynamic.time_shift(0.9, 1.0, sigma))
    constant = FlowMatchEulerDiscreteScheduler(shift=3.0)
    constant.set_timesteps(sigmas=rectified_flow.sampling_sigmas(7))
    ours = rectified_flow.shift_constant(torch.tensor(rectified_flow.sampling_sigmas(7)), 3.0)
    torch.testing.assert_close(constant.sigmas[:-1], ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_euler_is_the_stock_scheduler_bit_for_bit(dtype: torch.dtype) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=rectified_flow.sampling_sigmas(7))
    x = stock = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen: list[tuple[int, float]] = []
    for timestep in scheduler.timesteps:
        stock = scheduler.step(torch.sin(3 * stock), timestep, stock, return_dict=False)[0]
    ours = rectified_flow.euler(
        lambda x, _sigma: torch.sin(3 * x),
        x,
        scheduler.sigmas,
        lambda step, sigma, _x: seen.append((step, float(sigma))),
    )
    assert ours.dtype == dtype and torch.equal(ours, stock)
    assert seen == list(enumerate(scheduler.sigmas[:-1].tolist()))


def test_the_loss_is_zero_at_the_true_velocity_alone() -> None:
    clean, noise = torch.zeros(2, 3), torch.ones(2, 3)
    sigma_B = torch.tensor([0.25, 0.75])
    assert rectified_flow.flow_matching_loss(lambda x, _sigma: torch.ones_like(x), clean, noise, sigma_B) == 0
    assert rectified_flow.flow_matching_loss(lambda x, _sigma: x, clean, noise, sigma_B) == (0.75**2 + 0.25**2) / 2


def test_logit_normal_is_seeded_and_centred() -> None:
    draw = rectified_flow.logit_normal(20_000, torch.Generator().manual_seed(3))
    assert torch.equal(draw, rectified_flow.logit_normal(20_000, torch.Generator().manual_seed(3)))
    assert 0 < draw.min() and draw.max() < 1
    logits = torch.logit(draw.double())
    assert abs(logits.mean()) < 0.03 and abs(logits.std() - 1) < 0.03


def test_what_a_callback_raises_ends_the_loop() -> None:
    calls: list[int] = []

    def stop(step: int, _sigma: float, _x: torch.Tensor) -> None:
        calls.append(step)
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rectified_flow.euler(lambda x, _sigma: x, torch.ones(1), [1.0, 0.75, 0.5, 0.25, 0.0], callback=stop)
    assert calls == [0, 1]
