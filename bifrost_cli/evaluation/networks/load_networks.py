"""Names to networks: `inception`, `builtin:open_clip`, `open_clip:NAME/PRETRAINED`, `dinov2:MODEL`, LPIPS, a detector.

Weights that are not here are an error that says which file to put where; nothing is downloaded but from the hub.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from bifrost_cli.artifacts.files import sha256_file
from bifrost_cli.config.schema import Evaluate
from bifrost_cli.data.safetensors_io import load_tensors
from bifrost_cli.errors import ArtifactError, EnvironmentProblem
from bifrost_cli.evaluation.networks.feature_network import (
    ClipFeatures,
    DinoFeatures,
    FeatureNetwork,
    InceptionFeatures,
    Lpips,
)
from bifrost_cli.loading.open_clip_models import features_name, load_open_clip
from bifrost_cli.loading.resolve import model_errors, resolve_device, resolve_model

if TYPE_CHECKING:
    from bifrost_cli.evaluation.networks.judges import Detector

INCEPTION_FILE, ALEXNET_FILE = "weights-inception-2015-12-05-6726825d.pth", "alexnet-owt-7be5be79.pth"
PUBLISHED = {INCEPTION_FILE: "6726825d", ALEXNET_FILE: "7be5be79"}  # the first eight digits of their sha256
DINO = "dinov2:"
T = TypeVar("T")


class _Published(NamedTuple):
    """Weights that exist as a file of their publisher: what for, of which network, and the recipe's key of the file."""

    metric: str
    network: str
    file: str
    source: str
    key: str
    instead: str = ""


_INCEPTION = _Published("FID", "Inception", INCEPTION_FILE, "95.7 MB, from the releases of torch-fidelity on GitHub",
                        "inception_weights", "; without it: --features builtin:open_clip")  # fmt: skip
_ALEXNET = _Published("LPIPS", "AlexNet", ALEXNET_FILE, "233 MB, from PyTorch's model downloads", "lpips_weights")


def load_features(ref: str, settings: Evaluate, device: str | torch.device) -> FeatureNetwork:
    """The feature network `ref`; `settings` is the recipe's evaluate section.

    Raises:
        EnvironmentProblem: no Inception weights (BF-ENV-030), or a package is not installed (BF-ENV-002).
        ArtifactError: weights that do not fit (BF-ART-007), or are damaged or no weights at all (BF-ART-005, 008).
    """
    if ref == "inception":
        return _load(_INCEPTION, settings, lambda state: InceptionFeatures(state, resolve_device(str(device))))
    if ref.startswith(DINO):
        from transformers import Dinov2Model

        place = ref.removeprefix(DINO)
        model = _whole(Dinov2Model, place, "give a Dinov2Model's folder")
        return DinoFeatures(model.to(resolve_device(str(device))), f"{DINO}{Path(place).name}")
    return ClipFeatures(load_open_clip(ref, device), features_name(ref))


def load_lpips(settings: Evaluate, device: str) -> Lpips:
    """LPIPS with AlexNet's weights from the recipe's file, else torchvision's own cache; errors as `load_features`."""
    return _load(_ALEXNET, settings, lambda state: Lpips(state, resolve_device(device)))


def load_detector(ref: str, device: str) -> Detector:
    """A Mask2Former for instances, a folder or a hub id. Errors as `load_features`."""
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

    from bifrost_cli.evaluation.networks.judges import Detector

    with model_errors(ref):
        processor = AutoImageProcessor.from_pretrained(resolve_model(ref), trust_remote_code=False)
    fix = "give one like facebook/mask2former-swin-small-coco-instance"
    model = _whole(Mask2FormerForUniversalSegmentation, ref, fix)
    return Detector(model.to(resolve_device(device)), processor, Path(ref).name)


def _whole(kind: Any, ref: str, fix: str) -> Any:
    """A transformers model from a folder or the hub, no tensor missing."""
    folder = resolve_model(ref)
    with model_errors(ref):
        model, info = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    if lost := sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]})):
        raise ArtifactError(f"{folder} lacks {len(lost)} tensors of a {kind.__name__}", at="; ".join(lost[:5]), fix=fix,
                            code="BF-ART-007")  # fmt: skip
    return model


def _load(published: _Published, settings: Evaluate, load: Callable[[dict[str, torch.Tensor]], T]) -> T:
    """A network of published weights: the recipe's file, else that among PyTorch's own downloads."""
    metric, network, file, source, key, instead = published
    cache = Path(os.environ.get("TORCH_HOME", "~/.cache/torch")).expanduser() / "hub" / "checkpoints" / file
    given = getattr(settings, key)
    path = Path(given).expanduser() if given else cache
    if not path.is_file():
        raise EnvironmentProblem(
            f"{metric} needs the standard {network} weights, and {path} is not there", at=f"{file} ({source})",
            fix=f"put it at {cache}, or --set evaluate.{key}=FILE{instead}", code="BF-ENV-030",
        )  # fmt: skip
    try:
        return load(_read_published(path) if path.suffix == ".pth" else load_tensors(path)[0])
    except ImportError as error:
        raise EnvironmentProblem(f"{metric} needs the package {error.name}", fix="pip install 'bifrost-cli[eval]'",
                                 code="BF-ENV-002") from error  # fmt: skip
    except (KeyError, RuntimeError) as error:  # torch lists every tensor that is missing or of another shape
        raise ArtifactError(f"{path} does not hold the weights of the {network} network", at=str(error)[:600],
                            fix=f"give {file}, or its tensors as safetensors",
                            code="BF-ART-007") from error  # fmt: skip


def _read_published(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that its publisher wrote with torch.save; nothing else in it is read."""
    if path.name in PUBLISHED and not sha256_file(path).startswith(PUBLISHED[path.name]):
        raise ArtifactError(f"{path} is damaged: its sha256 is not {PUBLISHED[path.name]}...", fix="fetch it again",
                            code="BF-ART-005")  # fmt: skip
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        raise ArtifactError(f"{path} holds something else than weights", at=str(error)[:300], fix="fetch it again",
                            code="BF-ART-008") from error  # fmt: skip
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ArtifactError(f"{path} is not a table of weights", fix="fetch it again", code="BF-ART-008")
    return state
