"""What an artifact is: the hash of its kind, format, identity and parents; and, apart from it, who made it and when."""

from __future__ import annotations

import contextlib
import hashlib
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from bifrost_cli.artifacts.files import canonical_json
from bifrost_cli.errors import public

KINDS = ("latents", "branch", "controlnet", "samples", "report")
FORMATS = {kind: 1 for kind in KINDS}
_LIBRARIES = ("torch", "transformers", "diffusers", "open_clip_torch", "zarr", "safetensors", "numpy", "pillow")
_SHOWN = 5


def identity_id(kind: str, identity: Mapping[str, Any], parents: Sequence[Any] = ()) -> str:
    """`kind-` and 12 hexadecimal digits of sha256 over kind, format, identity and the parents' ids."""
    value = {"kind": kind, "format": FORMATS[kind], "identity": identity, "parents": [parent.id for parent in parents]}
    return f"{kind}-{digest_of(value)[:12]}"


def digest_of(value: Any) -> str:
    """sha256 of a JSON value's canonical bytes."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """`key: a -> b` for the first few leaves in which two headers (kind, identity, parents) differ."""
    sides = [{"kind": s["kind"], "parents": [one["id"] for one in s["parents"]], **s["identity"]} for s in (old, new)]
    before, after = (dict(leaves(side)) for side in sides)
    keys = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    changed = [f"{key}: {_short(before.get(key))} -> {_short(after.get(key))}" for key in keys[:_SHOWN]]
    return "; ".join(changed + ([f"and {len(keys) - _SHOWN} more"] if len(keys) > _SHOWN else []))


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values inside nested dictionaries, with their dotted names."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _short(value: Any) -> str:
    text = "(none)" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def provenance(**extra: Any) -> dict[str, Any]:
    """When, the command as typed, the versions it ran with, the commit in a checkout, and `extra`; no host, no user."""
    command = [Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv and sys.argv[0] else []
    made = {
        "when": datetime.now(UTC).isoformat(),
        "command": shlex.join(map(public, command))[:2000].encode("utf-8", "replace").decode(),
        "versions": dict(_versions()),
    }
    if commit := _commit():
        made["commit"] = commit
    return {**made, **extra}


@cache
def _commit() -> str | None:
    """The commit of the checkout this package runs from, read from git's own files; None in a wheel."""
    git = Path(__file__).parents[2] / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        loose = git / head.removeprefix("ref: ")
        if loose.is_file():
            return loose.read_text().strip()
        packed = (git / "packed-refs").read_text().splitlines()
        return next((line.split()[0] for line in packed if line.endswith(" " + head.removeprefix("ref: "))), None)
    except OSError:
        return None


@cache
def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("bifrost-cli", *_LIBRARIES):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
