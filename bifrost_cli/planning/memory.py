"""Peak device memory of each stage of a recipe, from sizes alone.

The first half counts tensor by tensor what the stock layers (transformers 5, diffusers 0.42) keep for a backward pass
with torch's fused attention, which keeps queries, keys, values and the result but no matrix of scores; neither training
computes logits. The second half knows which parts a stage holds. Texts are as long as the recipe allows.
tests/planning/test_plan_memory.py holds the sums to measured peaks. `size`: bytes of one number of an activation.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from bifrost_cli.config.schema import Recipe, Train
from bifrost_cli.loading.offload import bytes_of, layers_of
from bifrost_cli.planning.meta_models import MetaModels, numbers

FULL = 4  # bytes of float32: trained weights, their gradients and averages, whatever the arithmetic
EIGHT_BIT_AVERAGES = 2 * (1 + FULL / 256)  # one byte each and a float32 scale for a block of 256 (arXiv 2110.02861)

# What a FLUX block keeps for each token, in widths. Frozen weights need no inputs kept, only what the gradient passes:
# normed inputs, queries and keys before and after their norm, values, the result, GELU's input.
FROZEN_DOUBLE, FROZEN_SINGLE = 12, 11
TRAINED_DOUBLE, TRAINED_SINGLE = 22, 19
FLUX_MOMENT = 24  # the last block's gradients beside what it kept
EMBEDDER_MAPS = 6  # maps of all channels on the fine grid that the ControlNet's embedder keeps


def trained_state(parameters: int, *, eight_bit: bool = False, averaged: bool = False) -> int:
    """Bytes of weights, Adam's two moments and the averaged weights, without gradients."""
    moments = EIGHT_BIT_AVERAGES if eight_bit else 2 * FULL
    return round(parameters * (FULL + moments + (FULL if averaged else 0)))


def training_peak(held: int, kept: int, moment: int, gradients: int, *, accumulates: bool) -> int:
    """The highest point of a step: at the end of forward or of backward, which frees activations as gradients come.

    Args:
        held: always there.
        kept: what forward keeps for backward.
        moment: what one layer needs while it runs.
        gradients: of the trained weights.
        accumulates: gradients of an earlier pass are there already.
    """
    at_once = kept + gradients if accumulates else max(kept, gradients)
    return held + at_once + moment


# ---- the branch -----------------------------------------------------------------------------------------------------


def decoder_layer_kept(
    batch: int, patches: int, text: int, width: int, inner: int, *, size: int, weights: str = "trained"
) -> int:
    """One decoder layer of the branch: `patches` queries on `text` + `patches` keys and values.

    Trained weights: two norms keep input and normed input in float32; queries and the result once; four maps of the
    MLP; keys and values repeated for every head. In bfloat16 each of the five projections of a normed input keeps its
    own cast. Frozen weights need no inputs of their projections; weights with additions of low rank ("low rank") do.
    """
    tokens, seen = batch * patches, batch * (text + patches)
    inputs = 0 if weights == "frozen" else 2 * FULL if size == FULL else 5 * size
    normed = 2 * FULL if weights == "trained" else 0
    maps = 3 if weights == "frozen" else 4
    return tokens * (width * (2 * FULL + normed + inputs + 2 * size) + maps * inner * size) + 2 * seen * width * size


def branch_head_kept(batch: int, patches: int, width: int, channels: int) -> int:
    """The final norm, the head and the loss."""
    return batch * patches * FULL * (4 * width + 4 * channels)


def checkpointed_kept(batch: int, patches: int, width: int, layers: list[int]) -> int:
    """With gradient checkpointing: every layer's input, and the largest layer, which is computed again."""
    return len(layers) * batch * patches * width * FULL + max(layers)


def branch_moment(batch: int, patches: int, width: int, inner: int, channels: int, *, size: int) -> int:
    """The larger of the health numbers on all latents and the gradients inside the last MLP."""
    return batch * patches * max(6 * channels * FULL, 3 * inner * size + 2 * width * FULL)


