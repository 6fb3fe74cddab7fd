"""Several sources as one: their images stand under `1/`, `2/` and so on, in the order in which they were given. As one
text, which a store keeps, they are a JSON list."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from bifrost_cli.data.sources.item import Listing, SourceItem


def as_one(sources: Sequence[str]) -> str:
    """One text for one source or several."""
    return sources[0] if len(sources) == 1 else json.dumps(list(sources), ensure_ascii=False)


def parts_of(source: str) -> list[str]:
    """The sources that a text stands for."""
    if source.startswith("[") and not Path(source).exists():
        try:
            parts = json.loads(source)
        except ValueError:
            return [source]
        if isinstance(parts, list) and parts and all(isinstance(part, str) for part in parts):
            return parts
    return [source]


def list_all(parts: Sequence[str], list_one: Callable[[str], Listing]) -> Listing:
    """The listings of several sources as one; a key says of which it is."""
    listings = [list_one(part) for part in parts]
    entries = [replace(entry, key=f"{number}/{entry.key}") for number, one in enumerate(listings, 1) for entry in
               one.entries]  # fmt: skip
    counts = sum((Counter(one.counts) for one in listings), Counter[str]())
    said = tuple(dict.fromkeys(line for one in listings for line in one.said))
    problems = tuple(problem for one in listings for problem in one.problems)
    return Listing(tuple(sorted(entries, key=lambda entry: entry.key)), dict(counts), said, problems)


def choose_captions(listing: Listing, rule: str) -> Listing:
    """Of rows that are one image with several captions: all, the first, or one by a hash of the image's key."""
    if rule == "all":
        return listing
    rows: dict[str, list[SourceItem]] = {}
    for entry in listing.entries:
        rows.setdefault(entry.key.partition("#")[0], []).append(entry)
    chosen = []
    for key, group in rows.items():
        group.sort(key=lambda entry: int(entry.key.partition("#")[2] or 0))
        place = int.from_bytes(sha256(key.encode()).digest()[:8]) % len(group) if rule == "random" else 0
        chosen.append(replace(group[place], key=key))
    left = len(listing.entries) - len(chosen)
    counts = {**listing.counts, **({"other captions of an image": left} if left else {})}
    return replace(listing, entries=tuple(chosen), counts=counts)
