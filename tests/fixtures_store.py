"""A small latents store with random rows, for tests that train on or read one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bifrost_cli.artifacts import Artifact, Draft
from bifrost_cli.data.store_layout import Layout
from bifrost_cli.data.store_writer import StoreWriter

ENCODER = {"name": "random", "weights": "0" * 64, "grid": [2, 2], "channels": 8}


def make_store(
    path: Path,
    *,
    rows: int = 40,
    grid: tuple[int, int] = (2, 2),
    channels: int = 8,
    vae: tuple[int, int, int] | None = None,
    shard_rows: int = 16,
    chunk_rows: int = 4,
    seed: int = 0,
    encoder: dict[str, Any] | None = None,
    painter: dict[str, Any] | None = None,
    captions: list[str] | None = None,
    plans: list[str] | None = None,
    failed: tuple[int, ...] = (),
    storage: str = "float16",
    info: dict[str, Any] | None = None,
) -> Artifact:
    """A complete latents artifact at `path`; row i's latents are a function of (seed, i)."""
    layout = Layout(rows, grid, channels, vae, shard_rows, chunk_rows, storage)
    encoder = encoder or {**ENCODER, "grid": list(grid), "channels": channels}
    with Draft.open(path, "latents", {"encoder": encoder, "rows": rows, "seed": seed, "vae": list(vae or ())}) as draft:
        if draft.complete:
            return draft.complete
        writer = StoreWriter(draft, layout, {"encoder": encoder, "preprocessing": {}, "painter": painter})
        for shard in writer.missing_shards():
            span = range(*layout.span(shard).indices(rows))
            lines = [line(i, captions, plans, failed) for i in span]
            names = ("latents",) if vae is None else ("latents", "vae")
            arrays = {name: np.stack([row(name, i, layout, seed) for i in span]) for name in names}
            writer.write_shard(shard, arrays["latents"], lines, arrays.get("vae"))
        return draft.commit(info={"statistics": writer.finish(), **(info or {})})


def row(name: str, i: int, layout: Layout, seed: int = 0) -> np.ndarray:
    """The values of one row, float16."""
    rng = np.random.default_rng([seed, i, len(name)])
    return rng.normal(size=layout.row_shapes[name]).astype(np.float16)


def line(
    i: int, captions: list[str] | None = None, plans: list[str] | None = None, failed: tuple[int, ...] = ()
) -> dict[str, Any]:
    """The index line of one row."""
    return {
        "key": f"{i:08d}",
        "caption": captions[i] if captions else f"caption {i}",
        "plan": plans[i] if plans else None,
        "image": f"{i:064x}",
        "size": [64, 64],
        "status": "failed" if i in failed else "ok",
        "notes": [],
    }
