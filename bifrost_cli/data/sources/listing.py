"""Which kind of source a text means: a folder, a table, archives, a data set of the hub, or what a plug-in reads.

Another package adds a scheme by an entry point of the group `bifrost.sources`, a function of what follows `SCHEME:` and
of the recipe's `latents` section that returns a `Listing`:

    [project.entry-points."bifrost.sources"]
    lmdb = "my_package.lmdb:list_lmdb"
"""

from __future__ import annotations

import re
from pathlib import Path

from bifrost_cli.config.schema import Latents
from bifrost_cli.data.sources.folder import list_folder, table_in
from bifrost_cli.data.sources.hf_datasets import HUB, list_hub
from bifrost_cli.data.sources.item import Listing
from bifrost_cli.data.sources.parquet import list_parquet
from bifrost_cli.data.sources.remote import SCHEMES, expand, is_remote, suffix_of
from bifrost_cli.data.sources.table import TABLES, list_tables
from bifrost_cli.data.sources.webdataset import list_tars
from bifrost_cli.errors import BifrostError, DataError, EnvironmentProblem, RecipeError
from bifrost_cli.runtime.plugins import Plugins

PARQUET = ".parquet"
_FIX = "give a folder of images with .txt captions, a table (.jsonl, .csv, ...), .tar archives, or shapes:2048"
# Listers of other packages by scheme. The names of ours stand here so that none of them can be taken.
SOURCES = Plugins("bifrost.sources", {name: None for name in ("hf", "shapes", *SCHEMES)})


def list_source(source: str, rules: Latents) -> Listing:
    """The images of a source, and what of it cannot be used.

    Raises:
        DataError: nothing there, no images, a list that cannot be read at all.
        RecipeError: a setting that this source would ignore.
        EnvironmentProblem: a package is missing or a plug-in fails, a server cannot be reached.
    """
    if scheme := _plugin_scheme(source):
        return _of_plugin(scheme, source, rules)
    try:
        if source.startswith(HUB) and not is_remote(source):
            refuse_ignored(rules, "a data set", captions="files", class_names=None)
            return list_hub(source.removeprefix(HUB), rules)
        places = expand(source)
        suffix = suffix_of(places[0])
        is_file = is_remote(source) or not Path(places[0]).is_dir()
        if suffix in (*TABLES, PARQUET) and is_file:
            return _of_tables(places, rules)
        if suffix == ".tar" and is_file:
            refuse_ignored(rules, "archives", captions="files", image_column=None)
            return list_tars(places, rules)
        root = Path(source)
        if is_remote(source) or not root.is_dir():
            raise _no_source(source)
        if rules.captions == "files" and (metadata := table_in(root)):
            return _of_tables([str(metadata)], rules)
        refuse_ignored(rules, "a folder", image_column=None, caption_column=None)
        if rules.captions == "files":
            refuse_ignored(rules, "captions in files", class_names=None)
        return list_folder(root, rules)
    except PermissionError as error:
        raise DataError(f"{error.filename} is not readable by this user") from error


def _plugin_scheme(source: str) -> str | None:
    """The scheme of a source that a plug-in reads; a file of that name comes first."""
    match = re.match(r"([a-z][a-z0-9+.-]+):", source)
    ours = ("hf", "shapes", *SCHEMES)
    if match is None or match[1] not in SOURCES or Path(source).exists():
        return None
    SOURCES[match[1]]  # two of one name, or a plug-in that does not load, stop here
    return None if match[1] in ours else match[1]


def _of_plugin(scheme: str, source: str, rules: Latents) -> Listing:
    try:
        listing = SOURCES[scheme](source.removeprefix(f"{scheme}:"), rules)
        if not isinstance(listing, Listing):
            raise TypeError(f"it returned {type(listing).__name__}, not a Listing")
        return listing
    except BifrostError:
        raise
    except Exception as error:  # whatever somebody else's code does
        raise EnvironmentProblem(
            f"the plug-in for {scheme}: failed on {source}",
            at=f"{type(error).__name__}: {error}",
            fix="ask its author, or give another source",
            code="BF-ENV-004",
        ) from error


def folder_of(source: str) -> Path | None:
    """The local folder that a source is, which is never written to; None for files, and for what is elsewhere."""
    name = source.removeprefix(HUB).partition(":")[0] if source.startswith(HUB) else source
    return Path(name) if not is_remote(name) and Path(name).is_dir() else None


def _no_source(source: str) -> DataError:
    if is_remote(source):
        what = "is not a table or an archive (folders are read locally only)"
    else:
        what = "is not a folder, a table or an archive" if Path(source).exists() else "does not exist"
    return DataError(f"{source} {what}", fix=_FIX)


def _of_tables(places: list[str], rules: Latents) -> Listing:
    refuse_ignored(rules, "a table", captions="files", class_names=None)
    parquet = suffix_of(places[0]) == PARQUET
    return list_parquet(places, rules) if parquet else list_tables(places, rules)


def refuse_ignored(rules: Latents, what: str, **ignored: object) -> None:
    """RecipeError for a key that is set and that this kind of source has no use for."""
    for name, default in ignored.items():
        if getattr(rules, name) != default:
            raise RecipeError(
                f"latents.{name} says nothing about {what}, and would be ignored",
                fix=f"leave it out, or set it to {default}",
                code="BF-RECIPE-005",
            )
