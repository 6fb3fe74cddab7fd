"""Names to models: the only place where weights are read for use.

Every model is in eval mode, frozen and whole (`whole_weights`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, ModelMixin
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import logging as hub_logging

from bifrost_cli.artifacts import Artifact
from bifrost_cli.artifacts.files import read_json
from bifrost_cli.config.schema import Images, Latents, Models
from bifrost_cli.data.safetensors_io import load_tensors, misfits, shapes_of
from bifrost_cli.data.sharded_checkpoint import ShardedCheckpoint
from bifrost_cli.errors import ArtifactError, RecipeError
from bifrost_cli.loading.diffusion_families import DIFFUSION_MODELS, diffusion_class, part_classes, require_part
from bifrost_cli.loading.offload import OffloadPolicy
from bifrost_cli.loading.open_clip_models import features_name, load_open_clip
from bifrost_cli.loading.resolve import MODEL_FILES, model_errors, resolve_device, resolve_model
from bifrost_cli.loading.whole_weights import ADAPTER, load_whole, require_plain
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.diffusion.base import DiffusionModel
from bifrost_cli.models.diffusion.controlnet import config_family
from bifrost_cli.models.encoders import (
    Encoder,
    MllmEncoder,
    OpenClipEncoder,
    UnsupportedSize,
    UnsupportedTower,
    VaePatchEncoder,
)
from bifrost_cli.models.mllm.adapters import adapter_of, require_known
from bifrost_cli.models.mllm.frozen_mllm import Mllm

_FAMILY_FILES = ("model_index.json", "*/config.json", f"*/{ADAPTER}")
_CONFIG = "config.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SHOWN = 5

for library in (hub_logging, diffusers_logging):  # a bar for every part of a model, terminal or not; ours counts
    library.disable_progress_bar()


class ModelLoader:
    """Loads what a recipe's `models` section names, all of it in one number format and for one device.

    Args:
        models: names, revisions, number format and quantization of the frozen models.
        device: where they compute: a name as `resolve_device` takes it, or a device.
        offload: `generate.offload`. What is loaded lies where `policy.home` says until `policy.settle` makes it ready.
        in_memory: copy weights that would lie on the CPU as a mapped file, so that the file may change or go.
    """

    def __init__(
        self, models: Models, device: torch.device | str = "cpu", offload: str = "none", *, in_memory: bool = False
    ) -> None:
        self.models, self.dtype = models, getattr(torch, models.dtype)
        self.device = resolve_device(device) if isinstance(device, str) else device
        self.policy = OffloadPolicy(self.device, offload, models.weights)
        self._in_memory = in_memory

    def mllm(self) -> Mllm:
        """The multimodal LLM. Raises what `load_mllm` does."""
        models = self.models
        mllm = load_mllm(models.mllm, self.policy.home, self.dtype, revision=models.mllm_revision)
        self._copy(mllm.model)
        return mllm

    def diffusion(self) -> DiffusionModel:
        """The diffusion model, whole. Raises what `load_diffusion` does."""
        models = self.models
        diffusion = load_diffusion(models.diffusion, self.policy.home, self.dtype, revision=models.diffusion_revision)
        self._copy(*diffusion.frozen_modules())
        return diffusion

    def vae(self) -> AutoencoderKL:
        """The diffusion model's VAE alone, on the device. Raises what `load_diffusion` does."""
        return load_vae(self.models.diffusion, self.device, self.dtype, revision=self.models.diffusion_revision)

    def encoder(
        self, latents: Latents, images: Images, *, mllm: Mllm | None = None, vae: AutoencoderKL | None = None
    ) -> Encoder:
        """The image encoder that `latents.encoder` names, on the device; of `mllm` or `vae` where one is loaded.

        Raises:
            RecipeError: its sizes and `images.input_size` do not fit.
        """
        name, size, models = latents.encoder, images.input_size, self.models
        with encoder_errors("images.input_size"):
            if name == "mllm":
                mllm = mllm or load_mllm(models.mllm, self.device, self.dtype, revision=models.mllm_revision)
                return MllmEncoder(mllm, size)
            if name == "vae":
                return VaePatchEncoder(vae or self.vae(), size)
            return OpenClipEncoder(load_open_clip(name, self.device), features_name(name), size)

    def branch(self, artifact: Artifact, mllm: Mllm) -> VisualBranch:
        """A trained branch of this MLLM. Raises what `load_branch` does."""
        branch = load_branch(artifact, self.policy.home, self.dtype, mllm=mllm)
        self._copy(branch)
        return branch

    def controlnet(self, artifact: Artifact) -> nn.Module:
        """A trained ControlNet. Raises what `load_controlnet` does."""
        controlnet = load_controlnet(artifact, self.policy.home, self.dtype)
        self._copy(controlnet)
        return controlnet

    def _copy(self, *modules: nn.Module) -> None:
        for module in modules if self._in_memory else ():
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.device.type == "cpu":
                    tensor.data = tensor.data.clone()


