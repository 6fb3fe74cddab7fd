"""What each stage of a recipe computes, and how long a device takes.

In: a `System` and its recipe. Out: floating-point operations of one step or one image; peaks of known devices. The
longest text that the recipe allows is assumed. Knows no memory and no disk.
"""

from __future__ import annotations

from bifrost_cli.config.schema import Recipe
from bifrost_cli.planning import flops
from bifrost_cli.planning.meta_models import MetaModels, numbers

# Dense bfloat16 operations a second, by the makers' data sheets.
DEVICES = {"b200": 2250e12, "h200": 989e12, "h100": 989e12, "a100": 312e12, "l40s": 362e12, "rtx4090": 165e12,
           "rtx3090": 71e12}  # fmt: skip


def extraction(system: MetaModels, recipe: Recipe) -> int:
    """One image through the encoder and, if the store keeps them, the VAE."""
    if system.encoder is system.vae:
        return (1 + recipe.latents.vae) * _vae(system, recipe.images.output_size)
    merge = getattr(system.mllm.config.vision_config, "spatial_merge_size", 1) if system.own_encoder else 1
    total = flops.linear(numbers(system.encoder), (system.grid * merge) ** 2)
    if recipe.latents.vae:
        total += _vae(system, recipe.images.output_size)
    return total


def branch_step(system: MetaModels, recipe: Recipe) -> int:
    """One optimizer step: the prompt through the frozen MLLM, the branch forward and backward."""
    train, text = recipe.branch.train, recipe.branch.max_text_tokens
    rows = train.batch_size * train.accumulate
    passes = 4 if train.gradient_checkpointing else 3
    return rows * (_prompt(system, text) + passes * _branch(system, text))


def controlnet_step(system: MetaModels, recipe: Recipe) -> int:
    """One optimizer step: texts, FLUX forward and back to where the ControlNet speaks, the ControlNet itself."""
    train = recipe.controlnet.train
    again = 1 if train.gradient_checkpointing else 0
    text = flops.linear(numbers(system.text_encoder_2), recipe.models.diffusion_text_tokens)
    step = (2 + again) * _flux(system, recipe) + (3 + again) * _controlnet(system, recipe)
    return train.batch_size * train.accumulate * (text + step)


def image(system: MetaModels, recipe: Recipe) -> int:
    """One image from its prompt."""
    settings, text = recipe.generate, recipe.branch.max_text_tokens
    halves = 1 if settings.branch_guidance == 1.0 else 2
    total = halves * (_prompt(system, text) + settings.decode_steps * _branch(system, text))
    if settings.plan:
        total += flops.linear(numbers(system.mllm.model.language_model), text + settings.plan_tokens)
    total += flops.linear(numbers(system.text_encoder_2), recipe.models.diffusion_text_tokens)
    total += settings.steps * (_flux(system, recipe) + _controlnet(system, recipe))
    return total + _vae(system, recipe.images.output_size)


def _prompt(system: MetaModels, text: int) -> int:
    layers = system.mllm.model.language_model.layers
    config = system.mllm.config.text_config
    return flops.linear(numbers(layers), text) + flops.attention(text, text, config.hidden_size, len(layers)) // 2


def _branch(system: MetaModels, text: int) -> int:
    config, patches = system.mllm.config.text_config, system.grid**2
    seen = flops.attention(patches, text + patches, config.hidden_size, config.num_hidden_layers)
    return flops.linear(numbers(system.branch), patches) + seen


def _flux(system: MetaModels, recipe: Recipe) -> int:
    config = system.transformer.config
    return _blocks(system, recipe, config.num_layers + config.num_single_layers)


def _controlnet(system: MetaModels, recipe: Recipe) -> int:
    settings, embedder = recipe.controlnet, system.controlnet.controlnet_x_embedder
    blocks = _blocks(system, recipe, settings.double_blocks + settings.single_blocks)
    return blocks + flops.linear(numbers(embedder), system.image_tokens())


def _blocks(system: MetaModels, recipe: Recipe, blocks: int) -> int:
    config, tokens = system.transformer.config, system.image_tokens() + recipe.models.diffusion_text_tokens
    width = config.num_attention_heads * config.attention_head_dim
    return blocks * flops.linear(flops.FLUX_BLOCK * width**2, tokens) + flops.attention(tokens, tokens, width, blocks)


def _vae(system: MetaModels, side: int) -> int:
    config = system.vae.config
    return flops.vae_half(side**2, tuple(config.block_out_channels), config.layers_per_block)
