"""`bifrost export-mllm`: a recipe's frozen MLLM as a folder of its own, for programs that measure understanding.

The folder holds the base's files byte for byte, and a README with the hash of its weights and lmms-eval's command. The
model that generates and the model that is measured are then the same by hash.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bifrost_cli.artifacts.files import make_folder, new_file, new_folder, write_bytes
from bifrost_cli.artifacts.manifest import require_new
from bifrost_cli.config.schema import Recipe
from bifrost_cli.errors import ArtifactError
from bifrost_cli.interop.published_names import public_name
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.loading.resolve import MODEL_FILES, resolve_model
from bifrost_cli.models.mllm.frozen_mllm import Mllm
from bifrost_cli.runtime.ui import Ui

BLOCK = 16 * 2**20
_LMMS_EVAL = {"qwen2_5_vl": "qwen2_5_vl", "qwen3_vl": "qwen3_vl"}  # model_type -> its model; the LLaVAs have one


def export_mllm(recipe: Recipe, output: Path | str, *, ui: Ui | None = None) -> Path:
    """Copy the recipe's frozen MLLM into a new folder, load the copy and compare the hashes of the weights.

    Args:
        recipe: names the MLLM, its revision and its number format.
        output: the new folder, which appears whole or not at all.
        ui: where progress is said.

    Returns:
        The folder.

    Raises:
        UsageError: the folder exists.
        EnvironmentProblem: the model is not here.
        ArtifactError: damaged weights, or a copy whose weights have another hash.
    """
    ui, folder, models = ui or Ui(), Path(output), recipe.models
    require_new(folder)
    base = ModelLoader(models).mllm()
    kind, wanted = base.model.config.model_type, base.weights_hash()
    del base  # the copy is loaded next, and there may be room for one
    source = Path(resolve_model(models.mllm, revision=models.mllm_revision))
    make_folder(folder.parent)
    with new_folder(folder) as draft:
        for path in sorted({path for pattern in MODEL_FILES for path in source.glob(pattern)}):
            _copy(path, draft / path.name)
        copy = models.model_copy(update={"mllm": str(draft), "mllm_revision": None})
        _require_same(ModelLoader(copy).mllm(), wanted, models.mllm)
        write_bytes(draft / "README.md", _card(recipe, folder.name, kind, wanted).encode())
    ui.say(f"{folder}: the MLLM as it is, weights {wanted[:12]}; {_command(str(folder), kind)}")
    return folder


def _copy(source: Path, target: Path) -> None:
    with new_file(target, source.stat().st_size) as write:
        for block in _blocks(source):
            write(block)


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def _require_same(copy: Mllm, wanted: str, name: str) -> None:
    if (actual := copy.weights_hash()) != wanted:
        raise ArtifactError(f"the copy of {name} has other weights", at=f"sha256 {wanted[:12]} -> {actual[:12]}",
                            fix="give the command again; if it stays, check the disk", code="BF-ART-008")  # fmt: skip


def _command(folder: str, kind: str) -> str:
    name = _LMMS_EVAL.get(kind, "llava_hf")
    return f"python -m lmms_eval --model {name} --model_args pretrained={folder} --tasks mme --batch_size 1"


def _card(recipe: Recipe, folder: str, kind: str, weights: str) -> str:
    name, commit = public_name(recipe.models.mllm), recipe.models.mllm_revision
    revision = f" at revision {commit}" if commit else ""
    return f"""# The frozen MLLM of recipe {recipe.name}

These are the files of {name}{revision}, byte for byte; Bifrost trains a branch beside this model and
never changes it. sha256 over its tensors in {recipe.models.dtype}: `{weights}`. The manifest of every branch that was
trained beside it names the same hash (`bifrost artifacts show BRANCH`, identity.mllm).

Its understanding, measured by lmms-eval (a package of its own environment):

```sh
{_command(folder, kind)}
```

The licence is that of the base model.
"""
