"""Names to models: the only place where weights are read for use, and hashed.

Every model is in eval mode, frozen and whole: where a file and a config.json do not agree, the libraries warn and go
on; here that is an error. What would change weights on the way (an adapter, a quantization) is refused before.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, ModelMixin
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as hub_logging

from bifrost_cli.artifacts import Artifact
from bifrost_cli.artifacts.files import make_folder, read_json, sha256_file, write_json
from bifrost_cli.artifacts.identity import digest_of, provenance
from bifrost_cli.config.schema import Images, Latents, Models, Recipe
from bifrost_cli.data.safetensors_io import ShardedCheckpoint, few, load_tensors, misfits, shapes_of
from bifrost_cli.errors import ArtifactError, BifrostError, RecipeError
from bifrost_cli.loading.offload import OffloadPolicy
from bifrost_cli.loading.open_clip_models import features_name, load_open_clip
from bifrost_cli.loading.resolve import MODEL_FILES, model_errors, resolve_device, resolve_model
from bifrost_cli.models import encoders
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.diffusion.base import DiffusionModel
from bifrost_cli.models.diffusion.controlnet import config_family
from bifrost_cli.models.diffusion.flux import FluxModel
from bifrost_cli.models.diffusion.sd3 import Sd3Model
from bifrost_cli.models.mllm.adapters import adapter_of, require_known
from bifrost_cli.models.mllm.frozen_mllm import Mllm
from bifrost_cli.runtime.plugins import Plugins

DIFFUSION_MODELS = Plugins("bifrost.diffusion_models", {"FLUX": FluxModel, "SD3": Sd3Model}, base=DiffusionModel)
_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Tensors of stock checkpoints that their own library computes by itself today.
_COMPUTED = (
    r"(^|\.)position_ids$",  # 0, 1, 2 ...: CLIP and SigLIP, saved before transformers 4.31
    r"rotary_emb\.inv_freq$",  # Llama, saved before transformers 4.33
    r"\.relative_position_index$",  # Swin's windows
)
_WHOLE_NUMBERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
# Beside the weights, what decides what a model reads and writes.
_FILES = {
    "mllm": ("*config.json", "tokenizer.*", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
             "chat_template.*"),
    "diffusion": ("model_index.json", "*/*config.json", "tokenizer*/*"),
}  # fmt: skip
_ABOUT = {"_name_or_path", "transformers_version", "_diffusers_version"}  # keys of a config.json that decide nothing
SETTLED = 2.0  # seconds: files touched later than this before hashing could change again within one tick of the clock
_LIBRARIES = ("torch", "transformers", "diffusers", "bifrost-cli")
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

    Raises:
        EnvironmentProblem: (every method) a model is not here, or is none.
        ArtifactError: (every method) it is not whole, of no known family, or its weights are damaged.
    """

    def __init__(
        self, models: Models, device: torch.device | str = "cpu", offload: str = "none", *, in_memory: bool = False
    ) -> None:
        self.models, self.dtype, self._in_memory = models, getattr(torch, models.dtype), in_memory
        self.device = resolve_device(device) if isinstance(device, str) else device
        self.policy = OffloadPolicy(self.device, offload, models.weights)

    def mllm(self, device: torch.device | None = None) -> Mllm:
        """The multimodal LLM, of the family that its config.json names (`adapters.FAMILIES`)."""
        ref, revision = self.models.mllm, self.models.mllm_revision
        config = Path(resolve_model(ref, revision=revision, patterns=(_CONFIG,))) / _CONFIG
        if config.is_file():  # before gigabytes are fetched that could not be used
            values = read_json(config)
            require_known(values.get("model_type") if isinstance(values, dict) else None)
            _require_plain(config.parent)
        folder = resolve_model(ref, revision=revision)
        _require_plain(Path(folder))
        with model_errors(ref):
            settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            adapter_of(settings)
            # A config.json can ask for another attention: its sums differ in the last bits, and it may not be there.
            settings._attn_implementation = "sdpa"
            if not any((Path(folder) / name).is_file() for name in _TOKENIZERS):
                # The library would make an empty one.
                raise ValueError(f"it has no tokenizer: none of {', '.join(_TOKENIZERS)}")
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
            if ShardedCheckpoint.open(folder, pickles_too=True) is None:
                ShardedCheckpoint.open(folder)  # says so if pickles are all there is
            options: dict[str, Any] = {"attn_implementation": "sdpa", "trust_remote_code": False}
            model = load_whole(AutoModelForImageTextToText, folder, config=settings, dtype=self.dtype, **options)
            tokenizer = processor.tokenizer  # padded on the left, as a batch of prompts needs it
            tokenizer.padding_side, tokenizer.chat_template = "left", processor.chat_template or tokenizer.chat_template
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            if not tokenizer.chat_template:
                raise ValueError("it has no chat template (chat_template.jinja, or in tokenizer_config.json)")
            return Mllm(self._ready(model, device or self.policy.home), tokenizer, processor.image_processor)

    def diffusion(self) -> DiffusionModel:
        """The diffusion model of a diffusers pipeline folder, whole, of any family in `DIFFUSION_MODELS`."""
        # which family it is of and what it lacks is known before gigabytes are fetched
        patterns = ("model_index.json", f"*/{_CONFIG}", f"*/{_ADAPTER}")
        configs = resolve_model(self.models.diffusion, revision=self.models.diffusion_revision, patterns=patterns)
        family = diffusion_class(configs)
        classes = part_classes(family)
        for part in classes:
            _require_plain(Path(configs) / part)
        return family(**self._parts(classes, self.policy.home))

    def vae(self) -> AutoencoderKL:
        """The diffusion model's VAE alone, on the device: a hundredth of the whole."""
        return self._parts({"vae": AutoencoderKL}, self.device)["vae"]

    def encoder(
        self, latents: Latents, images: Images, *, mllm: Mllm | None = None, vae: AutoencoderKL | None = None
    ) -> encoders.Encoder:
        """The image encoder that `latents.encoder` names, on the device; of `mllm` or `vae` where one is loaded.
        RecipeError: its sizes and `images.input_size` do not fit."""
        name, size = latents.encoder, images.input_size
        with encoder_errors("images.input_size"):
            if name == "mllm":
                return encoders.MllmEncoder(mllm or self.mllm(self.device), size)
            if name == "vae":
                return encoders.VaePatchEncoder(vae or self.vae(), size)
            return encoders.OpenClipEncoder(load_open_clip(name, self.device), features_name(name), size)

    def _parts(self, classes: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """The named parts of the diffusion model's folder, each read by its class."""
        patterns = ["model_index.json", *(f"{part}/{name}" for part in classes for name in MODEL_FILES)]
        folder = resolve_model(self.models.diffusion, revision=self.models.diffusion_revision, patterns=patterns)
        for part, kind in classes.items():
            require_part(folder, part, kind)
            _require_plain(Path(folder) / part)
        parts: dict[str, Any] = {}
        for part, kind in classes.items():
            with model_errors(f"{folder}/{part}"):
                if not issubclass(kind, nn.Module):
                    parts[part] = kind.from_pretrained(folder, subfolder=part)
                    continue
                options: dict[str, Any] = {"torch_dtype": self.dtype}
                if not issubclass(kind, ModelMixin):
                    options = {"dtype": self.dtype, "attn_implementation": "sdpa" if kind._supports_sdpa else "eager"}
                parts[part] = self._ready(load_whole(kind, folder, subfolder=part, **options), device)
        return parts

    def branch(self, artifact: Artifact, mllm: Mllm | None = None) -> VisualBranch:
        """A trained branch; every payload file is checked first. One that was trained in part takes the rest of `mllm`,
        whose weights must be those of the training."""
        return self._trained(artifact, "branch", VisualBranch.from_config, mllm)

    def controlnet(self, artifact: Artifact) -> nn.Module:
        """A trained ControlNet, or the control that learned queries were trained with; as `branch`."""
        return self._trained(
            artifact, "control", lambda config: DIFFUSION_MODELS[config_family(config)].controlnet_from_config(config)
        )

    def _trained(
        self, artifact: Artifact, part: str, empty: Callable[[dict[str, Any]], Any], mllm: Mllm | None = None
    ) -> Any:
        """The artifact's module, or of two the `part`, with the artifact's weights and those of its base, not copied;
        every tensor that is missing, surplus, misshapen, or of whole numbers instead of fractions, is named."""
        artifact.check()
        config, prefix = read_json(artifact.file(_CONFIG)), ""
        if "branch" in config:
            config, prefix = config[part], f"{part}."
        with init_empty_weights():
            module = empty(config)
        path = artifact.file("model.safetensors")
        there, wanted = load_tensors(path)[0], module.state_dict()
        own = {name.removeprefix(prefix): there[name] for name in there if name.startswith(prefix)}
        weights = {**(module.from_base(mllm) if mllm is not None and module.tune else {}), **own}
        troubles = misfits(shapes_of(wanted), shapes_of(weights))
        troubles = troubles or [f"{name} holds {weights[name].dtype}, not {wanted[name].dtype}" for name in wanted
                                if weights[name].is_floating_point() != wanted[name].is_floating_point()]  # fmt: skip
        if troubles:
            raise ArtifactError(f"the weights of {path} do not fit its config.json", at=few(troubles, "; "),
                                fix="train it again", code="BF-ART-007")  # fmt: skip
        module.load_state_dict(weights, assign=True)
        return self._ready(nn.Module.to(module, self.dtype), self.policy.home)

    def _ready(self, module: nn.Module, device: torch.device) -> Any:
        """Frozen, on the device, and out of its file where the loader is told so."""
        nn.Module.to(module.eval().requires_grad_(False), device)  # diffusers' own `to` warns of float32 parts
        if self._in_memory:
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.device.type == "cpu":
                    tensor.data = tensor.data.clone()
        return module


@contextmanager
def encoder_errors(key: str) -> Iterator[None]:
    """Turn what an encoder refuses into a RecipeError: of a size, BF-RECIPE-005 with the `--set` that works."""
    try:
        yield
    except encoders.UnsupportedSize as error:
        fix = f"--set {key}={error.nearest}"
        raise RecipeError(f"{key} is {error}", fix=fix, code="BF-RECIPE-005") from None
    except encoders.UnsupportedTower as error:
        raise RecipeError(str(error), fix="name a vision transformer in latents.encoder") from None


def diffusion_class(folder: Path | str) -> type[DiffusionModel]:
    """The family of the diffusers pipeline in `folder`, by its transformer's class. ArtifactError BF-ART-009: no known
    one, or no pipeline; EnvironmentProblem: it is not built in, and a plug-in does not load."""
    name, known = _class_of(Path(folder), "transformer"), []
    for family in DIFFUSION_MODELS:  # built-in ones first, so that plug-ins are imported for other models only
        kind = DIFFUSION_MODELS[family]
        transformer = kind.parts["transformer"].partition(":")[2]
        if transformer == name:
            return kind
        known.append(f"{transformer} ({family})")
    raise _unfit(f"{folder} holds no diffusion model of a known family",
                 f"transformer: {name}\nknown: {', '.join(known)}")  # fmt: skip


def part_classes(kind: type[DiffusionModel]) -> dict[str, type]:
    """The folders of a family's pipeline and the class that reads each."""
    named = {part: value.partition(":") for part, value in kind.parts.items()}
    return {part: getattr(importlib.import_module(module), name) for part, (module, _, name) in named.items()}


def require_part(folder: Path | str, part: str, wanted: type) -> None:
    """ArtifactError unless the part is there: BF-ART-009 of another class, BF-ART-010 missing, or without weights."""
    place, lacks = Path(folder) / part, ""
    if not place.is_dir():
        lacks = f"{folder} lacks its {part} ({wanted.__name__})"
    elif issubclass(wanted, nn.Module):
        if (found := _class_of(Path(folder), part)) != wanted.__name__:
            at = f"found: {found}\nwanted: {wanted.__name__}"
            raise _unfit(f"{place} is not the {part} that its family has", at)
        indexes = [read_json(path)["weight_map"].values() for path in place.glob("*.safetensors.index.json")]
        gone = sorted({name for index in indexes for name in index if not (place / name).is_file()})
        if gone or not any(place.glob("*.safetensors")):
            lacks = f"{place} lacks {', '.join(gone[:3]) or 'its weights: there is no .safetensors file'}"
    if lacks:
        raise ArtifactError(lacks, fix="fetch the model again, whole", code="BF-ART-010")


def _class_of(folder: Path, part: str) -> str | None:
    """The class that a part's config.json names, by diffusers' key or by transformers'; else the pipeline's index."""
    config, index = folder / part / "config.json", folder / "model_index.json"
    facts = read_json(config) if config.is_file() else {}
    listed = read_json(index).get(part) if index.is_file() else None
    return facts.get("_class_name") or (facts.get("architectures") or listed or [None])[-1]


def _unfit(what: str, at: str) -> ArtifactError:
    return ArtifactError(what, at=at, fix="name another in models.diffusion", code="BF-ART-009")


# ---- whole weights --------------------------------------------------------------------------------------------------


def _require_plain(folder: Path) -> None:
    """ArtifactError BF-ART-007 for a model that is quantized, or that has a LoRA lying beside its weights."""
    if (folder / _ADAPTER).is_file():  # transformers would apply it unasked
        fix = "merge it (merge_and_unload of peft) and save the model, or take the adapter's files out of the folder"
        raise ArtifactError(f"{folder} holds an adapter (LoRA) beside the weights, which is not merged into them",
                            at=str(folder / _ADAPTER), fix=fix, code="BF-ART-007")  # fmt: skip
    config = folder / _CONFIG
    values = read_json(config) if config.is_file() else {}
    parts = [part for part in (values, *getattr(values, "values", tuple)()) if isinstance(part, dict)]
    keys = ("quantization_config", "compression_config")
    if found := next((part[key] for part in parts for key in keys if part.get(key)), None):
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise _quantized(folder, f"config.json: {method or 'quantization_config'}")


def load_whole(kind: Any, folder: str, **options: Any) -> Any:
    """`from_pretrained`, which would fill what is missing with random numbers and leave out what it has no place for;
    ArtifactError BF-ART-007 instead, also for tensors of another shape, or of whole numbers."""
    place = Path(folder) / options.get("subfolder", "")
    for path in sorted(place.glob("*.safetensors")):
        with safe_open(path, "pt") as file:  # codes of a quantization would be copied as if they were weights
            codes = [name for name in file.keys() if re.search(r"(^|[._])(weight|bias)$", name)
                     and file.get_slice(name).get_dtype() in _WHOLE_NUMBERS]  # fmt: skip
        if codes:
            raise _quantized(place, f"{path.name}: {'; '.join(sorted(codes)[:_SHOWN])}")
    loud = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # the library prints a table of what our error says
    try:
        model, report = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True,
                                             ignore_mismatched_sizes=True, **options)  # fmt: skip
    finally:
        hub_logging.set_verbosity(loud)
    name = type(model).__name__
    lost = [*report["missing_keys"], *(f"{key} is {(*shape,)}, not {(*expected,)}"
                                       for key, shape, expected in report["mismatched_keys"])]  # fmt: skip
    if lost:
        shown = "; ".join(sorted(lost)[:_SHOWN])
        raise ArtifactError(f"{place} lacks {len(lost)} tensors of {name}, or has them in another shape", at=shown,
                            fix="fetch the model again", code="BF-ART-007")  # fmt: skip
    if surplus := [key for key in report["unexpected_keys"] if not re.search("|".join(_COMPUTED), key)]:
        said = f"{place} holds {len(surplus)} tensors that {name}, as its config.json describes it, has no place for"
        raise ArtifactError(said, at="; ".join(sorted(surplus)[:_SHOWN]), code="BF-ART-007",
                            fix="fetch config.json and weights of one model again, not quantized")  # fmt: skip
    return model


