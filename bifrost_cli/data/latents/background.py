"""Writing shards in a thread of its own, so that encoding the next rows waits for no disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from queue import Empty, Full, Queue

from bifrost_cli.data.latents.writer import RowBatch, StoreWriter

AHEAD = 2  # batches that wait while another one is written
_LOOK = 0.2  # seconds until a caller whose batch finds no room looks whether the writing has failed

_Queue = Queue[RowBatch | BaseException | None]  # rows; why no more will come; None after the last


class BackgroundWriter:
    """Writes the shards that it is given, in order. A context manager: its end waits until all of it is on the disk.

    An error of the writing, of whatever kind, arrives at the next call or at the end, and nothing is written after it;
    after an error of the caller the shard that is not complete is abandoned and leaves nothing, and those before it are
    completed.
    """

    def __init__(self, writer: StoreWriter) -> None:
        self._writer = writer
        self._thread = ThreadPoolExecutor(1, "bifrost-write")
        self._written: list[Future[None]] = []
        self._failed = False

    def write_shard(self, shard: int, batches: Iterable[RowBatch]) -> None:
        """Hand over the rows of a shard, see `StoreWriter.write_shard`; returns when the last are handed over."""
        rows: _Queue = Queue(AHEAD)
        self._written.append(self._thread.submit(self._write, shard, rows))
        try:
            for batch in batches:
                self._hand(rows, batch)
            self._hand(rows, None)
        except BaseException as error:
            with suppress(Empty):
                while True:
                    rows.get_nowait()
            rows.put_nowait(error)
            raise

    def flush(self) -> None:
        """Wait until everything is on the disk. Raises what the writing raised."""
        for future in self._written:
            future.result()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        wait(self._written)
        self._thread.shutdown()
        if kind is None:
            self.flush()

    def _write(self, shard: int, rows: _Queue) -> None:
        """In the thread; nothing more after an error, which is on its way to the caller."""
        if self._failed:
            return
        try:
            self._writer.write_shard(shard, _taken(rows))
        except BaseException:
            self._failed = True
            raise

    def _hand(self, rows: _Queue, item: RowBatch | None) -> None:
        while True:
            for future in self._written:
                if future.done():
                    future.result()
            with suppress(Full):
                return rows.put(item, timeout=_LOOK)


def _taken(rows: _Queue) -> Iterator[RowBatch]:
    while (item := rows.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item
