"""What is to be generated: prompts, seeds, and where each image goes. Imports no model library, to refuse quickly."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shlex import quote
from typing import Any

from bifrost_cli import __version__
from bifrost_cli.artifacts import Artifact
from bifrost_cli.artifacts.files import exists
from bifrost_cli.artifacts.identity import provenance
from bifrost_cli.artifacts.manifest import require_outside
from bifrost_cli.config.schema import Recipe
from bifrost_cli.config.section import identity_of
from bifrost_cli.data.png import WRITTEN
from bifrost_cli.errors import UsageError
from bifrost_cli.runtime.ui import Ui

MAX_BYTES = 64 * 1024
FILE_BYTES = 1 << 28  # of a file of prompts
OTHER_FORMATS = {".gif", ".bmp", ".tif", ".tiff", ".avif", ".jxl", ".heic"}
_JSON_EXAMPLE = 'a prompt is an object: {"prompt": "a star"}'
_EXAMPLE = 'bifrost generate "a red circle above a blue square" -o out.png'


@dataclass(frozen=True)
class ImageRequest:
    """One image to generate. The same (prompt, seed) is the same image, alone or among others; with a `plan` that was
    given, the same of the three."""

    index: int
    prompt: str
    seed: int
    plan: str | None = None

    @property
    def name(self) -> str:
        """File name: the number alone, since a prompt may hold anything."""
        return f"{self.index:05d}.png"


def image_requests(prompts: Sequence[str], copies: int, seed: int) -> Iterator[ImageRequest]:
    """`copies` images of each prompt, seeds counting up from `seed`; a prompt that comes again goes on counting."""
    rendered: Counter[str] = Counter()
    for index in range(len(prompts) * copies):
        prompt = prompts[index // copies]
        yield ImageRequest(index, prompt, seed + rendered[prompt])
        rendered[prompt] += 1


def generate_settings(recipe: Recipe) -> dict[str, Any]:
    """What of the `generate` section decides an image, and the prompt tokens of the diffusion model."""
    return {**identity_of(recipe.generate), "painter_tokens": recipe.models.diffusion_text_tokens}


def image_settings(recipe: Recipe, **more: Any) -> dict[str, Any]:
    """What of a recipe decides an image beside prompt, seed and weights (which the parents' ids stand for)."""
    quantized = {"weights": recipe.models.weights} if recipe.models.weights != "dtype" else {}
    sizes = {"paint_size": recipe.images.output_size, **more}
    return {**generate_settings(recipe), **sizes, "dtype": recipe.models.dtype, **quantized}


def png_facts(
    request: ImageRequest, settings: dict[str, Any], parents: Sequence[Artifact], plan: str | None = None
) -> dict[str, str]:
    """What an image says of itself: everything that made it; no time, no host, no position in a batch."""
    artifacts = {parent.kind: parent.id for parent in parents}
    facts = {"settings": settings, "artifacts": artifacts, "versions": provenance()["versions"]}
    planned = {} if plan is None else {"plan": plan}
    text = {"prompt": request.prompt, **planned, "seed": str(request.seed), "Software": f"bifrost {__version__}"}
    return text | {key: json.dumps(value) for key, value in facts.items()}


def read_prompts(prompts: str | Path | Sequence[str], ui: Ui) -> list[str]:
    """One prompt (str), a file with one a line (Path), or a list of them; each checked.

    In a file blank lines are skipped and counted; a line that begins with `#` is a prompt like any other; the lines of
    a .jsonl file are objects with a "prompt", as GenEval's are; a .json file is a list of these or of texts. The file
    `-` is standard input. UsageError (2): no prompt, an empty one, one that is no text, over 64 kB, or holds a NUL; the
    file's name and line are given.
    """
    if isinstance(prompts, Path) and prompts.suffix.lower() == ".json":
        placed, skipped = _of_list(prompts), 0
    elif isinstance(prompts, Path):
        lines = _text(prompts).removesuffix("\n").split("\n")  # not splitlines: U+2028 may stand in a prompt
        placed = [(f"{prompts}:{number}", line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
        if not placed:
            raise UsageError(f"{prompts} holds no prompt", fix="write one prompt a line")
        if prompts.suffix.lower() == ".jsonl":
            placed = [(where, _of_object(_json(line, where), where)) for where, line in placed]
        skipped = len(lines) - len(placed)
    else:
        given, skipped = [prompts] if isinstance(prompts, str) else list(prompts), 0
        if not given:
            raise UsageError("there is no prompt", fix=_EXAMPLE)
        for number, prompt in enumerate(given, start=1):
            if not isinstance(prompt, str):
                raise UsageError(f"prompt {number} is {type(prompt).__name__}, not text", fix=_EXAMPLE)
        numbered = [(f"prompt {number}", prompt) for number, prompt in enumerate(given, start=1)]
        placed = numbered if len(given) > 1 else [("the prompt", given[0])]
    for where, prompt in placed:
        _check(prompt, where)
    if skipped:
        ui.say(f"{prompts}: {len(placed)} prompts; {skipped} blank lines skipped")
    return [prompt for _, prompt in placed]


def destination(output: Path | str | None, images: int, suffixes: Collection[str] = WRITTEN) -> Path | None:
    """The one image file that is asked for, or None when the images go into a samples folder. UsageError (2): the file
    exists, several images for one file, a format that is not written, a folder name that is a file. `suffixes`: of one
    file; by default all that are written."""
    if output is None:
        return None
    path = Path(output)
    suffix = path.suffix.lower()
    if suffix in OTHER_FORMATS:
        raise UsageError(f"{path} would be no PNG, JPEG or WebP", at="no other format is written",
                         fix=f"-o {quote(str(path.with_suffix('.png')))}")  # fmt: skip
    if suffix not in suffixes:
        if path.exists() and not path.is_dir():
            raise exists(path, f"{path}-2")
        return None
    if images != 1:
        raise UsageError(f"{images} images do not fit into {path}", fix=f"give a folder: -o {path.with_suffix('')}")
    if path.exists() or path.is_symlink():
        raise exists(path, str(path.with_name(f"{path.stem}-2{path.suffix}")))
    require_outside(path)
    return path


def _text(path: Path) -> str:
    try:
        if str(path) == "-":
            data = _stdin(sys.stdin)
        else:
            with path.open("rb") as stream:  # a file, or what a shell gives for <(...)
                data = stream.read(FILE_BYTES + 1)
        if len(data) > FILE_BYTES:
            raise UsageError(f"{path} has more than {FILE_BYTES} bytes", fix="give a file with one prompt a line")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text", at=f"byte {error.start}", fix="save it as UTF-8") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", fix="give a text file") from error


@cache
def _stdin(stream: Any) -> bytes:
    """Read once: what is asked before the models are loaded is asked again after."""
    return stream.buffer.read(FILE_BYTES + 1)


def _of_list(path: Path) -> list[tuple[str, str]]:
    values = _json(_text(path), str(path))
    if not isinstance(values, list) or not values:
        raise UsageError(f"{path} is not a list of prompts", fix=f"write a list; {_JSON_EXAMPLE}")
    placed = [(f"{path}[{index}]", value) for index, value in enumerate(values)]
    return [(where, value if isinstance(value, str) else _of_object(value, where)) for where, value in placed]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is no JSON: {error}", fix=_JSON_EXAMPLE) from error


def _of_object(value: Any, where: str) -> str:
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise UsageError(f"{where} has no prompt", fix=_JSON_EXAMPLE)
    return value["prompt"]


def _check(prompt: str, where: str) -> None:
    if not prompt.strip():
        raise UsageError(f"{where} is empty", fix=_EXAMPLE)
    if "\0" in prompt:
        raise UsageError(f"{where} holds a NUL character", at=repr(prompt[:60]), fix="remove it")
    try:
        size = len(prompt.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise UsageError(f"{where} is not valid text", at=f"character {error.start}", fix="type it as UTF-8") from error
    if size > MAX_BYTES:
        raise UsageError(f"{where} has {size} bytes; at most {MAX_BYTES} are read", fix="shorten it")