def _quantized(place: Path, at: str) -> ArtifactError:
    fix = "give the model in 16 or 32 bits; --set models.weights=int8 or nf4 quantizes it while it is loaded"
    return ArtifactError(f"{place} holds a quantized model", at=at, fix=fix, code="BF-ART-007")


def fingerprint(part: Literal["mllm", "diffusion"], models: Models, loaded: Mllm | DiffusionModel | None = None) -> str:
    """The sha256 over a base's tensors in `models.dtype`; `loaded` in full saves loading it when the hash is not kept.

    It is kept in the user's cache under the path, size, inode and times of every file and the versions of the libraries
    that read them: a file written in place is noticed even when its modification time was put back.
    """
    ref, revision = getattr(models, part), getattr(models, f"{part}_revision")
    folder = Path(resolve_model(ref, revision=revision, patterns=["model_index.json", _CONFIG]))
    facts = _file_facts(folder)
    versions = {name: provenance()["versions"].get(name) for name in _LIBRARIES}
    key = digest_of([{"diffusion": "painter"}.get(part, part), models.dtype, str(folder.resolve()), versions, facts])
    place = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bifrost" / "bases" / f"{key}.json"
    with suppress(BifrostError, KeyError, TypeError):  # a cache: what cannot be read is made again
        if place.is_file() and (kept := str(read_json(place)["sha256"])):
            return kept
    newest = max((max(times) for _, _, _, *times in facts), default=0) / 1e9
    settled = time.time() - newest > SETTLED
    computed = (loaded or getattr(ModelLoader(models), part)()).weights_hash()
    if settled and _file_facts(folder) == facts:
        with suppress(BifrostError, OSError):  # a home that cannot be written to only costs the time
            make_folder(place.parent)
            write_json(place, {"sha256": computed})
    return computed


