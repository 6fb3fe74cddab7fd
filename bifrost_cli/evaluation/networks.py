"""Networks of metrics, from their names: open_clip, DINOv2, Inception, CLIP's text side, LPIPS.

The resize rule is part of a network's identity. Shapes: B batch, N images, H W pixels, D feature width.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL import Image

from bifrost_cli.artifacts.files import sha256_file
from bifrost_cli.config.schema import Evaluate
from bifrost_cli.data.images import square
from bifrost_cli.data.safetensors_io import load_tensors, weights_hash
from bifrost_cli.errors import ArtifactError, EnvironmentProblem
from bifrost_cli.loading.open_clip_models import features_name, load_open_clip
from bifrost_cli.loading.resolve import model_errors, resolve_device, resolve_model

if TYPE_CHECKING:
    from bifrost_cli.evaluation.judges import Detector

BATCH = 32  # fixed: another batch size gives other last bits
DINO_SIZE, IMAGENET_MEAN, IMAGENET_STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPATIAL_CHANNELS = 7  # Nash et al. 2021, appendix B; ADM's evaluator reads the first seven of mixed_6/conv
_INCEPTION_LAYERS = {"pool": "2048", "logits": "logits_unbiased"}  # our names to torch-fidelity's
_LONGER = 8  # a text is tokenized at this many context lengths to see whether it is cut
INCEPTION_FILE, ALEXNET_FILE = "weights-inception-2015-12-05-6726825d.pth", "alexnet-owt-7be5be79.pth"
DINO = "dinov2:"
T = TypeVar("T")

# Weights that exist as a file of their publisher: what for, of which network, the file (its name ends with the first
# digits of its sha256), where it is from, the recipe's key of it, and what to do without.
_INCEPTION = ("FID", "Inception", INCEPTION_FILE, "95.7 MB, from the releases of torch-fidelity on GitHub",
              "inception_weights", "; without it: --features builtin:open_clip")  # fmt: skip
_ALEXNET = ("LPIPS", "AlexNet", ALEXNET_FILE, "233 MB, from PyTorch's model downloads", "lpips_weights", "")


class FeatureNetwork:
    """Images to a vector each, by layer: `pool` or another."""

    identity: dict[str, Any]  # names the network, its weights and its resize rule
    device: str

    def prepare(self, rgb_HWc: np.ndarray) -> np.ndarray:
        """An image uint8 (H, W, 3) as the network reads it."""
        return rgb_HWc

    def forward(self, pixels_BcHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """Prepared images of one size, uint8, to (B, D) for every layer."""
        raise NotImplementedError

    @torch.inference_mode()
    def outputs(self, pixels_BHWc: np.ndarray, layers: Sequence[str]) -> dict[str, np.ndarray]:
        """Prepared images of one size, uint8 (B, H, W, 3), to float32 (B, D) by layer."""
        found = self.forward(torch.from_numpy(np.array(pixels_BHWc)).permute(0, 3, 1, 2).to(self.device))
        return {layer: found[layer].float().cpu().numpy() for layer in layers}


class ClipFeatures(FeatureNetwork):
    """The image tower of an open_clip model, in float32: its projected embedding, not normalised."""

    def __init__(self, model: torch.nn.Module, name: str) -> None:
        self._model: Any = model.eval().requires_grad_(False).float()
        visual: Any = model.visual
        size = visual.image_size
        self.image_size: int = size if isinstance(size, int) else size[0]
        self.device = str(next(model.parameters()).device)
        self._mean_C11, self._std_C11 = (torch.tensor(values, device=self.device).view(-1, 1, 1)
                                         for values in (visual.image_mean, visual.image_std))  # fmt: skip
        width = self.features(np.zeros((1, self.image_size, self.image_size, 3), np.uint8)).shape[1]
        kinds = {type(module).__name__ for module in visual.modules()}  # the same weights with QuickGELU are another
        self.identity = {
            "name": name, "family": "open_clip", "weights": weights_hash(visual.state_dict()),
            "layer": "image embedding, projected, not normalised", "width": width, "image_size": self.image_size,
            "resize": "short side by bicubic with antialiasing, centre crop, uint8",
            "activation": "QuickGELU" if "QuickGELU" in kinds else "GELU",
            "mean": list(visual.image_mean), "std": list(visual.image_std),
        }  # fmt: skip

    def prepare(self, rgb_HWc: np.ndarray) -> np.ndarray:
        return square(rgb_HWc, self.image_size)

    def features(self, pixels_BHWc: np.ndarray) -> np.ndarray:
        return self.outputs(pixels_BHWc, ("pool",))["pool"]

    def forward(self, pixels_BcHW: torch.Tensor) -> dict[str, torch.Tensor]:
        shape = (3, self.image_size, self.image_size)
        if pixels_BcHW.dtype != torch.uint8 or pixels_BcHW.shape[1:] != shape:
            raise ValueError(f"images must be uint8 (B, {shape}), not {pixels_BcHW.dtype} {tuple(pixels_BcHW.shape)}")
        return {"pool": self._model.encode_image((pixels_BcHW.float().div(255) - self._mean_C11) / self._std_C11)}


class ClipScorer(ClipFeatures):
    """Both towers of a CLIP; `tokenize(texts, context_length)` is open_clip's own."""

    def __init__(self, model: torch.nn.Module, tokenize: Callable[..., torch.Tensor], name: str) -> None:
        super().__init__(model, name)
        self._tokenize = tokenize

    def cosines(self, image_BD: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """`features` of images and as many texts -> cosines (B,) float64."""
        text_BD = self.texts(texts)
        norms_B = np.linalg.norm(image_BD, axis=1) * np.linalg.norm(text_BD, axis=1)
        return (image_BD * text_BD).sum(axis=1) / norms_B

    def cut(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the model reads (77 tokens for most)."""
        length = self._tokenize(["a"]).shape[1]
        ids_BT = torch.cat([self._tokenize([text], _LONGER * length) for text in texts])
        return int((ids_BT[:, length:] != ids_BT[:, -1:]).any(dim=1).sum())

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings (B, D) float64 of texts, not normalised."""
        return self._model.encode_text(self._tokenize(list(texts)).to(self.device)).double().cpu().numpy()


class DinoFeatures(FeatureNetwork):
    """The class token of a transformers Dinov2Model by dgm-eval's rule: with ViT-L/14 the FD-DINOv2 of papers."""

    def __init__(self, model: torch.nn.Module, name: str) -> None:
        self._model: Any = model.eval().requires_grad_(False).float()
        self.device = str(next(model.parameters()).device)
        config: Any = model.config
        self.identity = {
            "name": name, "family": "dinov2", "weights": weights_hash(model.state_dict()),
            "layer": "class token after the final norm", "width": config.hidden_size, "image_size": DINO_SIZE,
            "resize": "Pillow bicubic to a square, uint8",
        }  # fmt: skip

    def prepare(self, rgb_HWc: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(rgb_HWc).resize((DINO_SIZE, DINO_SIZE), Image.Resampling.BICUBIC))

    def forward(self, pixels_BcHW: torch.Tensor) -> dict[str, torch.Tensor]:
        mean_c11, std_c11 = (torch.tensor(values, device=self.device).view(-1, 1, 1)
                             for values in (IMAGENET_MEAN, IMAGENET_STD))  # fmt: skip
        pixels_BcHW = (pixels_BcHW.float().div(255) - mean_c11) / std_c11
        return {"pool": self._model(pixel_values=pixels_BcHW).last_hidden_state[:, 0]}


class InceptionFeatures(FeatureNetwork):
    """The Inception network of FID, torch-fidelity's in float32; its resize to 299 pixels is TensorFlow 1's.

    Layers: `pool` (2048, for FID, KID and PRDC), `spatial` (7 channels of a 17x17 layer row by row, NHWC, for sFID) and
    `logits` (1008 classes without bias, for the Inception score). RuntimeError names what of `state` does not fit.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], device: torch.device) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        own = io.BytesIO()  # the stock class reads a file by unpickling: it gets one that was written here
        torch.save(dict(state), own)
        own.seek(0)
        self._model = FeatureExtractorInceptionV3("inception", list(_INCEPTION_LAYERS.values()), own).to(device)
        self._spatial: list[torch.Tensor] = []
        self._model.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, out: self._spatial.append(out))
        self.device = str(device)
        self.identity = {
            "name": "inception", "family": "inception-2015-12-05", "weights": weights_hash(dict(state)),
            "width": 2048, "image_size": 299, "resize": "bilinear as in TensorFlow 1, no antialiasing",
        }  # fmt: skip

    def forward(self, pixels_BcHW: torch.Tensor) -> dict[str, torch.Tensor]:
        self._spatial.clear()
        found = dict(zip(_INCEPTION_LAYERS, self._model(pixels_BcHW), strict=True))
        return found | {"spatial": self._spatial[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)}


class Lpips:
    """The perceptual distance of two images (Zhang et al. 2018), by the `lpips` package: version 0.1, AlexNet."""

    def __init__(self, alexnet: Mapping[str, torch.Tensor], device: torch.device) -> None:
        import lpips

        with warnings.catch_warnings():  # the package still names torchvision's old arguments
            warnings.simplefilter("ignore")
            self._net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        inner = self._net.net  # its slices keep the numbers of AlexNet's modules: slice2.3.weight is features.3.weight
        inner.load_state_dict({name: alexnet[f"features.{name.split('.', 1)[1]}"] for name in inner.state_dict()})
        self._net.to(device).eval()
        self._device = device
        self.identity: dict[str, Any] = {"name": "lpips-alex-0.1", "weights": weights_hash(self._net.state_dict())}

    @torch.inference_mode()
    def distance(self, first_HWc: np.ndarray, second_HWc: np.ndarray) -> float:
        """0 for equal images. ValueError: not two uint8 images of one size."""
        if first_HWc.dtype != np.uint8 or second_HWc.dtype != np.uint8 or first_HWc.shape != second_HWc.shape:
            raise ValueError("two uint8 images of one size are needed")
        pixels = torch.from_numpy(np.stack([first_HWc, second_HWc])).permute(0, 3, 1, 2).to(self._device)
        first, second = (pixels / 127.5 - 1).split(1)  # [-1, 1]: [0, 1] would give no error and another number
        return float(self._net(first, second))


def feature_batches(network: FeatureNetwork, images: Iterable[np.ndarray],
                    layers: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:  # fmt: skip
    """Features {layer: (b, D)} of prepared images, in order, one size a batch. A batch is filled up with empty images:
    an image's features do not depend on what stands beside it."""
    for _, alike in groupby(images, key=lambda image: image.shape):
        while batch := list(islice(alike, BATCH)):
            missing = [np.zeros_like(batch[0])] * (BATCH - len(batch))
            outputs = network.outputs(np.stack(batch + missing), layers)
            yield {layer: values_BD[: len(batch)] for layer, values_BD in outputs.items()}


def load_features(ref: str, settings: Evaluate, device: str | torch.device) -> FeatureNetwork:
    """The network `inception`, `builtin:open_clip`, `open_clip:NAME/PRETRAINED` or `dinov2:MODEL`."""
    if ref == "inception":
        return _load(_INCEPTION, settings, lambda state: InceptionFeatures(state, resolve_device(str(device))))
    if ref.startswith(DINO):
        from transformers import Dinov2Model

        model = _whole(Dinov2Model, ref.removeprefix(DINO), "give a Dinov2Model's folder")
        return DinoFeatures(model.to(resolve_device(str(device))), DINO + Path(ref.removeprefix(DINO)).name)
    return ClipFeatures(load_open_clip(ref, device), features_name(ref))


def load_lpips(settings: Evaluate, device: str) -> Lpips:
    return _load(_ALEXNET, settings, lambda state: Lpips(state, resolve_device(device)))


def load_detector(ref: str, device: str) -> Detector:
    """A Mask2Former for instances, a folder or a hub id."""
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

    from bifrost_cli.evaluation.judges import Detector

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


def torch_checkpoints() -> Path:
    """Where PyTorch's own downloads lie."""
    return Path(os.environ.get("TORCH_HOME", "~/.cache/torch")).expanduser() / "hub" / "checkpoints"


def _load(published: tuple[str, ...], settings: Evaluate, load: Callable[[dict[str, torch.Tensor]], T]) -> T:
    """A network of published weights: the recipe's file, else that among PyTorch's own downloads."""
    metric, network, file, source, key, instead = published
    cache, fetched = torch_checkpoints() / file, file == INCEPTION_FILE
    given = getattr(settings, key)
    path = Path(given).expanduser() if given else cache
    if not path.is_file():
        raise EnvironmentProblem(
            f"{metric} needs the standard {network} weights, and {path} is not there", at=f"{file} ({source})",
            fix=f"{'bifrost fetch inception, or ' if fetched else ''}put it at {cache}, or --set evaluate.{key}=FILE"
            f"{instead}",
            code="BF-ENV-030",
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
    known = path.stem.rpartition("-")[2]
    if path.name in (INCEPTION_FILE, ALEXNET_FILE) and not sha256_file(path).startswith(known):
        raise ArtifactError(f"{path} is damaged: its sha256 is not {known}...", fix="fetch it again", code="BF-ART-005")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        raise ArtifactError(f"{path} holds something else than weights", at=str(error)[:300], fix="fetch it again",
                            code="BF-ART-008") from error  # fmt: skip
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ArtifactError(f"{path} is not a table of weights", fix="fetch it again", code="BF-ART-008")
    return state
