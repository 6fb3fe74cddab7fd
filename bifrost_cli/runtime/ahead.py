"""Work that threads do ahead of whoever takes its results, such as decoding images while a device computes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")
MOST_THREADS = 32


def map_ahead(function: Callable[[A], B], items: Iterable[A], *, ahead: int) -> Iterator[B]:
    """`map(function, items)` in order, computed in threads; what `function` raises arrives at the item's place.

    Args:
        ahead: how many results may wait, which bounds their memory.
    """
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        waiting: deque[Future[B]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:  # nobody takes them any more
                future.cancel()
