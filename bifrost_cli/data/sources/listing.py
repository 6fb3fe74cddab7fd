"""Which kind of source a text means: a folder, a table, archives, a data set of the hub, or what a plug-in reads.

Another package adds a scheme by an entry point of the group `bifrost.sources`, a function of what follows `SCHEME:` and
of the recipe's `latents` section that returns a `Listing`:

    [project.entry-points."bifrost.sources"]
    lmdb = "my_package.lmdb:list_lmdb"
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from shlex import quote

from bifrost_cli.config.schema import Latents
from bifrost_cli.data.sources.folder import list_folder, table_in
from bifrost_cli.data.sources.hf_datasets import HUB, list_hub
from bifrost_cli.data.sources.item import Listing
from bifrost_cli.data.sources.parquet import list_parquet
from bifrost_cli.data.sources.remote import SCHEMES, expand, is_remote, suffix_of
from bifrost_cli.data.sources.several import as_one, choose_captions, list_all, parts_of
from bifrost_cli.data.sources.table import TABLES, list_tables
from bifrost_cli.data.sources.webdataset import list_tars
from bifrost_cli.errors import BifrostError, DataError, EnvironmentProblem, RecipeError, UsageError
from bifrost_cli.runtime.plugins import Plugins

# The listers of files by suffix, what they are called, and the settings that would say nothing about them.
_TABLE = ("a table", ("captions", "class_names"))
_FILES = {
    **dict.fromkeys(TABLES, (list_tables, *_TABLE)),
    ".parquet": (list_parquet, *_TABLE),
    ".tar": (list_tars, "archives", ("captions", "image_column")),
}
_FIX = "give a folder of images with .txt captions, a table (.jsonl, .csv, ...), .tar archives, or shapes:2048"
# Listers of other packages by scheme. The names of ours stand here so that none of them can be taken.
SOURCES = Plugins("bifrost.sources", dict.fromkeys(("hf", "shapes", *SCHEMES)))


def list_source(source: str, rules: Latents) -> Listing:
    """The images of a source, and what of it cannot be used. DataError: nothing there, no images, a list that cannot be
    read at all. RecipeError: a setting that this source would ignore. EnvironmentProblem: a package is missing, a
    plug-in fails, a server cannot be reached."""
    return choose_captions(_list(source, rules), rules.captions_per_image)


def _list(source: str, rules: Latents) -> Listing:
    if len(parts := parts_of(source)) > 1:
        return list_all(parts, lambda part: _list(part, rules))
    if (listing := _of_plugin(source, rules)) is not None:
        return listing
    try:
        if source.startswith(HUB) and not is_remote(source):
            refuse_ignored(rules, "a data set", "captions", "class_names")
            return list_hub(source.removeprefix(HUB), rules)
        places, root = expand(source), Path(source)
        if len(places) > 1 and all(Path(place).is_dir() for place in places if not is_remote(place)):
            return list_all(places, lambda part: _list(part, rules))
        if len(places) == 1 and not is_remote(source):
            root = Path(places[0])
        is_folder = not is_remote(source) and root.is_dir()
        if is_folder and rules.captions == "files" and (table := table_in(root)):
            places = [str(table)]
        elif is_folder:
            refuse_ignored(rules, "a folder", "image_column", "caption_column")
            if rules.captions == "files":
                refuse_ignored(rules, "captions in files", "class_names")
            return list_folder(root, rules)
        elif suffix_of(places[0]) not in _FILES or Path(places[0]).is_dir():
            what = "is not a folder, a table or an archive" if root.exists() else "does not exist"
            what = "is not a table or an archive (folders are read locally only)" if is_remote(source) else what
            raise DataError(f"{source} {what}", fix=_instead(root) or _FIX)
        lister, what, ignored = _FILES[suffix_of(places[0])]
        refuse_ignored(rules, what, *ignored)
        return lister(places, rules)
    except PermissionError as error:
        raise DataError(f"{error.filename} is not readable by this user") from error


def _instead(path: Path) -> str | None:
    """What to type for a file of a kind that people have and that is not read."""
    name, suffix = quote(str(path)), path.suffix.lower()
    if suffix == ".zip":
        return f"unpack it first: unzip {name} -d {quote(str(path.with_suffix('')))}"
    if suffix in (".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"):
        return "unpack it first, and give the folder or the .tar"
    if suffix == ".json":
        return f"write one object a line: jq -c '.[]' {name} > {quote(str(path.with_suffix('.jsonl')))}"
    if suffix == ".arrow":
        return "write it as Parquet: datasets.load_from_disk(FOLDER).to_parquet('data.parquet')"
    if path.is_file():
        return f"give its folder: {quote(str(path.parent))}; or a table whose first line is file_name,caption"
    return None


def _of_plugin(source: str, rules: Latents) -> Listing | None:
    """None for a source that no plug-in reads; a file of that name comes first."""
    match = re.match(r"([a-z][a-z0-9+.-]+):", source)
    if match is None or match[1] not in SOURCES or Path(source).exists():
        return None
    lister = SOURCES[match[1]]  # two of one name, or a plug-in that does not load, stop here
    if lister is None:
        return None
    try:
        listing = lister(source.removeprefix(match[0]), rules)
        if not isinstance(listing, Listing):
            raise TypeError(f"it returned {type(listing).__name__}, not a Listing")
        return listing
    except BifrostError:
        raise
    except Exception as error:  # whatever somebody else's code does
        told = f"{type(error).__name__}: {error}"
        raise EnvironmentProblem(f"the plug-in for {match[0]} failed on {source}", at=told, code="BF-ENV-004",
                                 fix="ask its author, or give another source") from error  # fmt: skip


def folder_of(source: str) -> Path | None:
    """The local folder that a source is, which is never written to; None for files, and for what is elsewhere."""
    name = source.removeprefix(HUB).partition(":")[0] if source.startswith(HUB) else source
    return Path(name) if not is_remote(name) and Path(name).is_dir() else None


def as_typed_in(folder: Path, source: str) -> str:
    """A source whose relative path was typed in another folder; as it is where nothing lies there."""
    if len(parts := parts_of(source)) > 1:
        return as_one([as_typed_in(folder, part) for part in parts])
    scheme = HUB if source.startswith(HUB) else ""
    path, colon, split = source.removeprefix(scheme).partition(":" if scheme else "\0")
    path = str(folder / path)
    with suppress(UsageError):
        return scheme + path + colon + split if Path(expand(path)[0]).exists() else source
    return source


def refuse_ignored(rules: Latents, what: str, *names: str) -> None:
    """RecipeError for a key that is set and that this kind of source has no use for."""
    for name in names:
        default = Latents.model_fields[name].default
        if getattr(rules, name) != default:
            raise RecipeError(f"latents.{name} says nothing about {what}, and would be ignored",
                              fix=f"leave it out, or set it to {default}", code="BF-RECIPE-005")  # fmt: skip
