"""The index of a latents store: what each row is, and which shards count.

In and out: `index/shard-NNNNN.jsonl`, one line a row (key, caption, plan, sha256 of the image, size, status, notes) and
a last line that commits the shard: the digests of its files and its sums for the channel statistics. The file appears,
whole, after the shard's own files are on the disk; a shard without it does not exist. Does not know Zarr.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bifrost_cli.artifacts.files import canonical_json, write_bytes
from bifrost_cli.errors import StoreError

INDEX = "index"
OK = "ok"
MEND = "restore the file from a copy, or extract again in another place: bifrost extract-latents -o PLACE"


@dataclass(frozen=True)
class ShardIndex:
    """One committed shard: its row lines, its files' {"sha256", "size"} by name, and its sums."""

    lines: list[dict[str, Any]]
    files: dict[str, dict[str, Any]]
    sums: dict[str, Any]


def index_file(shard: int) -> str:
    return f"{INDEX}/shard-{shard:05d}.jsonl"


def write_index(
    folder: Path, shard: int, lines: Sequence[Mapping[str, Any]], files: Mapping[str, Any], sums: Mapping[str, Any]
) -> None:
    """Commit a shard. Its files must have been fsynced before."""
    rows = b"".join(canonical_json(line) + b"\n" for line in lines)
    commit = {"shard": shard, "lines": hashlib.sha256(rows).hexdigest(), "files": files, "sums": sums}
    last = canonical_json({"commit": commit, "digest": hashlib.sha256(canonical_json(commit)).hexdigest()})
    write_bytes(folder / index_file(shard), rows + last + b"\n")


def read_index(folder: Path, shard: int) -> ShardIndex:
    """One shard's index. StoreError when it is missing, cut short or changed."""
    path = folder / index_file(shard)
    try:
        *rows, last = path.read_bytes().splitlines(keepends=True)
        end = json.loads(last)
        commit = end["commit"]
        whole = (
            end["digest"] == hashlib.sha256(canonical_json(commit)).hexdigest()
            and commit["lines"] == hashlib.sha256(b"".join(rows)).hexdigest()
            and commit["shard"] == shard
        )
        index = ShardIndex([json.loads(row) for row in rows], commit["files"], commit["sums"])
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing", fix=MEND, code="BF-STORE-006") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged: {error}", fix=MEND, code="BF-STORE-005") from error
    if not whole:
        raise StoreError(f"{path} was changed after it was written", fix=MEND, code="BF-STORE-005")
    return index
