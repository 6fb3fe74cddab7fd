"""reconstruct: image -> patch latents -> image, to see what the latents keep; the branch has no part in it.

In: a recipe, an image, a ControlNet (given, or found). Out: one PNG file. Does not know the branch.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from bifrost_cli import __version__
from bifrost_cli.artifacts import Artifact
from bifrost_cli.artifacts.files import make_folder, write_bytes
from bifrost_cli.artifacts.identity import provenance
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.images import read_image, square
from bifrost_cli.data.png import png_bytes
from bifrost_cli.errors import UsageError
from bifrost_cli.generation.pipeline import Decoder
from bifrost_cli.generation.requests import destination
from bifrost_cli.loading.compatibility import choose_controlnet
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.loading.offload import OffloadPolicy, deciding, forget
from bifrost_cli.loading.resolve import resolve_device
from bifrost_cli.runtime.ui import Ui


@torch.no_grad()
def reconstruct(
    recipe: Recipe,
    image: Path | str,
    *,
    output: Path | str,
    prompt: str = "",
    controlnet: Path | str | None = None,
    workspace: Path | str = "runs",
    seed: int = 0,
    device: str = "auto",
    ui: Ui | None = None,
) -> Path:
    """Encode a square of the image, generate it again from its latents, write `output` (PNG) and return its path.

    `prompt` is what the diffusion model reads beside the latents. BadImage (4): an image that cannot be used; UsageError (2):
    the output exists or is no PNG; ArtifactError (5): a ControlNet for other latents or another diffusion model.
    """
    ui = ui or Ui()
    file = _file(output)
    decoded = read_image(Path(image), recipe.images)
    for note in decoded.notes:
        ui.say(f"{image}: {note}")
    place = resolve_device(device)
    encoder = ModelLoader(recipe.models, place).encoder(recipe.latents, recipe.images)
    chosen, why = choose_controlnet(controlnet, encoder.identity, workspace)
    ui.say(why)
    pixels_BHWC = square(decoded.rgb, recipe.images.input_size)[None]
    grid, latents_BPC = encoder.grid, encoder.encode(pixels_BHWC.copy())
    del encoder  # two large models, one after the other
    forget()
    decoder_half = Decoder.load(
        recipe, chosen, OffloadPolicy(place, recipe.generate.offload, recipe.models.weights), ui
    )
    made_HWC = decoder_half.render(prompt, latents_BPC[0], seed)
    make_folder(file.parent)
    write_bytes(file, png_bytes(made_HWC, _facts(recipe, chosen, prompt, seed)))
    ui.say(f"{file}: reconstructed from {grid[0]}x{grid[1]} latents of {image}")
    return file


def _file(output: Path | str) -> Path:
    file = destination(output, 1)
    if file is None:
        raise UsageError(f"{output} is no PNG file", fix=f"-o {output}.png")
    return file


def _facts(recipe: Recipe, controlnet: Artifact, prompt: str, seed: int) -> dict[str, str]:
    settings = {
        "images": recipe.images.model_dump(mode="json"),
        "latents": recipe.latents.model_dump(mode="json"),
        "generate": deciding(recipe),
    }
    facts = {"settings": settings, "artifacts": {"controlnet": controlnet.id}, "versions": provenance()["versions"]}
    plain = {"reconstruction": "yes", "prompt": prompt, "seed": str(seed), "Software": f"bifrost {__version__}"}
    return plain | {key: json.dumps(value) for key, value in facts.items()}
