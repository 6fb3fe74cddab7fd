"""`bifrost shapes pretrain`: trains the whole built-in system from nothing, part by part.

The folder holds what `bifrost_cli/builtin` does: `mllm/`, `flux/`, `open_clip/` in their libraries' layouts, and the
artifacts `branch/` and `controlnet/`. Every part resumes from its checkpoints; a finished one is not trained again. Two
terminals may share the work: `--parts mllm,open_clip` in one, `--parts vae,flux` in the other, then the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from diffusers import AutoencoderKL

from bifrost_cli.artifacts.files import make_folder, remove, sync, write_json
from bifrost_cli.artifacts.identity import provenance
from bifrost_cli.config.schema import Recipe, Train
from bifrost_cli.data.safetensors_io import save_tensors, weights_hash
from bifrost_cli.errors import UsageError
from bifrost_cli.extraction.extract import extract_latents
from bifrost_cli.models.diffusion.flux import FluxModel
from bifrost_cli.models.mllm.chat_template import chat_text
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.toy_system import tiny_models
from bifrost_cli.toy_system.curricula import CURRICULA
from bifrost_cli.toy_system.tasks import FluxTask, MllmTask, OpenClipTask, VaeTask, measure_scale
from bifrost_cli.training.loop import FitResult, fit
from bifrost_cli.training.train_branch import train_branch
from bifrost_cli.training.train_controlnet import train_controlnet

CARD = "bifrost.json"
PARTS = {  # part -> the file by which it is complete, and the parts that it needs
    "vae": (f"flux/vae/{CARD}", ()),
    "mllm": (f"mllm/{CARD}", ()),
    "open_clip": (f"open_clip/{CARD}", ()),
    "flux": (f"flux/transformer/{CARD}", ("vae",)),
    "latents": ("work/latents/manifest.json", ("mllm", "vae")),
    "branch": ("branch/manifest.json", ("latents",)),
    "controlnet": ("controlnet/manifest.json", ("latents", "flux")),
}
POOL = 12_288  # drawings encoded once for FLUX's pretraining
Fit = Callable[[Any], FitResult]


def pretrain(
    recipe: Recipe, *, parts: Sequence[str] | None = None, output: Path | str | None = None,
    workspace: Path | str = "runs", device: str = "auto", ui: Ui | None = None,
) -> Path:  # fmt: skip
    """Train parts of the built-in system.

    Args:
        recipe: its `shapes` section sizes the bases; `latents`, `branch` and `controlnet` the rest.
        parts: of `PARTS`; None trains all, in order.
        output: the folder; None is `workspace`/system.
        device: where branch and ControlNet are trained; the bases, whose images are drawn on the fly, train on the CPU
            unless it is named.

    Raises:
        UsageError: an unknown part, or one whose predecessors are not there.
        Stopped: a signal stopped a training, which left a checkpoint.
    """
    folder, ui = Path(output or Path(workspace) / "system"), ui or Ui()
    if unknown := sorted(set(parts or ()) - set(PARTS)):
        raise UsageError(f"no such part: {', '.join(unknown)}", fix=f"parts are {', '.join(PARTS)}", code="BF-USE-001")
    bases = {"vae": _vae, "mllm": _mllm, "open_clip": _open_clip, "flux": _flux}
    provenance()  # reads the commit now: the checkout may move during hours of training
    for part in parts or PARTS:
        ui.say(f"pretrain: {part} in {folder}")
        work = folder / "work" / part
        finished = part in bases and (folder / PARTS[part][0]).exists()
        for needed in () if finished else PARTS[part][1]:
            if not (path := folder / PARTS[needed][0]).exists():
                fix = f"first: bifrost shapes pretrain --parts {needed} -o {quote(str(folder))}"
                raise UsageError(f"{folder} has no finished {needed}", at=str(path), fix=fix, code="BF-USE-001")
        if part not in bases:
            _made_with_bases(part, recipe, folder, device, ui)
        elif not finished:
            train: Train = getattr(recipe.shapes, part)
            torch.manual_seed(train.seed)
            on = "cpu" if device == "auto" else device
            bases[part](recipe, train, folder, partial(fit, train=train, folder=work, device=on, ui=ui))
        remove(work / "checkpoints")  # only now: the part is complete
    return folder


def _vae(recipe: Recipe, train: Train, folder: Path, fit: Fit) -> None:
    curriculum = CURRICULA[recipe.shapes.world]
    untrained: Any = tiny_models.vae(tiny_models.SIZES[recipe.shapes.world])
    untrained.to(memory_format=torch.channels_last)
    task = VaeTask(untrained, curriculum, train.seed, train.batch_size)
    result = fit(task)
    vae = task.module.to("cpu")
    vae.load_state_dict(result.ema_state)
    measure_scale(vae, curriculum, train.seed)
    _save(vae, folder / "flux" / "vae", train, result)


def _mllm(recipe: Recipe, train: Train, folder: Path, fit: Fit) -> None:
    target, instruction = folder / "mllm", recipe.generate.plan_instruction
    curriculum, sizes = CURRICULA[recipe.shapes.world], tiny_models.SIZES[recipe.shapes.world]
    tokenizer = tiny_models.qwen_tokenizer(curriculum.words([instruction, chat_text("")]))
    mllm, processor = tiny_models.mllm(tokenizer, sizes), tiny_models.image_processor(sizes)
    task = MllmTask(mllm, tokenizer, processor, curriculum, instruction, train.seed, train.batch_size)
    result = fit(task)
    task.module.load_state_dict(result.ema_state)
    tokenizer.save_pretrained(target)
    processor.save_pretrained(target)
    _save(task.module["mllm"], target, train, result)


def _open_clip(recipe: Recipe, train: Train, folder: Path, fit: Fit) -> None:
    import open_clip  # a second of import time that only this part needs

    target = folder / "open_clip"
    curriculum = CURRICULA[recipe.shapes.world]
    tokenizer = tiny_models.clip_tokenizer(curriculum.words())
    make_folder(target)
    config = tiny_models.open_clip_config(len(tokenizer), tiny_models.SIZES[recipe.shapes.world])
    write_json(target / "open_clip_config.json", config)
    tokenizer.save_pretrained(target)
    model = open_clip.create_model(f"local-dir:{target}", pretrained=None, load_weights=False)
    tokenize = open_clip.get_tokenizer(f"local-dir:{target}")
    result = fit(OpenClipTask(model, tokenize, config["preprocess_cfg"], curriculum, train.seed, train.batch_size))
    weights = {name: tensor.to("cpu").half().contiguous() for name, tensor in result.ema_state.items()}
    save_tensors(target / "open_clip_model.safetensors", weights, {})
    _complete(target, train, result, weights)


def _flux(recipe: Recipe, train: Train, folder: Path, fit: Fit) -> None:
    curriculum, target = CURRICULA[recipe.shapes.world], folder / "flux"
    vocabulary = curriculum.words()
    tokenizers = tiny_models.clip_tokenizer(vocabulary), tiny_models.t5_tokenizer(vocabulary)
    scheduler: Any = tiny_models.scheduler()  # save_pretrained comes from a mixin that the stubs do not know
    diffusion = FluxModel(
        transformer=tiny_models.flux_transformer(),
        vae=AutoencoderKL.from_pretrained(target / "vae", dtype=torch.float32).eval(),
        text_encoder=tiny_models.clip_text(tokenizers[0]),
        text_encoder_2=tiny_models.t5(tokenizers[1]),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        scheduler=scheduler,
    )
    pool = min(POOL, train.steps * train.batch_size)
    tokens = recipe.models.diffusion_text_tokens
    task = FluxTask(diffusion, curriculum, tokens, train.seed, train.batch_size, pool)
    result = fit(task)
    task.module.load_state_dict(result.ema_state)
    scheduler.save_pretrained(target / "scheduler")
    tokenizers[0].save_pretrained(target / "tokenizer")
    tokenizers[1].save_pretrained(target / "tokenizer_2")
    classes = {name: kind.split(":") for name, kind in sorted(FluxModel.parts.items())}
    write_json(target / "model_index.json", {"_class_name": "FluxPipeline", **classes})
    _sync(target)
    for name in ("text_encoder", "text_encoder_2", "transformer"):
        _save(task.module[name], target / name, train, result)


def _made_with_bases(part: str, recipe: Recipe, folder: Path, device: str, ui: Ui) -> None:
    """Latents of drawings, or what is trained on them."""
    models = recipe.models.model_copy(update={"mllm": str(folder / "mllm"), "diffusion": str(folder / "flux")})
    recipe, store = recipe.model_copy(update={"models": models}), folder / "work" / "latents"
    if part == "latents":
        extract_latents(recipe, output=store, device=device, ui=ui)
    else:
        train = train_branch if part == "branch" else train_controlnet
        train(recipe, latents=store, output=folder / part, device=device, ui=ui)


def _save(module: Any, target: Path, train: Train, result: FitResult) -> None:
    module.to("cpu").half().save_pretrained(target)
    _complete(target, train, result, module.state_dict())


def _complete(target: Path, train: Train, result: FitResult, weights: dict[str, torch.Tensor]) -> None:
    """The card, whose presence means that the part is complete."""
    _sync(target)
    card = {
        "made": provenance(seed=train.seed, device="cpu"),
        "cost": {"seconds": round(result.seconds, 1), "samples": result.samples_seen},
        "train": train.model_dump(mode="json"),
        "weights_sha256": weights_hash(weights),
    }
    write_json(target / CARD, card)


def _sync(folder: Path) -> None:
    """Sync what the libraries wrote, which they do not do: a card must not outlive its weights in a power cut."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        sync(path)
