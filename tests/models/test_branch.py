"""The branch: what it holds, what it sees, its loss, and what it refuses. Its numbers are held by test_parity.py."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from fixtures_mllm import PATCHES, normal, random_branch, tiny_mllm  # noqa: F401
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from bifrost_cli.models.branch.decoder_adapters import with_cache
from bifrost_cli.models.branch.masking import draw_masks, random_orders, sample_masked
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.mllm.chat_template import additive

LATENTS = normal(2, PATCHES, 128)
MASKED = draw_masks(2, PATCHES, torch.Generator().manual_seed(0))


class _Before(torch.nn.Module):
    def forward(self, hidden, past_key_values=None, **kwargs): ...


class _Now(torch.nn.Module):
    def forward(self, hidden, cache=None, **kwargs): ...


class _Deaf(torch.nn.Module):
    def forward(self, hidden, **kwargs): ...


@pytest.fixture(scope="module")
def prefix(tiny_mllm):  # noqa: F811
    return tiny_mllm.encode_prompts(tiny_mllm.tokenize_prompts(["red", "a red circle above a blue square"], 300))


def test_a_new_branch_is_the_decoder_copied(tiny_mllm):  # noqa: F811
    branch = VisualBranch.from_mllm(tiny_mllm, PATCHES)
    stock = tiny_mllm.model.model.language_model.state_dict()
    ours = branch.decoder.state_dict()
    assert set(stock) - set(ours) == {"embed_tokens.weight"} and set(ours) <= set(stock)
    assert all(torch.equal(value, stock[name]) for name, value in ours.items())
    assert all(value.data_ptr() != stock[name].data_ptr() for name, value in ours.items())
    assert not branch.mask_token.any() and not branch.position_embedding.any() and not branch.vision_head.bias.any()
    assert 0.01 < branch.vision_head.weight.std() < 0.03
    assert all(parameter.requires_grad for parameter in branch.parameters())


def test_the_head_is_drawn_from_the_generator_and_from_nothing_else(tiny_mllm):  # noqa: F811
    heads = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        branch = VisualBranch.from_mllm(tiny_mllm, PATCHES, generator=torch.Generator().manual_seed(5))
        heads.append(branch.vision_head.weight)
    assert torch.equal(*heads)


def test_the_native_branch_has_no_tensor_that_the_published_one_lacks(tiny_mllm):  # noqa: F811
    names = {name.split(".")[0] for name in VisualBranch.from_mllm(tiny_mllm, PATCHES).state_dict()}
    assert names == {"decoder", "mask_token", "position_embedding", "vision_head"}
    other = VisualBranch.from_mllm(tiny_mllm, PATCHES, channels=24)
    assert other.input_projection.weight.shape == (128, 24) and other.vision_head.weight.shape == (24, 128)


def test_its_config_builds_it_again(tiny_mllm, prefix):  # noqa: F811
    branch = random_branch(tiny_mllm, channels=24, head="flow", normalize=True)
    again = VisualBranch.from_config(json.loads(json.dumps(branch.config)))
    again.load_state_dict(branch.state_dict())
    known = normal(2, PATCHES, 24)
    assert torch.equal(again(known, MASKED, prefix), branch(known, MASKED, prefix))


def test_masked_latents_are_never_seen(tiny_mllm, prefix):  # noqa: F811
    branch = random_branch(tiny_mllm)
    other = torch.where(MASKED[..., None], torch.full_like(LATENTS, float("nan")), LATENTS)
    assert torch.equal(branch(LATENTS, MASKED, prefix), branch(other, MASKED, prefix))


def test_every_patch_sees_every_known_patch_and_all_the_text(tiny_mllm, prefix):  # noqa: F811
    branch, masked_BP = random_branch(tiny_mllm), torch.ones(2, PATCHES, dtype=torch.bool)
    masked_BP[:, -1] = False
    base, changed = branch(LATENTS, masked_BP, prefix), LATENTS.clone()
    changed[:, -1] += 1
    assert ((branch(changed, masked_BP, prefix) - base).abs().amax(-1) > 1e-4).all()
    for column in range(prefix.attention_BT.shape[1]):
        values = tuple(value.clone() for value in prefix.values)
        values[0][:, :, column] += 1
        moved = (branch(LATENTS, masked_BP, replace(prefix, values=values)) - base).abs().amax(-1) > 0
        assert torch.equal(moved.all(1), prefix.attention_BT[:, column].bool())
        assert torch.equal(moved.any(1), prefix.attention_BT[:, column].bool())


def test_the_prefix_is_read_and_not_extended(tiny_mllm, prefix):  # noqa: F811
    branch = random_branch(tiny_mllm)
    before = [tensor.clone() for tensor in prefix.keys]
    first, second = branch(LATENTS, MASKED, prefix), branch(LATENTS, MASKED, prefix)
    assert torch.equal(first, second)
    assert all(torch.equal(*pair) for pair in zip(before, prefix.keys, strict=True))


def test_keys_and_values_have_the_name_that_the_library_gives_them():
    cache = DynamicCache()
    assert with_cache(_Before(), cache) == {"past_key_values": cache} and with_cache(_Now(), cache) == {"cache": cache}
    with pytest.raises(TypeError, match="_Deaf"):  # it would swallow them, and the branch would not hear its text
        with_cache(_Deaf(), cache)


def test_the_loss_is_the_mean_squared_error_over_all_or_masked_patches(tiny_mllm, prefix):  # noqa: F811
    branch = random_branch(tiny_mllm)
    error = (branch(LATENTS, MASKED, prefix) - LATENTS).square()
    torch.testing.assert_close(branch.loss(LATENTS, prefix, MASKED)[0], error.mean())
    torch.testing.assert_close(branch.loss(LATENTS, prefix, MASKED, loss_on="masked")[0], error[MASKED].mean())
    with pytest.raises(ValueError, match="loss_on"):
        branch.loss(LATENTS, prefix, MASKED, loss_on="some")


def test_normalised_training_is_training_on_normalised_latents(tiny_mllm, prefix):  # noqa: F811
    mean, std = normal(128, seed=3), normal(128, seed=4).abs() + 0.5
    plain, scaled = random_branch(tiny_mllm), random_branch(tiny_mllm, normalize=True)
    scaled.set_statistics(mean, std)
    raw = LATENTS * std + mean
    torch.testing.assert_close(scaled.loss(raw, prefix, MASKED)[0], plain.loss(LATENTS, prefix, MASKED)[0])
    torch.testing.assert_close(
        scaled(raw, MASKED, prefix), plain(LATENTS, MASKED, prefix) * std + mean, atol=1e-4, rtol=1e-4
    )
    assert {"latents_mean_C", "latents_std_C"} <= set(scaled.state_dict())
    with pytest.raises(ValueError, match="ignored"):
        plain.set_statistics(mean, std)


def test_dead_channels_do_not_divide_by_zero(tiny_mllm, prefix):  # noqa: F811
    branch = random_branch(tiny_mllm, normalize=True)
    branch.set_statistics(torch.zeros(128), torch.zeros(128))
    assert branch(LATENTS, MASKED, prefix).isfinite().all()


def test_metrics_tell_perfect_from_flat(tiny_mllm, prefix):  # noqa: F811
    branch = random_branch(tiny_mllm)
    target = branch(LATENTS, torch.ones_like(MASKED), prefix).detach()
    _, metrics = branch.loss(target, prefix, torch.ones_like(MASKED))
    assert metrics["cosine"] > 0.999 and abs(metrics["variance"] - 1) < 1e-3
    torch.nn.init.zeros_(branch.vision_head.weight)
    assert branch.loss(target, prefix, MASKED)[1]["variance"] < 1e-6


@pytest.mark.parametrize("head", ["linear", "flow"])
def test_it_learns_what_the_text_decides(tiny_mllm, prefix, head):  # noqa: F811
    branch = VisualBranch.from_mllm(tiny_mllm, PATCHES, head=head)
    latents_BPC = LATENTS[:, :1].expand(-1, PATCHES, -1)  # one colour a prompt
    optimizer = torch.optim.AdamW(branch.parameters(), lr=3e-3)
    losses = []
    for step in range(40):
        generator = torch.Generator().manual_seed(step)
        loss, metrics = branch.loss(latents_BPC, prefix, torch.ones_like(MASKED), generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5]) and metrics["cosine"] > 0.4


def test_unknown_kinds_are_refused(tiny_mllm):  # noqa: F811
    with pytest.raises(ValueError, match="heads are"):
        VisualBranch.from_mllm(tiny_mllm, PATCHES, head="square")


def test_half_precision_prefixes_and_latents_are_accepted(tiny_mllm, prefix):  # noqa: F811
    branch = random_branch(tiny_mllm)
    keys, values = (tuple(tensor.bfloat16() for tensor in tensors) for tensors in (prefix.keys, prefix.values))
    predicted = branch(LATENTS.half(), MASKED, replace(prefix, keys=keys, values=values))
    assert predicted.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = branch.loss(LATENTS.half(), prefix, MASKED)
    assert loss.dtype == torch.float32 and loss.isfinite()


def saved_bytes(branch, prefix) -> tuple[int, list[torch.Tensor]]:
    """What the forward pass keeps for the gradient, beside the weights; and the gradients."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in branch.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = branch.train().loss(LATENTS, prefix, MASKED)
    size = sum(size for size, _ in kept.values())
    return size, torch.autograd.grad(loss, list(branch.parameters()))