def prefix_cache(batch: int, text: int, layers: int, key_width: int, *, size: int) -> int:
    """The prompt's keys and values of every layer."""
    return 2 * layers * batch * text * key_width * size


# ---- the ControlNet -------------------------------------------------------------------------------------------------


def controlnet_kept(
    tokens: int, width: int, frozen: tuple[int, int], trained: tuple[int, int], *, size: int, checkpointed: bool = False
) -> int:
    """Blocks (double, single) of frozen FLUX and of the ControlNet on `tokens` text and image tokens.

    The first double block of FLUX stands before the first residual, so no gradient passes it.
    """
    double, single = max(0, frozen[0] - 1), frozen[1]
    if checkpointed:  # the inputs of each block, and the largest block computed again
        widths = double + single + sum(trained) + TRAINED_DOUBLE
    else:
        widths = FROZEN_DOUBLE * double + FROZEN_SINGLE * single
        widths += TRAINED_DOUBLE * trained[0] + TRAINED_SINGLE * trained[1]
    return tokens * width * size * widths


def embedder_kept(tokens: int, channels: int, *, size: int) -> int:
    """The ControlNet's embedder on its fine grid."""
    return EMBEDDER_MAPS * tokens * channels * size


# ---- without gradients ----------------------------------------------------------------------------------------------


def decoder_moment(batch: int, queries: int, seen: int, width: int, inner: int, *, size: int) -> int:
    """One decoder layer on `queries` tokens a row that see `seen`."""
    return batch * size * (queries * (4 * width + 3 * inner) + 2 * seen * width)


def flux_moment(tokens: int, width: int, *, size: int) -> int:
    """One single block: queries, keys, values, their normed copies, the MLP's four widths twice, their union."""
    return 24 * tokens * width * size


def vision_moment(patches: int, width: int, inner: int, patch_numbers: int, *, size: int) -> int:
    """The visual encoder on `patches` patches in all: pixels in float32 and cast, and the larger half of one block:
    its attention, which turns queries and keys in float32, or its MLP."""
    attention, mlp = width * (2 * size + 8 * FULL), 2 * width * size + 3 * inner * size
    return patches * (patch_numbers * (FULL + size) + max(attention, mlp))


def vae_encode_moment(batch: int, pixels: int, channels: int, layers: int, *, size: int) -> int:
    """The last of `layers` blocks at full size (`pixels` an image, `channels` there): its input, what came out of its
    convolutions, their sum, the sum scaled, and what the caller still holds."""
    return batch * pixels * ((4 + (layers > 1)) * channels * size + 3 * FULL)


def vae_decode_moment(batch: int, pixels: int, channels: int, *, size: int) -> int:
    """The last block at full size, which takes the `channels` of the one before, held by the caller too."""
    return 4 * batch * pixels * channels * size


# ---- the stages ------------------------------------------------------------------------------------------------------

SIZES = {"float32": 4, "bfloat16": 2, "fp32": 4, "bf16": 2}
STAGES = ("extract-latents", "train branch", "train controlnet", "generate")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device.

    Attributes:
        held: frozen weights.
        state: trained weights, optimizer, averages.
        gradients: gradients of the trained weights.
        activations: what a forward pass keeps, and the largest layer's own.
        peak: less than the sum, because activations are freed as gradients are made.
    """

    held: int
    state: int
    gradients: int
    activations: int
    peak: int


def estimates(system: MetaModels, recipe: Recipe, gpus: int = 1) -> dict[str, MemoryEstimate]:
    """Memory of every stage on each of `gpus` devices.

    Args:
        system: the models of `recipe`.
        recipe: the settings.
        gpus: devices that share a training's batch and, with `parallel: fsdp`, what is trained; nothing else is shared.
    """
    return {name: estimate(name, system, recipe, gpus) for name in STAGES}


def estimate(stage: str, system: MetaModels, recipe: Recipe, gpus: int = 1) -> MemoryEstimate:
    """Memory of one of `STAGES`, as in `estimates`."""
    if stage == "extract-latents":
        return extraction(system, recipe)
    if stage == "generate":
        return generation(system, recipe)
    training = branch_training if stage == "train branch" else controlnet_training
    return training(system, recipe, gpus)


def extraction(system: MetaModels, recipe: Recipe) -> MemoryEstimate:
    """The MLLM as a whole when its visual encoder is used, and FLUX's VAE."""
    latents, size = recipe.latents, SIZES[recipe.models.dtype]
    own = FULL if latents.encoder not in ("mllm", "vae") else size  # open_clip is read in float32
    held = _weights(system.mllm if system.own_encoder else system.encoder, size=own)
    moments = [_encoder_moment(system, latents.batch_size, recipe.images.input_size, own)]
    if latents.vae:
        held += _weights(system.vae, size=size)
        moments.append(_vae_moment(system, latents.batch_size, recipe.images.output_size, size))
    return MemoryEstimate(held, 0, 0, max(moments), held + max(moments))


