"""Planned memory against measured peaks of the CPU's allocator: the built-in system, and a random one of 150 M numbers.

A plan is a sum of formulas; here every stage really runs, and what it took must be within 15 % of what was planned.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from fixtures_flux import save_mllm, save_painter, save_part
from fixtures_loading import load_diffusion, load_mllm
from memory_meter import peak_bytes, weight_bytes
from transformers import AutoModelForImageTextToText, T5Config, T5EncoderModel

from bifrost_cli.config.load import load_recipe
from bifrost_cli.generation.stages import BifrostDecoder, BifrostPrior
from bifrost_cli.loading.offload import OffloadPolicy
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.diffusion.controlnet import controlnet_config, latent_controlnet
from bifrost_cli.models.diffusion.flux import FluxModel
from bifrost_cli.models.encoders import MllmEncoder, VaeEncoder
from bifrost_cli.models.mllm.frozen_mllm import Mllm
from bifrost_cli.planning.meta_models import build
from bifrost_cli.planning.stages import estimates
from bifrost_cli.toy_system import tiny_models
from bifrost_cli.training.loop import fit
from bifrost_cli.training.train_branch import BranchTask, tuned
from bifrost_cli.training.train_controlnet import ControlNetTask

NEAR = 0.15
WORDS = ("a", "red", "circle", "above", "blue", "square")
LONG = "a red circle above a blue square " * 60  # every text is cut to what the recipe reads, as the plan assumes
QUIET = ["validate_every=0", "sample_every=0", "validation_rows=4", "steps=2", "checkpoint_every=100"]
QUIET = [f"{section}.train.{entry}" for section in ("branch", "controlnet") for entry in QUIET]


class Rows:
    """A store in memory: rows of zeros with one long caption."""

    def __init__(self, count: int, grid: int, channels: int, vae: tuple[int, int, int] | None = None) -> None:
        self.keys, self.captions, self.plans = [f"{i:08d}" for i in range(count)], [LONG] * count, [None] * count
        self.grid, self._latents, self._vae = (grid, grid), (grid * grid, channels), vae
        self.std_C = np.ones(channels, np.float32)

    def latents(self, rows: list[int]) -> np.ndarray:
        return np.zeros((len(rows), *self._latents), np.float16)

    def vae(self, rows: list[int]) -> np.ndarray:
        return np.zeros((len(rows), *self._vae), np.float16)


def middle_system(folder: Path) -> list[str]:
    """Random bases: a decoder of 8 layers 512 wide, FLUX of 4 + 4 blocks 512 wide; the settings that name them."""
    qwen, clip, t5 = (
        tiny_models.qwen_tokenizer(WORDS),
        tiny_models.clip_tokenizer(WORDS),
        tiny_models.t5_tokenizer(WORDS),
    )
    config = tiny_models.mllm(qwen).config
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 512, 1536, 8
    text.layer_types = ["full_attention"] * 8
    text.num_attention_heads, text.rope_parameters["mrope_section"] = 8, [8, 12, 12]
    vision.hidden_size, vision.intermediate_size, vision.num_heads, vision.depth = 256, 768, 4, 4
    vision.out_hidden_size, vision.fullatt_block_indexes = 512, [3]
    model = AutoModelForImageTextToText.from_config(config)
    save_mllm(Mllm(model, qwen, tiny_models.image_processor()), folder / "mllm")
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=4, num_single_layers=4, attention_head_dim=64, num_attention_heads=8,
        joint_attention_dim=512, pooled_projection_dim=64, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, norm_num_groups=8,
        block_out_channels=[32, 64, 128], layers_per_block=2, latent_channels=16, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0,
    )  # fmt: skip
    sequence = T5EncoderModel(T5Config(vocab_size=len(t5), d_model=512, d_kv=64, d_ff=1024, num_layers=2, num_heads=8))
    diffusion = FluxModel(transformer, vae, tiny_models.clip_text(clip), sequence, clip, t5, tiny_models.scheduler())
    save_painter(diffusion, folder / "flux")
    return [f"models.mllm={folder / 'mllm'}", f"models.diffusion={folder / 'flux'}", "images.input_size=128",
            "images.output_size=128", "latents.batch_size=8", "branch.normalize=false", "branch.max_text_tokens=80",
            "branch.train.batch_size=4", "controlnet.double_blocks=2", "controlnet.train.batch_size=2",
            "models.diffusion_text_tokens=64", "generate.plan=false", "generate.steps=2"]  # fmt: skip


class Measured:
    """Every stage of a recipe, run for two steps or one image, with what it took."""

    def __init__(self, sets: list[str]) -> None:
        self.recipe = load_recipe("tiny", [*sets, *QUIET])
        self.system = build(self.recipe)
        kind = {"device": torch.device("cpu"), "dtype": getattr(torch, self.recipe.models.dtype)}
        self.mllm = load_mllm(self.recipe.models.mllm, **kind)
        self.diffusion = load_diffusion(self.recipe.models.diffusion, **kind)
        self.frozen = [
            getattr(self.diffusion, part) for part in ("transformer", "vae", "text_encoder", "text_encoder_2")
        ]

    def planned(self, stage: str) -> int:
        return estimates(self.system)[stage].peak

    def extraction(self) -> int:
        images, batch = self.recipe.images, self.recipe.latents.batch_size
        sides = (images.input_size, images.output_size)
        squares = [np.zeros((batch, side, side, 3), np.uint8) for side in sides]
        encoders = MllmEncoder(self.mllm, images.input_size), VaeEncoder(self.diffusion.vae, images.output_size)
        work = [peak_bytes(lambda e=e, s=s: e.encode(s)) for e, s in zip(encoders, squares, strict=True)]
        return max(work) + weight_bytes(self.mllm.model, self.diffusion.vae)

    def branch(self, folder: Path) -> int:
        settings = self.recipe.branch
        kind = {"normalize": settings.normalize, "tune": tuned(self.recipe)}
        branch = VisualBranch.from_mllm(self.mllm, self.system.grid**2, **kind)
        if settings.train.gradient_checkpointing:
            branch.enable_gradient_checkpointing()
        rows = Rows(3 * settings.train.batch_size * settings.train.accumulate + 8, self.system.grid, self.mllm.width)
        task = BranchTask(branch, self.mllm, rows, settings)
        return peak_bytes(lambda: fit(task, settings.train, folder), [self.mllm.model, branch])

    def controlnet(self, folder: Path) -> int:
        settings, grid = self.recipe.controlnet, self.system.grid
        blocks = (settings.double_blocks, settings.single_blocks)
        controlnet = latent_controlnet(self.diffusion.transformer, *blocks, self.mllm.width).float()
        for module in (controlnet, self.diffusion.transformer) if settings.train.gradient_checkpointing else ():
            module.enable_gradient_checkpointing()
        count = 3 * settings.train.batch_size * settings.train.accumulate + 8
        task = ControlNetTask(controlnet, self.diffusion, Rows(count, grid, self.mllm.width, (16, 4 * grid, 4 * grid)),
                              settings, self.recipe.models.diffusion_text_tokens)  # fmt: skip
        return peak_bytes(lambda: fit(task, settings.train, folder), [*self.frozen, controlnet])

    def generation(self, folder: Path) -> int:
        settings, dtype = self.recipe.controlnet, getattr(torch, self.recipe.models.dtype)
        branch = VisualBranch.from_mllm(self.mllm, self.system.grid**2, tune=tuned(self.recipe)).to(dtype)
        blocks = (settings.double_blocks, settings.single_blocks)
        controlnet = torch.nn.Module.to(latent_controlnet(self.diffusion.transformer, *blocks, self.mllm.width), dtype)
        made = [
            save_part(folder / kind, kind, torch.nn.Identity(), config, {base: model.weights_hash()})
            for kind, config, base, model in (("branch", {}, "mllm", self.mllm),
                                              ("controlnet", controlnet_config(controlnet), "painter", self.diffusion))
        ]  # fmt: skip
        loader = SimpleNamespace(
            policy=OffloadPolicy(torch.device("cpu")), mllm=lambda: self.mllm, branch=lambda *rest: branch,
            diffusion=lambda: self.diffusion, controlnet=lambda *rest: controlnet.eval(),
        )  # fmt: skip
        first = BifrostPrior(self.recipe, made[0], loader)
        second = BifrostDecoder(self.recipe, made[1], loader)
        held = [self.mllm.model, branch, controlnet, *self.frozen]
        return peak_bytes(lambda: second.render("a red circle", first.predict("a red circle", 0).latents_PC, 0), held)


def near(planned: int, measured: int) -> bool:
    print(f"planned {planned / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB, {planned / measured - 1:+.1%}")
    return abs(planned / measured - 1) <= NEAR


@pytest.fixture(scope="module")
def small() -> Measured:
    return Measured([])


def test_the_built_in_system_extracts_in_what_was_planned(small):
    assert near(small.planned("extract-latents"), small.extraction())


def test_the_built_in_branch_trains_in_what_was_planned(small, tmp_path):
    assert near(small.planned("train branch"), small.branch(tmp_path))


def test_the_built_in_controlnet_trains_in_what_was_planned(small, tmp_path):
    assert near(small.planned("train controlnet"), small.controlnet(tmp_path))


def test_the_built_in_system_paints_in_what_was_planned(small, tmp_path):
    assert near(small.planned("generate"), small.generation(tmp_path))


HALF = ["models.dtype=bfloat16", "branch.train.precision=bf16", "controlnet.train.precision=bf16"]
WAYS = {
    "float32": ["models.dtype=float32"],
    "not averaged": ["models.dtype=float32", "branch.train.ema=0.0", "controlnet.train.ema=0.0"],
    "last layers": ["models.dtype=float32", "branch.tune=layers", "branch.layers=2"],
    "last layers in bfloat16": [*HALF, "branch.tune=layers", "branch.layers=2"],
    "low rank": ["models.dtype=float32", "branch.tune=lora", "branch.lora_rank=16", "branch.train.batch_size=8"],
    "low rank in bfloat16": [*HALF, "branch.tune=lora", "branch.lora_rank=16", "branch.train.batch_size=8"],
    "checkpointed": ["models.dtype=float32", "branch.train.gradient_checkpointing=true",
                     "controlnet.train.gradient_checkpointing=true"],
    "bfloat16": HALF,
    "bfloat16, accumulated": [*HALF, "branch.train.accumulate=2", "controlnet.train.accumulate=2"],
    "bfloat16, checkpointed": [*HALF, "branch.train.gradient_checkpointing=true",
                               "controlnet.train.gradient_checkpointing=true"],
    "larger batches": ["models.dtype=float32", "branch.train.batch_size=16", "controlnet.train.batch_size=8"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_system_of_middle_size_needs_what_was_planned(way, tmp_path):
    system = Measured([*middle_system(tmp_path), *WAYS[way]])
    measured = {
        "extract-latents": system.extraction(),
        "train branch": system.branch(tmp_path / "branch"),
        "generate": system.generation(tmp_path / "parts"),
        "train controlnet": system.controlnet(tmp_path / "controlnet"),
    }
    found = {stage: near(system.planned(stage), bytes_) for stage, bytes_ in measured.items()}
    assert all(found.values()), found
