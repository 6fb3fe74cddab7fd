"""`bifrost doctor`: libraries, GPU, disk, models and licences that a recipe needs; each ok, warn or fail, with its fix.

Only models that are not here are looked up on the hub, never when offline; no weights are read and no token is shown.
A broken torch is a finding, so no model library is imported before it was tried.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants, get_token, is_offline_mode, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from bifrost_cli.artifacts.files import read_json
from bifrost_cli.config.schema import Recipe
from bifrost_cli.errors import BifrostError
from bifrost_cli.planning.model_configs import own_folder

PACKAGE = "bifrost-cli"
_FLUX = ("vae", "transformer", "text_encoder", "text_encoder_2")
# The parts that have weights, by the transformer's class.
WITH_WEIGHTS = {"FluxTransformer2DModel": _FLUX, "SD3Transformer2DModel": (*_FLUX, "text_encoder_3")}
ROOM = 10**9  # free bytes of a disk below which nothing useful can be written


@dataclass(frozen=True)
class Finding:
    """`status` ok, warn (works, or may) or fail (will not work); `fix` is one command or edit."""

    what: str
    status: Literal["ok", "warn", "fail"]
    message: str
    fix: str = ""


def doctor(recipe: Recipe, *, workspace: Path | str = "runs") -> list[Finding]:
    """Check what a recipe needs, and the disk of the workspace.

    Returns:
        Every finding, the most important first; where torch is broken, none that needs it.
    """
    findings = [*_libraries(recipe), _torchvision()]
    if any(finding.what == "torch" and finding.status == "fail" for finding in findings):
        return findings
    token = "present, not shown" if get_token() else "none; only gated and private models need one"
    models = recipe.models
    return [
        *findings,
        _device(recipe),
        *_disks(Path(workspace)),
        Finding("hub token", "ok", token),
        _model(models.mllm, models.mllm_revision, diffusion=False),
        _model(models.diffusion, models.diffusion_revision, diffusion=True),
    ]


def _checked(what: str, good: bool, message: str, fix: str) -> Finding:
    return Finding(what, "ok", message) if good else Finding(what, "fail", message, fix)


def _libraries(recipe: Recipe) -> Iterator[Finding]:
    """Python and every required library against the bounds of pyproject; extras where the recipe asks for them."""
    try:
        facts, wanted = metadata.metadata(PACKAGE), metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        yield Finding(PACKAGE, "warn", "runs from a folder, so the versions it needs are not known", "pip install -e .")
        return
    python, bounds = platform.python_version(), facts["Requires-Python"]
    good = SpecifierSet(bounds).contains(python)
    yield _checked("python", good, f"{python}, wanted {bounds}", "install another Python")
    eight_bit = "adamw8bit" in (recipe.branch.train.optimizer, recipe.controlnet.train.optimizer)
    asked = {"lora": recipe.branch.tune == "lora", "quant": eight_bit or recipe.models.weights != "dtype"}
    extras = [{"extra": extra} for extra, used in asked.items() if used]
    for requirement in map(Requirement, wanted):
        if requirement.marker is not None and not any(map(requirement.marker.evaluate, extras)):
            continue
        fix = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(requirement.name, "fail", "is not installed", fix)
            continue
        good = requirement.specifier.contains(version, prereleases=True)
        message = version if good else f"{version} is installed, wanted {requirement.specifier}"
        yield _checked(requirement.name, good, message, fix)


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


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _device(recipe: Recipe) -> Finding:
    """The GPU and its free memory against what generating needs."""
    import torch

    if not torch.cuda.is_available():
        if all(ref.startswith("builtin:") for ref in (recipe.models.mllm, recipe.models.diffusion)):
            return Finding("device", "ok", "CPU, which is enough for this recipe")
        message = "no GPU: models of this size take hours an image on a CPU"
        fix = "use a machine with a GPU, or --recipe tiny"
        if torch.version.cuda:
            message, fix = "no GPU is visible, although torch was built with CUDA", "check nvidia-smi"
        return Finding("device", "warn", message, fix)
    free, total = torch.cuda.mem_get_info()
    name, version = torch.cuda.get_device_name(), torch.version.cuda
    message = f"{name}, CUDA {version}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    try:
        from bifrost_cli.planning.meta_models import build
        from bifrost_cli.planning.stages import estimates

        wanted = estimates(build(recipe))["generate"].peak
    except BifrostError:
        return Finding("device", "ok", f"{message}; this recipe cannot be planned")
    if wanted > free:
        fix = f"bifrost plan {recipe.name} --memory {int(free / 1e9)}GB says what would make it fit"
        return Finding("device", "warn", f"{message}; generation needs {wanted / 1e9:.1f} GB", fix)
    return Finding("device", "ok", message)


def _disks(workspace: Path) -> Iterator[Finding]:
    for what, folder in (("workspace disk", workspace), ("hub cache disk", Path(constants.HF_HUB_CACHE))):
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(place).free
        yield _checked(what, free >= ROOM, f"{free / 1e9:.1f} GB free at {folder}", "free some space")


def _model(ref: str, revision: str | None, *, diffusion: bool) -> Finding:
    """Whole and here; or on the hub, and whether it may be fetched."""
    here, folder = own_folder(ref), None
    missing: str | None = "is not here"
    try:
        if here.is_dir():
            folder = here
        else:
            cached = snapshot_download(ref, revision=revision, allow_patterns=["*.json"], local_files_only=True)
            folder = Path(cached)
        missing = _lack(folder, diffusion)
    except (LocalEntryNotFoundError, HFValidationError):
        folder = None
    if missing is None:
        return Finding(ref, "ok", f"whole, at {folder}")
    if folder is not None and Path(ref).expanduser().is_dir():
        return Finding(ref, "fail", missing, "fetch the model again, or give another folder")
    if ref.startswith(("builtin:", ".", "/", "~")):
        return Finding(ref, "fail", missing, "give a folder, builtin:NAME or a hub id")
    if is_offline_mode():
        return Finding(ref, "fail", f"{missing}, and this run is offline", f"go online once: hf download {ref}")
    from bifrost_cli.loading.resolve import HUB_ERRORS, hub_problem  # transformers, only to ask the hub

    try:
        api = HfApi()
        api.model_info(ref, revision=revision, timeout=10)
        api.auth_check(ref)  # a gated model's page can be read by all, its files by those who accepted its licence
    except HUB_ERRORS as error:
        problem = hub_problem(ref, error, revision)
        return Finding(ref, "fail", f"{missing}; {problem.message}", problem.fix or "")
    return Finding(ref, "warn", f"{missing}; it may be fetched", f"hf download {ref}, or wait until it is needed")


def _parts_with_weights(folder: Path) -> Sequence[str]:
    """Of a diffusers pipeline. ArtifactError: it is of no known family."""
    config = folder / "transformer" / "config.json"
    if config.is_file() and (known := WITH_WEIGHTS.get(read_json(config).get("_class_name"))):
        return known
    from torch import nn

    from bifrost_cli.loading.loaders import diffusion_class, part_classes  # seconds: it may be of a plug-in

    return [name for name, kind in part_classes(diffusion_class(folder)).items() if issubclass(kind, nn.Module)]


def _lack(folder: Path, diffusion: bool) -> str | None:
    """What a model's folder lacks: a part, or a file of weights that its index names."""
    try:
        for part in _parts_with_weights(folder) if diffusion else [""]:
            weights = {path.name for path in (folder / part).glob("*.safetensors")}
            for index in (folder / part).glob("*.safetensors.index.json"):
                if lost := sorted(set(read_json(index)["weight_map"].values()) - weights):
                    return f"lacks {len(lost)} files of weights, first {Path(part) / lost[0]}"
            if not weights:
                return f"lacks the weights of {part or 'the model'}"
    except BifrostError as error:
        return error.message
    return None
