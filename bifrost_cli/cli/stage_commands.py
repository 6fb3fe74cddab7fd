"""The stages as commands. Each imports its stage inside, so that help and other commands stay quick."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

import typer

from bifrost_cli.artifacts import newest, resolve
from bifrost_cli.artifacts.manifest import require_place
from bifrost_cli.cli.command import FIRST_PROMPT, Result, command, refusals, start_processes
from bifrost_cli.cli.options import (
    RUNS,
    Device,
    DryRun,
    Gpus,
    Init,
    Output,
    Recipe,
    Resume,
    Workspace,
    artifact_option,
    parameter,
)
from bifrost_cli.errors import Findings, UsageError, public
from bifrost_cli.planning.bench import BENCHES
from bifrost_cli.runtime.launch import distributed_env
from bifrost_cli.runtime.light_imports import import_generation
from bifrost_cli.runtime.ui import Ui

SOURCE = (
    "latents.missing_caption", "latents.bad_image", "latents.max_bad", "images.animated", "latents.image_column",
    "latents.caption_column", "latents.captions", "latents.class_names", "latents.captions_per_image",
    "latents.caption_extension", "latents.recursive",
)  # fmt: skip
EXTRACT = ("latents.encoder", "latents.batch_size", "images.background", *SOURCE)
TRAIN = ("steps", "batch_size", "lr")
RECONSTRUCT = ("generate.steps", "generate.guidance_scale", "generate.control_scale")
GENERATE = ("generate.plan", "generate.decode_steps", "generate.branch_guidance", *RECONSTRUCT)
_FILES = (".tar", ".parquet", ".jsonl", ".csv", ".tsv")

app = typer.Typer()
train = typer.Typer(no_args_is_help=True, help="Train the branch or the ControlNet on a latents store.")
bench = typer.Typer(no_args_is_help=True, help="Measure what a design decision saves.")
app.add_typer(train, name="train")
app.add_typer(bench, name="bench")
data = typer.Typer(no_args_is_help=True, help="Check images and captions before they are encoded.")
shapes = typer.Typer(no_args_is_help=True, help="The built-in world of coloured shapes.")

Latents = Annotated[str | None, artifact_option("--latents", "A store or its address.  (default: the newest)")]
Branch = Annotated[str | None, artifact_option("--branch", "A branch artifact.")]
ControlNet = Annotated[str | None, artifact_option("--controlnet", "A ControlNet artifact.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same bytes.")]
NewImage = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE.png", help="A new PNG, JPEG (.jpg) or WebP file.")
]
Image = Annotated[Path, typer.Argument(metavar="IMAGE", help="A PNG, JPEG or WebP file.")]


@command(app, "extract-latents", EXTRACT, stage="extract_latents")
def extract_latents(
    recipe: Recipe, ui: Ui,
    source: Annotated[list[str] | None,
        typer.Argument(metavar="SOURCE...", help="Images: see above.  [default: the built-in world]")] = None,
    output: Output = None, workspace: Workspace = RUNS,
    device: Device = "auto", gpus: Gpus = 1, dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Turn images and captions into a latents store.

    SOURCE is a folder of images with .txt captions or a metadata.jsonl, a table (.jsonl, .csv, .tsv, .parquet),
    WebDataset archives ('shards-{000..099}.tar'), hf:NAME[:SPLIT], or shapes:N; of several, the keys say of which an
    image is. Given again, the command continues where it stopped.

    Example: bifrost extract-latents photos/ -o runs/photos
    """
    if output is not None and not output.is_symlink():
        require_place(output)
    if not source:
        return
    from bifrost_cli.data.sources.hf_datasets import HUB
    from bifrost_cli.data.sources.listing import list_source
    from bifrost_cli.data.sources.remote import expand, is_remote
    from bifrost_cli.data.sources.scan import SHAPES
    from bifrost_cli.extraction.source import refuse_output

    for part in source:
        refuse_output(part, output, workspace)
        if not is_remote(part) and not part.startswith((HUB, *SHAPES)):
            places = [Path(place) for place in expand(part)]
            if not all(place.is_dir() or (place.exists() and place.suffix in _FILES) for place in places):
                list_source(part, recipe.latents)  # it says why


