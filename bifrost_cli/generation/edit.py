"""edit, vary, mix and decode: images from images, and from patch latents, as files.

The patch latents of an image are the MLLM's own picture of it. What masked autoregression is for: some are predicted
again, from the prompt and from those that stay.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from bifrost_cli.artifacts import Artifact, resolve
from bifrost_cli.artifacts.files import exists, make_folder, new_folder, sha256_file, write_bytes, write_new
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.images import read_image, square
from bifrost_cli.data.png import WRITTEN, contact_sheet, image_bytes, png_bytes
from bifrost_cli.data.safetensors_io import load_tensors
from bifrost_cli.data.xmp import EDITED, GENERATED
from bifrost_cli.errors import ArtifactError, UsageError
from bifrost_cli.generation import regions
from bifrost_cli.generation.choose_models import choose_controlnet, choose_models
from bifrost_cli.generation.pipeline import BifrostPipeline
from bifrost_cli.generation.requests import ImageRequest, destination, image_settings, png_facts
from bifrost_cli.loading.compatibility import has_own_conditioner, require_one_step, trained_on
from bifrost_cli.runtime.ui import Ui


def edit(
    recipe: Recipe,
    image: Path | str,
    prompt: str,
    *,
    output: Path | str,
    mask: Path | str | None = None,
    box: Sequence[float] | None = None,
    region: str | None = None,
    strength: float = 1.0,
    keep_pixels: bool = False,
    show_mask: Path | str | None = None,
    branch: Path | str | None = None,
    controlnet: Path | str | None = None,
    workspace: Path | str = "runs",
    seed: int = 0,
    device: str = "auto",
    ui: Ui | None = None,
    sets: Sequence[str] | None = None,
) -> Path:
    """Predict a part of an image again and write the whole; see `BifrostPipeline.edit`.

    Args:
        recipe: models and settings; see `sets`.
        image: a file; its centre square is read.
        prompt: what the whole image shall show.
        output: FILE.png, .jpg or .webp, which must not exist.
        mask: an image of the same size, white where it is to change. One of `mask`, `box`, `region` is needed.
        box: (x, y, width, height) in px of the image.
        region: words for what is to change; the MLLM says where it is.
        strength: share of the marked patches that are predicted again.
        keep_pixels: pixels of patches that stay are the original's.
        show_mask: FILE.png with what stays made pale, which must not exist.
        branch: a branch artifact, looked up in `workspace`; None chooses (`choose_models`). `controlnet` likewise.
        seed: (image, mask, prompt, seed, settings, weights) decide the bytes.
        sets: not None: by the recipe that trained the branch, with these `section.key=value` settings, instead.

    Returns:
        The path of the file.

    Raises:
        BadImage: (4) an image cannot be used.
        UsageError: (2) an output that exists or is no image file; a mask of another size, an empty or full one, a
            region that is not found.
        ArtifactError: (5) parts that do not fit.
    """
    ui, file = ui or Ui(), _file(output)
    shown = _file(show_mask, (".png",)) if show_mask is not None else None
    pipe, parents = _pipeline(recipe, branch, controlnet, workspace, device, ui, sets)
    rgb = _read(image, pipe, ui)
    marked = read_image(Path(mask), pipe.recipe.images).rgb if mask is not None else None
    where: dict[str, Any] = {"mask_image": marked, "box": box, "region": region}
    made = pipe.edit(rgb, prompt, **where, strength=strength, keep_pixels=keep_pixels, seed=seed)
    assert made.masked is not None  # of an edit
    patches, grid = made.masked[0].numpy(), pipe.encoder.grid
    if shown:
        make_folder(shown.parent)
        side = pipe.encoder.image_size
        write_new(shown, png_bytes(regions.shown(square(rgb, side), patches, grid)))
        ui.say(f"{shown}: pale is what stays")
    masked = "".join("1" if one else "0" for one in patches)
    how = {"edit_of": sha256_file(Path(image)), "masked": masked, "keep_pixels": keep_pixels}
    _write(file, made.images[0], ImageRequest(0, prompt, seed), made.plans[0], pipe, parents, how)
    ui.say(f"{file}: {int(patches.sum())} of {len(patches)} patches predicted again; another: --seed {seed + 1}")
    return file


def vary(
    recipe: Recipe,
    image: Path | str,
    prompt: str = "",
    *,
    output: Path | str,
    n: int = 4,
    strength: float = 0.5,
    branch: Path | str | None = None,
    controlnet: Path | str | None = None,
    workspace: Path | str = "runs",
    seed: int = 0,
    device: str = "auto",
    ui: Ui | None = None,
    sets: Sequence[str] | None = None,
) -> Path:
    """Write variations of an image, of which a share `strength` of the patches is predicted again; see `edit`.

    Args:
        output: FILE.png, .jpg or .webp for one variation, else a new folder: 00000.png, ... and grid.png.
        n: how many; variation i has seed `seed + i`.

    Returns:
        The path of the file or the folder.
    """
    ui, file = ui or Ui(), destination(output, n)
    folder = Path(output)
    if file is None and folder.exists():
        raise exists(folder)
    pipe, parents = _pipeline(recipe, branch, controlnet, workspace, device, ui, sets)
    made = pipe.vary(_read(image, pipe, ui), prompt, num_images=n, strength=strength, seed=seed)
    how = {"variation_of": sha256_file(Path(image)), "strength": strength}
    requests = [ImageRequest(index, prompt, seed + index) for index in range(n)]
    suffix = file.suffix.lower() if file else ".png"
    ways = zip(made.images, requests, made.plans, strict=True)
    data = [_bytes(*one, pipe, parents, how, suffix=suffix) for one in ways]
    make_folder((file or folder).parent)
    if file:
        write_new(file, data[0])
        return file
    with new_folder(folder) as draft:
        for request, png in zip(requests, data, strict=True):
            write_bytes(draft / request.name, png)
        sheet = contact_sheet([np.asarray(image) for image in made.images])
        write_bytes(draft / "grid.png", image_bytes(sheet, {}, source_type=EDITED))
    ui.say(f"{folder}: {n} variations, and grid.png with all of them")
    return folder


def mix(
    recipe: Recipe,
    image: Path | str,
    other: Path | str,
    *,
    output: Path | str,
    weight: float = 0.5,
    strip: int | None = None,
    prompt: str = "",
    controlnet: Path | str | None = None,
    workspace: Path | str = "runs",
    seed: int = 0,
    device: str = "auto",
    ui: Ui | None = None,
) -> Path:
    """Write the image of interpolated patch latents of two images; see `BifrostPipeline.mix`.

    Args:
        weight: of the other image's latents, 0 to 1.
        strip: instead of `weight` so many images side by side, from one image to the other.
        prompt: what the diffusion model reads beside the latents.

    Returns:
        The path of the file.
    """
    ui, file = ui or Ui(), _file(output)
    if strip is not None and strip < 2:
        raise UsageError(f"a strip of {strip} images shows no steps", fix="--strip 5")
    pipe = BifrostPipeline(recipe, device=device, ui=ui)
    pipe.controlnet, why = choose_controlnet(controlnet, pipe.encoder.identity, workspace)
    ui.say(why)
    weights = [weight] if strip is None else [index / (strip - 1) for index in range(strip)]
    made = pipe.mix(_read(image, pipe, ui), _read(other, pipe, ui), weight=weights, prompt=prompt, seed=seed)
    how = {"mix_of": [sha256_file(Path(image)), sha256_file(Path(other))], "weights": weights}
    pixels = [np.asarray(one) for one in made.images]
    shown = pixels[0] if strip is None else np.concatenate(pixels, axis=1)
    _write(file, shown, ImageRequest(0, prompt, seed), None, pipe, [pipe.controlnet], how)
    return file


def decode(
    recipe: Recipe,
    latents: Path | str,
    *,
    output: Path | str,
    prompt: str = "",
    controlnet: Path | str | None = None,
    workspace: Path | str = "runs",
    seed: int = 0,
    device: str = "auto",
    ui: Ui | None = None,
) -> Path:
    """Write the image of patch latents that `generate --save-latents` kept: the tensor `latents` (P, C) of a
    safetensors file. With the prompt and the seed of that command the same bytes of pixels.

    Raises:
        ArtifactError: (5) the file is none, or holds no such tensor.
        UsageError: (2) the output exists or is no image file; latents that the ControlNet is not for.
    """
    ui, file, path = ui or Ui(), _file(output), Path(latents)
    tensors, _ = load_tensors(path)
    kept = tensors.get("latents")
    if kept is None or kept.ndim != 2:
        held = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()) or "nothing"
        raise ArtifactError(f"{path} holds no patch latents", at=f"it holds {held}; wanted is latents (P, C)",
                            fix="bifrost generate --save-latents writes such files", code="BF-ART-007")  # fmt: skip
    if controlnet is not None:
        chosen = resolve(workspace, controlnet, "controlnet")
    else:
        models = choose_models(None, None, workspace)
        chosen = models.controlnet
        ui.say(models.why)
    pipe = BifrostPipeline(recipe, controlnet=chosen, device=device, ui=ui)
    if kept.shape[1] != (wanted := trained_on(chosen)["channels"]):
        raise ArtifactError(f"{path} holds latents of {kept.shape[1]} channels, the ControlNet reads {wanted}",
                            fix="--controlnet that was trained on such latents", code="BF-ART-004")  # fmt: skip
    made = pipe.decode(kept.float(), prompt, seed=seed)
    how = {"latents": sha256_file(path)}
    _write(file, made, ImageRequest(0, prompt, seed), None, pipe, [chosen], how, source_type=GENERATED)
    return file


def _pipeline(
    recipe: Recipe, branch: Path | str | None, controlnet: Path | str | None, workspace: Path | str, device: str,
    ui: Ui, sets: Sequence[str] | None,
) -> tuple[BifrostPipeline, list[Artifact]]:  # fmt: skip
    models = choose_models(branch, controlnet, workspace)
    if has_own_conditioner(models.branch):
        raise ArtifactError(f"branch {models.branch.id} has learned queries, which cannot read an image's patches",
                            fix="--branch builtin, or another branch", code="BF-ART-004")  # fmt: skip
    recipe = recipe if sets is None else models.own_recipe(sets)
    require_one_step(models.branch, recipe.generate.decode_steps)
    ui.say(models.why)
    pipe = BifrostPipeline(recipe, models.branch, models.controlnet, device=device, ui=ui)
    return pipe, [models.branch, models.controlnet]


def _file(output: Path | str, suffixes: Collection[str] = WRITTEN) -> Path:
    file = destination(output, 1, suffixes)
    if file is None:
        raise UsageError(f"{output} is no {' or '.join(suffixes)} file", fix=quote(f"{output}.png"))
    return file


def _read(image: Path | str, pipe: BifrostPipeline, ui: Ui) -> np.ndarray:
    decoded = read_image(Path(image), pipe.recipe.images)
    for note in decoded.notes:
        ui.say(f"{image}: {note}")
    return decoded.rgb


def _write(file: Path, image: Any, *facts: Any, source_type: str = EDITED) -> None:
    make_folder(file.parent)
    write_new(file, _bytes(image, *facts, source_type=source_type, suffix=file.suffix.lower()))


def _bytes(
    image: Any, request: ImageRequest, plan: str | None, pipe: BifrostPipeline, parents: Sequence[Artifact],
    how: dict[str, Any], *, source_type: str = EDITED, suffix: str,
) -> bytes:  # fmt: skip
    settings = image_settings(pipe.recipe, max_text_tokens=pipe.recipe.branch.max_text_tokens)
    facts = png_facts(request, {**settings, **how}, parents, plan)
    return image_bytes(np.asarray(image), facts, source_type=source_type, suffix=suffix)
