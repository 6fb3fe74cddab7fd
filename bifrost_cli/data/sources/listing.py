"""Which kind of source a text means, and its listing.

In: what the user typed: a folder, a table, archives, a data set of the hub, local or remote. Out: a `Listing`, or the
error that says what can be given. Decodes no image.
"""

from __future__ import annotations

from pathlib import Path

from bifrost_cli.config.schema import Latents
from bifrost_cli.data.sources.folder import list_folder
from bifrost_cli.data.sources.hf_datasets import HUB, list_hub
from bifrost_cli.data.sources.item import Listing
from bifrost_cli.data.sources.parquet import list_parquet
from bifrost_cli.data.sources.remote import expand, is_remote, suffix_of
from bifrost_cli.data.sources.table import METADATA, TABLES, list_tables
from bifrost_cli.data.sources.webdataset import list_tars
from bifrost_cli.errors import DataError, RecipeError

PARQUET = ".parquet"
_FIX = "give a folder of images with .txt captions, a table (.jsonl, .csv, ...), .tar archives, or shapes:2048"


def list_source(source: str, rules: Latents) -> Listing:
    """Entries of a source, sorted by key.

    DataError: nothing there, no images, two images with one key. SourceError: captions that cannot be read, broken
    lines, paths that leave the source (each problem listed). RecipeError: a setting that this source would ignore.
    """
    try:
        if source.startswith(HUB) and not is_remote(source):
            refuse_ignored(rules, "a data set", captions="files", class_names=None)
            return list_hub(source.removeprefix(HUB), rules)
        places = expand(source)
        suffix = suffix_of(places[0])
        if suffix in (*TABLES, PARQUET) and (is_remote(source) or not Path(places[0]).is_dir()):
            return _of_tables(places, rules)
        if suffix == ".tar":
            refuse_ignored(rules, "archives", captions="files", image_column=None)
            return list_tars(places, rules)
        root = Path(source)
        if is_remote(source) or not root.is_dir():
            raise _no_source(source)
        metadata = root / METADATA
        if metadata.exists() and rules.captions == "files":
            return _of_tables([str(metadata)], rules)
        refuse_ignored(rules, "a folder", image_column=None, caption_column=None)
        if rules.captions == "files":
            refuse_ignored(rules, "captions in files", class_names=None)
        return list_folder(root, rules)
    except PermissionError as error:
        raise DataError(f"{error.filename} is not readable by this user") from error


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
