"""Artifacts that lie on the hub: `hub:ORG/NAME[@REVISION]` as a local folder, whose name is the commit."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download

from bifrost_cli.errors import UsageError
from bifrost_cli.loading.resolve import model_errors

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ("*.json", "*.safetensors", "*.csv", "*.png", "*.txt", "*.jsonl", "*.md")
HUB_FILES = (*_FILES, *(f"*/{name}" for name in _FILES))  # what artifacts consist of; no code


@cache
def from_hub(ref: str) -> Path:
    """The folder of an artifact on the hub, downloaded or from the cache; one command asks the hub once.

    Args:
        ref: `hub:ORG/NAME`, the newest, or `hub:ORG/NAME@REVISION`, a branch, tag or commit.

    Returns:
        The folder in the hub's cache, named after the commit.

    Raises:
        UsageError: it is not such a reference.
        EnvironmentProblem: the hub's trouble (`hub_problem`).
    """
    name, at, revision = ref.removeprefix("hub:").partition("@")
    if not HUB_ID.fullmatch(name) or (at and not revision):
        raise UsageError(f"{ref} is no artifact of a hub", fix="hub:ORG/NAME, or hub:ORG/NAME@REVISION")
    with model_errors(name, revision or None):
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(HUB_FILES)))
