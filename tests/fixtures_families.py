"""Random multimodal LLMs of every family, a few thousand weights each, in the folder layout of the hub, in shards."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from fixtures_mllm import WORDS, randomize
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPImageProcessor,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from bifrost_cli.models import tiny

SIDE, WIDTH = 32, 48
TEXT = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 1024}  # fmt: skip
TOWER = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
         "image_size": SIDE, "patch_size": 8}  # fmt: skip
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def qwen_tokenizer(image: str = "<|vision_start|><|image_pad|><|vision_end|>") -> PreTrainedTokenizerBase:
    tokenizer = tiny.qwen_tokenizer(WORDS)
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    tokenizer.chat_template = CHATML.replace("IMAGE", image)
    return tokenizer


def llama_tokenizer() -> LlamaTokenizer:
    """The Llama form: a first token before every text, spaces as part of words, unknown letters as bytes."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(
        ["USER: ASSISTANT: " + " ".join(WORDS)] * 4,
        BpeTrainer(vocab_size=400, special_tokens=special, min_frequency=2, show_progress=False),
    )
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<image>", special=True)]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.chat_template = VICUNA
    return tokenizer


def qwen2_5_vl() -> tuple[PreTrainedModel, PreTrainedTokenizerBase, object]:
    tokenizer = qwen_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, **_ids(tokenizer), "rope_parameters": _rope([2, 2, 2])}, tie_word_embeddings=True,
        vision_config={"depth": 2, "hidden_size": 24, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
                       "window_size": 16, "out_hidden_size": WIDTH, "fullatt_block_indexes": [1]}, **_qwen(tokenizer),
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config), tokenizer, _qwen_images()


def qwen3_vl() -> tuple[PreTrainedModel, PreTrainedTokenizerBase, object]:
    tokenizer = qwen_tokenizer()
    rope = {**_rope([4, 2, 2]), "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={**TEXT, **_ids(tokenizer), "head_dim": 16, "rope_parameters": rope}, tie_word_embeddings=True,
        vision_config={"depth": 3, "hidden_size": 24, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
                       "out_hidden_size": WIDTH, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        **_qwen(tokenizer),
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(config), tokenizer, _qwen_images()


def llava(**changes: object) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, object]:
    """CLIP and Llama, as LLaVA 1.5."""
    tokenizer = llama_tokenizer()
    config = LlavaConfig(
        text_config={"model_type": "llama", **TEXT, **_ids(tokenizer)},
        vision_config={"model_type": "clip_vision_model", **TOWER},
        **{**_image(tokenizer), "image_seq_length": 16, **changes},
    )
    size = {"crop_size": {"height": SIDE, "width": SIDE}, "size": {"shortest_edge": SIDE}}
    return LlavaForConditionalGeneration(config), tokenizer, CLIPImageProcessor(**size)


def llava_next() -> tuple[PreTrainedModel, PreTrainedTokenizerBase, object]:
    """CLIP and Mistral with tiles, as LLaVA 1.6."""
    tokenizer, tiles = llama_tokenizer(), [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    config = LlavaNextConfig(
        text_config={"model_type": "mistral", **TEXT, **_ids(tokenizer), "sliding_window": None},
        vision_config={"model_type": "clip_vision_model", **TOWER}, image_grid_pinpoints=tiles, **_image(tokenizer),
    )  # fmt: skip
    size = {"crop_size": {"height": SIDE, "width": SIDE}, "size": {"shortest_edge": SIDE}}
    return (
        LlavaNextForConditionalGeneration(config),
        tokenizer,
        LlavaNextImageProcessor(image_grid_pinpoints=tiles, **size),
    )


def llava_onevision() -> tuple[PreTrainedModel, PreTrainedTokenizerBase, object]:
    """SigLIP and Qwen2 with tiles."""
    tokenizer, tiles = qwen_tokenizer("<image>"), [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT, **_ids(tokenizer)},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER},
        image_grid_pinpoints=tiles, video_token_index=tokenizer.convert_tokens_to_ids("<video>"), **_image(tokenizer),
    )  # fmt: skip
    return (
        LlavaOnevisionForConditionalGeneration(config),
        tokenizer,
        LlavaOnevisionImageProcessor(image_grid_pinpoints=tiles, size={"height": SIDE, "width": SIDE}),
    )


BUILDERS = {build.__name__: build for build in (qwen2_5_vl, qwen3_vl, llava, llava_next, llava_onevision)}


def save_family(folder: Path, name: str) -> Path:
    """A folder as the hub has it: weights in shards with their index, tokenizer, image processor, chat template."""
    torch.manual_seed(0)
    model, tokenizer, images = BUILDERS[name]()
    randomize(model, 0)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    return folder


def _rope(sections: list[int]) -> dict:
    return {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}


def _ids(tokenizer: PreTrainedTokenizerBase) -> dict:
    return {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip


def _qwen(tokenizer: PreTrainedTokenizerBase) -> dict:
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad", "vision_start_token_id": "vision_start",
             "vision_end_token_id": "vision_end"}  # fmt: skip
    return {key: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}


def _image(tokenizer: PreTrainedTokenizerBase) -> dict:
    return {"image_token_index": tokenizer.convert_tokens_to_ids("<image>")}


def _qwen_images() -> Qwen2VLImageProcessor:
    return Qwen2VLImageProcessor(patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=SIDE**2,
                                 max_pixels=SIDE**2)  # fmt: skip