@command(data, "check", SOURCE)
def check(
    recipe: Recipe, ui: Ui,
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="As for extract-latents.")],
) -> Result:  # fmt: skip
    """Read every image and caption of a source as extract-latents would. Exit code 8 when that would stop.

    Example: bifrost data check photos/
    """
    from bifrost_cli.data.sources.scan import listed
    from bifrost_cli.data.sources.several import as_one
    from bifrost_cli.extraction.source import check_source

    source = as_one(sources)
    found = check_source(recipe, source, ui=ui)
    causes = dict(sorted(Counter(problem.event for problem in found.problems).items()))
    source, lines = public(source), [public(f"{one.event}  {one.where}: {one.reason}") for one in found.problems]
    lines += [f"counted: {listed(found.counts)}"] if found.counts else []
    lines += [f"funnel: {listed(found.funnel)}"] if found.funnel else []
    stops = found.stops
    data = {"source": source, "funnel": dict(found.funnel), "counts": dict(found.counts), "causes": causes,
            "problems": [public(vars(problem)) for problem in found.problems],
            "stops": {"code": stops.code, "message": public(stops.message)} if stops else None}  # fmt: skip
    if not stops:
        return Result([*lines, "extract-latents would not stop"], data, source)
    told = f"found {listed(causes)}; " if causes else ""
    message = f"{told}extract-latents would stop: {stops.message} ({stops.code})"
    return Result(lines, data, error=Findings(message, at=None if found.problems else stops.at, fix=stops.fix))


def _train(
    recipe: Recipe, ui: Ui, latents: Latents = None, output: Output = None, workspace: Workspace = RUNS,
    resume: Resume = "auto", init: Init = None, device: Device = "auto", gpus: Gpus = 1, dry_run: DryRun = False,
) -> None:  # fmt: skip
    if init is not None:
        resolve(workspace, init)
    if latents is None:
        newest(workspace, "latents")
    elif "://" not in latents:
        resolve(workspace, latents, "latents")
    if output is not None:
        require_place(output)


for _part, _what, _example in (
    ("branch", "visual generation branch", "branch --set branch.train.steps=2000"),
    ("controlnet", "latent ControlNet", "controlnet --latents runs/photos"),
):
    _help = f"""Train the {_what} on a latents store.

    Given again, the command continues from the last checkpoint, to the bit.

    Example: bifrost train {_example}
    """
    command(train, _part, [f"{_part}.train.{key}" for key in TRAIN], stage=f"train_{_part}", text=_help)(_train)


@command(app, "generate", GENERATE, default=None)
def generate(
    recipe: Recipe, ui: Ui, settings: list[str] | None,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to generate.")] = None,
    prompts: Annotated[Path | None,
        typer.Option("--prompts", metavar="FILE", help="Prompts, one a line; - is stdin.")] = None,
    output: Output = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Images of each prompt.")] = 1,
    seed: Seed = 0, branch: Branch = None, controlnet: ControlNet = None,
    grid: Annotated[bool, typer.Option("--grid", help="Also put all images into one.")] = False,
    save_latents: Annotated[bool, typer.Option("--save-latents", help="Also keep the predicted latents.")] = False,
    timings: Annotated[bool, typer.Option("--timings", help="Say how long each stage took.")] = False,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images in one pass; the last bits depend on it.")] = 1,
    workspace: Workspace = RUNS, device: Device = "auto", gpus: Gpus = 1, dry_run: DryRun = False,
) -> Result:  # fmt: skip
    """Generate images of a prompt, or of each line of a file.

    -o FILE.png (.jpg, .webp) makes one image; -o DIR a samples folder, which is continued when the command is given
    again. Each image says in its XMP that a model made it.

    Example: bifrost generate "a green star left of a yellow circle" -o out.png --seed 7
    """
    with refusals():
        given = _prompts(prompt, prompts, output, n, grid)
        for kind, ref in (("branch", branch), ("controlnet", controlnet)):
            if ref is not None:
                resolve(workspace, ref, kind)
        if prompts is not None:
            require_shareable(prompts, gpus)
    start_processes(gpus, device, dry_run)
    import_generation(recipe.models.weights)
    from bifrost_cli.generation.generate import generate

    if prompt is None and prompts is None:
        ui.say(f'no prompt was given; generating "{given}"')
    return Result.of(generate(
        recipe, given, output=output, n=n, seed=seed, branch=branch, controlnet=controlnet, workspace=workspace,
        grid=grid, save_latents=save_latents, timings=timings, batch=batch, device=device, dry_run=dry_run, ui=ui,
        sets=settings,
    ))  # fmt: skip


def require_shareable(prompts: Path, gpus: int) -> None:
    """UsageError for prompts that can be read only once (standard input, a pipe), and several processes."""
    if max(gpus, distributed_env().world) > 1 and not prompts.is_file():
        raise UsageError(f"{prompts} can be read only once, and there are several processes",
                         fix="write the prompts to a file")  # fmt: skip


def _prompts(prompt: str | None, file: Path | None, output: Path | None, n: int, grid: bool) -> str | Path:
    """What to generate, when it can be used and its images have a place to go."""
    from bifrost_cli.generation.requests import destination, read_prompts

    if prompt is not None and file is not None:
        raise UsageError("a prompt and --prompts were both given", fix="leave one of them out")
    given = file or (FIRST_PROMPT if prompt is None else prompt)
    image = destination(output, len(read_prompts(given, Ui())) * n)
    if image and grid:
        raise UsageError("--grid needs several images", fix="give a folder: -o DIR; or leave --grid out")
    if output is not None and image is None:
        require_place(output)
    return given


