"""The decode loop against a plain one, and its promises: cost, order, guidance, batches, sampling."""

from __future__ import annotations

import pytest
import torch
from fixtures_mllm import PATCHES, normal, random_branch, tiny_mllm  # noqa: F401

from bifrost_cli.models.branch.masking import mask_schedule, random_orders, sample_masked
from bifrost_cli.planning.bench.bench_decode import plain_decode

ORDERS = random_orders(2, PATCHES, torch.Generator().manual_seed(0))
PROMPTS = ["red", "a red circle above a blue square"]


@pytest.fixture(scope="module")
def prefixes(tiny_mllm):  # noqa: F811
    return [tiny_mllm.encode_prompts(tiny_mllm.tokenize_prompts(prompts, 300)) for prompts in (PROMPTS, ["", ""])]


@pytest.mark.parametrize(("steps", "guidance"), [(16, 3.0), (5, 1.0), (1, 2.0), (5, 0.0), (40, 1.5)])
def test_it_is_the_plain_loop(tiny_mllm, prefixes, steps, guidance):  # noqa: F811
    branch = random_branch(tiny_mllm)
    ours = sample_masked(branch, *prefixes, steps=steps, guidance=guidance, orders_BP=ORDERS)
    texts = [tiny_mllm.tokenize_prompts(prompts, 300, text_length=60) for prompts in (PROMPTS, ["", ""])]
    plain = plain_decode(tiny_mllm, branch, *texts, steps=steps, guidance=guidance, orders_BP=ORDERS)
    torch.testing.assert_close(ours, plain, atol=1e-3, rtol=1e-4)


def test_patches_are_revealed_from_the_end_of_the_order_and_then_kept(tiny_mllm, prefixes):  # noqa: F811
    trail = []
    branch, steps = random_branch(tiny_mllm), []

    def record(step: int, *state: torch.Tensor) -> None:
        steps.append(step)
        trail.append(state)

    last = sample_masked(branch, prefixes[0], steps=6, orders_BP=ORDERS, callback=record)
    assert steps == list(range(6)) and torch.equal(trail[-1][0], last)
    assert [int(masked[0].sum()) for _, masked in trail] == mask_schedule(PATCHES, 6)
    for (before, masked_before), (after, masked) in zip(trail, trail[1:], strict=False):
        assert torch.equal(before[~masked_before], after[~masked_before])
        for row in range(2):
            assert masked[row, ORDERS[row, : int(masked[row].sum())]].all()


def test_without_guidance_the_unconditional_half_is_not_run(tiny_mllm, prefixes):  # noqa: F811
    branch, calls = random_branch(tiny_mllm), []
    branch.decoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    alone = sample_masked(branch, prefixes[0], steps=4, orders_BP=ORDERS)
    assert len(calls) == 4
    assert torch.equal(sample_masked(branch, *prefixes, steps=4, orders_BP=ORDERS), alone) and len(calls) == 8
    sample_masked(branch, *prefixes, steps=4, orders_BP=ORDERS, guidance=2.0)
    assert len(calls) == 16


def test_only_image_tokens_pass_the_branch(tiny_mllm, prefixes):  # noqa: F811
    branch, lengths = random_branch(tiny_mllm), set()
    branch.decoder.layers[0].mlp.register_forward_hook(lambda _, args, __: lengths.add(args[0].shape[1]))
    sample_masked(branch, *prefixes, steps=4, orders_BP=ORDERS, guidance=2.0)
    assert lengths == {PATCHES}


def test_wanted_patches_are_those_of_the_whole_pass(tiny_mllm, prefixes):  # noqa: F811
    branch, known = random_branch(tiny_mllm), normal(2, PATCHES, 128)
    masked_BP = torch.arange(PATCHES).expand(2, -1) % 3 > 0
    for wanted_Bn in (ORDERS[:, :5], ORDERS[:, :1], ORDERS):
        whole = branch.hidden(known, masked_BP, prefixes[0])
        some = branch.hidden(known, masked_BP, prefixes[0], wanted_Bn)
        wanted = whole.gather(1, wanted_Bn[..., None].expand(-1, -1, 128))
        torch.testing.assert_close(some, wanted, atol=1e-4, rtol=1e-4)


def test_one_prompt_alone_or_in_a_batch(tiny_mllm, prefixes):  # noqa: F811
    branch = random_branch(tiny_mllm)
    batch = sample_masked(branch, prefixes[0], steps=8, orders_BP=ORDERS)
    for row, prompt in enumerate(PROMPTS):
        prefix = tiny_mllm.encode_prompts(tiny_mllm.tokenize_prompts([prompt], 300))
        alone = sample_masked(branch, prefix, steps=8, orders_BP=ORDERS[row : row + 1])
        torch.testing.assert_close(alone[0], batch[row], atol=1e-3, rtol=1e-4)


def test_normalised_latents_come_out_in_their_own_scale(tiny_mllm, prefixes):  # noqa: F811
    mean, std = normal(128, seed=3), normal(128, seed=4).abs() + 0.5
    plain, scaled = random_branch(tiny_mllm), random_branch(tiny_mllm, normalize=True)
    scaled.set_statistics(mean, std)
    wanted = sample_masked(plain, *prefixes, steps=4, guidance=2.0, orders_BP=ORDERS) * std + mean
    torch.testing.assert_close(
        sample_masked(scaled, *prefixes, steps=4, guidance=2.0, orders_BP=ORDERS), wanted, atol=1e-3, rtol=1e-4
    )


def test_a_flow_head_samples_from_the_noise_it_is_given(tiny_mllm, prefixes):  # noqa: F811
    branch = random_branch(tiny_mllm, head="flow")
    noises = [normal(2, PATCHES, 128, seed=seed) for seed in (7, 7, 8)]
    first, second, other = (sample_masked(branch, *prefixes, steps=3, guidance=1.5, orders_BP=ORDERS, noise_BPC=noise)
                            for noise in noises)  # fmt: skip
    assert torch.equal(first, second) and not torch.allclose(first, other)
    with pytest.raises(ValueError, match="noise"):
        sample_masked(branch, prefixes[0], steps=3, orders_BP=ORDERS)


def test_what_cannot_be_decoded_is_refused(tiny_mllm, prefixes):  # noqa: F811
    branch = random_branch(tiny_mllm)
    with pytest.raises(ValueError, match="empty prompt"):
        sample_masked(branch, prefixes[0], steps=4, guidance=2.0, orders_BP=ORDERS)
    with pytest.raises(ValueError, match="orders"):
        sample_masked(branch, prefixes[0], steps=4, orders_BP=ORDERS[:, :4])
