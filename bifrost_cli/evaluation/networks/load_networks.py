"""Names to the networks of eval: `inception`, `builtin:open_clip`, `open_clip:NAME/PRETRAINED`, `dinov2:...`, LPIPS.

In: a recipe's `evaluate` section and a device. Out: a network whose identity names its weights. Weights that are not
here are a message that says which file to put where; nothing is downloaded behind the user's back but from the hub.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bifrost_cli.artifacts.files import sha256_file
from bifrost_cli.config.schema import Evaluate
from bifrost_cli.data.safetensors_io import load_tensors
from bifrost_cli.errors import ArtifactError, EnvironmentProblem
from bifrost_cli.evaluation.networks.dino import DinoFeatures
from bifrost_cli.evaluation.networks.feature_network import ClipFeatures, FeatureNetwork
from bifrost_cli.loading.open_clip_models import features_name, load_open_clip
from bifrost_cli.loading.resolve import model_errors, resolve_device, resolve_model

if TYPE_CHECKING:
    from bifrost_cli.evaluation.networks.detector import Detector
    from bifrost_cli.evaluation.networks.lpips import Lpips

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
PUBLISHED = {INCEPTION_FILE: "6726825d", ALEXNET_FILE: "7be5be79"}  # the first eight digits of their sha256
DINO = "dinov2:"


def load_features(ref: str, settings: Evaluate, device: str | torch.device) -> FeatureNetwork:
    """The feature network `ref`.

    EnvironmentProblem: no Inception weights (BF-ENV-030), or torch-fidelity is not installed (BF-ENV-002).
    ArtifactError: weights that do not fit (BF-ART-007), or are damaged or no weights at all (BF-ART-005, 008).
    """
    if ref == "inception":
        return _inception(inception_file(settings), resolve_device(str(device)))
    if ref.startswith(DINO):
        return _dino(ref.removeprefix(DINO), resolve_device(str(device)))
    return ClipFeatures(load_open_clip(ref, device), features_name(ref))


def inception_file(settings: Evaluate) -> Path:
    """Where FID's standard weights are: the recipe's file, else torch-fidelity's own cache. BF-ENV-030: nowhere."""
    cache = _cached(INCEPTION_FILE)
    path = Path(settings.inception_weights).expanduser() if settings.inception_weights else cache
    if path.is_file():
        return path
    raise EnvironmentProblem(
        f"FID needs the standard Inception weights, and {path} is not there",
        at=f"{INCEPTION_FILE} (95.7 MB), from the releases of torch-fidelity on GitHub",
        fix=f"put it at {cache}, or --set evaluate.inception_weights=FILE; without it: --features builtin:open_clip",
        code="BF-ENV-030",
    )


def load_lpips(settings: Evaluate, device: str) -> Lpips:
    """LPIPS with AlexNet's weights from the recipe's file, else torchvision's own cache; errors as `load_features`."""
    cache = _cached(ALEXNET_FILE)
    path = Path(settings.lpips_weights).expanduser() if settings.lpips_weights else cache
    if not path.is_file():
        raise EnvironmentProblem(
            f"LPIPS needs AlexNet's weights, and {path} is not there",
            at=f"{ALEXNET_FILE} (233 MB), from PyTorch's model downloads",
            fix=f"put it at {cache}, or --set evaluate.lpips_weights=FILE",
            code="BF-ENV-030",
        )
    try:
        from bifrost_cli.evaluation.networks.lpips import Lpips
    except ImportError as error:
        raise EnvironmentProblem("LPIPS needs the package lpips", fix="pip install 'bifrost-cli[eval]'",
                                 code="BF-ENV-002") from error  # fmt: skip
    try:
        return Lpips(_state(path), resolve_device(device))
    except (KeyError, RuntimeError) as error:
        raise ArtifactError(
            f"{path} does not hold AlexNet's weights",
            at=str(error)[:300],
            fix=f"give {ALEXNET_FILE}, or its tensors as safetensors",
            code="BF-ART-007",
        ) from error


def load_detector(ref: str, device: str) -> Detector:
    """A Mask2Former for instances, a folder or a hub id. Errors as `load_features`."""
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

    from bifrost_cli.evaluation.networks.detector import Detector

    folder = resolve_model(ref)
    with model_errors(ref):
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        model, told = Mask2FormerForUniversalSegmentation.from_pretrained(folder, use_safetensors=True,
                                                                          output_loading_info=True)  # fmt: skip
    if lost := sorted(map(str, {*told["missing_keys"], *told["mismatched_keys"]})):
        raise ArtifactError(f"{folder} lacks {len(lost)} tensors of a Mask2Former", at="; ".join(lost[:5]),
                            code="BF-ART-007",
                            fix="give one like facebook/mask2former-swin-small-coco-instance")  # fmt: skip
    return Detector(model.to(resolve_device(device)), processor, Path(ref).name)


def _cached(name: str) -> Path:
    """Where PyTorch's own downloads lie."""
    return Path(os.environ.get("TORCH_HOME", "~/.cache/torch")).expanduser() / "hub" / "checkpoints" / name


def _inception(path: Path, device: torch.device) -> FeatureNetwork:
    try:
        from bifrost_cli.evaluation.networks.inception import InceptionFeatures
    except ImportError as error:
        raise EnvironmentProblem(
            "Inception features need torch-fidelity", fix="pip install 'bifrost-cli[eval]'", code="BF-ENV-002"
        ) from error
    try:
        return InceptionFeatures(_state(path), device)
    except RuntimeError as error:  # torch lists every tensor that is missing or of another shape
        raise ArtifactError(
            f"{path} does not hold the weights of FID's Inception network",
            at=str(error)[:600],
            fix=f"give {INCEPTION_FILE}, or its tensors as safetensors",
            code="BF-ART-007",
        ) from error


def _state(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix != ".pth":
        return load_tensors(path)[0]
    if path.name in PUBLISHED and not sha256_file(path).startswith(PUBLISHED[path.name]):
        raise ArtifactError(f"{path} is damaged: its sha256 is not {PUBLISHED[path.name]}...", fix="fetch it again",
                            code="BF-ART-005")  # fmt: skip
    return read_published(path)


def read_published(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that its publisher wrote with torch.save; nothing else in it is read. BF-ART-008."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        raise ArtifactError(
            f"{path} holds something else than weights", at=str(error)[:300], fix="fetch it again", code="BF-ART-008"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ArtifactError(f"{path} is not a table of weights", fix="fetch it again", code="BF-ART-008")
    return state


def _dino(ref: str, device: torch.device) -> FeatureNetwork:
    from transformers import Dinov2Model

    folder = resolve_model(ref)
    with model_errors(ref):
        model, told = Dinov2Model.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    if lost := sorted(map(str, {*told["missing_keys"], *told["mismatched_keys"]})):
        raise ArtifactError(f"{folder} lacks {len(lost)} tensors of a DINOv2", at="; ".join(lost[:5]),
                            fix="give a Dinov2Model's folder", code="BF-ART-007")  # fmt: skip
    return DinoFeatures(model.to(device), f"{DINO}{Path(ref).name}")
