"""`bifrost bench extract`: extract-latents from image files to a finished store, against the bare encoders on the same
images, decoded, resized and stacked in memory."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2VLImageProcessor

from bifrost_cli.artifacts.files import make_folder, write_bytes
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.images import square
from bifrost_cli.data.png import png_bytes
from bifrost_cli.extraction.extract import ExtractionRun
from bifrost_cli.extraction.source import scan_source
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.models.encoders import Encoder, MllmEncoder, VaeEncoder
from bifrost_cli.models.mllm.frozen_mllm import Mllm
from bifrost_cli.planning.bench.paired import BenchRow, BenchSetup, compare, random_weights
from bifrost_cli.planning.model_configs import configs
from bifrost_cli.runtime.ui import Ui


def bench_extract(setup: BenchSetup) -> Iterator[BenchRow]:
    """One row. Loading the models is not timed; scanning the source, writing and committing the store are."""
    count = setup.sizes.get("images", 512)
    pixels = setup.sizes.get("pixels", 2 * setup.recipe.images.input_size)
    recipe, (encoder, vae) = setup.recipe, _encoders(setup)
    size, batch = encoder.image_size, recipe.latents.batch_size
    output_size = vae.image_size if vae else None
    _ = encoder.identity, vae and vae.identity  # the hashes of their weights are made once
    with tempfile.TemporaryDirectory(prefix="bifrost-bench-") as place:
        folder = Path(place)
        images = list(_photographs(folder / "source", count, pixels))
        inputs = np.stack([square(image, size) for image in images])
        outputs = None if output_size is None else np.stack([square(image, output_size) for image in images])
        numbers = itertools.count()

        def ours() -> None:
            scanned = scan_source(str(folder / "source"), recipe, folder, Ui())
            job = ExtractionRun(recipe, "source", scanned, encoder, vae, setup.device, Ui())
            job.run(folder / f"latents-{next(numbers)}")

        def bare() -> None:
            for start in range(0, count, batch):
                encoder.encode(inputs[start : start + batch]).to("cpu", torch.float16)
                if vae is not None and outputs is not None:
                    vae.encode(outputs[start : start + batch]).to("cpu", torch.float16)

        what = f"extraction of {count} PNG files of {pixels} pixels"
        yield compare(what, ours, bare, baseline="the bare encoders", setup=setup, work=(count, "images"))


def _photographs(folder: Path, count: int, pixels: int) -> Iterator[np.ndarray]:
    """Write images of smooth noise with captions, as a photograph's numbers are neither flat nor random."""
    make_folder(folder)
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        rgb = np.asarray(coarse.resize((pixels, pixels), Image.Resampling.BICUBIC))
        write_bytes(folder / f"{number:05d}.png", png_bytes(rgb))
        write_bytes(folder / f"{number:05d}.txt", b"noise")
        yield rgb


def _encoders(setup: BenchSetup) -> tuple[Encoder, VaeEncoder | None]:
    """The recipe's: the tiny system's own, or at a recipe's widths with random weights."""
    recipe: Recipe = setup.recipe
    if not setup.full or recipe.models.mllm.startswith("builtin:"):
        loader = ModelLoader(recipe.models, setup.device)
        vae = VaeEncoder(loader.vae(), recipe.images.output_size) if recipe.latents.vae else None
        return loader.encoder(recipe.latents, recipe.images), vae
    from diffusers import AutoencoderKL

    config: Any = AutoConfig.from_pretrained(configs(recipe.models.mllm), trust_remote_code=False)
    config.text_config.num_hidden_layers = 1  # images never meet the decoder
    with random_weights(setup):
        model = AutoModelForImageTextToText.from_config(config)
        vae_model = AutoencoderKL.from_config(AutoencoderKL.load_config(configs(recipe.models.diffusion) / "vae"))
    vision = config.vision_config
    nothing: Any = None  # no text is read
    processor = Qwen2VLImageProcessor(patch_size=vision.patch_size, merge_size=vision.spatial_merge_size)
    encoder = MllmEncoder(Mllm(model, nothing, processor), recipe.images.input_size)
    return encoder, VaeEncoder(vae_model, recipe.images.output_size) if recipe.latents.vae else None
