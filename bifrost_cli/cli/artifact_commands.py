"""`bifrost artifacts`, and `import`, `export`, `export-mllm`: what a workspace holds, and other programs' layouts."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from bifrost_cli.artifacts import Artifact, default_path, lineage, newest, resolve
from bifrost_cli.artifacts.identity import leaves
from bifrost_cli.artifacts.manifest import require_new
from bifrost_cli.artifacts.workspace import SHIPPED, Removable, Survey, leftovers, removable, remove_all, survey
from bifrost_cli.cli.command import FIRST_PROMPT, Result, command, refusals
from bifrost_cli.cli.options import RUNS, DryRun, NewFolder, Output, Recipe, Reference, Workspace, artifact_argument
from bifrost_cli.errors import ArtifactError, EnvironmentProblem, Findings, UsageError, public
from bifrost_cli.runtime.ui import Ui, counted

app = typer.Typer(help="List, show, check and remove artifacts, and see what they were made from.")
interop = typer.Typer()


@app.callback(invoke_without_command=True)
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print("\n".join(ls().lines))


@command(app, "ls")
def ls(workspace: Workspace = RUNS) -> Result:
    """List the artifacts of a workspace, newest first; unfinished and damaged folders too.

    What its commands wrote elsewhere with -o is among them.

    Example: bifrost artifacts ls -w runs
    """
    found = survey(workspace, outside=True)
    made, rows = [], []
    for a in found.artifacts:
        when, size = a.manifest["made"].get("when", ""), sum(entry["size"] for entry in a.files.values()) / 1e6
        made.append({"kind": a.kind, "id": a.id, "path": str(a.path), "when": when})
        rows.append((a.id, when[:16].replace("T", " "), f"{size:.1f} MB", str(a.path)))
    rows += [("(unfinished)", "", "", str(path)) for path in found.drafts]
    rows += [("(damaged)", "", "", str(path)) for path, _ in found.broken]
    data = {
        "artifacts": made,
        "unfinished": [str(path) for path in found.drafts],
        "damaged": {str(path): reason for path, reason in found.broken},
    }
    lines = [f"{name:24}  {when:16}  {size:>9}  {path}" for name, when, size, path in rows]
    return Result(lines or [f"{workspace} holds no artifact; make one: bifrost extract-latents"], data)


@command(app, "show")
def show(ref: Reference = None, workspace: Workspace = RUNS) -> Result:
    """Show what an artifact is: its settings, who made it, what it cost and what it holds.

    Example: bifrost artifacts show runs/latents-0123456789ab
    """
    artifact = _choose(workspace, ref)
    lines, manifest = [f"{artifact.id}  {artifact.path}"], public(artifact.manifest)
    for title in ("made", "cost", "identity", "info"):
        shown = {key: value for key, value in manifest[title].items() if key != "recipe"}
        texts = [(name, str(value)) for name, value in leaves(shown)]
        lines += [title, *(f"  {name}: {t if len(t) <= 200 else t[:197] + '...'}" for name, t in texts)]
    lines += ["parents", *(f"  {parent['id']}  {parent['path']}" for parent in artifact.parents)]
    lines += ["files", *(f"  {name}  {entry['size']:,} bytes" for name, entry in artifact.files.items())]
    return Result(lines, {**manifest, "path": str(artifact.path)}, artifact.path)


@command(app, "verify")
def verify(
    ui: Ui,
    refs: Annotated[list[str] | None, artifact_argument("REF...", "(default: all of the workspace)")] = None,
    workspace: Workspace = RUNS,
) -> Result:
    """Read every byte of artifacts and compare it with their manifests. Exit code 8 when something is wrong.

    Example: bifrost artifacts verify runs/latents-0123456789ab
    """
    found = survey(workspace) if not refs else Survey()
    problems, chosen = {str(path): [reason] for path, reason in found.broken}, found.artifacts
    for ref in refs or ():
        try:
            chosen.append(resolve(workspace, ref))
        except ArtifactError as error:
            if error.code != "BF-ART-005":
                raise
            problems[str(Path(ref))] = [error.message]
    with ui.progress(len(chosen), "artifacts") as bar:
        for artifact in chosen:
            if damage := artifact.verify():
                problems[str(artifact.path)] = damage
            for stray in artifact.strays():
                ui.say(f"{artifact.path}: {stray} is not part of the artifact")
            bar.advance(1)
    whole = [str(artifact.path) for artifact in chosen if str(artifact.path) not in problems]
    lines = [f"whole    {path}" for path in whole]
    lines += [f"damaged  {path}: {reason}" for path, reasons in problems.items() for reason in reasons]
    fix = "make the damaged ones again at a new place; nothing was changed"
    findings = Findings(f"{counted(len(problems), 'damaged artifact')} found", fix=fix) if problems else None
    return Result(lines or [f"{workspace} holds no artifact"], {"whole": whole, "damaged": problems}, error=findings)


@command(app, "convert")
def convert(
    ui: Ui,
    ref: Annotated[str, artifact_argument("REF", "A latents store of an older format.")],
    output: Output = None, workspace: Workspace = RUNS,
) -> Result:  # fmt: skip
    """Copy a latents store of an older format into the newest one, which is many times faster to read.

    The same rows under the same id; without -o beside the old one, which stays. An interrupted copy goes on.

    Example: bifrost artifacts convert runs/latents-0123456789ab
    """
    source = resolve(workspace, ref, "latents")
    path = Path(output or source.path.with_name(f"{source.path.name}-converted"))
    from bifrost_cli.data.latents.convert import convert_store

    made = convert_store(source, path, ui)
    hint = f"next: bifrost artifacts rm {quote(str(source.path))}"
    return Result([f"{made.id}  {path}"], {"id": made.id, "path": str(path)}, path, hint, artifacts=[path])


@command(app, "lineage")
def show_lineage(ref: Reference = None, workspace: Workspace = RUNS) -> Result:
    """Show what an artifact was made from, back to the first step.

    Example: bifrost artifacts lineage runs/report-0123456789ab
    """
    if ref is None and not survey(workspace, outside=True).artifacts:
        drafts = [f"unfinished: {path}; give the command that made it again" for path in survey(workspace).drafts]
        shipped = [f"ships with bifrost: {resolve(workspace, ref).id}  ({ref})" for ref in SHIPPED]
        nothing = f"{workspace} holds no artifact; make one: bifrost extract-latents"
        return Result([nothing, *drafts, *shipped], {"lineage": []})
    lines, data = [], []
    for one in lineage(_choose(workspace, ref), workspace):
        path = str(one.artifact.path) if one.artifact else None
        lines.append(f"{'  ' * one.depth}{one.id}  {path or '(not here any more)'}")
        data.append({"depth": one.depth, "kind": one.kind, "id": one.id, "path": path})
    return Result(lines, {"lineage": data})


@command(app, "rm")
def rm(
    refs: Annotated[list[str], artifact_argument("REF...", "Folders or ids; unfinished folders too.")],
    workspace: Workspace = RUNS,
    dry_run: DryRun = False,
) -> Result:
    """Remove artifacts. One that another artifact was made from is refused, unless both are named.

    Example: bifrost artifacts rm samples-0123456789ab
    """
    return _removed(removable(workspace, refs), dry_run)


@command(app, "gc")
def gc(workspace: Workspace = RUNS, dry_run: DryRun = False) -> Result:
    """Remove unfinished folders that no process writes, and temporary files of killed processes.

    An interrupted command whose folder is removed begins anew. Artifacts stay.

    Example: bifrost artifacts gc --dry-run
    """
    return _removed(leftovers(workspace), dry_run)


def _removed(items: list[Removable], dry_run: bool) -> Result:
    if not dry_run:
        remove_all(items)
    verb = "would remove" if dry_run else "removed"
    lines = [f"{verb}  {item.what:24}  {item.size / 1e6:>9.1f} MB  {item.path}" for item in items]
    total = sum(item.size for item in items)
    lines.append(f"{verb} {counted(len(items), 'item')}, {total / 1e6:.1f} MB" if items else "nothing to remove")
    data = [{"path": str(item.path), "what": item.what, "bytes": item.size} for item in items]
    return Result(lines, {"removed": data, "bytes": total, "dry_run": dry_run})


def _choose(workspace: Path, ref: str | None) -> Artifact:
    if ref is not None:
        return resolve(workspace, ref)
    found = survey(workspace, outside=True).artifacts
    return found[0] if found else newest(workspace, "latents")


@command(interop, "show")
def show_file(
    path: Annotated[Path, typer.Argument(metavar="IMAGE|FOLDER", help="An image, a page, or any folder of ours.")],
    private: Annotated[bool, typer.Option("--private", help="List what it would tell to whoever is given it.")] = False,
) -> Result:  # fmt: skip
    """Show what an image or a folder says of itself: prompt, seed, settings, what made it.

    With --private: its paths, user and host names, secrets, prompts, commands, and what a camera wrote.

    Example: bifrost show out.png --private
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist", fix="give a file or a folder")
    if not private and path.is_dir():
        return show(str(path))
    from bifrost_cli.interop.privacy import file_facts, private_facts

    if not private:
        facts = file_facts(path)
        return Result([f"{name}: {text}" for name, text in facts.items()] or [f"{path} says nothing of itself"], facts)
    told = private_facts(path)
    lines = [f"{one.kind:8} {one.file}: {one.value if len(one.value) <= 200 else one.value[:197] + '...'}"
             for one in told]  # fmt: skip
    kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(one.kind for one in told).items())
    data = {"path": str(path), "private": [one._asdict() for one in told]}
    return Result([*lines, f"{path} tells: {kinds or 'nothing private'}"], data)


