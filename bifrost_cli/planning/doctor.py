"""`bifrost doctor`: libraries, GPU, disk, models and licences that a recipe needs; each ok, warn or fail, with its fix.

Only models that are not here are looked up on the hub, never when offline; no weights are read and no token is shown.
A broken torch is a finding, so no model library is imported before it was tried.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from bifrost_cli.artifacts.files import read_json
from bifrost_cli.config.schema import Recipe
from bifrost_cli.errors import BifrostError

PACKAGE = "bifrost-cli"
ROOM = 10**9  # free bytes of a disk below which nothing useful can be written


@dataclass(frozen=True)
class Finding:
    """`status` ok, warn (works, or may) or fail (will not work); `fix` is one command or edit."""

    what: str
    status: Literal["ok", "warn", "fail"]
    message: str
    fix: str = ""


def doctor(recipe: Recipe, *, workspace: Path | str = "runs") -> list[Finding]:
    """Check what a recipe needs.

    Args:
        recipe: the recipe.
        workspace: the folder whose disk is checked.

    Returns:
        Every finding, the most important first; where torch is broken, none that needs it.
    """
    findings = [*_libraries(recipe), _torchvision()]
    if any(finding.what == "torch" and finding.status == "fail" for finding in findings):
        return findings
    return [*findings, _device(recipe), *_disks(Path(workspace)), _token(), *_models(recipe)]


# ---- libraries ------------------------------------------------------------------------------------------------------


def _libraries(recipe: Recipe) -> Iterator[Finding]:
    """Python and every required library against the bounds of pyproject; extras where the recipe asks for them."""
    try:
        facts, wanted = metadata.metadata(PACKAGE), metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        yield Finding(PACKAGE, "warn", "runs from a folder, so the versions it needs are not known", "pip install -e .")
        return
    python, bounds = platform.python_version(), facts["Requires-Python"]
    good = SpecifierSet(bounds).contains(python)
    message = f"{python}, wanted {bounds}"
    yield Finding("python", "ok", message) if good else Finding("python", "fail", message, "install another Python")
    extras = set(_extras(recipe))
    for requirement in map(Requirement, wanted):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            yield _library(requirement)


def _extras(recipe: Recipe) -> Iterator[str]:
    if recipe.branch.tune == "lora":
        yield "lora"
    eight_bit = "adamw8bit" in (recipe.branch.train.optimizer, recipe.controlnet.train.optimizer)
    if eight_bit or recipe.models.weights != "dtype":
        yield "quant"


def _library(wanted: Requirement) -> Finding:
    fix = f"pip install '{wanted.name}{wanted.specifier}'"
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return Finding(wanted.name, "fail", "is not installed", fix)
    if not wanted.specifier.contains(version, prereleases=True):
        return Finding(wanted.name, "fail", f"{version} is installed, wanted {wanted.specifier}", fix)
    return Finding(wanted.name, "ok", version)


def _torchvision() -> Finding:
    """open_clip needs torchvision; one made for another torch says that operator torchvision::nms does not exist."""
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:
        return Finding("torch", "fail", f"cannot be imported: {_line(error)}", "pip install --force-reinstall torch")
    try:
        import torchvision

        torch.ops.torchvision.nms  # noqa: B018 looking it up is the test
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return Finding("torchvision", "fail", f"does not fit torch {torch.__version__}: {_line(error)}",
                       "pip install --force-reinstall torch torchvision, both from one index")  # fmt: skip
    return Finding("torchvision", "ok", f"{torchvision.__version__} fits torch {torch.__version__}")


# ---- the machine ----------------------------------------------------------------------------------------------------


def _device(recipe: Recipe) -> Finding:
    """The GPU and its free memory against what generating needs."""
    import torch

    if not torch.cuda.is_available():
        if _builtin(recipe):
            return Finding("device", "ok", "CPU, which is enough for this recipe")
        if torch.version.cuda:
            return Finding(
                "device", "warn", "no GPU is visible, although torch was built with CUDA", "check nvidia-smi"
            )
        return Finding("device", "warn", "no GPU: models of this size take hours an image on a CPU",
                       "use a machine with a GPU, or --recipe tiny")  # fmt: skip
    free, total = torch.cuda.mem_get_info()
    message = (
        f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    )
    try:
        from bifrost_cli.planning.memory import estimates
        from bifrost_cli.planning.meta_models import build

        wanted = estimates(build(recipe), recipe)["generate"].peak
    except BifrostError:
        return Finding("device", "ok", f"{message}; this recipe cannot be planned")
    if wanted > free:
        fix = f"bifrost plan {recipe.name} --memory {int(free / 1e9)}GB says what would make it fit"
        return Finding("device", "warn", f"{message}; generation needs {wanted / 1e9:.1f} GB", fix)
    return Finding("device", "ok", message)


def _disks(workspace: Path) -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for what, folder in (("workspace disk", workspace), ("hub cache disk", Path(HF_HUB_CACHE))):
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(place).free
        message = f"{free / 1e9:.1f} GB free at {folder}"
        yield Finding(what, "ok", message) if free >= ROOM else Finding(what, "fail", message, "free some space")


def _token() -> Finding:
    from huggingface_hub import get_token

    if get_token():
        return Finding("hub token", "ok", "present, not shown")
    return Finding("hub token", "ok", "none; only gated and private models need one")


# ---- models ---------------------------------------------------------------------------------------------------------


def _models(recipe: Recipe) -> Iterator[Finding]:
    models = recipe.models
    yield _model(models.mllm, models.mllm_revision, diffusion=False)
    yield _model(models.diffusion, models.diffusion_revision, diffusion=True)


def _model(ref: str, revision: str | None, *, diffusion: bool) -> Finding:
    """Whole and here; or on the hub, and whether it may be fetched."""
    from huggingface_hub import is_offline_mode

    folder = _here(ref, revision)
    missing = "is not here" if folder is None else _lack(folder, diffusion)
    if missing is None:
        return Finding(ref, "ok", f"whole, at {folder}")
    if folder is not None and Path(ref).expanduser().is_dir():
        return Finding(ref, "fail", missing, "fetch the model again, or give another folder")
    if ref.startswith(("builtin:", ".", "/", "~")):
        return Finding(ref, "fail", missing, "give a folder, builtin:NAME or a hub id")
    if is_offline_mode():
        return Finding(ref, "fail", f"{missing}, and this run is offline", f"go online once: hf download {ref}")
    return _on_hub(ref, revision, missing)


def _on_hub(ref: str, revision: str | None, missing: str) -> Finding:
    from huggingface_hub import HfApi

    from bifrost_cli.loading.resolve import HUB_ERRORS, hub_problem

    try:
        api = HfApi()
        api.model_info(ref, revision=revision, timeout=10)
        api.auth_check(ref)  # a gated model's page can be read by all, its files by those who accepted its licence
    except HUB_ERRORS as error:
        problem = hub_problem(ref, error, revision)
        return Finding(ref, "fail", f"{missing}; {problem.message}", problem.fix or "")
    return Finding(ref, "warn", f"{missing}; it may be fetched", f"hf download {ref}, or wait until it is needed")


def _here(ref: str, revision: str | None) -> Path | None:
    """The folder of a model without asking the network; None when there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    from bifrost_cli.loading.resolve import BUILTIN

    folder = BUILTIN / ref.removeprefix("builtin:") if ref.startswith("builtin:") else Path(ref).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(ref, revision=revision, allow_patterns=["*.json"], local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _lack(folder: Path, diffusion: bool) -> str | None:
    """What a model's folder lacks: a part, or a file of weights that its index names."""
    from torch import nn

    from bifrost_cli.loading.loaders import diffusion_class, part_classes

    parts = [""]
    try:
        if diffusion:
            classes = part_classes(diffusion_class(folder))
            parts = [name for name, kind in classes.items() if issubclass(kind, nn.Module)]
        for part in parts:
            weights = {path.name for path in (folder / part).glob("*.safetensors")}
            for index in (folder / part).glob("*.safetensors.index.json"):
                lost = sorted(set(read_json(index)["weight_map"].values()) - weights)
                if lost:
                    return f"lacks {len(lost)} files of weights, first {Path(part) / lost[0]}"
            if not weights:
                return f"lacks the weights of {part or 'the model'}"
    except BifrostError as error:
        return error.message
    return None


def _builtin(recipe: Recipe) -> bool:
    return recipe.models.mllm.startswith("builtin:") and recipe.models.diffusion.startswith("builtin:")


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
