"""Peak device memory and floating-point operations of each stage of a recipe, from sizes alone.

Texts are as long as the recipe allows. Memory is counted tensor by tensor: what the stock layers (transformers 5,
diffusers 0.42) keep for a backward pass with torch's fused attention, which keeps queries, keys, values and the result
but no matrix of scores; neither training computes logits. tests/planning/test_plan_memory.py holds the sums to measured
peaks. `size`: bytes of one number of an activation.

An addition and a multiplication count as two operations; a backward pass costs two forward passes. Transformers are
counted by formula (every weight once a token, and attention): `torch.utils.flop_counter` takes 2 s to pass FLUX's meta
model and cannot pass the MLLM's vision tower; tests/planning holds the formulas to its counts. The VAE, whose
convolutions no short formula describes, is counted by it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bifrost_cli.config.schema import Train
from bifrost_cli.loading.offload import bytes_of, layers_of
from bifrost_cli.planning.meta_models import MetaModels, numbers

# Dense bfloat16 operations a second, by the makers' data sheets.
DEVICES = {"b200": 2250e12, "h200": 989e12, "h100": 989e12, "a100": 312e12, "l40s": 362e12, "rtx4090": 165e12,
           "rtx3090": 71e12}  # fmt: skip
FLUX_BLOCK = 12  # weights that one token meets in a block, in squares of the width: its own stream's in a double block
SIZES = {"float32": 4, "bfloat16": 2, "fp32": 4, "bf16": 2}
FULL = 4  # bytes of float32: trained weights, their gradients and averages, whatever the arithmetic
EIGHT_BIT_AVERAGES = 2 * (1 + FULL / 256)  # one byte each and a float32 scale for a block of 256 (arXiv 2110.02861)

# What a FLUX block keeps for each token, in widths. Frozen weights need no inputs kept, only what the gradient passes:
# normed inputs, queries and keys before and after their norm, values, the result, GELU's input.
FROZEN_DOUBLE, FROZEN_SINGLE = 12, 11
TRAINED_DOUBLE, TRAINED_SINGLE = 22, 19
FLUX_MOMENT = 24  # the last block's gradients beside what it kept; without gradients what a single block needs
EMBEDDER_MAPS = 6  # maps of all channels on the fine grid that the ControlNet's embedder keeps


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device."""

    held: int  # frozen weights
    state: int  # trained weights, optimizer, averages
    gradients: int  # of the trained weights
    activations: int  # what a forward pass keeps, and the largest layer's own
    peak: int  # less than the sum, because activations are freed as gradients are made


def estimates(system: MetaModels, gpus: int = 1) -> dict[str, MemoryEstimate]:
    """Memory of every stage on each of `gpus` devices, which share a training's batch and, with `parallel: fsdp`, what
    is trained; nothing else is shared."""
    return {name: memory(system, gpus) for name, (memory, _) in STAGES.items()}


