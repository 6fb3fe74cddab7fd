"""`bifrost shapes pretrain`: trains the whole built-in system from nothing, part by part.

The folder holds what `bifrost_cli/builtin` does: `mllm/`, `flux/`, `open_clip/` in their libraries' layouts, and the
artifacts `branch/` and `controlnet/`. Every part resumes from its checkpoints; a finished one is not trained again. Two
terminals may share the work: `--parts mllm,open_clip` in one, `--parts vae,flux` in the other, then the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from bifrost_cli.artifacts.files import make_folder, remove, sync, write_json
from bifrost_cli.artifacts.identity import provenance
from bifrost_cli.config.schema import Recipe, Train
from bifrost_cli.data.safetensors_io import weights_hash
from bifrost_cli.errors import UsageError
from bifrost_cli.models.diffusion.flux import FluxModel
from bifrost_cli.models.mllm.chat_template import chat_text
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.shapes.words import words
from bifrost_cli.toy_system import tiny_models
from bifrost_cli.training.loop import FitResult, fit

PARTS = ("vae", "mllm", "open_clip", "flux", "latents", "branch", "controlnet")
CARD = "bifrost.json"
POOL = 12_288  # drawings encoded once for FLUX's pretraining


def pretrain(
    recipe: Recipe,
    *,
    parts: Sequence[str] | None = None,
    output: Path | str | None = None,
    workspace: Path | str = "runs",
    device: str = "auto",
    ui: Ui | None = None,
) -> Path:
    """Train parts of the built-in system.

    Args:
        recipe: its `shapes` section sizes the bases; `latents`, `branch` and `controlnet` the rest.
        parts: of `PARTS`; None trains all, in order.
        output: the folder; None is `workspace`/system.
        workspace: folder of the default output.
        device: where branch and ControlNet are trained; the bases train on the CPU unless it is named.
        ui: where progress is shown.

    Returns:
        The folder.

    Raises:
        UsageError: an unknown part, or one whose predecessors are not there.
        Stopped: a signal stopped a training, which left a checkpoint.
    """
    folder, ui = Path(output or Path(workspace) / "system"), ui or Ui()
    unknown = sorted(set(parts or ()) - set(PARTS))
    if unknown:
        raise UsageError(f"no such part: {', '.join(unknown)}", fix=f"parts are {', '.join(PARTS)}", code="BF-USE-001")
    makers: dict[str, Callable[[Recipe, Path, str, Ui], None]] = {
        "vae": _vae, "mllm": _mllm, "open_clip": _open_clip, "flux": _flux,
        "latents": _latents, "branch": _branch, "controlnet": _controlnet,
    }  # fmt: skip
    provenance()  # reads the commit now: the checkout may move during hours of training
    for part in parts or PARTS:
        ui.say(f"pretrain: {part} in {folder}")
        makers[part](recipe, folder, device, ui)
        remove(folder / "work" / part / "checkpoints")  # only now: the part is complete
    return folder


# ---- the frozen bases ------------------------------------------------------------------------------------------------


def _vae(recipe: Recipe, folder: Path, device: str, ui: Ui) -> None:
    from bifrost_cli.toy_system.train_vae import VaeTask, measure_scale

    train, target = recipe.shapes.vae, folder / "flux" / "vae"
    if (target / CARD).exists():
        return
    torch.manual_seed(train.seed)
    task = VaeTask(tiny_models.vae(), train.seed, train.batch_size)
    result = _fit(task, train, folder, "vae", device, ui)
    vae = task.module.to("cpu")
    vae.load_state_dict(result.ema_state)
    measure_scale(vae, train.seed)
    _save(vae.half(), target, train, result)


def _mllm(recipe: Recipe, folder: Path, device: str, ui: Ui) -> None:
    from bifrost_cli.toy_system.train_mllm import FILL_QUESTION, MllmTask

    train, target, instruction = recipe.shapes.mllm, folder / "mllm", recipe.generate.plan_instruction
    if (target / CARD).exists():
        return
    torch.manual_seed(train.seed)
    tokenizer = tiny_models.qwen_tokenizer(words([instruction, FILL_QUESTION, chat_text("")]))
    processor = tiny_models.image_processor()
    task = MllmTask(tiny_models.mllm(tokenizer), tokenizer, processor, instruction, train.seed, train.batch_size)
    result = _fit(task, train, folder, "mllm", device, ui)
    task.module.load_state_dict(result.ema_state)
    tokenizer.save_pretrained(target)
    processor.save_pretrained(target)
    _save(task.module["mllm"].to("cpu").half(), target, train, result)


def _open_clip(recipe: Recipe, folder: Path, device: str, ui: Ui) -> None:
    import open_clip

    from bifrost_cli.data.safetensors_io import save_tensors
    from bifrost_cli.toy_system.train_open_clip import OpenClipTask

    train, target = recipe.shapes.open_clip, folder / "open_clip"
    if (target / CARD).exists():
        return
    torch.manual_seed(train.seed)
    tokenizer = tiny_models.clip_tokenizer(words())
    make_folder(target)
    config = tiny_models.open_clip_config(len(tokenizer))
    write_json(target / "open_clip_config.json", config)
    tokenizer.save_pretrained(target)
    model = open_clip.create_model(f"local-dir:{target}", pretrained=None, load_weights=False)
    card = config["preprocess_cfg"]
    tokenize = open_clip.get_tokenizer(f"local-dir:{target}")
    task = OpenClipTask(model, tokenize, card["mean"], card["std"], train.seed, train.batch_size)
    result = _fit(task, train, folder, "open_clip", device, ui)
    weights = {name: tensor.to("cpu").half().contiguous() for name, tensor in result.ema_state.items()}
    save_tensors(target / "open_clip_model.safetensors", weights, {})
    _sync(target)
    write_json(target / CARD, _card(train, result, weights))


def _flux(recipe: Recipe, folder: Path, device: str, ui: Ui) -> None:
    from diffusers import AutoencoderKL

    from bifrost_cli.toy_system.train_flux import FluxTask

    train, target = recipe.shapes.flux, folder / "flux"
    if (target / "transformer" / CARD).exists():
        return
    _require(target / "vae" / CARD, "vae", folder)
    torch.manual_seed(train.seed)
    vocabulary = words()
    tokenizers = tiny_models.clip_tokenizer(vocabulary), tiny_models.t5_tokenizer(vocabulary)
    diffusion = FluxModel(
        transformer=tiny_models.flux_transformer(),
        vae=AutoencoderKL.from_pretrained(target / "vae", dtype=torch.float32).eval(),
        text_encoder=tiny_models.clip_text(tokenizers[0]),
        text_encoder_2=tiny_models.t5(tokenizers[1]),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        scheduler=tiny_models.scheduler(),
    )
    pool = min(POOL, train.steps * train.batch_size)
    task = FluxTask(diffusion, recipe.models.diffusion_text_tokens, train.seed, train.batch_size, pool)
    result = _fit(task, train, folder, "flux", device, ui)
    task.module.load_state_dict(result.ema_state)
    scheduler: Any = diffusion.scheduler
    scheduler.save_pretrained(target / "scheduler")
    diffusion.tokenizer.save_pretrained(target / "tokenizer")
    diffusion.tokenizer_2.save_pretrained(target / "tokenizer_2")
    write_json(target / "model_index.json", _model_index(diffusion))
    _sync(target)
    for name in ("text_encoder", "text_encoder_2", "transformer"):
        _save(task.module[name].to("cpu").half(), target / name, train, result)


def _model_index(diffusion: FluxModel) -> dict[str, Any]:
    """model_index.json, by which diffusers' FluxPipeline finds the class of each folder."""
    names = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")
    classes = {name: type(getattr(diffusion, name)) for name in names}
    index = {name: [cls.__module__.split(".")[0], cls.__name__] for name, cls in classes.items()}
    return {"_class_name": "FluxPipeline", **index}