def test_checkpointed_layers_give_the_same_gradients_for_less(tiny_mllm, prefix):  # noqa: F811
    branch = random_branch(tiny_mllm)
    bytes_before, before = saved_bytes(branch, prefix)
    branch.enable_gradient_checkpointing()
    bytes_after, after = saved_bytes(branch, prefix)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert bytes_after < 0.3 * bytes_before
    keys = prefix.keys[0].clone().requires_grad_()  # the prompt is really read in the second pass
    loss, _ = branch.loss(LATENTS, replace(prefix, keys=(keys, *prefix.keys[1:])), MASKED)
    assert torch.autograd.grad(loss, keys)[0].abs().max() > 0


@pytest.mark.parametrize(
    "prompts", [["red", "blue"], ["red", "a red circle above a blue square"]], ids=["even", "padded"]
)
def test_every_attention_kernel_lets_patches_see_each_other(tiny_mllm, prompts):  # noqa: F811
    """The mask is bidirectional: a kernel that knows a causal one alone would hide later patches from earlier ones."""
    prefix = tiny_mllm.encode_prompts(tiny_mllm.tokenize_prompts(prompts, 300))
    branch = random_branch(tiny_mllm)
    masked_BP = torch.zeros(2, PATCHES, dtype=torch.bool)
    masked_BP[:, 0] = True
    moved = LATENTS.clone()
    moved[:, -1] += 1.0
    ways = [("eager", None), ("sdpa", SDPBackend.MATH), ("sdpa", SDPBackend.FLASH_ATTENTION), ("sdpa", None)]
    found = []
    for name, backend in ways:
        branch.decoder.config._attn_implementation = name
        with torch.no_grad(), sdpa_kernel([backend, SDPBackend.MATH]) if backend else nullcontext():
            first, other = (branch(latents_BPC, masked_BP, prefix) for latents_BPC in (LATENTS, moved))
        assert (first[:, 0] - other[:, 0]).abs().max() > 1e-4, (name, backend)
        found.append(first)
    for (name, backend), one in zip(ways, found, strict=True):
        assert torch.allclose(one, found[0], atol=1e-4), (name, backend)