def branch_training(system: MetaModels, recipe: Recipe, gpus: int = 1) -> MemoryEstimate:
    """The frozen MLLM, the branch's state, and its layers' activations behind the longest prompt."""
    settings, train, text = recipe.branch, recipe.branch.train, system.mllm.config.text_config
    frozen, size = SIZES[recipe.models.dtype], SIZES[train.precision]
    batch, patches, prompt = -(-train.batch_size // gpus), system.grid**2, settings.max_text_tokens
    key_width = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    held = _weights(system.mllm, size=frozen)
    held += prefix_cache(batch, prompt, text.num_hidden_layers, key_width, size=frozen)
    widths = (text.hidden_size, text.intermediate_size)
    kinds = _layer_kinds(recipe, text.num_hidden_layers)
    layers = [decoder_layer_kept(batch, patches, prompt, *widths, size=size, weights=kind) for kind in kinds]
    kept = branch_head_kept(batch, patches, text.hidden_size, system.channels)
    if train.gradient_checkpointing:
        kept += checkpointed_kept(batch, patches, text.hidden_size, layers)
    else:
        kept += sum(layers)
    moment = branch_moment(batch, patches, *widths, system.channels, size=size)
    return _training(train, system.branch, gpus, held, kept, moment)


def _layer_kinds(recipe: Recipe, count: int) -> list[str]:
    """How the weights of each decoder layer of the branch are trained."""
    settings = recipe.branch
    if settings.tune == "layers":
        trained = min(settings.layers or 0, count)
        return ["frozen"] * (count - trained) + ["trained"] * trained
    return ["low rank" if settings.tune == "lora" else "trained"] * count


def controlnet_training(system: MetaModels, recipe: Recipe, gpus: int = 1) -> MemoryEstimate:
    """All of frozen FLUX, the ControlNet's state, and the activations of both: the gradient passes through FLUX."""
    settings, train, config = recipe.controlnet, recipe.controlnet.train, system.transformer.config
    size, batch = SIZES[train.precision], -(-train.batch_size // gpus)
    frozen = SIZES[recipe.models.dtype]
    rendered = (system.transformer, system.text_encoder, system.text_encoder_2)
    held = sum(bytes_of(part, recipe.models.weights, frozen) for part in rendered) + _weights(system.vae, size=frozen)
    width, image = _flux_width(system), batch * system.image_tokens()
    tokens = image + batch * recipe.models.diffusion_text_tokens
    blocks = ((config.num_layers, config.num_single_layers), (settings.double_blocks, settings.single_blocks))
    kept = controlnet_kept(tokens, width, *blocks, size=size, checkpointed=train.gradient_checkpointing)
    kept += embedder_kept(image, system.channels, size=size)
    return _training(train, system.controlnet, gpus, held, kept, FLUX_MOMENT * tokens * width * size)


def generation(system: MetaModels, recipe: Recipe) -> MemoryEstimate:
    """What of the chain is on the device at once, and one image at a time."""
    size = SIZES[recipe.models.dtype]
    text, patches = system.mllm.config.text_config, system.grid**2
    held = _chain_held(system, recipe, size)
    seen = recipe.branch.max_text_tokens + patches
    config = system.vae.config.block_out_channels
    moments = (
        decoder_moment(1, patches, seen, text.hidden_size, text.intermediate_size, size=size),
        flux_moment(system.image_tokens() + recipe.models.diffusion_text_tokens, _flux_width(system), size=size),
        vae_decode_moment(1, recipe.images.output_size**2, config[min(1, len(config) - 1)], size=size),
    )
    return MemoryEstimate(held, 0, 0, max(moments), held + max(moments))


def _chain_held(system: MetaModels, recipe: Recipe, size: int) -> int:
    """Weights on the device at once under `generate.offload`."""
    offload, weights = recipe.generate.offload, recipe.models.weights
    mllm, branch, controlnet = system.mllm, system.branch, system.controlnet
    encoders = (system.text_encoder, system.text_encoder_2)
    if offload == "sequential":
        halves = ((mllm, branch), (*_diffusion(system), controlnet))
        return max(size * (sum(map(_in_no_layer, half)) + max(map(_largest_layer, half))) for half in halves)
    if offload == "model" and weights == "dtype":
        together = ((mllm,), (branch,), encoders, (system.transformer, controlnet), (system.vae,))
        return max(_weights(*parts, size=size) for parts in together)
    decoder, rendered = mllm.model.language_model, (system.transformer, *encoders)
    # What is frozen of a branch is the MLLM's own, but not when the MLLM's is quantised.
    first = _weights(mllm, size=size) + size * numbers(branch, trained=weights == "dtype")
    first += bytes_of(decoder, weights, size) - _weights(decoder, size=size)
    second = sum(bytes_of(part, weights, size) for part in rendered) + _weights(system.vae, controlnet, size=size)
    return max(first, second) if offload == "model" else first + second


def _in_no_layer(module: nn.Module) -> int:
    return numbers(module) - sum(map(numbers, layers_of(module)))


def _largest_layer(module: nn.Module) -> int:
    return max(map(numbers, layers_of(module)), default=0)


def _training(train: Train, module: nn.Module, gpus: int, held: int, kept: int, moment: int) -> MemoryEstimate:
    parameters = numbers(module, trained=True)
    state = trained_state(parameters, eight_bit=train.optimizer == "adamw8bit", averaged=train.ema > 0)
    gradients = FULL * parameters
    if gpus > 1 and train.parallel == "fsdp":
        state, gradients = -(-state // gpus), -(-gradients // gpus)
        moment += 2 * FULL * _largest_layer(module)  # one layer put together while the next one is fetched
    elif gpus > 1:
        held += gradients  # DDP sends copies
    if train.precision == "bf16":
        kept += 2 * parameters  # autocast keeps the weights it has cast until backward has passed them, on every device
    peak = training_peak(held + state, kept, moment, gradients, accumulates=train.accumulate > 1)
    return MemoryEstimate(held, state, gradients, kept + moment, peak)


def _encoder_moment(system: MetaModels, batch: int, side: int, size: int) -> int:
    if system.encoder is system.vae:
        return _vae_moment(system, batch, side, size)
    if not system.own_encoder:
        width, patches = system.channels, batch * system.grid**2
        return vision_moment(patches, width, 4 * width, 3 * (side // system.grid) ** 2, size=size)
    vision = system.mllm.config.vision_config
    patches = batch * (side // vision.patch_size) ** 2
    pixels = 3 * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    return vision_moment(patches, vision.hidden_size, vision.intermediate_size, pixels, size=size)


def _vae_moment(system: MetaModels, batch: int, side: int, size: int) -> int:
    config = system.vae.config
    return vae_encode_moment(batch, side**2, config.block_out_channels[0], config.layers_per_block, size=size)


def _weights(*modules: nn.Module, size: int) -> int:
    return size * numbers(*modules)


def _diffusion(system: MetaModels) -> tuple[nn.Module, ...]:
    return system.transformer, system.vae, system.text_encoder, system.text_encoder_2


def _flux_width(system: MetaModels) -> int:
    config = system.transformer.config
    return config.num_attention_heads * config.attention_head_dim
