"""Writing a latents store, one whole shard at a time, so that a killed extraction continues and ends in the same bytes.
Shard files are on the disk before the index that makes them count. The statistics of the channels are float64 sums of
each shard, combined in shard order (Chan, Golub and LeVeque 1979), whichever process wrote which shard."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from bifrost_cli.artifacts import Draft
from bifrost_cli.artifacts.files import make_folder, sha256_file, write_bytes
from bifrost_cli.data.latents import zarr_layout
from bifrost_cli.data.latents.int8 import decode_int8, encode_int8
from bifrost_cli.data.latents.zarr_layout import INDEX, LATENTS, OK, SCALE, StoreLayout, read_index, write_index
from bifrost_cli.errors import DataError, StoreError


class StoreWriter:
    """Fills the store of a draft; shards that an earlier attempt committed are kept. For another process than the one
    that holds the draft, `place` is its path: it writes the shards that it is given, and nothing else. `attributes` are
    JSON values that readers need (encoder identity and so on). Call `write_shard` for each of `missing_shards`, then
    `finish`, then `draft.commit`."""

    def __init__(self, place: Draft | Path, layout: StoreLayout, attributes: Mapping[str, Any]) -> None:
        self.layout, self.attributes = layout, dict(attributes)
        self.path = place.path if isinstance(place, Draft) else place
        self._sums: dict[int, dict[str, Any]] = {}
        if isinstance(place, Draft):
            make_folder(self.path / INDEX)
            for shard in range(layout.shards):
                with suppress(StoreError):
                    index = read_index(self.path, shard)
                    if all(_is_whole(self.path / name, index.files.get(name)) for name in layout.shard_files(shard)):
                        self._sums[shard] = index.sums

    def missing_shards(self) -> list[int]:
        return [shard for shard in range(self.layout.shards) if shard not in self._sums]

    def write_shard(self, shard: int, latents_NPC: np.ndarray, lines: Sequence[Mapping[str, Any]],
                    vae_NCHW: np.ndarray | None = None) -> None:  # fmt: skip
        """Write the rows of one shard, all of them. Rows whose line's status is not "ok" are stored as NaN. DataError
        when a value is not finite in float16, naming the row's key. DiskFull when there is no room; the shard then does
        not count and the next attempt writes it again."""
        layout, span = self.layout, self.layout.span(shard)
        ok_N = np.array([line["status"] == OK for line in lines], bool)
        assert (vae_NCHW is None) == (layout.vae is None), f"a shard has {' and '.join(layout.row_shapes)}"
        assert len(lines) == span.stop - span.start, "a shard is written whole"
        stored = {LATENTS: _as_half(LATENTS, latents_NPC, ok_N, lines)}
        if vae_NCHW is not None:
            stored["vae"] = _as_half("vae", vae_NCHW, ok_N, lines)
        seen_NPC = stored[LATENTS]  # by a reader
        if layout.storage == "int8":
            stored[LATENTS], stored[SCALE] = encode_int8(seen_NPC)
            seen_NPC = decode_int8(stored[LATENTS], stored[SCALE])
        files = {}
        for name, values in stored.items():
            assert values.shape == (len(lines), *layout.row_shapes[name]), f"{name} has shape {values.shape}"
            file, data = layout.shard_file(name, shard), zarr_layout.shard_bytes(layout, name, shard, values)
            self._write(file, data)
            files[file] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        sums = sums_of(seen_NPC[ok_N])
        write_index(self.path, shard, lines, files, sums)
        self._sums[shard] = sums

    def finish(self) -> dict[str, Any]:
        """Write the attributes and return the channel statistics. StoreError while shards are missing, of this process
        and of others."""
        for shard in self.missing_shards():
            with suppress(StoreError):
                self._sums[shard] = read_index(self.path, shard).sums
        if missing := self.missing_shards():
            raise StoreError(f"{self.path}: {len(missing)} shards are not written yet", code="BF-STORE-006")
        statistics = statistics_of((self._sums[shard] for shard in range(self.layout.shards)), self.layout.channels)
        attributes = {**self.layout.attributes, **self.attributes, **statistics}
        for file, data in zarr_layout.metadata_files(self.layout, attributes).items():
            self._write(file, data)
        return statistics

    def _write(self, file: str, data: bytes) -> None:
        make_folder((self.path / file).parent)
        write_bytes(self.path / file, data)


def _is_whole(path: Path, entry: Mapping[str, Any] | None) -> bool:
    if entry is None or not path.is_file() or path.stat().st_size != entry["size"]:
        return False
    return sha256_file(path) == entry["sha256"]


def _as_half(name: str, values: np.ndarray, ok_N: np.ndarray, lines: Sequence[Mapping[str, Any]]) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = np.asarray(values, np.float16)
    if not ok_N.all():
        half = half.copy()
        half[~ok_N] = np.nan
    for row in map(int, np.flatnonzero(ok_N)):
        if not np.isfinite(half[row]).all():
            raise DataError(f"the {name} of {lines[row]['key']} are not finite in float16",
                            at=f"largest value {np.abs(np.asarray(values[row], np.float64)).max()}",
                            fix="check the encoder's weights and precision (--set models.dtype=float32)",
                            code="BF-DATA-003")  # fmt: skip
    return half


def sums_of(rows_NPC: np.ndarray) -> dict[str, Any]:
    """Tokens counted, channel mean, sum of squared deviations, sum of token norms; JSON values."""
    blocks = (_block_sums(rows_NPC[start : start + 16]) for start in range(0, len(rows_NPC), 16))
    total = _combine(blocks, rows_NPC.shape[-1])
    return {**total, "mean": total["mean"].tolist(), "m2": total["m2"].tolist()}


def statistics_of(parts: Iterable[dict[str, Any]], channels: int) -> dict[str, Any]:
    """Channel `mean` and `std` (population), and `norm`, the mean length of a token; JSON values."""
    total = _combine(parts, channels)
    tokens = max(1, total["tokens"])
    mean, std = total["mean"].tolist(), np.sqrt(total["m2"] / tokens).tolist()
    return {"mean": mean, "std": std, "norm": total["norm"] / tokens, "tokens": total["tokens"]}


def _block_sums(rows_NPC: np.ndarray) -> dict[str, Any]:
    tokens_TC = rows_NPC.reshape(-1, rows_NPC.shape[-1]).astype(np.float64)
    mean_C, norms_T = tokens_TC.mean(0), np.sqrt((tokens_TC**2).sum(1))
    m2_C = ((tokens_TC - mean_C) ** 2).sum(0)
    return {"tokens": len(tokens_TC), "mean": mean_C, "m2": m2_C, "norm": float(norms_T.sum())}


def _combine(parts: Iterable[dict[str, Any]], channels: int) -> dict[str, Any]:
    """The sums of several parts together, taken in their order."""
    tokens, mean_C, m2_C, norm = 0, np.zeros(channels), np.zeros(channels), 0.0
    for part in parts:
        if not part["tokens"]:
            continue
        together = tokens + part["tokens"]
        delta_C = np.asarray(part["mean"]) - mean_C
        mean_C = mean_C + delta_C * (part["tokens"] / together)
        m2_C = m2_C + np.asarray(part["m2"]) + delta_C**2 * (tokens * part["tokens"] / together)
        tokens, norm = together, norm + part["norm"]
    return {"tokens": tokens, "mean": mean_C, "m2": m2_C, "norm": norm}