def test_a_masked_row_stays_finite_where_autocast_takes_the_mask_to_bfloat16():
    allowed_BQK = torch.tensor([[[True, False], [False, False]]])
    for dtype in (torch.float32, torch.bfloat16):
        mask = additive(allowed_BQK, dtype)
        assert mask.dtype == dtype and torch.isfinite(mask.to(torch.bfloat16)).all()
        weights = (mask.to(torch.bfloat16) + torch.randn(1, 1, 2, 2).to(torch.bfloat16)).float().softmax(-1)
        assert torch.isfinite(weights).all() and weights[0, 0, 0].tolist() == [1.0, 0.0]


# ---- the device's kernels --------------------------------------------------------------------------------------------


def test_without_padding_no_mask_says_the_same(tiny_mllm, monkeypatch):  # noqa: F811
    """Two prompts of one length; where kernels that know no mask can be chosen, there is none, and none is causal."""
    cache = tiny_mllm.encode_prompts(tiny_mllm.tokenize_prompts(["a red circle", "a blue square"], 300))
    assert (
        not cache.padded and tiny_mllm.encode_prompts(tiny_mllm.tokenize_prompts(["red", "a red circle"], 300)).padded
    )
    branch, found = random_branch(tiny_mllm), []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr("bifrost_cli.models.branch.visual_branch.MASKLESS", devices)
        branch.zero_grad()
        loss, _ = branch.loss(LATENTS, cache, MASKED)
        loss.backward()
        orders_BP = random_orders(2, PATCHES, torch.Generator().manual_seed(0))
        decoded_BPC = sample_masked(branch, cache, steps=3, orders_BP=orders_BP)
        found.append([loss.detach(), decoded_BPC, *(p.grad.clone() for p in branch.parameters())])
    for masked, maskless in zip(*found, strict=True):
        torch.testing.assert_close(maskless, masked, rtol=1e-4, atol=1e-6)


def test_masked_tokens_are_those_that_a_boolean_index_picks(tiny_mllm, prefix):  # noqa: F811
    branch = random_branch(tiny_mllm)
    loss, _ = branch.loss(LATENTS, prefix, MASKED, loss_on="masked")
    hidden_BPD = branch.hidden(LATENTS, MASKED, prefix)
    assert torch.equal(loss, branch.vision_head.loss(hidden_BPD[MASKED], branch.to_decoder(LATENTS)[MASKED]))


@pytest.mark.gpu
@pytest.mark.parametrize("loss_on", ["all", "masked"])
def test_a_step_does_not_wait_for_the_gpu(tiny_mllm, loss_on):  # noqa: F811
    branch, latents_BPC = random_branch(tiny_mllm).cuda(), LATENTS.cuda()
    tiny_mllm.model.cuda()
    try:
        for mode in ("default", "error"):  # once to let everything that is made at first use be made
            torch.cuda.set_sync_debug_mode(mode)
            prompts = tiny_mllm.tokenize_prompts(["red", "a red circle above a blue square"], 300)
            loss, _ = branch.loss(latents_BPC, tiny_mllm.encode_prompts(prompts), MASKED, loss_on=loss_on)
            loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        tiny_mllm.model.cpu()
