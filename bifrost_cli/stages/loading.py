"""Names -> folders -> models: the only place where weights are read for use.

In: `builtin:NAME`, a folder, a hub id, or an artifact; a device and a number format. Out: models in eval mode,
frozen. Every base becomes a local folder first, so that each trouble with a hub has one place and one message. Does not
know what the models are used for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxControlNetModel, FluxTransformer2DModel
from huggingface_hub import get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.utils import logging as hub_logging

from bifrost_cli.artifacts import Artifact
from bifrost_cli.artifacts.files import read_json
from bifrost_cli.config import Recipe
from bifrost_cli.data.weights import load_tensors
from bifrost_cli.errors import ArtifactError, BifrostError, EnvironmentProblem
from bifrost_cli.models.branch import VisualBranch
from bifrost_cli.models.controlnet import controlnet_from_config
from bifrost_cli.models.encoders import Encoder, MllmEncoder, OpenClipEncoder
from bifrost_cli.models.flux import Painter
from bifrost_cli.models.mllm import Mllm

BUILTIN = Path(__file__).parents[1] / "builtin"
_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
_FLUX_FILES = ("model_index.json", *(f"*/{pattern}" for pattern in _FILES))  # not the second copy at the root
_HUB_ERRORS = (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, HFValidationError)
_SHOWN = 5

hub_logging.disable_progress_bar()  # a bar for every part of a model, terminal or not; ours is the one that counts


# ---- where things are -----------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one. EnvironmentProblem BF-ENV-001 for a device that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EnvironmentProblem(f"there is no device {name} here", at=_first_line(error),
                                 fix="--device cpu, or bifrost doctor", code="BF-ENV-001") from error  # fmt: skip
    return device


def model_place(ref: str, *, revision: str | None = None, patterns: Sequence[str] = _FILES) -> str:
    """The local folder of a frozen base; a hub id is downloaded (safetensors and text files alone) or taken from cache.

    Raises what `model_errors` does.
    """
    folder = BUILTIN / ref.removeprefix("builtin:") if ref.startswith("builtin:") else Path(ref).expanduser()
    if folder.is_dir():
        return str(folder)
    if ref.startswith(("builtin:", ".", "/", "~")):
        raise EnvironmentProblem(f"there is no model folder {folder}", fix="give a folder, builtin:NAME or a hub id",
                                 code="BF-ENV-020")  # fmt: skip
    with model_errors(ref):
        return snapshot_download(ref, revision=revision, allow_patterns=list(patterns))


@contextmanager
def model_errors(ref: str) -> Iterator[None]:
    """Turn a library's complaint about a model into one of ours.

    EnvironmentProblem: BF-ENV-020 not a model, or not reachable; 021 gated and no token; 022 licence not accepted; 023
    offline and not in the cache. ArtifactError BF-ART-008: damaged weights.
    """
    try:
        yield
    except BifrostError:
        raise
    except _HUB_ERRORS as error:
        raise _hub_problem(ref, error) from error
    except SafetensorError as error:
        raise ArtifactError(f"{ref} holds damaged weights: {error}", fix="fetch the model again",
                            code="BF-ART-008") from error  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise EnvironmentProblem(f"{ref} is not a model of the kind that is needed", at=_first_line(error),
                                 fix="check the recipe's models section", code="BF-ENV-020") from error  # fmt: skip


def _hub_problem(ref: str, error: Exception) -> EnvironmentProblem:
    page = f"https://huggingface.co/{ref}"
    if isinstance(error, GatedRepoError) and get_token() is None:
        return EnvironmentProblem(f"{ref} is gated, and there is no token", at=page,
                                  fix="hf auth login, or set HF_TOKEN", code="BF-ENV-021")  # fmt: skip
    if isinstance(error, GatedRepoError):
        return EnvironmentProblem(f"{ref} is gated, and your account has not accepted its licence", at=page,
                                  fix=f"accept it at {page}", code="BF-ENV-022")  # fmt: skip
    if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError)):
        return EnvironmentProblem(f"there is no model {ref}", at=_first_line(error),
                                  fix="check the name and the revision; a private one needs HF_TOKEN",
                                  code="BF-ENV-020")  # fmt: skip
    if os.environ.get("HF_HUB_OFFLINE") or isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return EnvironmentProblem(f"{ref} is not in the cache, and the hub cannot be reached", at=page,
                                  fix="go online once, or give a local folder", code="BF-ENV-023")  # fmt: skip
    return EnvironmentProblem(f"{ref} cannot be reached", at=_first_line(error), fix="try again later",
                              code="BF-ENV-020")  # fmt: skip


# ---- the frozen bases -----------------------------------------------------------------------------------------------


def load_mllm(
    ref: str, device: torch.device, dtype: torch.dtype = torch.float32, *, revision: str | None = None
) -> Mllm:
    """The frozen multimodal LLM. EnvironmentProblem or ArtifactError when it is not there or not whole."""
    folder = model_place(ref, revision=revision)
    with model_errors(ref):
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        return Mllm(model.to(device), tokenizer, Qwen2VLImageProcessor.from_pretrained(folder))


def load_painter(
    ref: str, device: torch.device, dtype: torch.dtype = torch.float32, *, revision: str | None = None
) -> Painter:
    """Frozen FLUX from a diffusers pipeline folder. EnvironmentProblem or ArtifactError as `load_mllm`."""
    folder = model_place(ref, revision=revision, patterns=_FLUX_FILES)
    with model_errors(ref):
        diffusion, text = ({"use_safetensors": True, key: dtype} for key in ("torch_dtype", "dtype"))
        modules = (
            FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer", **diffusion),
            AutoencoderKL.from_pretrained(folder, subfolder="vae", **diffusion),
            CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", **text),
            T5EncoderModel.from_pretrained(folder, subfolder="text_encoder_2", **text),
        )
        tokenizers = (
            CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
            T5Tokenizer.from_pretrained(folder, subfolder="tokenizer_2"),
        )
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    return Painter(*(_frozen(module, device) for module in modules), *tokenizers, scheduler)


def load_vae(
    ref: str, device: torch.device, dtype: torch.dtype = torch.float32, *, revision: str | None = None
) -> AutoencoderKL:
    """The VAE of a frozen FLUX alone, a hundredth of the whole. Errors as `load_painter`."""
    folder = model_place(ref, revision=revision, patterns=("model_index.json", *(f"vae/{name}" for name in _FILES)))
    with model_errors(ref):
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", use_safetensors=True, torch_dtype=dtype)
    return _frozen(vae, device)


def load_encoder(recipe: Recipe, device: torch.device) -> Encoder:
    """The picture encoder of `latents.encoder`. RecipeError (2) when its sizes and `latents.image_size` do not fit."""
    wanted, models = recipe.latents, recipe.models
    if wanted.encoder == "mllm":
        mllm = load_mllm(models.mllm, device, getattr(torch, models.dtype), revision=models.revision)
        return MllmEncoder(mllm, wanted.image_size)
    from bifrost_cli.stages.loading_clip import features_name, load_open_clip  # which imports this file

    model = load_open_clip(wanted.encoder, device)
    return OpenClipEncoder(model, features_name(wanted.encoder), wanted.image_size)


# ---- what was trained -----------------------------------------------------------------------------------------------


def load_branch(artifact: Artifact, device: torch.device, dtype: torch.dtype = torch.float32) -> VisualBranch:
    """A trained branch; every payload file is checked first. ArtifactError BF-ART-005, 007 or 008."""
    branch = VisualBranch.from_config(_config(artifact))
    return _frozen(_filled(branch, artifact), device).to(dtype)


def load_controlnet(
    artifact: Artifact, device: torch.device, dtype: torch.dtype = torch.float32
) -> FluxControlNetModel:
    """A trained ControlNet, as `load_branch`."""
    controlnet = _frozen(_filled(controlnet_from_config(_config(artifact)), artifact), device)
    return nn.Module.to(controlnet, dtype)  # diffusers' own `to` warns of modules kept in float32; there are none


def _config(artifact: Artifact) -> dict:
    artifact.check()
    return read_json(artifact.file("config.json"))


def _filled(module: nn.Module, artifact: Artifact) -> nn.Module:
    """The module with the artifact's weights; every missing, surplus or misshapen tensor is named."""
    path = artifact.file("model.safetensors")
    weights, _ = load_tensors(path)
    wanted = module.state_dict()
    troubles = [f"missing {name}" for name in wanted.keys() - weights.keys()]
    troubles += [f"unexpected {name}" for name in weights.keys() - wanted.keys()]
    troubles += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted.keys() & weights.keys()
        if weights[name].shape != wanted[name].shape
    ]
    if troubles:
        more = [f"and {len(troubles) - _SHOWN} more"] if len(troubles) > _SHOWN else []
        shown = "; ".join(sorted(troubles)[:_SHOWN] + more)
        raise ArtifactError(f"the weights of {path} do not fit its config.json", at=shown, fix="train it again",
                            code="BF-ART-007")  # fmt: skip
    module.load_state_dict(weights)
    return module


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _frozen(module: nn.Module, device: torch.device) -> nn.Module:
    return module.eval().requires_grad_(False).to(device)
