"""`bifrost push`: an artifact, or an exported folder, onto the hub with its model card, and nothing private with it.

A pushed artifact is read back by `hub:ORG/NAME` wherever an artifact can stand: its id and its weights are those of the
original; its manifest names no place of this machine.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from bifrost_cli import __version__
from bifrost_cli.artifacts import Artifact, resolve
from bifrost_cli.artifacts.files import canonical_json, write_bytes, write_json
from bifrost_cli.artifacts.identity import digest_of
from bifrost_cli.artifacts.manifest import MANIFEST, payload_files
from bifrost_cli.errors import ArtifactError, EnvironmentProblem, UsageError
from bifrost_cli.interop.model_card import model_card
from bifrost_cli.interop.privacy import private_facts, shared_command
from bifrost_cli.interop.published_names import HUB_ID, public_name
from bifrost_cli.runtime.ui import Ui

CARD = "README.md"
TOKEN = "HF_TOKEN"
_KEPT = {".gitattributes", CARD}  # what a hub puts into a new repository
_REFUSED = {"secret", "user", "host", "mail", "path", "place", "camera"}  # kinds of private facts


def push(
    ref: Path | str, repo_id: str, *, private: bool = True, workspace: Path | str = "runs", dry_run: bool = False,
    ui: Ui | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Upload a branch, a ControlNet, or what `export` wrote, as one commit; earlier ones stay in the repository.

    Args:
        ref: an artifact's folder or id, `builtin:branch`, ..., or an exported folder.
        repo_id: ORG/NAME; made where it does not exist.
        private: whether others cannot see it. A repository that exists must be so already.
        workspace: where ids are looked up.
        dry_run: check all that can be without the hub, and list the files.
        ui: hears what is uploaded.

    Returns:
        `repo`, `kind` (`export` of a folder), `files` (name to bytes), `private`;
        after an upload `commit`, and `ref` to name that very state.

    Raises:
        UsageError: ORG/NAME is none, the artifact is of another kind, or the repository holds other things.
        ArtifactError: the artifact is damaged, or holds what is private.
        EnvironmentProblem: BF-ENV-021 no token in the environment; or the hub's trouble.
    """
    ui = ui or Ui()
    if not HUB_ID.fullmatch(repo_id):
        raise UsageError(f"{repo_id} is not a hub id", fix="ORG/NAME, for example me/my-branch")
    with tempfile.TemporaryDirectory(prefix="bifrost-push-") as scratch:
        kind, files = _files(ref, repo_id, Path(scratch), workspace)
        _require_public(files)
        sizes = {name: path.stat().st_size for name, path in files.items()}
        told = {"repo": repo_id, "kind": kind, "private": private, "files": sizes}
        if dry_run:
            return told
        token = os.environ.get(TOKEN)
        if not token:
            raise EnvironmentProblem("there is no token to upload with", code="BF-ENV-021",
                                     fix=f"set {TOKEN} to one that may write; it is read from the environment alone"
                                     )  # fmt: skip
        seen = "private" if private else "public"
        ui.say(f"{repo_id}: {len(files)} files, {sum(sizes.values()) / 1e6:.1f} MB, {seen}")
        commit = _upload(files, repo_id, private, token)
    return {**told, "commit": commit, "ref": f"hub:{repo_id}@{commit}"}


def _files(ref: Path | str, repo_id: str, scratch: Path, workspace: Path | str) -> tuple[str, dict[str, Path]]:
    """The kind of artifact, or `export`, and what is uploaded: names on the hub to files here.

    The card and the manifest are written into `scratch`.
    """
    folder = Path(ref)
    if folder.is_dir() and not (folder / MANIFEST).is_file() and (folder / CARD).is_file():
        return "export", {name: folder / name for name in payload_files(folder)}
    artifact = resolve(workspace, ref)
    if artifact.kind not in ("branch", "controlnet"):
        raise UsageError(f"{artifact.path} is a {artifact.kind} artifact; a branch or a ControlNet can be pushed",
                         fix="give one: bifrost artifacts ls")  # fmt: skip
    artifact.check()
    manifest = shared_manifest(artifact)
    write_json(scratch / MANIFEST, manifest)
    write_bytes(scratch / CARD, model_card(artifact, repo_id).encode())
    own = {name: artifact.file(name) for name in artifact.files}
    return artifact.kind, {**own, MANIFEST: scratch / MANIFEST, CARD: scratch / CARD}


def shared_manifest(artifact: Artifact) -> dict[str, Any]:
    """The manifest as others may read it: the same id, identity and files, with places hidden in the command, in the
    names of models and of sources, and in the ways to its parents."""
    manifest = {key: value for key, value in artifact.manifest.items() if key != "digest"}
    manifest = json.loads(canonical_json(manifest))
    manifest["parents"] = [{**parent, "path": ""} for parent in manifest["parents"]]  # known by their ids
    if "command" in manifest["made"]:
        manifest["made"]["command"] = shared_command(manifest["made"]["command"])
    models = manifest["info"].get("recipe", {}).get("models", {})
    models |= {key: public_name(value) for key, value in models.items() if isinstance(value, str) and "/" in value}
    for place in ("source", "init"):
        if isinstance(manifest["info"].get(place), str):
            manifest["info"][place] = public_name(manifest["info"][place])
    return {**manifest, "digest": digest_of(manifest)}


def _require_public(files: dict[str, Path]) -> None:
    found = {(name, fact.kind, fact.value) for name, path in files.items() for fact in private_facts(path)
             if fact.kind in _REFUSED}  # fmt: skip
    if not found:
        return
    shown = "; ".join(
        f"{name}: {kind} {'...' if kind == 'secret' else value}" for name, kind, value in sorted(found)[:5]
    )
    raise ArtifactError(f"{len(found)} things are private, and nothing was uploaded", at=shown, code="BF-ART-009",
                        fix="see all: bifrost show --private FOLDER; then make it again without them")  # fmt: skip


def _upload(files: dict[str, Path], repo_id: str, private: bool, token: str) -> str:
    """One commit; its hash."""
    from huggingface_hub import CommitOperationAdd, HfApi

    from bifrost_cli.loading.resolve import HUB_ERRORS, hub_problem

    api = HfApi(token=token, library_name="bifrost-cli")
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        there = api.model_info(repo_id)
        if bool(there.private) != private:
            now, wanted = ("private", "--private") if there.private else ("public", "--public")
            raise UsageError(f"{repo_id} exists and is {now}; nothing was uploaded",
                             fix=f"give {wanted}, or another name")  # fmt: skip
        held = {sibling.rfilename for sibling in there.siblings or ()} - _KEPT - files.keys()
        if held:
            raise UsageError(f"{repo_id} holds other files; nothing was uploaded", at=", ".join(sorted(held)[:5]),
                             fix="give another name")  # fmt: skip
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        message = f"Upload by bifrost {__version__}"
        return str(api.create_commit(repo_id, operations, commit_message=message, parent_commit=there.sha).oid)
    except HUB_ERRORS as error:
        answer = getattr(error, "response", None)
        if answer is not None and answer.status_code in (401, 403):
            fix = f"set {TOKEN} to a token with the right to write"
            at = f"the hub answers {answer.status_code}"
            raise EnvironmentProblem(
                f"your token may not write to {repo_id}", at=at, fix=fix, code="BF-ENV-022"
            ) from error
        raise hub_problem(repo_id, error) from error