def _extraction(system: MetaModels, gpus: int) -> MemoryEstimate:
    """The MLLM as a whole when its visual encoder is used, and FLUX's VAE."""
    latents, images, size = system.recipe.latents, system.recipe.images, SIZES[system.recipe.models.dtype]
    own = FULL if latents.encoder not in ("mllm", "vae") else size  # open_clip is read in float32
    held = own * numbers(system.mllm if system.own_encoder else system.encoder)
    if system.encoder is system.vae:
        moment = _vae_moment(system, images.input_size, size)
    else:
        if system.own_encoder:
            vision = system.mllm.config.vision_config
            patches, width = (images.input_size // vision.patch_size) ** 2, vision.hidden_size
            inner, pixels = vision.intermediate_size, getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
        else:
            patches, width = system.grid**2, system.channels
            inner, pixels = 4 * width, (images.input_size // system.grid) ** 2
        # Pixels in float32 and cast, and the larger half of a block: attention, which turns queries and keys in
        # float32, or the MLP.
        block = max(width * (2 * own + 8 * FULL), 2 * width * own + 3 * inner * own)
        moment = latents.batch_size * patches * (3 * pixels * (FULL + own) + block)
    if latents.vae:
        held += size * numbers(system.vae)
        moment = max(moment, _vae_moment(system, images.output_size, size))
    return MemoryEstimate(held, 0, 0, moment, held + moment)


def _vae_moment(system: MetaModels, side: int, size: int) -> int:
    """The last of an encoder's blocks at full size: its input, what came out of its convolutions, their sum, the sum
    scaled, and what the caller still holds."""
    config = system.vae.config
    maps = (4 + (config.layers_per_block > 1)) * config.block_out_channels[0] * size + 3 * FULL
    return system.recipe.latents.batch_size * side**2 * maps


def _branch_training(system: MetaModels, gpus: int) -> MemoryEstimate:
    """The frozen MLLM, the longest prompt's keys and values, the branch's state, and its layers' activations."""
    branch, train, text = system.recipe.branch, system.recipe.branch.train, system.mllm.config.text_config
    frozen, size = SIZES[system.recipe.models.dtype], SIZES[train.precision]
    rows, width, inner = -(-train.batch_size // gpus), text.hidden_size, text.intermediate_size
    count = text.num_hidden_layers
    tokens, prompt = rows * system.grid**2, rows * branch.max_text_tokens
    key_width = text.num_key_value_heads * width // text.num_attention_heads
    held = frozen * (numbers(system.mllm) + 2 * count * prompt * key_width)
    if branch.tune == "layers":
        trained = min(branch.layers or 0, count)
        kinds = ["frozen"] * (count - trained) + ["trained"] * trained
    else:
        kinds = ["low rank" if branch.tune == "lora" else "trained"] * count
    layers = [_layer_kept(tokens, prompt + tokens, width, inner, size, kind) for kind in kinds]
    kept = tokens * FULL * 4 * (width + system.channels)  # the final norm, the head and the loss
    if train.gradient_checkpointing:  # every layer's input, and the largest layer, which is computed again
        kept += count * tokens * width * FULL + max(layers)
    else:
        kept += sum(layers)
    # The larger of the health numbers on all latents and the gradients inside the last MLP.
    moment = tokens * max(6 * system.channels * FULL, 3 * inner * size + 2 * width * FULL)
    return _training(train, system.branch, gpus, held, kept, moment)


def _layer_kept(tokens: int, seen: int, width: int, inner: int, size: int, kind: str) -> int:
    """One decoder layer of the branch: queries of `tokens` on keys and values of `seen`.

    Trained weights: two norms keep input and normed input in float32; queries and the result once; four maps of the
    MLP; keys and values repeated for every head. In bfloat16 each of the five projections of a normed input keeps its
    own cast. Frozen weights need no inputs of their projections; weights with additions of low rank ("low rank") do.
    """
    inputs = 0 if kind == "frozen" else 2 * FULL if size == FULL else 5 * size
    normed = 2 * FULL if kind == "trained" else 0
    maps = 3 if kind == "frozen" else 4
    return tokens * (width * (2 * FULL + normed + inputs + 2 * size) + maps * inner * size) + 2 * seen * width * size


def _controlnet_training(system: MetaModels, gpus: int) -> MemoryEstimate:
    """All of frozen FLUX, the ControlNet's state, and the activations of both: the gradient passes through FLUX, though
    not its first double block, which stands before the first residual."""
    settings, config, models = system.recipe.controlnet, system.transformer.config, system.recipe.models
    train, size, frozen = settings.train, SIZES[settings.train.precision], SIZES[models.dtype]
    rendered = (system.transformer, system.text_encoder, system.text_encoder_2)
    held = sum(bytes_of(part, models.weights, frozen) for part in rendered) + frozen * numbers(system.vae)
    rows = -(-train.batch_size // gpus)
    image, text = rows * system.image_tokens, rows * models.diffusion_text_tokens
    numbers_of_a_width = (image + text) * system.flux_width * size
    double, single = max(0, config.num_layers - 1), config.num_single_layers
    if train.gradient_checkpointing:  # the inputs of each block, and the largest block computed again
        widths = double + single + settings.double_blocks + settings.single_blocks + TRAINED_DOUBLE
    else:
        widths = FROZEN_DOUBLE * double + FROZEN_SINGLE * single
        widths += TRAINED_DOUBLE * settings.double_blocks + TRAINED_SINGLE * settings.single_blocks
    kept = numbers_of_a_width * widths + EMBEDDER_MAPS * image * system.channels * size
    return _training(train, system.controlnet, gpus, held, kept, FLUX_MOMENT * numbers_of_a_width)


def _training(train: Train, module: nn.Module, gpus: int, held: int, kept: int, moment: int) -> MemoryEstimate:
    parameters = numbers(module, trained=True)
    state, gradients = trained_state(parameters, train), FULL * parameters
    if gpus > 1 and train.parallel == "fsdp":
        state, gradients = -(-state // gpus), -(-gradients // gpus)
        moment += 2 * FULL * _largest_layer(module)  # one layer put together while the next one is fetched
    elif gpus > 1:
        held += gradients  # DDP sends copies
    if train.precision == "bf16":
        kept += 2 * parameters  # autocast keeps the weights it has cast until backward has passed them, on every device
    peak = training_peak(held + state, kept, moment, gradients, accumulates=train.accumulate > 1)
    return MemoryEstimate(held, state, gradients, kept + moment, peak)


def trained_state(parameters: int, train: Train) -> int:
    """Bytes of weights, Adam's two moments and the averaged weights, without gradients."""
    moments = EIGHT_BIT_AVERAGES if train.optimizer == "adamw8bit" else 2 * FULL
    return round(parameters * (FULL + moments + (FULL if train.ema > 0 else 0)))


def training_peak(held: int, kept: int, moment: int, gradients: int, *, accumulates: bool) -> int:
    """The highest point of a step, where a layer needs `moment`: at the end of forward or of backward, which frees what
    forward `kept` as gradients come; one that `accumulates` has gradients of an earlier pass already."""
    return held + moment + (kept + gradients if accumulates else max(kept, gradients))


def _generation(system: MetaModels, gpus: int) -> MemoryEstimate:
    """What of the chain is on the device at once, and one image at a time."""
    recipe, text, patches = system.recipe, system.mllm.config.text_config, system.grid**2
    size, width, seen = SIZES[recipe.models.dtype], text.hidden_size, recipe.branch.max_text_tokens + patches
    channels = system.vae.config.block_out_channels
    held = _chain_held(system, size)
    moment = size * max(
        # a decoder layer
        patches * (4 * width + 3 * text.intermediate_size) + 2 * seen * width,
        # a single block of FLUX: queries, keys, values, normed copies, the MLP's four widths twice, their union
        FLUX_MOMENT * (system.image_tokens + recipe.models.diffusion_text_tokens) * system.flux_width,
        # the VAE's last block at full size, which takes the channels of the one before, held by the caller too
        4 * recipe.images.output_size**2 * channels[min(1, len(channels) - 1)],
    )
    return MemoryEstimate(held, 0, 0, moment, held + moment)


def _chain_held(system: MetaModels, size: int) -> int:
    """Weights on the device at once under `generate.offload`."""
    offload, weights = system.recipe.generate.offload, system.recipe.models.weights
    mllm, branch, controlnet = system.mllm, system.branch, system.controlnet
    encoders = (system.text_encoder, system.text_encoder_2)
    if offload == "sequential":
        halves = ((mllm, branch), (system.transformer, system.vae, *encoders, controlnet))
        return size * max(
            numbers(*half) - sum(numbers(*layers_of(part)) for part in half) + max(map(_largest_layer, half))
            for half in halves
        )
    if offload == "model" and weights == "dtype":
        together = ((mllm,), (branch,), encoders, (system.transformer, controlnet), (system.vae,))
        return size * max(numbers(*parts) for parts in together)
    decoder, rendered = mllm.model.language_model, (system.transformer, *encoders)
    # What is frozen of a branch is the MLLM's own, but not when the MLLM's is quantised.
    first = size * (numbers(mllm) - numbers(decoder) + numbers(branch, trained=weights == "dtype"))
    first += bytes_of(decoder, weights, size)
    second = sum(bytes_of(part, weights, size) for part in rendered) + size * numbers(system.vae, controlnet)
    return max(first, second) if offload == "model" else first + second


def _largest_layer(module: nn.Module) -> int:
    return max(map(numbers, layers_of(module)), default=0)


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


def extraction_flops(system: MetaModels) -> int:
    """One image through the encoder and, if the store keeps its latents, the VAE."""
    images = system.recipe.images
    vae = vae_pass(system, images.output_size) if system.recipe.latents.vae else 0
    if system.encoder is system.vae:
        return vae + vae_pass(system, images.input_size)
    merge = getattr(system.mllm.config.vision_config, "spatial_merge_size", 1) if system.own_encoder else 1
    return vae + linear(numbers(system.encoder), (system.grid * merge) ** 2)


def branch_flops(system: MetaModels) -> int:
    """One optimizer step: the prompt through the frozen MLLM, the branch forward and backward."""
    train = system.recipe.branch.train
    passes = 4 if train.gradient_checkpointing else 3
    return train.batch_size * train.accumulate * (prompt_pass(system) + passes * branch_pass(system))


def controlnet_flops(system: MetaModels) -> int:
    """One optimizer step: texts, FLUX forward and back to the first residual of the ControlNet, the ControlNet."""
    train = system.recipe.controlnet.train
    again = 1 if train.gradient_checkpointing else 0
    step = text_pass(system) + (2 + again) * flux_pass(system) + (3 + again) * controlnet_pass(system)
    return train.batch_size * train.accumulate * step


def generation_flops(system: MetaModels) -> int:
    """One image from its prompt."""
    settings = system.recipe.generate
    halves = 1 if settings.branch_guidance == 1.0 else 2
    total = halves * (prompt_pass(system) + settings.decode_steps * branch_pass(system))
    if settings.plan:
        tokens = system.recipe.branch.max_text_tokens + settings.plan_tokens
        total += linear(numbers(system.mllm.model.language_model), tokens)
    total += text_pass(system) + settings.steps * (flux_pass(system) + controlnet_pass(system))
    return total + vae_pass(system, system.recipe.images.output_size, decode=True)


def prompt_pass(system: MetaModels) -> int:
    """The longest prompt through the MLLM's decoder layers; causal attention is half of full attention."""
    layers, text = system.mllm.model.language_model.layers, system.recipe.branch.max_text_tokens
    width = system.mllm.config.text_config.hidden_size
    return linear(numbers(layers), text) + attention(text, text, width, len(layers)) // 2


def branch_pass(system: MetaModels) -> int:
    """All patches through the branch, over the keys and values of the longest prompt and their own."""
    config, patches = system.mllm.config.text_config, system.grid**2
    keys = system.recipe.branch.max_text_tokens + patches
    return linear(numbers(system.branch), patches) + attention(
        patches, keys, config.hidden_size, config.num_hidden_layers
    )


def text_pass(system: MetaModels) -> int:
    """A prompt through FLUX's second text encoder."""
    return linear(numbers(system.text_encoder_2), system.recipe.models.diffusion_text_tokens)


def flux_pass(system: MetaModels, blocks: int | None = None) -> int:
    """One image's tokens and its text through FLUX's blocks, or through `blocks` of them."""
    config, width = system.transformer.config, system.flux_width
    tokens = system.image_tokens + system.recipe.models.diffusion_text_tokens
    blocks = config.num_layers + config.num_single_layers if blocks is None else blocks
    return blocks * linear(FLUX_BLOCK * width**2, tokens) + attention(tokens, tokens, width, blocks)


def controlnet_pass(system: MetaModels) -> int:
    """The same tokens through the ControlNet's blocks, and the latents through its embedder."""
    settings, embedder = system.recipe.controlnet, system.controlnet.controlnet_x_embedder
    blocks = flux_pass(system, settings.double_blocks + settings.single_blocks)
    return blocks + linear(numbers(embedder), system.image_tokens)


STAGES: dict[str, tuple[Callable[[MetaModels, int], MemoryEstimate], Callable[[MetaModels], int]]] = {
    "extract-latents": (_extraction, extraction_flops),
    "train branch": (_branch_training, branch_flops),
    "train controlnet": (_controlnet_training, controlnet_flops),
    "generate": (_generation, generation_flops),
}