def files_digest(part: Literal["mllm", "diffusion"], models: Models) -> str:
    """The sha256 over a base's tokenizers, chat template, configs, preprocessor and scheduler, in any folder."""
    ref, revision = getattr(models, part), getattr(models, f"{part}_revision")
    folder = Path(resolve_model(ref, revision=revision, patterns=_FILES[part]))
    found: dict[str, Any] = {}
    value: Any
    for path in {path for pattern in _FILES[part] for path in folder.glob(pattern) if path.is_file()}:
        value = sha256_file(path)
        with suppress(BifrostError):
            value = read_json(path) if path.name.endswith("config.json") else value
        kept = {key: value[key] for key in value.keys() - _ABOUT} if isinstance(value, dict) else value
        found[path.relative_to(folder).as_posix()] = kept
    return digest_of(found)


def decisive_files(part: Literal["mllm", "diffusion"], models: Models) -> dict[str, str]:
    """`files_digest` as it stands in an identity; nothing for what ships with the package: its files stay."""
    name = {"diffusion": "painter"}.get(part, part)
    return {} if getattr(models, part).startswith("builtin:") else {f"{name}_files": files_digest(part, models)}


def files_between(recipe: Recipe) -> dict[str, str]:
    """`decisive_files` of the models between an image and its latents."""
    latents, models = recipe.latents, recipe.models
    mllm = decisive_files("mllm", models) if latents.encoder == "mllm" else {}
    return mllm | (decisive_files("diffusion", models) if latents.vae or latents.encoder == "vae" else {})


def _file_facts(folder: Path) -> list[list[Any]]:
    """Name, size, inode and times of every file that a model is read from."""
    files = sorted(path for kind in ("safetensors", "json") for path in folder.rglob(f"*.{kind}"))
    stats = [(str(path.relative_to(folder)), path.stat()) for path in files]
    return [[name, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats]
