"""edit, vary, mix and decode as commands: images from images, and from kept patch latents."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from bifrost_cli.artifacts import resolve
from bifrost_cli.cli.command import Result, command, refusals
from bifrost_cli.cli.options import RUNS, Device, Recipe, Workspace
from bifrost_cli.cli.stage_commands import RECONSTRUCT, Branch, ControlNet, Image, NewImage, Seed
from bifrost_cli.errors import UsageError
from bifrost_cli.runtime.light_imports import import_generation
from bifrost_cli.runtime.ui import Ui

BRANCH_KEYS = ("generate.decode_steps", "generate.branch_guidance", "generate.temperature", *RECONSTRUCT)

app = typer.Typer()

Wanted = Annotated[str, typer.Argument(metavar="PROMPT", help="What the whole image shall show.")]
Again = typer.Option("--strength", min=0.0, max=1.0, help="Share of those patches that are predicted again.")


@command(app, "edit", BRANCH_KEYS, default=None)
def edit(
    recipe: Recipe, ui: Ui, settings: list[str] | None, image: Image, prompt: Wanted,
    output: NewImage = Path("edited.png"),
    mask: Annotated[Path | None,
        typer.Option("--mask", metavar="FILE", help="An image of the same size, white where it is to change.")] = None,
    box: Annotated[str | None, typer.Option("--box", metavar="X,Y,W,H", help="What is to change, in px.")] = None,
    region: Annotated[str | None,
        typer.Option("--region", metavar="WORDS", help="What is to change, in words; the MLLM finds it.")] = None,
    strength: Annotated[float, Again] = 1.0,
    keep_pixels: Annotated[bool,
        typer.Option("--keep-pixels", help="Keep the image's own pixels where nothing changes.")] = False,
    show_mask: Annotated[Path | None,
        typer.Option("--show-mask", metavar="FILE.png", help="Also write what is to change, the rest pale.")] = None,
    branch: Branch = None, controlnet: ControlNet = None, seed: Seed = 0, workspace: Workspace = RUNS,
    device: Device = "auto",
) -> Result:  # fmt: skip
    """Change a part of an image: its patches are predicted again, from the prompt and from those that stay.

    Example: bifrost edit out.png "a green circle above a blue square" --region "the red circle" -o edited.png
    """
    with refusals():
        if sum(part is not None for part in (mask, box, region)) != 1:
            raise UsageError("what is to change is not marked, or twice",
                             fix="give one of --box X,Y,W,H, --mask FILE and --region WORDS")  # fmt: skip
        _require(output, branch, controlnet, workspace, recipe, [image, *([mask] if mask else [])], [show_mask])
        corners = _box(box)
    import_generation(recipe.models.weights)
    from bifrost_cli.generation.edit import edit as run

    made = run(
        recipe, image, prompt, output=output, mask=mask, box=corners, region=region, strength=strength,
        keep_pixels=keep_pixels, show_mask=show_mask, branch=branch, controlnet=controlnet, workspace=workspace,
        seed=seed, device=device, ui=ui, sets=settings,
    )  # fmt: skip
    return Result.of(made)


@command(app, "vary", BRANCH_KEYS, default=None)
def vary(
    recipe: Recipe, ui: Ui, settings: list[str] | None, image: Image,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the variations shall show.")] = "",
    output: Annotated[Path,
        typer.Option("--output", "-o", metavar="PATH", help="A new folder; FILE.png for one.")] = Path("variations"),
    n: Annotated[int, typer.Option("-n", min=1, help="How many variations.")] = 4,
    strength: Annotated[float, Again] = 0.5,
    branch: Branch = None, controlnet: ControlNet = None, seed: Seed = 0, workspace: Workspace = RUNS,
    device: Device = "auto",
) -> Result:  # fmt: skip
    """Make variations of an image: a share of its patches, others in each, is predicted again.

    Example: bifrost vary out.png "a red circle above a blue square" -n 4 -o variations
    """
    with refusals():
        _require(output, branch, controlnet, workspace, recipe, [image], [], n)
    import_generation(recipe.models.weights)
    from bifrost_cli.generation.edit import vary as run

    made = run(
        recipe, image, prompt, output=output, n=n, strength=strength, branch=branch, controlnet=controlnet,
        workspace=workspace, seed=seed, device=device, ui=ui, sets=settings,
    )  # fmt: skip
    return Result.of(made)


@command(app, "mix", RECONSTRUCT)
def mix(
    recipe: Recipe, ui: Ui, image: Image,
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Another image.")],
    output: NewImage = Path("mixed.png"),
    weight: Annotated[float, typer.Option("--weight", min=0.0, max=1.0, help="Of the other image.")] = 0.5,
    strip: Annotated[int | None,
        typer.Option("--strip", min=2, metavar="N", help="N images side by side, from one to the other.")] = None,
    prompt: Annotated[str, typer.Option("--prompt", help="What the diffusion model reads beside the latents.")] = "",
    controlnet: ControlNet = None, seed: Seed = 0, workspace: Workspace = RUNS, device: Device = "auto",
) -> Result:  # fmt: skip
    """Mix two images: the image of their interpolated latents.

    Example: bifrost mix a.png b.png --strip 5 -o strip.png
    """
    with refusals():
        _require(output, None, controlnet, workspace, recipe, [image, other], [])
    import_generation(recipe.models.weights)
    from bifrost_cli.generation.edit import mix as run

    return Result.of(run(recipe, image, other, output=output, weight=weight, strip=strip, prompt=prompt,
                         controlnet=controlnet, workspace=workspace, seed=seed, device=device, ui=ui))  # fmt: skip


@command(app, "decode", RECONSTRUCT)
def decode(
    recipe: Recipe, ui: Ui,
    latents: Annotated[Path, typer.Argument(metavar="LATENTS", help="A file of generate --save-latents.")],
    output: NewImage = Path("decoded.png"),
    prompt: Annotated[str, typer.Option("--prompt", help="What the diffusion model reads beside the latents.")] = "",
    controlnet: ControlNet = None, seed: Seed = 0, workspace: Workspace = RUNS, device: Device = "auto",
) -> Result:  # fmt: skip
    """Turn kept patch latents into an image.

    Example: bifrost decode out.safetensors --prompt "a red circle above a blue square" -o again.png
    """
    with refusals():
        _require(output, None, controlnet, workspace, recipe, [], [])
    import_generation(recipe.models.weights)
    from bifrost_cli.generation.edit import decode as run

    return Result.of(run(recipe, latents, output=output, prompt=prompt, controlnet=controlnet, workspace=workspace,
                         seed=seed, device=device, ui=ui))  # fmt: skip


def _require(
    output: Path, branch: str | None, controlnet: str | None, workspace: Path, recipe: Any, images: list[Path],
    more: list[Path | None], count: int = 1,
) -> None:  # fmt: skip
    """Refuse what can be refused before a model library is imported."""
    from bifrost_cli.data.images import read_image
    from bifrost_cli.generation.requests import destination

    if destination(output, count) is None and count == 1:
        raise UsageError(f"{output} is no image file", fix=f"-o {quote(f'{output}.png')}")
    for file in more:
        if file is not None and destination(file, 1, (".png",)) is None:
            raise UsageError(f"{file} is not a PNG file", fix=quote(f"{file}.png"))
    for kind, ref in (("branch", branch), ("controlnet", controlnet)):
        if ref is not None:
            resolve(workspace, ref, kind)
    for image in images:
        read_image(image, recipe.images)


def _box(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 4:
        raise UsageError(f"--box {text} is not X,Y,WIDTH,HEIGHT in px", fix="for example --box 16,0,16,16")
    return numbers
