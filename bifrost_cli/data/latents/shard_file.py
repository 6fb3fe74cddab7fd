"""A shard file as Zarr v3's sharding codec lays it out: chunks of whole rows, the crc32c of each behind it, and at the
end the index, an (offset, length) for each chunk with a crc32c of its own
(https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/).

Zarr writes and reads the same bytes, but a row of the paper's size costs it 100 ms: here one is one read into the array
that is returned, and its checksum is taken while it is in the processor's cache (10 to 20 GB/s; a disk is slower).
Several threads may read at once. n rows, c chunks.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd

from bifrost_cli.data.sources.remote import read_span, size_of

CRC_BYTES, ENTRY_BYTES = 4, 16
ABSENT = 2**64 - 1  # both numbers of a chunk that was never written


def crc32c(data: np.ndarray) -> int:
    """Of a contiguous array's bytes."""
    return google_crc32c.value(data.reshape(-1).view(np.uint8))


class ShardEncoder:
    """The bytes of one shard of one array, handed to `write` as rows come."""

    def __init__(self, write: Callable[[memoryview], object], chunk_shape: tuple[int, ...], dtype: str, fill: float
                 ) -> None:  # fmt: skip
        """`chunk_shape` is (rows, ...); `fill` is what stands in a chunk behind the last row."""
        self._write, self._chunk_shape, self._dtype, self._fill = write, chunk_shape, np.dtype(dtype), fill
        self._chunk_bytes = math.prod(chunk_shape) * self._dtype.itemsize
        self._hash, self._size = hashlib.sha256(), 0
        self._crcs: list[int] = []

    @property
    def entry(self) -> dict[str, Any]:
        """sha256 and size of all bytes so far, and the checksum of each chunk, in hexadecimal."""
        crcs = np.array(self._crcs, "<u4").tobytes().hex()
        return {"sha256": self._hash.hexdigest(), "size": self._size, "crc32c": crcs}

    def add(self, rows: np.ndarray) -> None:
        """Rows (n, ...) that begin a chunk. All but the last ones of the shard fill their chunks."""
        of_chunk = self._chunk_shape[0]
        encoded = np.empty((-(-len(rows) // of_chunk), self._chunk_bytes + CRC_BYTES), np.uint8)
        for data, start in zip(encoded, range(0, len(rows), of_chunk), strict=True):
            values = data[: self._chunk_bytes].view(self._dtype).reshape(self._chunk_shape)
            part = rows[start : start + of_chunk]
            values[: len(part)] = part
            values[len(part) :] = self._fill
            self._crcs.append(crc32c(values))
            data[self._chunk_bytes :] = np.array([self._crcs[-1]], "<u4").view(np.uint8)
        self._put(encoded)

    def finish(self, chunks: int) -> None:
        """Write the index of a shard that has room for that many chunks."""
        index = np.full((chunks, 2), ABSENT, "<u8")
        written, stride = len(self._crcs), self._chunk_bytes + CRC_BYTES
        index[:written] = np.stack([np.arange(written) * stride, np.full(written, stride)], 1)
        self._put(np.concatenate([index.reshape(-1).view("<u4"), [np.uint32(crc32c(index))]]).view(np.uint8))

    def _put(self, data: np.ndarray) -> None:
        view = data.reshape(-1).data
        self._hash.update(view)
        self._size += len(view)
        self._write(view)


@dataclass(frozen=True)
class ShardReader:
    """One shard of one array.

    Attributes:
        place: its file, or the address of it.
        chunk_shape: (rows, ...) of one chunk.
        dtype: of its values.
        index_c2: offset and length of each chunk, from `read_index`.
        compressed: by zstd, as shards before format 3 are.
        crcs_c: what the checksums were when the shard was written; None where that is not known.
    """

    place: Path | str
    chunk_shape: tuple[int, ...]
    dtype: np.dtype
    index_c2: np.ndarray
    compressed: bool = False
    crcs_c: np.ndarray | None = None

    def read(self, chunk: int, out: np.ndarray | None = None) -> np.ndarray:
        """One chunk.

        Args:
            chunk: its number in the shard.
            out: a contiguous array to read it into.

        Raises:
            ValueError: it was never written, is cut short, or its bytes are not those that were written.
        """
        out = np.empty(self.chunk_shape, self.dtype) if out is None else out
        offset, length = map(int, self.index_c2[chunk])
        if offset == ABSENT:
            raise ValueError("it was never written")
        if not self.compressed and length != out.nbytes + CRC_BYTES:
            raise ValueError(f"it has {length} bytes, not {out.nbytes + CRC_BYTES}")
        if not self.compressed:
            self._read_checked(chunk, offset, out.reshape(-1).view(np.uint8))
            return out
        if length < CRC_BYTES or offset + length > _size(self.place):
            raise ValueError("it lies outside of its shard")
        packed = np.empty(length - CRC_BYTES, np.uint8)
        self._read_checked(chunk, offset, packed)
        data = np.frombuffer(Zstd().decode(packed), np.uint8)
        if len(data) != out.nbytes:
            raise ValueError(f"it has {len(data)} bytes after zstd, not {out.nbytes}")
        out.reshape(-1).view(np.uint8)[:] = data
        return out

    def _read_checked(self, chunk: int, offset: int, out: np.ndarray) -> None:
        stored = read_into(self.place, offset, out)
        found = crc32c(out)
        wanted = found if self.crcs_c is None else int(self.crcs_c[chunk])
        if not found == stored == wanted:
            raise ValueError(f"its crc32c is {found:08x}, and was {wanted if found == stored else stored:08x}")


def read_into(place: Path | str, offset: int, out: np.ndarray) -> int:
    """Fill `out`, of bytes, from a file, and give the 4 bytes behind it as a number. ValueError: the file ends before.

    A file of its own for each call: threads share no position, and a store of a thousand shards holds no thousand
    descriptors. The system is told to read nothing ahead.
    """
    if isinstance(place, str):
        data = np.frombuffer(read_span(place, offset, len(out) + CRC_BYTES), np.uint8)
        out[:] = data[: len(out)]
        return int.from_bytes(data[len(out) :].tobytes(), "little")
    last = bytearray(CRC_BYTES)
    with open(place, "rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        stream.seek(offset)
        for part in (out.data, memoryview(last)):
            while part:
                if not (count := stream.readinto(part)):
                    raise ValueError("it is cut short")
                part = part[count:]
    return int.from_bytes(last, "little")


def _size(place: Path | str) -> int:
    return size_of(place) if isinstance(place, str) else place.stat().st_size


def read_index(place: Path | str, chunks: int) -> np.ndarray:
    """Offset and length (c, 2) of each chunk of a shard, from the end of its file. ValueError: it is damaged."""
    index = np.empty(chunks * ENTRY_BYTES, np.uint8)
    start = _size(place) - len(index) - CRC_BYTES
    if start < 0:
        raise ValueError("it is cut short")
    if read_into(place, start, index) != crc32c(index):
        raise ValueError("its index is damaged")
    return index.view("<u8").reshape(chunks, 2)


def is_finite(half: np.ndarray) -> bool:
    """Neither infinity nor NaN in a float16 array: of either sign those are the largest as integers. `np.isfinite`
    takes twenty times as long."""
    return not half.size or bool(half.view(np.int16).max() < 0x7C00 and half.view(np.uint16).max() < 0xFC00)