@command(app, "reconstruct", RECONSTRUCT, stage="reconstruct")
def reconstruct(
    recipe: Recipe, ui: Ui, image: Image, output: NewImage = Path("reconstruction.png"),
    prompt: Annotated[str, typer.Option("--prompt", help="What the diffusion model reads beside the latents.")] = "",
    controlnet: ControlNet = None, seed: Seed = 0, workspace: Workspace = RUNS, device: Device = "auto",
) -> None:  # fmt: skip
    """Turn an image into latents and generate it again from them.

    Shows what the latents keep; the branch is not used.

    Example: bifrost reconstruct photo.jpg -o again.png
    """
    from bifrost_cli.data.images import read_image
    from bifrost_cli.generation.requests import destination

    if destination(output, 1) is None:
        raise UsageError(f"{output} is no image file", fix=f"-o {quote(f'{output}.png')}")
    read_image(image, recipe.images)
    if controlnet is not None:
        resolve(workspace, controlnet, "controlnet")


@command(app, "ask")
def ask(
    recipe: Recipe, ui: Ui, image: Image,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="A question about it.")], device: Device = "auto",
) -> Result:  # fmt: skip
    """Ask the frozen multimodal LLM about an image.

    Example: bifrost ask out.png "what is above the blue square?"
    """
    from bifrost_cli.data.images import read_image

    with refusals():
        if not question.strip():
            raise UsageError("the question is empty", fix='bifrost ask IMAGE "what is in the image?"')
        read_image(image, recipe.images)
    import_generation(recipe.models.weights)
    from bifrost_cli.generation.ask import answer

    given = answer(recipe, image, question, device=device, ui=ui)
    data = {"image": str(image), "question": question, "answer": given.text, "cut": given.cut}
    return Result(given.text.splitlines() or [""], data)


def _bench_command(name: str) -> None:
    """`bifrost bench NAME`, with the sizes that the benchmark takes."""
    sizes = BENCHES[name].sizes

    def options(declared: Sequence[Any]) -> list[inspect.Parameter]:
        return [
            parameter(size, Annotated[int | None, typer.Option(f"--{size}", min=1, help=f"{text}  (default: {value})")],
                      None)
            for size, (value, text) in sizes.items()
        ]  # fmt: skip

    def run(recipe: Recipe, ui: Ui, settings: list[str] | None, late: dict[str, Any], device: Device = "auto"
            ) -> Result:  # fmt: skip
        from bifrost_cli.planning.bench.paired import run_bench

        given = {size: late[size] for size in sizes if late.get(size) is not None}
        rows = run_bench(name, recipe=recipe if settings is None else None, sets=settings, device=device, sizes=given,
                         ui=ui)  # fmt: skip
        return Result([str(row) for row in rows], {"bench": name, "rows": [row.values() for row in rows]})

    text = f"""{BENCHES[name].help}

    On a GPU with random weights at the recipe's own widths (--recipe, default bifrost1-7b), on a CPU scaled down.

    Example: bifrost bench {name}
    """
    command(bench, name, default=None, first=options, text=text)(run)


for _name in BENCHES:
    _bench_command(_name)


@command(shapes, "render")
def render(
    ui: Ui,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to fill.")] = Path("shapes"),
    n: Annotated[int, typer.Option("-n", min=1, help="How many images.")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which images.")] = 0,
    split: Annotated[Literal["train", "held-out", "new"], typer.Option("--split", help="Which prompts.")] = "train",
    world: Annotated[Literal["shapes", "shapes-2"], typer.Option("--world", help="Which world.")] = "shapes",
) -> Result:
    """Draw images of a built-in world with their captions and plans.

    Example: bifrost shapes render -n 100 -o shapes
    """
    from bifrost_cli.toy_system.render import render_shapes

    folder = render_shapes(output, n=n, seed=seed, split=split, world=world, ui=ui)
    hint = f"next: bifrost extract-latents {quote(str(folder))}"
    return Result([str(folder)], {"path": str(folder), "images": n}, folder, hint)


@command(shapes, "pretrain", default="shapes")
def pretrain(
    recipe: Recipe, ui: Ui,
    parts: Annotated[str | None, typer.Option("--parts", metavar="A,B", help="Only these parts.")] = None,
    output: Output = None, workspace: Workspace = RUNS, device: Device = "auto",
) -> Result:  # fmt: skip
    """Train the whole built-in system from nothing: bases, branch and ControlNet.

    Parts, in order: vae, mllm, open_clip, flux, latents, branch, controlnet.

    Given again, the command continues where it stopped.

    Example: bifrost shapes pretrain -o system
    """
    from bifrost_cli.toy_system.pretrain import pretrain

    chosen = parts.split(",") if parts is not None else None
    return Result.of(pretrain(recipe, parts=chosen, output=output, workspace=workspace, device=device, ui=ui))