@command(interop, "import")
def import_checkpoint(
    recipe: Recipe, ui: Ui,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A folder or a hub id in the published layout.")],
    output: Output = None, workspace: Workspace = RUNS, dry_run: DryRun = False,
) -> Result:  # fmt: skip
    """Turn a published checkpoint into a branch and a ControlNet artifact.

    The recipe names the frozen bases, which are loaded and compared; with --dry-run they are not, and every key is
    listed.

    Example: bifrost import hanlincs/Bifrost-1 --recipe bifrost1-7b -o runs/published
    """
    with refusals():
        if not Path(source).expanduser().is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
            what = f"{source} is neither a folder nor a hub id"
            raise EnvironmentProblem(what, fix="check the path", code="BF-ENV-020")
    from bifrost_cli.interop.import_checkpoint import import_checkpoint

    artifacts = import_checkpoint(recipe, source, output=output, workspace=workspace, dry_run=dry_run, ui=ui)
    if isinstance(artifacts, dict):
        return Result([f"{group:12} {name}" for group, names in artifacts.items() for name in names], artifacts)
    paths = [part.path for part in artifacts]
    options = [("recipe", paths[0]), *((part.kind, part.path) for part in artifacts)]
    given = " ".join(f"--{name} {quote(str(path))}" for name, path in options)
    lines = [f"{part.id}  {part.path}" for part in artifacts]
    data = {part.kind: {"id": part.id, "path": str(part.path)} for part in artifacts}
    hint = f'next: bifrost generate "{FIRST_PROMPT}" -o out.png {given}'
    return Result(lines, data, "\n".join(map(str, paths)), hint, artifacts=paths)


