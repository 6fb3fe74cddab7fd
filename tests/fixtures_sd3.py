"""An SD3 painter with random weights, for tests: SD3.5-medium's kinds of parts (dual attention, normed queries and
keys, three text encoders) at the smallest sizes, and the folder layout that its hub repository has.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from fixtures_flux import WORDS
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from bifrost_cli.models import tiny
from bifrost_cli.models.sd3 import Sd3Painter

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3",
         "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler")  # fmt: skip


def sd3_transformer(layers: int = 4) -> SD3Transformer2DModel:
    """Width 32; T5's 48 channels hold both CLIPs (16 + 24), the pooled vectors have 12 + 20."""
    return SD3Transformer2DModel(
        sample_size=32, in_channels=16, num_layers=layers, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, caption_projection_dim=32, pooled_projection_dim=32, pos_embed_max_size=24,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def tiny_sd3(seed: int = 0) -> Sd3Painter:
    """A frozen random painter: 64 px pictures, VAE factor 4, an 8x8 grid of image tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip, t5_tokenizer = tiny.clip_tokenizer(WORDS), tiny.t5_tokenizer(WORDS)
        vae = tiny.vae()
        vae.register_to_config(scaling_factor=1.5, shift_factor=0.06)
        t5 = T5Config(vocab_size=len(t5_tokenizer), d_model=48, d_kv=16, d_ff=64, num_layers=1, num_heads=2,
                      feed_forward_proj="gated-gelu", dropout_rate=0.0)  # fmt: skip
        modules = (sd3_transformer(), vae, _clip(clip, 16, 12), _clip(clip, 24, 20), T5EncoderModel(t5))
        for module in modules[:1]:  # a stock transformer starts with its last layers at their usual scale
            for parameter in module.parameters():
                parameter.data += 0.05 * torch.randn(parameter.shape)
    for module in modules:
        module.eval().requires_grad_(False)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    return Sd3Painter(*modules, clip, clip, t5_tokenizer, scheduler)


def tiny_sd3_controlnet(painter: Sd3Painter, channels: int = 12, layers: int = 2, seed: int = 1) -> SD3ControlNetModel:
    """Its zero layers and BatchNorm statistics made random, so that it changes the picture."""
    controlnet = painter.new_controlnet(layers, 0, channels).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in controlnet.state_dict().items():
        if name.startswith(("controlnet_", "pos_embed_input")) and tensor.is_floating_point():
            shift = 0.5 if "running_var" in name else 0.0
            tensor.copy_(torch.randn(tensor.shape, generator=generator).mul(0.2).add(shift).abs())
    return controlnet


def sd3_pipeline(painter: Sd3Painter) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(**{part: getattr(painter, part) for part in PARTS})


def save_sd3(painter: Sd3Painter, folder: Path) -> Path:
    """As the pipeline writes it: model_index.json, a folder a part, the transformer in shards with an index."""
    sd3_pipeline(painter).save_pretrained(folder, max_shard_size="500KB")
    return folder


def _clip(tokenizer: CLIPTokenizer, width: int, projection: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, projection_dim=projection,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)