@contextmanager
def encoder_errors(key: str) -> Iterator[None]:
    """Turn what an encoder refuses into a RecipeError: of a size, BF-RECIPE-005 with the `--set` that works."""
    try:
        yield
    except UnsupportedSize as error:
        fix = f"--set {key}={error.nearest}"
        raise RecipeError(f"{key} is {error}", fix=fix, code="BF-RECIPE-005") from None
    except UnsupportedTower as error:
        raise RecipeError(str(error), fix="name a vision transformer in latents.encoder") from None


# ---- the frozen models ----------------------------------------------------------------------------------------------


def load_mllm(
    ref: str, device: torch.device, dtype: torch.dtype = torch.float32, *, revision: str | None = None
) -> Mllm:
    """The frozen multimodal LLM, of the family that its config.json names (`adapters.FAMILIES`).

    EnvironmentProblem or ArtifactError when it is not there, not whole, or of no known family.
    """
    config = Path(resolve_model(ref, revision=revision, patterns=(_CONFIG,))) / _CONFIG
    if config.is_file():  # before gigabytes are fetched that could not be used
        values = read_json(config)
        require_known(values.get("model_type") if isinstance(values, dict) else None)
        require_plain(config.parent)
    folder = resolve_model(ref, revision=revision)
    require_plain(folder)
    with model_errors(ref):
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        adapter_of(settings)
        # A config.json can ask for another attention, whose sums differ in the last bits, and which may not be there.
        settings._attn_implementation = "sdpa"
        if not any((Path(folder) / name).is_file() for name in _TOKENIZERS):
            # The library would make an empty one.
            raise ValueError(f"it has no tokenizer: none of {', '.join(_TOKENIZERS)}")
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        if ShardedCheckpoint.open(folder, pickles_too=True) is None:
            ShardedCheckpoint.open(folder)  # says so if pickles are all there is
        options: dict[str, Any] = {"attn_implementation": "sdpa", "trust_remote_code": False}
        model = load_whole(AutoModelForImageTextToText, folder, config=settings, dtype=dtype, **options)
        return Mllm(model.to(device), _tokenizer(processor), processor.image_processor)


def _tokenizer(processor: ProcessorMixin) -> PreTrainedTokenizerBase:
    """The processor's tokenizer, as a batch of prompts needs it: padded on the left, and with the chat template."""
    tokenizer = processor.tokenizer
    tokenizer.padding_side, tokenizer.chat_template = "left", processor.chat_template or tokenizer.chat_template
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if not tokenizer.chat_template:
        raise ValueError("it has no chat template (chat_template.jinja, or in tokenizer_config.json)")
    return tokenizer


def load_diffusion(
    ref: str, device: torch.device, dtype: torch.dtype = torch.float32, *, revision: str | None = None
) -> DiffusionModel:
    """The frozen diffusion model of a diffusers pipeline folder, of any family in `DIFFUSION_MODELS`.

    Raises:
        EnvironmentProblem, ArtifactError: as `load_mllm`.
    """
    # which family it is of and what it lacks is known before gigabytes are fetched
    configs = Path(resolve_model(ref, revision=revision, patterns=_FAMILY_FILES))
    family = diffusion_class(configs)
    classes = part_classes(family)
    for part in classes:
        require_plain(configs / part)
    patterns = ["model_index.json", *(f"{part}/{name}" for part in classes for name in MODEL_FILES)]
    folder = resolve_model(ref, revision=revision, patterns=patterns)
    for part, kind in classes.items():
        require_part(folder, part, kind)
    return family(**{part: _part(kind, folder, part, device, dtype) for part, kind in classes.items()})