@command(interop, "export")
def export(
    ui: Ui,
    ref: Annotated[str, typer.Argument(metavar="REF", help="A branch or ControlNet artifact, or builtin:branch.")],
    output: Output = None, workspace: Workspace = RUNS,
) -> Result:  # fmt: skip
    """Write a branch or a ControlNet for others to use: plain safetensors, a configuration and a model card.

    A ControlNet beside its branch, in FOLDER/flux_controlnet, makes the published layout, which import reads.

    Example: bifrost export builtin:controlnet -o exported/flux_controlnet
    """
    with refusals():
        artifact = resolve(workspace, ref)
        require_new(output or default_path(workspace, "export", artifact.id))
    from bifrost_cli.interop.export import export

    return _exported(export(ref, output=output, workspace=workspace, ui=ui))


@command(interop, "push")
def push(
    ui: Ui,
    ref: Annotated[str, typer.Argument(metavar="REF", help="A branch or ControlNet artifact, or an exported folder.")],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Where on the hub; made where it does not exist.")],
    private: Annotated[bool, typer.Option("--private/--public", help="Who may see it.")] = True,
    workspace: Workspace = RUNS, dry_run: DryRun = False,
) -> Result:  # fmt: skip
    """Upload a branch or a ControlNet to the Hugging Face hub, with a model card.

    hub:ORG/NAME can then stand wherever an artifact can. The token is read from HF_TOKEN alone. Refused is what holds a
    secret, a path, or the name of a user or host. Tried by us against a stand-in of the hub, not the hub itself.

    Example: bifrost push builtin:branch me/my-branch --dry-run
    """
    from bifrost_cli.interop.push import push as run

    told = run(ref, repo, private=private, workspace=workspace, dry_run=dry_run, ui=ui)
    lines = [f"{size:>13,} bytes  {name}" for name, size in told["files"].items()]
    if dry_run:
        return Result([*lines, f"would go to {repo}, {'private' if private else 'public'}"], told)
    hint = f'next: bifrost generate "{FIRST_PROMPT}" -o out.png --{told["kind"]} hub:{repo}'
    return Result([*lines, told["ref"]], told, told["ref"], hint if told["kind"] != "export" else None)


@command(interop, "export-mllm")
def export_mllm(recipe: Recipe, ui: Ui, output: NewFolder = Path("mllm")) -> Result:
    """Write the frozen MLLM as a folder of its own, for lmms-eval to measure its understanding.

    The same bytes and the same hash of weights as generation uses; its README has the command.

    Example: bifrost export-mllm --recipe bifrost1-7b -o mllm
    """
    from bifrost_cli.interop.export import export_mllm

    return _exported(export_mllm(recipe, output, ui=ui))


def _exported(folder: Path) -> Result:
    return Result([str(folder)], {"path": str(folder), "files": sorted(path.name for path in folder.iterdir())}, folder)
