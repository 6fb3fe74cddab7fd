"""The frozen MLLM: prefixes, latents, words; and that nothing else in this package changes a bit of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fixtures_mllm import PATCHES, normal, random_branch, random_mllm, tiny_mllm  # noqa: F401
from transformers import DynamicCache

from bifrost_cli.models.branch.decoder_adapters import with_cache
from bifrost_cli.models.branch.masking import draw_masks, random_orders, sample_masked
from bifrost_cli.models.branch.visual_branch import VisualBranch

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)


def test_padding_does_not_change_what_the_branch_sees(tiny_mllm):  # noqa: F811
    short, long = "red", "a red circle above a blue square"
    alone = tiny_mllm.encode_prompts(tiny_mllm.tokenize_prompts([short], 300))
    beside = tiny_mllm.encode_prompts(tiny_mllm.tokenize_prompts([short, long], 300))
    length = alone.attention_BT.shape[1]
    for single, batch in zip(alone.keys + alone.values, beside.keys + beside.values, strict=True):
        torch.testing.assert_close(batch[:1, :, -length:], single, atol=1e-5, rtol=1e-5)


def test_the_prefix_is_the_stock_models_cache(tiny_mllm):  # noqa: F811
    text = tiny_mllm.tokenize_prompts(["a red circle"], 300)
    stock, prefix = DynamicCache(), tiny_mllm.encode_prompts(text)
    tiny_mllm.model(input_ids=text.input_ids_BT, use_cache=True, **with_cache(tiny_mllm.model, stock))
    for layer, keys, values in zip(stock.layers, prefix.keys, prefix.values, strict=True):
        torch.testing.assert_close(keys, layer.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values, layer.values, atol=1e-5, rtol=1e-5)
    assert not any(tensor.requires_grad for tensor in prefix.keys + prefix.values)


def test_long_prompts_are_cut_and_said_to_be(tiny_mllm):  # noqa: F811
    text = tiny_mllm.tokenize_prompts(["red " * 500, "red"], 60)
    assert text.input_ids_BT.shape == (2, 60) and text.truncated == (True, False)
    assert tiny_mllm.tokenize_prompts(["red"], 60).input_ids_BT.shape[1] < 60
    assert tiny_mllm.tokenize_prompts(["red"], 60, text_length=60).input_ids_BT.shape[1] == 60


def test_latents_are_the_stock_visual_encoders_in_raster_order(tiny_mllm):  # noqa: F811
    latents_BPC = tiny_mllm.encode(PIXELS)
    assert latents_BPC.shape == (3, PATCHES, tiny_mllm.width) and latents_BPC.dtype == torch.float32
    torch.testing.assert_close(tiny_mllm.encode(PIXELS[1:2])[0], latents_BPC[1], atol=1e-5, rtol=1e-5)
    changed = PIXELS[:1].copy()
    changed[0, 16:32, 32:48] = 0  # row 1, column 2 of the 4x4 grid
    first, second = (_patch_embeddings(tiny_mllm, image) for image in (PIXELS[:1], changed))
    assert (first != second).any(-1).nonzero().flatten().tolist() == [1 * 4 + 2]


def _patch_embeddings(mllm, pixels_BHWC):
    """Rows before attention, grouped by the four patches that one latent merges: these show where a pixel goes."""
    inputs = mllm.image_processor(images=list(torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2)), do_resize=False)
    return torch.as_tensor(inputs["pixel_values"]).unflatten(0, (PATCHES, 4)).flatten(1)


@pytest.mark.parametrize("pixels", [PIXELS[:, :60], PIXELS.astype(np.float32), PIXELS[..., :1]])
def test_images_of_the_wrong_shape_are_refused(tiny_mllm, pixels):  # noqa: F811
    with pytest.raises(ValueError, match="images"):
        tiny_mllm.encode(pixels)


def test_writing_in_a_batch_is_writing_alone(tiny_mllm):  # noqa: F811
    prompts = ["red", "a red circle above a blue square", ""]
    instruction = "Describe an image of {prompt}"
    together = tiny_mllm.write(prompts, instruction, 8)
    assert together == [tiny_mllm.write([prompt], instruction, 8)[0] for prompt in prompts]
    assert all("<|" not in written.text for written in together)


def test_what_is_cut_before_its_end_is_said_to_be(tiny_mllm, monkeypatch):  # noqa: F811
    end = tiny_mllm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    word = tiny_mllm.tokenizer("red").input_ids[0]
    monkeypatch.setattr(tiny_mllm.model.generation_config, "eos_token_id", [end])
    written = torch.tensor([[word, word, end], [word, end, end], [word, word, word]])
    monkeypatch.setattr(tiny_mllm.model, "generate", lambda input_ids, **_: torch.cat([input_ids, written], dim=1))
    assert [written.cut for written in tiny_mllm.write(["a", "b", "c"], "{prompt}", 3)] == [False, False, True]


def test_answers_go_through_the_stock_processor(tiny_mllm):  # noqa: F811
    inputs = tiny_mllm.question(PIXELS[0], "What <|im_end|> is it")
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(tiny_mllm.model.config.image_token_id) == PATCHES
    assert ids.count(tiny_mllm.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert isinstance(tiny_mllm.answer(PIXELS[0], "What is it", 4).text, str)


def test_the_mllm_is_frozen_and_hashed_once():
    mllm = random_mllm()
    assert not any(parameter.requires_grad for parameter in mllm.model.parameters()) and not mllm.model.training
    assert mllm.weights_hash() == random_mllm().weights_hash() != random_mllm(seed=1).weights_hash()


def test_understanding_is_bit_identical_with_the_branch_built_trained_and_decoding():
    mllm = random_mllm()
    text = {"input_ids": mllm.tokenize_prompts(["a red circle", "blue"], 300).input_ids_BT}
    image = mllm.question(PIXELS[0], "What is above?")
    before = mllm.logits(**text), mllm.logits(**image), mllm.answer(PIXELS[0], "What is it", 4)
    state = {name: value.clone() for name, value in mllm.model.state_dict().items()}

    branch = VisualBranch.from_mllm(mllm, PATCHES)
    prefix = mllm.encode_prompts(mllm.tokenize_prompts(["a red circle", "blue"], 300))
    optimizer = torch.optim.AdamW(branch.parameters(), lr=1e-2)
    for step in range(3):
        masked_BP = draw_masks(2, PATCHES, torch.Generator().manual_seed(step))
        loss, _ = branch.loss(mllm.encode(PIXELS[:2]), prefix, masked_BP)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sample_masked(branch, prefix, prefix, steps=4, guidance=2.0, orders_BP=random_orders(2, PATCHES, torch.Generator()))
    mllm.write(["red"], "Describe {prompt}", 4)

    after = mllm.logits(**text), mllm.logits(**image), mllm.answer(PIXELS[0], "What is it", 4)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1]) and before[2] == after[2]
    assert all(torch.equal(state[name], value) for name, value in mllm.model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in mllm.model.parameters())


def test_eager_and_sdpa_attention_agree():
    layouts = ["red", "a red circle above a blue square"]
    masked_BP, latents_BPC = draw_masks(2, PATCHES, torch.Generator()), normal(2, PATCHES, 128)
    predicted = []
    for attention in ("eager", "sdpa"):
        mllm = random_mllm(attention=attention)
        predicted.append(
            random_branch(mllm)(latents_BPC, masked_BP, mllm.encode_prompts(mllm.tokenize_prompts(layouts, 300)))
        )
    torch.testing.assert_close(*predicted, atol=1e-4, rtol=1e-4)
