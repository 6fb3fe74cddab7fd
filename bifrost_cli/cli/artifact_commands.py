"""`bifrost artifacts`: what a workspace holds, what an artifact is and was made from, and what can be removed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from bifrost_cli.artifacts import Artifact, lineage, newest, resolve
from bifrost_cli.artifacts.cleanup import Removable, leftovers, removable, remove_all
from bifrost_cli.artifacts.workspace import SHIPPED, Survey, survey
from bifrost_cli.cli.command import Result, command
from bifrost_cli.cli.options import DryRun, Reference, Workspace, artifact_arguments
from bifrost_cli.errors import ArtifactError, Findings
from bifrost_cli.runtime.ui import Ui, counted

RUNS = Path("runs")
app = typer.Typer(help="List, show, check and remove artifacts, and see what they were made from.")


@app.callback(invoke_without_command=True)
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        for line in ls(Ui()).lines:
            print(line)


@command(app, "ls")
def ls(ui: Ui, workspace: Workspace = RUNS) -> Result:
    """List the artifacts of a workspace, newest first; unfinished and damaged folders too.

    What its commands wrote elsewhere with -o is among them.

    Example: bifrost artifacts ls -w runs
    """
    found = survey(workspace, outside=True)
    rows = [(a.id, _when(a), _size(a), str(a.path)) for a in found.artifacts]
    rows += [("(unfinished)", "", "", str(path)) for path in found.drafts]
    rows += [("(damaged)", "", "", str(path)) for path, _ in found.broken]
    lines = [f"{name:24}  {when:16}  {size:>9}  {path}" for name, when, size, path in rows]
    return Result(lines or [f"{workspace} holds no artifact; make one: bifrost extract-latents"], _survey_data(found))


@command(app, "show")
def show(ui: Ui, ref: Reference = None, workspace: Workspace = RUNS) -> Result:
    """Show what an artifact is: its settings, who made it, what it cost and what it holds.

    Example: bifrost artifacts show runs/latents-0123456789ab
    """
    artifact = _choose(workspace, ref)
    manifest = artifact.manifest
    lines = [f"{artifact.id}  {artifact.path}"]
    for title in ("made", "cost", "identity", "info"):
        shown = {key: value for key, value in manifest[title].items() if key != "recipe"}
        lines += [title, *(f"  {line}" for line in _lines(shown))]
    lines += ["parents", *(f"  {parent['id']}  {parent['path']}" for parent in artifact.parents)]
    lines += ["files", *(f"  {name}  {entry['size']:,} bytes" for name, entry in artifact.files.items())]
    return Result(lines, {**manifest, "path": str(artifact.path)}, artifact.path)


@command(app, "verify")
def verify(
    ui: Ui,
    refs: Annotated[
        list[str] | None,
        artifact_arguments("(default: all of the workspace)"),
    ] = None,
    workspace: Workspace = RUNS,
) -> Result:
    """Read every byte of artifacts and compare it with their manifests. Exit code 8 when something is wrong.

    Example: bifrost artifacts verify runs/latents-0123456789ab
    """
    problems: dict[str, list[str]] = {}
    chosen, unreadable = _to_verify(refs, workspace)
    for path, reason in unreadable:
        problems[str(path)] = [reason]
    with ui.progress(len(chosen), "artifacts") as bar:
        for artifact in chosen:
            if found := artifact.verify():
                problems[str(artifact.path)] = found
            for stray in artifact.strays():
                ui.say(f"{artifact.path}: {stray} is not part of the artifact")
            bar.advance(1)
    lines = [f"whole    {a.path}" for a in chosen if str(a.path) not in problems]
    lines += [f"damaged  {path}: {reason}" for path, reasons in problems.items() for reason in reasons]
    data = {"whole": [str(a.path) for a in chosen if str(a.path) not in problems], "damaged": problems}
    fix = "make the damaged ones again at a new place; nothing was changed"
    error = Findings(f"{counted(len(problems), 'damaged artifact')} found", fix=fix) if problems else None
    return Result(lines or [f"{workspace} holds no artifact"], data, error=error)


@command(app, "lineage")
def show_lineage(ui: Ui, ref: Reference = None, workspace: Workspace = RUNS) -> Result:
    """Show what an artifact was made from, back to the first step.

    Example: bifrost artifacts lineage runs/report-0123456789ab
    """
    if ref is None and not survey(workspace, outside=True).artifacts:
        return Result(_nothing(workspace), {"lineage": []})
    ancestors = lineage(_choose(workspace, ref), workspace)
    paths = [str(ancestor.artifact.path) if ancestor.artifact else None for ancestor in ancestors]
    lines, data = [], []
    for ancestor, path in zip(ancestors, paths, strict=True):
        lines.append(f"{'  ' * ancestor.depth}{ancestor.id}  {path or '(not here any more)'}")
        data.append({"depth": ancestor.depth, "kind": ancestor.kind, "id": ancestor.id, "path": path})
    return Result(lines, {"lineage": data})


@command(app, "rm")
def rm(
    ui: Ui,
    refs: Annotated[
        list[str],
        artifact_arguments("Folders or ids; unfinished folders too."),
    ],
    workspace: Workspace = RUNS,
    dry_run: DryRun = False,
) -> Result:
    """Remove artifacts. One that another artifact was made from is refused, unless both are named.

    Example: bifrost artifacts rm samples-0123456789ab
    """
    return _removed(removable(workspace, refs), dry_run)


@command(app, "gc")
def gc(ui: Ui, workspace: Workspace = RUNS, dry_run: DryRun = False) -> Result:
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


def _nothing(workspace: Path) -> list[str]:
    """What there is where a workspace holds no artifact."""
    drafts = [f"unfinished: {path}; give the command that made it again" for path in survey(workspace).drafts]
    shipped = [f"ships with bifrost: {resolve(workspace, ref).id}  ({ref})" for ref in SHIPPED]
    return [f"{workspace} holds no artifact; make one: bifrost extract-latents", *drafts, *shipped]


def _choose(workspace: Path, ref: str | None) -> Artifact:
    if ref is not None:
        return resolve(workspace, ref)
    found = survey(workspace, outside=True).artifacts
    return found[0] if found else newest(workspace, "latents")


def _to_verify(refs: list[str] | None, workspace: Path) -> tuple[list[Artifact], list[tuple[Path, str]]]:
    """Artifacts to read, and those whose manifest is damaged already. ArtifactError for one that is not there."""
    if not refs:
        found = survey(workspace)
        return found.artifacts, found.broken
    chosen, unreadable = [], []
    for ref in refs:
        try:
            chosen.append(resolve(workspace, ref))
        except ArtifactError as error:
            if error.code != "BF-ART-005":
                raise
            unreadable.append((Path(ref), error.message))
    return chosen, unreadable


def _survey_data(found: Survey) -> dict[str, Any]:
    return {
        "artifacts": [
            {"kind": a.kind, "id": a.id, "path": str(a.path), "when": a.manifest["made"]["when"]}
            for a in found.artifacts
        ],
        "unfinished": [str(path) for path in found.drafts],
        "damaged": {str(path): reason for path, reason in found.broken},
    }


def _lines(value: Any, name: str = "") -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _lines(inner, f"{name}.{key}" if name else key)
    else:
        text = str(value)
        yield f"{name}: {text if len(text) <= 200 else text[:197] + '...'}"


def _when(artifact: Artifact) -> str:
    return artifact.manifest["made"]["when"][:16].replace("T", " ")


def _size(artifact: Artifact) -> str:
    return f"{sum(entry['size'] for entry in artifact.files.values()) / 1e6:.1f} MB"
