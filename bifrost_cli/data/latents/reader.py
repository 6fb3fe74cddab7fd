"""Reading a latents store: a wrong, missing or changed byte is an error, and never returned as a number. Small files
are checked against the manifest when the store is opened, each shard by its sha256 when it is first touched, each inner
chunk by its crc32c and each row for being finite when it is read."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from bifrost_cli.artifacts import Artifact
from bifrost_cli.artifacts.files import sha256_file
from bifrost_cli.data.latents import zarr_layout
from bifrost_cli.data.latents.int8 import decode_int8
from bifrost_cli.data.latents.zarr_layout import LATENTS, MEND, OK, SCALE, StoreLayout, read_index
from bifrost_cli.errors import StoreError

_KEPT_IN_MEMORY = 2_000_000_000  # bytes of one array


class LatentsStore:
    """The rows of a latents artifact, in sorted key order; rows that failed in the extraction are left out.

    Attributes:
        rows: N.
        grid: (H, W) of the patches; P = H * W.
        channels: C.
        keys, captions: a text each row.
        plans: the plan of each row, or None.
        mean_C, std_C: of each channel over all tokens, float32.
        norm: mean length of a token.
        encoder: identity of what encoded the images.
        vae_shape: (c, h, w) of the VAE latents, or None without them.
        attributes: everything that the store says of itself.
        artifact: the artifact on disk.
    """

    def __init__(self, artifact: Artifact, verify: bool) -> None:
        self.artifact, self._path, self._verify = artifact, artifact.path, verify
        self._checked: set[str] = set()
        self._kept: dict[str, np.ndarray] = {}
        group = zarr_layout.open_group(self._path)
        self.attributes: dict[str, Any] = dict(group.attrs)
        self._layout = StoreLayout.of(self.attributes, self._path)
        self._arrays = zarr_layout.open_arrays(group, self._layout, self._path)
        # Of each row its text and its place, nothing else: a store may have millions.
        self.keys: list[str] = []
        self.captions: list[str] = []
        self.plans: list[str | None] = []
        places = array("q")
        for place, line in self._ok_lines():
            places.append(place)
            self.keys.append(line["key"])
            self.captions.append(line["caption"])
            self.plans.append(line.get("plan"))
        self._physical_N = np.array(places, np.int64)
        self.rows, self.grid, self.channels = len(self.keys), self._layout.grid, self._layout.channels
        self.vae_shape = self._layout.vae
        self.encoder: dict[str, Any] = self.attributes["encoder"]
        self.mean_C, self.std_C = (np.asarray(self.attributes[name], np.float32) for name in ("mean", "std"))
        self.norm = float(self.attributes["norm"])

    @classmethod
    def open(cls, source: Artifact | Path | str, verify: bool = True) -> LatentsStore:
        """Open a complete store.

        Args:
            source: a latents artifact, or its folder.
            verify: False leaves out the sha256 of each shard (for stores of terabytes that `bifrost artifacts verify`
                has passed); the checksums of the inner chunks and the check for finite rows remain.

        Raises:
            ArtifactError, StoreError: it is no latents store, or is damaged.
        """
        artifact = source if isinstance(source, Artifact) else Artifact.open(source)
        if artifact.kind != "latents":
            raise StoreError(f"{artifact.path} is a {artifact.kind} artifact, not latents", fix="give a latents store")
        for name, entry in artifact.files.items():  # all but the shards are hashed too
            path = artifact.path / name
            if not path.is_file() or path.stat().st_size != entry["size"]:
                trouble = "has another size than it was written with" if path.exists() else "is missing"
            elif "/c/" not in name and sha256_file(path) != entry["sha256"]:
                trouble = "was changed after it was written"
            else:
                continue
            see = f"see all of it: bifrost artifacts verify {quote(str(artifact.path))}"
            raise StoreError(f"{artifact.path}: {name} {trouble}", at=see, fix=MEND, code="BF-STORE-005")
        try:
            return cls(artifact, verify)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{artifact.path} is not a latents store of ours: {error}", fix=MEND) from error

    def latents(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Latents (n, P, C) float16 of `rows`, in the order given. StoreError naming the shard that is damaged."""
        return self._read(LATENTS, rows)

    def vae(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The diffusion model's VAE latents (n, c, h, w) float16 of `rows`. StoreError when the store has none."""
        if self.vae_shape is None:
            fix = "extract again with them, in another place: bifrost extract-latents --set latents.vae=true"
            raise StoreError(f"{self._path} holds no VAE latents", fix=fix, code="BF-STORE-006")
        return self._read("vae", rows)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The index line of each row, read again from the disk."""
        return [line for _, line in self._ok_lines()]

    def _ok_lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Row number in the arrays and index line of every row that did not fail."""
        for shard in range(self._layout.shards):
            lines, span = read_index(self._path, shard).lines, self._layout.span(shard)
            if len(lines) != span.stop - span.start:
                message = f"{self._path}: the index of shard {shard} has {len(lines)} rows"
                raise StoreError(message, fix=MEND, code="BF-STORE-006")
            yield from ((i, line) for i, line in enumerate(lines, span.start) if line["status"] == OK)

    def _read(self, name: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        wanted = np.asarray(rows, np.int64)
        if name not in self._kept and 2 * self._arrays[name].size <= _KEPT_IN_MEMORY:
            self._kept[name] = self._read_rows(name, self._physical_N)
        if name in self._kept:
            return self._kept[name][wanted]
        unique, inverse = np.unique(self._physical_N[wanted], return_inverse=True)
        return self._read_rows(name, unique)[inverse]

    def _read_rows(self, name: str, physical_N: np.ndarray) -> np.ndarray:
        """Rows in ascending order as float16. StoreError when one that was written is not there."""
        rows = np.empty((len(physical_N), *self._layout.row_shapes[name]), np.float16)
        shards_N = physical_N // self._layout.shard_rows
        for shard in map(int, np.unique(shards_N)):
            of_shard = shards_N == shard
            values = self._read_stored(name, shard, physical_N[of_shard])
            if self._layout.dtype(name) == "int8":
                values = decode_int8(values, self._read_stored(SCALE, shard, physical_N[of_shard]))
            if not np.isfinite(values).all():
                raise self._damaged(name, shard, "rows that were written are missing")
            rows[of_shard] = values
        return rows

    def _read_stored(self, name: str, shard: int, physical: np.ndarray) -> np.ndarray:
        """Rows as they are stored, from the file that the manifest names and no other."""
        file, span = self._layout.shard_file(name, shard), self._layout.span(shard)
        try:
            if self._verify and file not in self._checked:
                if sha256_file(self._path / file) != self.artifact.files[file]["sha256"]:
                    raise ValueError("its sha256 is not the one in the manifest")
                self._checked.add(file)
            if len(physical) == span.stop - span.start:
                return np.asarray(self._arrays[name][span])
            return np.asarray(self._arrays[name].oindex[physical])
        except Exception as error:  # Zarr and its codecs raise many kinds for bytes that are not what was written
            raise self._damaged(name, shard, str(error)) from error

    def _damaged(self, name: str, shard: int, reason: str) -> StoreError:
        span = self._layout.span(shard)
        message = f"{self._path}: shard {shard} of {name} (rows {span.start} to {span.stop - 1}) is damaged"
        at = f"{self._layout.shard_file(name, shard)}: {reason}"
        return StoreError(message, at=at, fix=MEND, code="BF-STORE-005")
