"""`bifrost bench generate`: an image of patch latents by our denoising loop and latent ControlNet, against diffusers'
own FluxControlNetPipeline with a ControlNet of as many blocks, which reads an image.

Both use the same transformer, VAE, text encoders, steps and size, with random weights; the two images differ, because
the two ControlNets read different things.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from bifrost_cli.artifacts.files import read_json
from bifrost_cli.config.load import load_recipe
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.models.diffusion.base import ControlInput
from bifrost_cli.models.diffusion.flux import FluxModel
from bifrost_cli.planning.bench.paired import BenchRow, BenchSetup, compare, random_weights
from bifrost_cli.planning.model_configs import configs

PROMPT = "a red circle above a blue square"
GRID = 16  # patch latents on a side, as at the paper's scale
SMALL = {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 8, "attention_head_dim": 64,
         "axes_dims_rope": [16, 24, 24]}  # fmt: skip


def bench_generate(setup: BenchSetup) -> Iterator[BenchRow]:
    """One row: text encoders, denoising with a ControlNet, and the VAE's decoder."""
    recipe = setup.recipe
    pixels = setup.sizes.get("pixels", recipe.images.output_size)
    steps = setup.sizes.get("steps", recipe.generate.steps)
    text_tokens, channels = recipe.models.diffusion_text_tokens, 3584 if setup.full else 512
    model, (double, single) = _flux(setup), (recipe.controlnet.double_blocks, recipe.controlnet.single_blocks)
    side = pixels // model.factor // 2
    with random_weights(setup):
        latent = model.new_controlnet(double, single, channels, max(1, side // GRID)).eval()
        blocks = {"num_layers": double, "num_single_layers": single}
        stock = FluxControlNetModel.from_config({**model.transformer.config, **blocks}).eval()
        latents_BPC = torch.randn(1, (side // max(1, side // GRID)) ** 2, channels)
    parts = ("vae", "scheduler", "transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipeline: Any = FluxControlNetPipeline(**{part: getattr(model, part) for part in parts}, controlnet=stock)
    pipeline.set_progress_bar_config(disable=True)
    picture = torch.zeros(1, 3, pixels, pixels, device=setup.device, dtype=setup.dtype)

    @torch.no_grad()
    def ours() -> Any:
        noise_Bchw = model.noise(pixels, torch.Generator().manual_seed(0))
        text = model.embed([PROMPT], text_tokens)
        return model.decode(model.denoise(noise_Bchw, text, control=ControlInput(latent, latents_BPC), steps=steps))

    def theirs() -> Any:
        return pipeline(PROMPT, control_image=picture, num_inference_steps=steps, height=pixels, width=pixels,
                        max_sequence_length=text_tokens, output_type="np").images  # fmt: skip

    what = f"an image of {pixels} pixels in {steps} steps, {double} and {single} ControlNet blocks"
    yield compare(what, ours, theirs, baseline="diffusers' FluxControlNetPipeline", setup=setup, flops=True)


def _flux(setup: BenchSetup) -> FluxModel:
    """FLUX with random weights; tokenizers of the built-in one, whose ids every text encoder knows."""
    tiny = load_recipe("tiny")
    own = ModelLoader(tiny.models).diffusion()
    assert isinstance(own, FluxModel)
    tokenizers = {"tokenizer": own.tokenizer, "tokenizer_2": own.tokenizer_2}
    if not setup.full:
        small = {**own.transformer.config, **SMALL}
        with random_weights(setup):
            transformer = FluxTransformer2DModel.from_config(small).eval()
        parts = {"vae": own.vae, "text_encoder": own.text_encoder, "text_encoder_2": own.text_encoder_2}
        return FluxModel(transformer=transformer, scheduler=own.scheduler, **parts, **tokenizers)
    folder = configs(setup.recipe.models.diffusion)
    read = {part: read_json(folder / part / "config.json") for part in ("transformer", "vae", "text_encoder",
                                                                      "text_encoder_2")}  # fmt: skip
    with random_weights(setup):
        parts = {
            "transformer": FluxTransformer2DModel.from_config(read["transformer"]),
            "vae": AutoencoderKL.from_config(read["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(read["text_encoder"])),
            "text_encoder_2": T5EncoderModel(T5Config.from_dict(read["text_encoder_2"])),
        }
    for part in parts.values():
        part.eval().requires_grad_(False)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    return FluxModel(scheduler=scheduler, **parts, **tokenizers)
