"""Floating-point operations of each stage of a recipe, and the peak rates of known devices.

An addition and a multiplication count as two; a backward pass costs two forward passes; texts are as long as the recipe
allows. Transformers are counted by formula (every weight once a token, and attention): `torch.utils.flop_counter` takes
2 s to pass FLUX's meta model and cannot pass the MLLM's vision tower; tests/planning holds the formulas to its counts.
The VAE, whose convolutions no short formula describes, is counted by it.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from bifrost_cli.config.schema import Recipe
from bifrost_cli.planning.meta_models import MetaModels, numbers

# Dense bfloat16 operations a second, by the makers' data sheets.
DEVICES = {"b200": 2250e12, "h200": 989e12, "h100": 989e12, "a100": 312e12, "l40s": 362e12, "rtx4090": 165e12,
           "rtx3090": 71e12}  # fmt: skip
FLUX_BLOCK = 12  # weights that one token meets in a block, in squares of the width: its own stream's in a double block


def linear(parameters: int, tokens: int) -> int:
    """Operations of `parameters` weights, each met once by every one of `tokens` tokens."""
    return 2 * parameters * tokens


def attention(queries: int, keys: int, width: int, layers: int) -> int:
    """Scores and weighted values of `queries` tokens over `keys` tokens, `width` channels in all heads."""
    return 4 * queries * keys * width * layers


def vae_pass(system: MetaModels, side: int, *, decode: bool = False) -> int:
    """The VAE's encoder, or its decoder, on one image of `side` pixels a side, counted on the meta model."""
    vae, small = system.vae, side // system.factor
    shape = (1, vae.config.latent_channels, small, small) if decode else (1, 3, side, side)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        (vae.decode if decode else vae.encode)(torch.empty(shape, device="meta"))
    return counter.get_total_flops()


def extraction(system: MetaModels, recipe: Recipe) -> int:
    """One image through the encoder and, if the store keeps its latents, the VAE."""
    vae = vae_pass(system, recipe.images.output_size) if recipe.latents.vae else 0
    if system.encoder is system.vae:
        return vae + vae_pass(system, recipe.images.input_size)
    merge = getattr(system.mllm.config.vision_config, "spatial_merge_size", 1) if system.own_encoder else 1
    return vae + linear(numbers(system.encoder), (system.grid * merge) ** 2)


def branch_step(system: MetaModels, recipe: Recipe) -> int:
    """One optimizer step: the prompt through the frozen MLLM, the branch forward and backward."""
    train, text = recipe.branch.train, recipe.branch.max_text_tokens
    rows = train.batch_size * train.accumulate
    passes = 4 if train.gradient_checkpointing else 3
    return rows * (prompt_pass(system, text) + passes * branch_pass(system, text))


def controlnet_step(system: MetaModels, recipe: Recipe) -> int:
    """One optimizer step: texts, FLUX forward and back to the first residual of the ControlNet, the ControlNet."""
    train = recipe.controlnet.train
    again = 1 if train.gradient_checkpointing else 0
    text = linear(numbers(system.text_encoder_2), recipe.models.diffusion_text_tokens)
    step = (2 + again) * flux_pass(system, recipe) + (3 + again) * controlnet_pass(system, recipe)
    return train.batch_size * train.accumulate * (text + step)


def image(system: MetaModels, recipe: Recipe) -> int:
    """One image from its prompt."""
    settings, text = recipe.generate, recipe.branch.max_text_tokens
    halves = 1 if settings.branch_guidance == 1.0 else 2
    total = halves * (prompt_pass(system, text) + settings.decode_steps * branch_pass(system, text))
    if settings.plan:
        total += linear(numbers(system.mllm.model.language_model), text + settings.plan_tokens)
    total += linear(numbers(system.text_encoder_2), recipe.models.diffusion_text_tokens)
    total += settings.steps * (flux_pass(system, recipe) + controlnet_pass(system, recipe))
    return total + vae_pass(system, recipe.images.output_size, decode=True)


def prompt_pass(system: MetaModels, text: int) -> int:
    """A prompt of `text` tokens through the MLLM's decoder layers; causal attention is half of full attention."""
    layers = system.mllm.model.language_model.layers
    config = system.mllm.config.text_config
    return linear(numbers(layers), text) + attention(text, text, config.hidden_size, len(layers)) // 2


def branch_pass(system: MetaModels, text: int) -> int:
    """All patches through the branch, over the keys and values of `text` prompt tokens and their own."""
    config, patches = system.mllm.config.text_config, system.grid**2
    over_all = attention(patches, text + patches, config.hidden_size, config.num_hidden_layers)
    return linear(numbers(system.branch), patches) + over_all


def flux_pass(system: MetaModels, recipe: Recipe) -> int:
    """One image's tokens and its text through FLUX's blocks."""
    config = system.transformer.config
    return _flux_blocks(system, recipe, config.num_layers + config.num_single_layers)


def controlnet_pass(system: MetaModels, recipe: Recipe) -> int:
    """The same tokens through the ControlNet's blocks, and the latents through its embedder."""
    settings, embedder = recipe.controlnet, system.controlnet.controlnet_x_embedder
    blocks = _flux_blocks(system, recipe, settings.double_blocks + settings.single_blocks)
    return blocks + linear(numbers(embedder), system.image_tokens())


def _flux_blocks(system: MetaModels, recipe: Recipe, blocks: int) -> int:
    config, tokens = system.transformer.config, system.image_tokens() + recipe.models.diffusion_text_tokens
    width = config.num_attention_heads * config.attention_head_dim
    return blocks * linear(FLUX_BLOCK * width**2, tokens) + attention(tokens, tokens, width, blocks)
