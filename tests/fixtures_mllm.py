"""A random Qwen2.5-VL of a few thousand weights with a tokenizer, made in memory: tests need no files and no hub."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from bifrost_cli.models import tiny
from bifrost_cli.models.branch import VisualBranch
from bifrost_cli.models.mllm import Mllm

WORDS = ("Generate", "an", "image", "of", "red", "green", "blue", "circle", "square", "above", "Describe", "What")
PATCHES = 16


def random_mllm(seed: int = 0, layers: int = 3, attention: str = "sdpa") -> Mllm:
    """Every weight is random, norms and biases too, so that any that is ignored shows."""
    tokenizer = tiny.qwen_tokenizer(WORDS)
    config = tiny.mllm(tokenizer).config
    config.text_config.num_hidden_layers, config.text_config.layer_types = layers, ["full_attention"] * layers
    config._attn_implementation = attention
    model = Qwen2_5_VLForConditionalGeneration(config)
    randomize(model, seed)
    return Mllm(model, tokenizer, tiny.image_processor())


def randomize(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.15, generator=generator)


def random_branch(mllm: Mllm, seed: int = 1, patches: int = PATCHES, **options) -> VisualBranch:
    branch = VisualBranch.from_mllm(mllm, patches, **options)
    randomize(branch, seed)
    return branch


def normal(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def tiny_mllm() -> Mllm:
    return random_mllm()
