"""Artifacts: folders whose manifest was written last. Standard library only; knows no tensor and no model."""

from __future__ import annotations

from bifrost_cli.artifacts.draft import Draft
from bifrost_cli.artifacts.identity import FORMATS, KINDS, identity_id
from bifrost_cli.artifacts.lock import Lock
from bifrost_cli.artifacts.manifest import Artifact
from bifrost_cli.artifacts.workspace import default_path, find, lineage, newest, resolve

__all__ = [
    "FORMATS", "KINDS", "Artifact", "Draft", "Lock",
    "default_path", "find", "identity_id", "lineage", "newest", "resolve",
]  # fmt: skip
