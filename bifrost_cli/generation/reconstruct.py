"""reconstruct: images to patch latents and back, to see what the latents keep; the branch has no part in it.

`reconstruct` makes one image file, `reconstruct_set` a samples artifact that an interrupted run continues.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from bifrost_cli.artifacts import Artifact, Draft, default_path, identity_id
from bifrost_cli.artifacts.files import make_folder, write_new
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.image_sets import PROMPTS, ImageSet
from bifrost_cli.data.images import DecodedImage, read_image
from bifrost_cli.data.png import image_bytes
from bifrost_cli.data.xmp import EDITED
from bifrost_cli.errors import UsageError
from bifrost_cli.generation.choose_models import choose_controlnet
from bifrost_cli.generation.generate import write_lines
from bifrost_cli.generation.pipeline import BifrostPipeline
from bifrost_cli.generation.requests import ImageRequest, destination, generate_settings, image_settings, png_facts
from bifrost_cli.generation.samples_folder import Work, fill_folder
from bifrost_cli.generation.stages import PredictedLatents
from bifrost_cli.loading.loaders import decisive_files, files_between
from bifrost_cli.runtime import distributed
from bifrost_cli.runtime.launch import together
from bifrost_cli.runtime.ui import Ui

_MARK = {"reconstruction": "yes"}


@together
def reconstruct(
    recipe: Recipe, image: Path | str, *, output: Path | str, prompt: str = "", controlnet: Path | str | None = None,
    workspace: Path | str = "runs", seed: int = 0, device: str = "auto", ui: Ui | None = None,
) -> Path:  # fmt: skip
    """Encode the centre square of an image, generate it again from its latents, and write it.

    Args:
        recipe: models and settings.
        image: a file.
        output: FILE.png, .jpg or .webp, which must not exist.
        prompt: what the diffusion model reads beside the latents.
        controlnet: a ControlNet artifact, looked up in `workspace`; None chooses (`choose_controlnet`).
        seed: of the noise that the diffusion model starts from.
        ui: hears what was chosen.

    Returns:
        The path of the file.

    Raises:
        BadImage: (4) the image cannot be used.
        UsageError: (2) the output exists or is no image file.
        ArtifactError: (5) a ControlNet for other latents or another diffusion model.
    """
    ui, file = ui or Ui(), destination(output, 1)
    if file is None:
        raise UsageError(f"{output} is no image file", fix=f"-o {quote(f'{output}.png')}")
    decoded = read_image(Path(image), recipe.images)
    for note in decoded.notes:
        ui.say(f"{image}: {note}")
    return distributed.run_on_main(  # one image cannot be shared
        lambda: _reconstruct(recipe, image, decoded, file, prompt, controlnet, workspace, seed, device, ui)
    )


def _reconstruct(
    recipe: Recipe, image: Path | str, decoded: DecodedImage, file: Path, prompt: str, controlnet: Path | str | None,
    workspace: Path | str, seed: int, device: str, ui: Ui,
) -> Path:  # fmt: skip
    pipe, used = _pipeline(recipe, controlnet, workspace, device, ui)
    rows, columns = pipe.encoder.grid
    request = ImageRequest(0, prompt, seed)
    pixels_HWC = pipe.image_of(request, pipe.encode(decoded.rgb))
    settings: dict[str, Any] = {key: getattr(recipe, key).model_dump(mode="json") for key in ("images", "latents")}
    settings |= {"generate": generate_settings(recipe), **files_between(recipe)}
    make_folder(file.parent)
    facts = _MARK | png_facts(request, settings, [used])
    write_new(file, image_bytes(pixels_HWC, facts, source_type=EDITED, suffix=file.suffix.lower()))
    ui.say(f"{file}: reconstructed from {rows}x{columns} latents of {image}")
    return file


@together
def reconstruct_set(
    recipe: Recipe, images: ImageSet, *, controlnet: Path | str | None = None, workspace: Path | str = "runs",
    seed: int = 0, device: str = "auto", ui: Ui | None = None,
) -> Artifact:  # fmt: skip
    """Encode each image of a set and generate it again from its latents alone: the diffusion model reads no text.

    Arguments and errors as `reconstruct`; all are encoded before one is rendered. Stopped (75): a signal between
    images; the same call again continues.

    Returns:
        A samples artifact whose image i is the i-th of the set.
    """
    ui = ui or Ui()
    pipe, used = _pipeline(recipe, controlnet, workspace, device, ui)
    settings = image_settings(recipe, encoder=pipe.encoder.identity, **decisive_files("diffusion", recipe.models))
    counted = {"reconstructions of": images.digest, "count": len(images.entries)}
    identity = {**counted, "seed": seed, "settings": settings}
    folder = default_path(workspace, "samples", identity_id("samples", identity, [used]))
    requests = [ImageRequest(index, entry.prompt or "", seed) for index, entry in enumerate(images.entries)]

    def encode(requests: Sequence[ImageRequest]) -> list[PredictedLatents]:
        return [PredictedLatents(request.prompt, None, False, pipe.encode(images.entries[request.index].load()))
                for request in requests]  # fmt: skip

    def render(
        requests: Sequence[ImageRequest], predicted: Sequence[PredictedLatents]
    ) -> list[tuple[dict[str, bytes], dict[str, Any]]]:
        made: list[tuple[dict[str, bytes], dict[str, Any]]] = []
        for request, latents in zip(requests, predicted, strict=True):
            pixels_HWC = pipe.image_of(replace(request, prompt=""), latents.latents_PC)
            made.append(({request.name: image_bytes(pixels_HWC, _MARK, source_type=EDITED)}, {}))
        return made

    def commit(draft: Draft, facts: Mapping[int, dict[str, Any]]) -> Artifact:
        lines = [{"index": r.index, "file": r.name, "prompt": r.prompt or None, "plan": None, "seed": r.seed,
                  "of": images.entries[r.index].name} for r in requests]  # fmt: skip
        write_lines(draft.path / PROMPTS, lines)
        info = {"settings": settings, "recipe": recipe.model_dump(mode="json")}
        return draft.commit(info, made={"seed": seed, "device": device}, cost={"samples": len(requests)})

    return fill_folder(folder, identity, [used], requests, Work(encode, render, commit, latents_first=True), ui)


def _pipeline(
    recipe: Recipe, controlnet: Path | str | None, workspace: Path | str, device: str, ui: Ui
) -> tuple[BifrostPipeline, Artifact]:
    """Encoder and decoder, with the ControlNet that was chosen for this encoder's latents."""
    pipe = BifrostPipeline(recipe, device=device, one_half=True, ui=ui)
    identity = pipe.encoder.identity
    pipe.controlnet, why = distributed.run_on_main(lambda: choose_controlnet(controlnet, identity, workspace))
    ui.say(why)
    return pipe, pipe.controlnet
