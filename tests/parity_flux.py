"""Reference vectors of the latent ControlNet and of the FLUX denoising loop, run through the public functions.

In: a folder with config.json, model, inputs and outputs (safetensors). Out: (name, largest error, tolerance) rows.
Takes every size, head count and block count from config.json; knows no particular vector.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlNetModel, FluxTransformer2DModel
from safetensors.torch import load_file

from bifrost_cli.interop.published_names import from_published
from bifrost_cli.models.diffusion.base import ControlInput
from bifrost_cli.models.diffusion.controlnet import controlnet_from_config
from bifrost_cli.models.diffusion.flux import FluxModel, FluxPrompt, pack, unpack

Row = tuple[str, float, float]
CONTROLNET_TOLERANCE = 1e-4
DENOISE_TOLERANCE = 1e-3


def check_controlnet(folder: str | Path) -> list[Row]:
    """Residuals at scale 1 and 0.7, the upsampler in both modes, and the time embedding."""
    config, weights, inputs, expected = _vectors(folder)
    model = _controlnet(config, weights)
    control = inputs.pop("control")
    ours = {"upsampled_control": model.controlnet_x_embedder.upsample(control), "temb": _temb(model, inputs)}
    for prefix, scale in (("", 1.0), ("scaled07.", 0.7)):
        residuals = model(**inputs, controlnet_cond=control, conditioning_scale=scale)
        for kind, samples in residuals.items():
            ours |= {f"{prefix}{kind}.{index}": sample for index, sample in enumerate(samples or ())}
    model.controlnet_x_embedder.train()
    ours["train_mode.upsampled_control"] = model.controlnet_x_embedder.upsample(control)
    return _compare(ours, expected, CONTROLNET_TOLERANCE)


def check_flux_denoise(folder: str | Path) -> list[Row]:
    """The whole loop with and without control, the schedule, and each step's input and prediction."""
    config, weights, inputs, expected = _vectors(folder)
    diffusion, controlnet = _diffusion(config, weights), _controlnet(config, _part(weights, "controlnet."))
    noise = unpack(inputs["latents"], _vae_grid(inputs["latents"].shape[1], config["height"], config["width"]))
    text = FluxPrompt(inputs["prompt_embeds"], inputs["pooled_prompt_embeds"])
    ours: dict[str, torch.Tensor] = {}
    for name, scale in (("latents_no_control", 0.0), ("latents", config["controlnet_conditioning_scale"])):
        steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        watch = diffusion.transformer.register_forward_hook(_recorder(steps), with_kwargs=True)
        options = {"steps": config["num_inference_steps"], "guidance": config["guidance_scale"]}
        control = ControlInput(controlnet, inputs["control"], scale)
        ours[name] = pack(diffusion.denoise(noise, text, control=control, **options))
        watch.remove()
    for index, (latents, _, velocity) in enumerate(steps):
        ours |= {f"latents_in.{index}": latents, f"noise_pred.{index}": velocity}
    sigmas = torch.stack([sigma[0] for _, sigma, _ in steps])
    ours |= {"sigmas": torch.cat([sigmas, sigmas.new_zeros(1)]), "timesteps": 1000 * sigmas}
    ours["mu"] = torch.tensor([diffusion.shift_mu(inputs["latents"].shape[1])])
    return _compare(ours, expected, DENOISE_TOLERANCE)


def _vae_grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    rows = round(math.sqrt(tokens * height / width))
    return 2 * rows, 2 * tokens // rows


def _recorder(steps: list) -> Any:
    def record(module: torch.nn.Module, args: tuple, inputs: dict, output: tuple) -> None:
        steps.append((inputs["hidden_states"], inputs["timestep"], output[0]))

    return record


def _vectors(folder: str | Path) -> tuple[dict, dict, dict, dict]:
    config = json.loads((Path(folder) / "config.json").read_text())
    return config, *(load_file(Path(folder) / f"{name}.safetensors") for name in ("model", "inputs", "outputs"))


def _part(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _controlnet(config: dict, weights: dict[str, torch.Tensor]) -> FluxControlNetModel:
    stock = dict(config["controlnet"])
    stock["control_channels"] = stock.pop("control_width")
    model = controlnet_from_config(stock)
    model.load_state_dict(from_published(weights))
    return model.requires_grad_(False)


def _diffusion(config: dict, weights: dict[str, torch.Tensor]) -> FluxModel:
    transformer = FluxTransformer2DModel(**config["transformer"]).eval()
    transformer.load_state_dict(_part(weights, "transformer."))
    scheduler = FlowMatchEulerDiscreteScheduler(**config["scheduler"])
    return FluxModel(transformer, None, None, None, None, None, scheduler)


def _temb(model: FluxControlNetModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    times = [1000 * inputs[name] for name in ("timestep", "guidance") if inputs.get(name) is not None]
    return model.time_text_embed(*times, inputs["pooled_projections"])


def _compare(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> list[Row]:
    missing = sorted(set(expected) - set(ours))
    rows = [(name, float("inf"), tolerance) for name in missing]
    for name in sorted(set(expected) & set(ours)):
        same = ours[name].shape == expected[name].shape
        error = float((ours[name].double() - expected[name].double()).abs().max()) if same else float("inf")
        rows.append((name, error, tolerance))
    return rows
