"""What each stage of a recipe needs of a device's memory.

In: a `System` (parts without weights) and its recipe. Out: a `MemoryEstimate` for each stage: what is held, what a step adds, the
peak. The sums are those of `maths.memory`; this file knows which parts a stage holds and which sizes its tensors have.
The longest text that the recipe allows is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from bifrost_cli.config.schema import Recipe, Train
from bifrost_cli.loading.quantize import bytes_of, layers_of
from bifrost_cli.planning import memory
from bifrost_cli.planning.meta_models import MetaModels, numbers

SIZES = {"float32": 4, "bfloat16": 2, "fp32": 4, "bf16": 2}
STAGES = ("extract-latents", "train branch", "train controlnet", "generate")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device. `held`: frozen weights; `state`: trained weights, optimizer, averages; then what a step
    adds. `peak` is less than their sum, because activations go as gradients come."""

    held: int
    state: int
    gradients: int
    activations: int
    peak: int


def estimates(system: MetaModels, recipe: Recipe, gpus: int = 1) -> dict[str, MemoryEstimate]:
    """The need of every stage of `recipe`, whose models are those of `system`, of each of `gpus` devices: trainings
    share their batch, and with `parallel: fsdp` what is trained; nothing else is shared."""
    return {name: estimate(name, system, recipe, gpus) for name in STAGES}


def estimate(stage: str, system: MetaModels, recipe: Recipe, gpus: int = 1) -> MemoryEstimate:
    """The need of one stage of `STAGES`, as `needs`."""
    if stage == "extract-latents":
        return extraction(system, recipe)
    if stage == "generate":
        return generation(system, recipe)
    training = branch_training if stage == "train branch" else controlnet_training
    return training(system, recipe, gpus)


def extraction(system: MetaModels, recipe: Recipe) -> MemoryEstimate:
    """The MLLM as a whole when its visual encoder is used, and FLUX's VAE."""
    latents, size = recipe.latents, SIZES[recipe.models.dtype]
    own = memory.FULL if latents.encoder not in ("mllm", "vae") else size  # open_clip is read in float32
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
    held += memory.prefix_cache(batch, prompt, text.num_hidden_layers, key_width, size=frozen)
    widths = (text.hidden_size, text.intermediate_size)
    kinds = _layer_kinds(recipe, text.num_hidden_layers)
    layers = [memory.decoder_layer_kept(batch, patches, prompt, *widths, size=size, weights=kind) for kind in kinds]
    kept = memory.branch_head_kept(batch, patches, text.hidden_size, system.channels)
    if train.gradient_checkpointing:
        kept += memory.checkpointed_kept(batch, patches, text.hidden_size, layers)
    else:
        kept += sum(layers)
    moment = memory.branch_moment(batch, patches, *widths, system.channels, size=size)
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
    kept = memory.controlnet_kept(tokens, width, *blocks, size=size, checkpointed=train.gradient_checkpointing)
    kept += memory.embedder_kept(image, system.channels, size=size)
    return _training(train, system.controlnet, gpus, held, kept, memory.FLUX_MOMENT * tokens * width * size)


def generation(system: MetaModels, recipe: Recipe) -> MemoryEstimate:
    """What of the chain is on the device at once, and one image at a time."""
    size = SIZES[recipe.models.dtype]
    text, patches = system.mllm.config.text_config, system.grid**2
    held = _chain_held(system, recipe, size)
    seen = recipe.branch.max_text_tokens + patches
    config = system.vae.config.block_out_channels
    moments = (
        memory.decoder_moment(1, patches, seen, text.hidden_size, text.intermediate_size, size=size),
        memory.flux_moment(system.image_tokens() + recipe.models.diffusion_text_tokens, _flux_width(system), size=size),
        memory.vae_decode_moment(1, recipe.images.output_size**2, config[min(1, len(config) - 1)], size=size),
    )
    return MemoryEstimate(held, 0, 0, max(moments), held + max(moments))


def _chain_held(system: MetaModels, recipe: Recipe, size: int) -> int:
    """Weights on the device while `stages.offload_policy` has the parts where `offload` says."""
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
    state = memory.trained_state(parameters, eight_bit=train.optimizer == "adamw8bit", averaged=train.ema > 0)
    gradients = memory.FULL * parameters
    if gpus > 1 and train.parallel == "fsdp":
        state, gradients = -(-state // gpus), -(-gradients // gpus)
        moment += 2 * memory.FULL * _largest_layer(module)  # one layer put together while the next one is fetched
    elif gpus > 1:
        held += gradients  # DDP sends copies
    if train.precision == "bf16":
        kept += 2 * parameters  # autocast keeps the weights it has cast until backward has passed them, on every device
    peak = memory.training_peak(held + state, kept, moment, gradients, accumulates=train.accumulate > 1)
    return MemoryEstimate(held, state, gradients, kept + moment, peak)


def _encoder_moment(system: MetaModels, batch: int, side: int, size: int) -> int:
    if system.encoder is system.vae:
        return _vae_moment(system, batch, side, size)
    if not system.own_encoder:
        width, patches = system.channels, batch * system.grid**2
        return memory.vision_moment(patches, width, 4 * width, 3 * (side // system.grid) ** 2, size=size)
    vision = system.mllm.config.vision_config
    patches = batch * (side // vision.patch_size) ** 2
    pixels = 3 * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    return memory.vision_moment(patches, vision.hidden_size, vision.intermediate_size, pixels, size=size)


def _vae_moment(system: MetaModels, batch: int, side: int, size: int) -> int:
    config = system.vae.config
    return memory.vae_encode_moment(batch, side**2, config.block_out_channels[0], config.layers_per_block, size=size)


def _weights(*modules: nn.Module, size: int) -> int:
    return size * numbers(*modules)


def _diffusion(system: MetaModels) -> tuple[nn.Module, ...]:
    return system.transformer, system.vae, system.text_encoder, system.text_encoder_2


def _flux_width(system: MetaModels) -> int:
    config = system.transformer.config
    return config.num_attention_heads * config.attention_head_dim
