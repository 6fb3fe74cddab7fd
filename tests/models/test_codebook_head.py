"""The codebook head: codes are latents; draws follow the distribution, its guidance and its temperature."""

import math

import pytest
import torch

from bifrost_cli.models.branch.codebook_head import CodebookHead


def head_with(logits, codes=None):
    """A head of one hidden channel whose logits at hidden state 1 are these."""
    head = CodebookHead(1, 2, len(logits))
    with torch.no_grad():
        head.to_logits.weight.copy_(torch.tensor(logits)[:, None])
        head.to_logits.bias.zero_()
    head.codes_KC.copy_(torch.arange(2.0 * len(logits)).view(-1, 2) if codes is None else codes)
    return head


def drawn(head, n=20_000, **settings):
    """The share of each code in n draws."""
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    hidden = torch.ones(n, 1)
    uncond = settings.pop("uncond", None)
    latents = head.guided(hidden, uncond, settings.pop("guidance", 1.0), noise, **settings)
    return torch.bincount(head.nearest(latents)[:, 0], minlength=len(head.codes_KC)) / n


def test_draws_follow_the_distribution():
    head = head_with([0.0, 1.0, 2.0, -1.0])
    wanted = torch.tensor([0.0, 1.0, 2.0, -1.0]).softmax(0)
    assert torch.allclose(drawn(head), wanted, atol=0.012)


def test_temperature_sharpens_and_flattens():
    head = head_with([0.0, 1.0])
    for temperature in (0.5, 2.0):
        wanted = (torch.tensor([0.0, 1.0]) / temperature).softmax(0)
        assert torch.allclose(drawn(head, temperature=temperature), wanted, atol=0.012)


def test_guidance_moves_log_probabilities_away_from_the_unconditional_ones():
    head = head_with([0.0, 1.0])
    conditional, unconditional = (torch.tensor([0.0, 1.0]) * h for h in (1.0, 0.25))
    wanted = (unconditional + 3 * (conditional - unconditional)).softmax(0)
    assert torch.allclose(drawn(head, uncond=torch.full((20_000, 1), 0.25), guidance=3.0), wanted, atol=0.012)


def test_a_draw_is_a_code_and_depends_on_its_own_noise_alone():
    head, noise = head_with([0.3, 0.1, 0.2]), torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    together = head.guided(torch.ones(6, 1), None, 1.0, noise)
    alone = torch.cat([head.guided(torch.ones(1, 1), None, 1.0, noise[i : i + 1]) for i in range(6)])
    assert torch.equal(together, alone)
    assert all(any(torch.equal(row, code) for code in head.codes_KC) for row in together)


@pytest.mark.parametrize("normal", [-40.0, 40.0])
def test_extreme_noise_draws_a_code_of_some_probability(normal):
    head = head_with([-50.0, 3.0, 1.0, -50.0])
    latents = head.guided(torch.ones(1, 1), None, 1.0, torch.tensor([[normal, 0.0]]))
    assert int(head.nearest(latents)) in (0, 1, 2)
    assert latents.isfinite().all()


def test_without_noise_it_refuses():
    with pytest.raises(ValueError, match="noise"):
        head_with([0.0, 0.0]).guided(torch.ones(1, 1), None, 1.0, None)


def test_the_loss_is_the_cross_entropy_of_the_nearest_code():
    head = head_with([0.0, 1.0], codes=torch.tensor([[0.0, 0.0], [10.0, 10.0]]))
    loss = head.loss(torch.ones(2, 1), torch.tensor([[1.0, -1.0], [9.0, 8.0]]))
    expected = -sum(math.log(math.exp(x) / (1 + math.e)) for x in (0, 1)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_the_mean_is_that_of_the_distribution():
    head = head_with([0.0, math.log(3)], codes=torch.tensor([[0.0, 4.0], [8.0, 0.0]]))
    assert torch.allclose(head.mean(torch.ones(1, 1)), torch.tensor([[6.0, 1.0]]))


def test_codes_are_found_in_clusters_however_rare():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0], [5.0, 5.0]])
    counts = (5000, 40, 40, 40)  # most patches of an image are its background
    tokens = torch.cat(
        [c + 0.05 * torch.randn(n, 2, generator=generator) for c, n in zip(centres, counts, strict=True)]
    )
    head = CodebookHead(1, 2, 4)
    head.fit(tokens, seed=0)
    distance = torch.cdist(centres, head.codes_KC).min(1).values
    assert (distance < 0.05).all(), distance


def test_fewer_latents_than_codes_are_refused():
    with pytest.raises(ValueError, match="8 codes cannot be made of 4 latents"):
        CodebookHead(1, 2, 8).fit(torch.randn(4, 2), seed=0)


def test_fewer_different_latents_than_codes_repeat_codes():
    head = CodebookHead(1, 2, 4)
    head.fit(torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(4, 1), seed=0)
    assert {tuple(row) for row in head.codes_KC.tolist()} == {(1.0, 0.0), (0.0, 1.0)}


def residual(levels=3, codes=8, channels=4, n=4096):
    """Latents, and a fitted head of several levels with random weights."""
    torch.manual_seed(0)
    latents = torch.randn(n, channels, generator=torch.Generator().manual_seed(0))
    head = CodebookHead(5, channels, codes, levels)
    head.fit(latents, seed=0)
    return head, latents


def test_each_level_explains_what_those_before_left_over():
    head, latents = residual()
    indices, errors = head.nearest(latents), [latents.square().mean()]
    left = latents
    for level, codes in enumerate([head.codes_KC, *(one.codes_KC for one in head.deeper)]):
        assert torch.equal(indices[:, level], torch.cdist(left, codes).argmin(-1))
        left = left - codes[indices[:, level]]
        errors.append(left.square().mean())
    assert indices.shape == (4096, 3)
    assert all(after < 0.75 * before for before, after in zip(errors, errors[1:], strict=False)), errors


def test_levels_are_drawn_from_their_joint_distribution():
    head, _ = residual(levels=2, codes=3, channels=2, n=300)
    hidden = torch.randn(5, generator=torch.Generator().manual_seed(2)).expand(40_000, 5)
    with torch.no_grad():
        drawn = head.guided(hidden, None, 1.0, torch.randn(40_000, 2, generator=torch.Generator().manual_seed(3)))
        first = head.to_logits(hidden[0]).softmax(-1)
        for one, share in enumerate(first):
            second = head.deeper[0](hidden[0], head.codes_KC[one]).softmax(-1)
            for other, conditional in enumerate(second):
                code = head.codes_KC[one] + head.deeper[0].codes_KC[other]
                met = (drawn - code).abs().sum(-1).lt(1e-5).float().mean()
                assert abs(met - share * conditional) < 0.01, (one, other)


def test_the_loss_of_levels_is_the_negative_log_likelihood_of_the_codes():
    head, latents = residual()
    hidden, indices = torch.randn(64, 5, generator=torch.Generator().manual_seed(4)), head.nearest(latents[:64])
    expected, written = 0.0, torch.zeros(64, 4)
    for level, codes in enumerate([head.codes_KC, *(one.codes_KC for one in head.deeper)]):
        logits = head.to_logits(hidden) if level == 0 else head.deeper[level - 1](hidden, written)
        expected = expected - logits.log_softmax(-1).gather(-1, indices[:, level, None]).mean()
        written = written + codes[indices[:, level]]
    assert torch.allclose(head.loss(hidden, latents[:64]), expected)


def test_more_levels_than_channels_are_refused():
    with pytest.raises(ValueError, match="3 levels need as many numbers"):
        CodebookHead(5, 2, 8, 3)
