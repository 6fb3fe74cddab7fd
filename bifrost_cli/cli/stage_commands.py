"""The stages as commands: extract-latents, train, generate, reconstruct, ask, bench.

In: options. Out: one stage call and its Result. Each imports its stage inside, so that help and other commands stay
quick.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bifrost_cli.artifacts import Artifact
from bifrost_cli.cli import preflight
from bifrost_cli.cli.command import Result, command
from bifrost_cli.cli.options import (
    EXTRACT,
    GENERATE,
    RECONSTRUCT,
    Device,
    DryRun,
    Gpus,
    Output,
    Recipe,
    Resume,
    Workspace,
    artifact_option,
)
from bifrost_cli.runtime import launch
from bifrost_cli.runtime.ui import Ui

FIRST_PROMPT = "a red circle above a blue square"
RUNS = Path("runs")
_NEXT = {
    "latents": "next: bifrost train branch",
    "branch": "next: bifrost train controlnet",
    "controlnet": f'next: bifrost generate "{FIRST_PROMPT}" -o out.png',
}

app = typer.Typer()
train = typer.Typer(no_args_is_help=True, help="Train the branch or the ControlNet on a latents store.")
bench = typer.Typer(no_args_is_help=True, help="Measure what a design decision saves.")
app.add_typer(train, name="train")
app.add_typer(bench, name="bench")

Latents = Annotated[
    str | None,
    artifact_option("--latents", "A latents artifact.  (default: the newest)"),
]
Branch = Annotated[str | None, artifact_option("--branch", "A branch artifact.")]
ControlNet = Annotated[
    str | None,
    artifact_option("--controlnet", "A ControlNet artifact."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same bytes.")]
ImageOutput = Annotated[Path, typer.Option("--output", "-o", metavar="FILE.png", help="A new file.")]
Image = Annotated[Path, typer.Argument(metavar="IMAGE", help="A PNG, JPEG or WebP file.")]


@command(app, "extract-latents", EXTRACT, check=preflight.extract_latents)
def extract_latents(
    recipe: Recipe,
    ui: Ui,
    source: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help="Images: see above.  [default: the built-in world]"),
    ] = None,
    output: Output = None,
    workspace: Workspace = RUNS,
    device: Device = "auto",
    gpus: Gpus = 1,
    dry_run: DryRun = False,
) -> Result:
    """Turn images and captions into a latents store.

    SOURCE is a folder of images with .txt captions or a metadata.jsonl, a table (.jsonl, .csv, .tsv, .parquet),
    WebDataset archives ('shards-{000..099}.tar'), hf:NAME[:SPLIT], or shapes:N. Given again, the command continues
    where it stopped.

    Example: bifrost extract-latents photos/ -o runs/photos
    """
    _in_processes(gpus, device, dry_run)
    from bifrost_cli.extraction.extract import extract_latents

    return as_result(
        extract_latents(
            recipe, source=source, output=output, workspace=workspace, device=device, dry_run=dry_run, ui=ui
        )
    )


@command(train, "branch", check=preflight.train)
def train_branch(
    recipe: Recipe,
    ui: Ui,
    latents: Latents = None,
    output: Output = None,
    workspace: Workspace = RUNS,
    resume: Resume = "auto",
    device: Device = "auto",
    gpus: Gpus = 1,
    dry_run: DryRun = False,
) -> Result:
    """Train the visual generation branch on a latents store.

    Given again, the command continues from the last checkpoint, to the bit.

    Example: bifrost train branch --set branch.train.steps=2000
    """
    _in_processes(gpus, device, dry_run)
    from bifrost_cli.training.train_branch import train_branch

    options = {"output": output, "workspace": workspace, "resume": resume, "device": device, "dry_run": dry_run}
    return as_result(train_branch(recipe, latents=latents, ui=ui, **options))


@command(train, "controlnet", check=preflight.train)
def train_controlnet(
    recipe: Recipe,
    ui: Ui,
    latents: Latents = None,
    output: Output = None,
    workspace: Workspace = RUNS,
    resume: Resume = "auto",
    device: Device = "auto",
    gpus: Gpus = 1,
    dry_run: DryRun = False,
) -> Result:
    """Train the latent ControlNet on a latents store.

    Given again, the command continues from the last checkpoint, to the bit.

    Example: bifrost train controlnet --latents runs/photos
    """
    _in_processes(gpus, device, dry_run)
    from bifrost_cli.training.train_controlnet import train_controlnet

    options = {"output": output, "workspace": workspace, "resume": resume, "device": device, "dry_run": dry_run}
    return as_result(train_controlnet(recipe, latents=latents, ui=ui, **options))


@command(app, "generate", GENERATE, check=preflight.generate)
def generate(
    recipe: Recipe,
    ui: Ui,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to generate.")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Prompts, one a line; - is stdin.")
    ] = None,
    output: Output = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Images of each prompt.")] = 1,
    seed: Seed = 0,
    branch: Branch = None,
    controlnet: ControlNet = None,
    grid: Annotated[bool, typer.Option("--grid", help="Also put all images into one.")] = False,
    save_latents: Annotated[bool, typer.Option("--save-latents", help="Also keep the predicted latents.")] = False,
    timings: Annotated[bool, typer.Option("--timings", help="Say how long each stage took.")] = False,
    workspace: Workspace = RUNS,
    device: Device = "auto",
    dry_run: DryRun = False,
) -> Result:
    """Generate images of a prompt, or of each line of a file.

    -o FILE.png makes one image; -o DIR a samples folder, which is continued when the command is given again.

    Example: bifrost generate "a green star left of a yellow circle" -o out.png --seed 7
    """
    from bifrost_cli.generation.generate import generate

    given = prompts or (FIRST_PROMPT if prompt is None else prompt)
    if prompt is None and prompts is None:
        ui.say(f'no prompt was given; generating "{given}"')
    return as_result(
        generate(
            recipe, given, output=output, n=n, seed=seed, branch=branch, controlnet=controlnet, workspace=workspace,
            grid=grid, save_latents=save_latents, timings=timings, device=device, dry_run=dry_run, ui=ui,
        )
    )  # fmt: skip


@command(app, "reconstruct", RECONSTRUCT, check=preflight.reconstruct)
def reconstruct(
    recipe: Recipe,
    ui: Ui,
    image: Image,
    output: ImageOutput = Path("reconstruction.png"),
    prompt: Annotated[str, typer.Option("--prompt", help="What the diffusion model reads beside the latents.")] = "",
    controlnet: ControlNet = None,
    seed: Seed = 0,
    workspace: Workspace = RUNS,
    device: Device = "auto",
) -> Result:
    """Turn an image into latents and generate it again from them.

    Shows what the latents keep; the branch is not used.

    Example: bifrost reconstruct photo.jpg -o again.png
    """
    from bifrost_cli.generation.reconstruct import reconstruct

    return as_result(
        reconstruct(
            recipe, image, output=output, prompt=prompt, controlnet=controlnet, seed=seed, workspace=workspace,
            device=device, ui=ui,
        )
    )  # fmt: skip


@command(app, "ask", check=preflight.ask)
def ask(
    recipe: Recipe,
    ui: Ui,
    image: Image,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="A question about it.")],
    device: Device = "auto",
) -> Result:
    """Ask the frozen multimodal LLM about an image.

    Example: bifrost ask out.png "what is above the blue square?"
    """
    from bifrost_cli.generation.ask import ask

    answer = ask(recipe, image, question, device=device, ui=ui)
    return Result(answer.splitlines() or [""], {"image": str(image), "question": question, "answer": answer})


@command(bench, "decode")
def bench_decode(
    ui: Ui,
    hidden: Annotated[int, typer.Option("--hidden", min=64, help="Width.")] = 512,
    layers: Annotated[int, typer.Option("--layers", min=1, help="Decoder layers.")] = 8,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Image tokens.")] = 256,
    text: Annotated[int, typer.Option("--text", min=1, help="Text tokens.")] = 300,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Decode steps.")] = 8,
) -> Result:
    """Time the decode loop against a plain one that encodes everything again at each step.

    Example: bifrost bench decode --steps 16
    """
    from dataclasses import asdict

    from bifrost_cli.planning.bench import bench_decode

    with ui.progress(2, "guidance weights") as bar:
        rows = bench_decode(
            hidden=hidden, layers=layers, tokens=tokens, text=text, steps=steps, on_row=lambda: bar.advance(1)
        )
    return Result([str(row) for row in rows], {"rows": [{**asdict(row), "ratio": row.ratio} for row in rows]})


def _in_processes(count: int, device: str, dry_run: bool) -> None:
    """With --gpus N this command line goes to N processes, and this one ends as they do; a plan needs only one."""
    launch.require_shared_device(device, count)
    if count > 1 and not dry_run:
        launch.start(count, sys.argv[1:])


def as_result(result: Artifact | Path | dict[str, Any]) -> Result:
    """A stage's return value as a Result: an artifact, an image, or the plan of a dry run."""
    if isinstance(result, Artifact):
        from bifrost_cli.loading.compatibility import has_own_conditioner

        info = {key: value for key, value in result.info.items() if key != "recipe"}
        data = {"kind": result.kind, "id": result.id, "path": str(result.path), "info": info}
        next_step = _NEXT.get("controlnet" if has_own_conditioner(result) else result.kind)
        return Result([f"{result.id}  {result.path}"], data, result.path, next_step, artifacts=[result.path])
    if isinstance(result, dict):
        return Result([f"{name}: {value}" for name, value in result.items()], result)
    return Result([str(result)], {"path": str(result)}, result)