# ---- what is trained on their latents --------------------------------------------------------------------------------


def _with_system(recipe: Recipe, folder: Path) -> Recipe:
    models = recipe.models.model_copy(update={"mllm": str(folder / "mllm"), "diffusion": str(folder / "flux")})
    return recipe.model_copy(update={"models": models})


def _latents(recipe: Recipe, folder: Path, device: str, ui: Ui) -> None:
    from bifrost_cli.extraction.extract import extract_latents

    _require(folder / "mllm" / CARD, "mllm", folder)
    _require(folder / "flux" / "vae" / CARD, "vae", folder)
    extract_latents(_with_system(recipe, folder), output=folder / "work" / "latents", device=device, ui=ui)


def _branch(recipe: Recipe, folder: Path, device: str, ui: Ui) -> None:
    from bifrost_cli.training.train_branch import train_branch

    store = folder / "work" / "latents"
    _require(store / "manifest.json", "latents", folder)
    train_branch(_with_system(recipe, folder), latents=store, output=folder / "branch", device=device, ui=ui)


def _controlnet(recipe: Recipe, folder: Path, device: str, ui: Ui) -> None:
    from bifrost_cli.training.train_controlnet import train_controlnet

    store = folder / "work" / "latents"
    _require(store / "manifest.json", "latents", folder)
    _require(folder / "flux" / "transformer" / CARD, "flux", folder)
    train_controlnet(_with_system(recipe, folder), latents=store, output=folder / "controlnet", device=device, ui=ui)


# ---- shared ----------------------------------------------------------------------------------------------------------


def _require(path: Path, part: str, folder: Path) -> None:
    if not path.exists():
        raise UsageError(f"{folder} has no finished {part}", at=str(path), code="BF-USE-001",
                         fix=f"first: bifrost shapes pretrain --parts {part} -o {quote(str(folder))}")  # fmt: skip


def _fit(task: Any, train: Train, folder: Path, part: str, device: str, ui: Ui) -> FitResult:
    """The training loop on one part: drawing on the fly keeps it on the CPU unless another device is named."""
    work = folder / "work" / part
    return fit(task, train, work, device="cpu" if device == "auto" else device, ui=ui)


def _save(module: Any, target: Path, train: Train, result: FitResult) -> None:
    """`save_pretrained`, then the card, whose presence means that the part is complete."""
    module.save_pretrained(target)
    _sync(target)
    write_json(target / CARD, _card(train, result, module.state_dict()))


def _sync(folder: Path) -> None:
    """Sync what the libraries wrote, which they do not do: a card must not outlive its weights in a power cut."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        sync(path)


def _card(train: Train, result: FitResult, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {
        "made": provenance(seed=train.seed, device="cpu"),
        "cost": {"seconds": round(result.seconds, 1), "samples": result.samples_seen},
        "train": train.model_dump(mode="json"),
        "weights_sha256": weights_hash(weights),
    }