def load_vae(
    ref: str, device: torch.device, dtype: torch.dtype = torch.float32, *, revision: str | None = None
) -> AutoencoderKL:
    """The VAE of a diffusion model alone, a hundredth of the whole. Errors as `load_diffusion`."""
    patterns = ["model_index.json", *(f"vae/{name}" for name in MODEL_FILES)]
    folder = resolve_model(ref, revision=revision, patterns=patterns)
    require_part(folder, "vae", AutoencoderKL)
    require_plain(Path(folder) / "vae")
    return _part(AutoencoderKL, folder, "vae", device, dtype)


def _part(kind: Any, folder: str, part: str, device: torch.device, dtype: torch.dtype) -> Any:
    with model_errors(f"{folder}/{part}"):
        if not issubclass(kind, nn.Module):
            return kind.from_pretrained(folder, subfolder=part)
        options: dict[str, Any] = {"torch_dtype": dtype}
        if not issubclass(kind, ModelMixin):
            options = {"dtype": dtype, "attn_implementation": "sdpa" if kind._supports_sdpa else "eager"}
        return _frozen(load_whole(kind, folder, subfolder=part, **options), device)


# ---- what was trained -----------------------------------------------------------------------------------------------


def load_branch(
    artifact: Artifact, device: torch.device, dtype: torch.dtype = torch.float32, *, mllm: Mllm | None = None
) -> VisualBranch:
    """A trained branch; every payload file is checked first. ArtifactError BF-ART-005, 007 or 008.

    mllm: whose tensors a branch takes that was trained in part; its weights must be those of the training.
    """
    config, prefix = _part_of(artifact, "branch")
    with init_empty_weights():
        branch = VisualBranch.from_config(config)
    base = branch.from_base(mllm) if branch.tune and mllm is not None else {}
    _frozen(_filled(branch, artifact, prefix, base), device)
    return branch.to(dtype)


def load_controlnet(artifact: Artifact, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A trained ControlNet, or the control that learned queries were trained with; as `load_branch`."""
    config, prefix = _part_of(artifact, "control")
    with init_empty_weights():
        controlnet = DIFFUSION_MODELS[config_family(config)].controlnet_from_config(config)
    _frozen(_filled(controlnet, artifact, prefix, {}), device)
    return nn.Module.to(controlnet, dtype)  # diffusers' own `to` warns of modules kept in float32; there are none


def _part_of(artifact: Artifact, part: str) -> tuple[dict[str, Any], str]:
    """The config of a part, and what the names of its tensors begin with where an artifact holds two."""
    artifact.check()
    config = read_json(artifact.file("config.json"))
    return (config[part], f"{part}.") if "branch" in config else (config, "")


def _filled(module: nn.Module, artifact: Artifact, prefix: str, base: dict[str, torch.Tensor]) -> nn.Module:
    """An empty module with the artifact's weights and those of its base, nothing copied; every tensor that is missing,
    surplus, misshapen, or of whole numbers instead of fractions, is named."""
    path = artifact.file("model.safetensors")
    there = load_tensors(path)[0]
    weights = {**base, **{name.removeprefix(prefix): there[name] for name in there if name.startswith(prefix)}}
    wanted = module.state_dict()
    troubles = misfits(shapes_of(wanted), shapes_of(weights))
    troubles = troubles or [f"{name} holds {weights[name].dtype}, not {own.dtype}" for name, own in wanted.items()
                            if weights[name].is_floating_point() != own.is_floating_point()]  # fmt: skip
    if troubles:
        more = [f"and {len(troubles) - _SHOWN} more"] if len(troubles) > _SHOWN else []
        shown = "; ".join(troubles[:_SHOWN] + more)
        raise ArtifactError(f"the weights of {path} do not fit its config.json", at=shown, fix="train it again",
                            code="BF-ART-007")  # fmt: skip
    module.load_state_dict(weights, assign=True)
    return module


def _frozen(module: nn.Module, device: torch.device) -> nn.Module:
    return module.eval().requires_grad_(False).to(device)
