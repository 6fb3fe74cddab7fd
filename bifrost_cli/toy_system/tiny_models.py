"""The built-in tiny systems, freshly initialized: stock classes of transformers and diffusers at sizes a laptop trains.

In the first world a 64 px image is 8x8 patches of 8 px; the 2x2 merge leaves 4x4 latents, one for each 16 px cell.
FLUX generates an 8x8 packed grid (VAE factor 4, packed by 2), twice as fine as the latents, as at paper scale. In the
second a 128 px image is 16x16 patches, merged to 8x8 latents, and FLUX's grid (VAE factor 8) is as fine as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

VISION_PATCH = 8
TEXT_TOKENS = 32


@dataclass(frozen=True)
class Sizes:
    """What differs between the systems of the worlds."""

    image: int  # px, side
    width: int  # of the MLLM's decoder, and so of the patch latents
    layers: int
    heads: int
    key_value_heads: int
    window: int  # px, of the visual encoder's windows (all its layers see the whole image)
    vae_channels: tuple[int, ...]  # by level; each after the first halves the image


SIZES = {
    "shapes": Sizes(64, 128, 4, 4, 2, 32, (16, 32, 64)),
    "shapes-2": Sizes(128, 160, 5, 5, 5, 64, (8, 24, 48, 96)),
}
FIRST = SIZES["shapes"]

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _bpe(words: Iterable[str], end: str = "") -> tuple[dict[str, int], Any]:
    """Byte-level merges that make every given word one token, `end` behind its last letter; other text falls apart into
    bytes."""
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    mapped = ["".join(piece for piece, _ in byte.pre_tokenize_str(word)) for word in words]
    lasts = sorted({word[-1] for word in mapped}) if end else []
    # A last letter is a character of its own while the merges are made: the trainer would give the ids of its own ends
    # in the order of a hash, which is another in each process.
    alone = {letter: chr(0xE000 + number) for number, letter in enumerate(lasts)}
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.Split("\x00", "removed")
    trainer = BpeTrainer(
        vocab_size=100_000, min_frequency=1, show_progress=False,
        initial_alphabet=[*sorted(pre_tokenizers.ByteLevel.alphabet()), *alone.values()],
    )  # fmt: skip
    backend.train_from_iterator([word[:-1] + alone.get(word[-1], word[-1]) for word in mapped], trainer)
    model, names = json.loads(backend.to_str())["model"], {char: letter + end for letter, char in alone.items()}

    def name(token: str) -> str:
        return token[:-1] + names.get(token[-1], token[-1])

    vocab = {name(token): number for token, number in model["vocab"].items()}
    return vocab, [tuple(map(name, pair)) for pair in model["merges"]]


def qwen_tokenizer(words: Iterable[str]) -> transformers.Qwen2Tokenizer:
    """Qwen2-format tokenizer in which each word, alone and after a space, is one token."""
    words = sorted(set(words) | {"system", "user", "assistant", "You", "are", "a", "helpful"})
    vocab, merges = _bpe([*words, *(" " + word for word in words)])
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges)
    special = ("im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in special]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "left"
    return tokenizer


def image_processor(sizes: Sizes = FIRST) -> transformers.Qwen2VLImageProcessor:
    """Stock Qwen2-VL preprocessing for images of the world's size."""
    pixels = sizes.image**2
    return transformers.Qwen2VLImageProcessor(
        patch_size=VISION_PATCH, temporal_patch_size=2, merge_size=2, min_pixels=pixels, max_pixels=pixels
    )


def mllm(
    tokenizer: transformers.Qwen2Tokenizer, sizes: Sizes = FIRST
) -> transformers.Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of 1.5 to 2.4 M parameters: a 3-layer visual encoder and a decoder of 4 or 5 layers."""
    ids: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
           for name in ("vision_start", "vision_end", "image_pad", "video_pad", "im_end", "endoftext")}  # fmt: skip
    text = dict(
        vocab_size=len(tokenizer), hidden_size=sizes.width, intermediate_size=3 * sizes.width,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.key_value_heads,
        max_position_embeddings=2048, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        bos_token_id=ids["endoftext"], eos_token_id=ids["im_end"], pad_token_id=ids["endoftext"],
    )  # fmt: skip
    vision = dict(
        depth=3, hidden_size=96, intermediate_size=288, num_heads=3, patch_size=VISION_PATCH,
        window_size=sizes.window, out_hidden_size=sizes.width, fullatt_block_indexes=[0, 1, 2],
    )  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )  # fmt: skip
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [ids["im_end"], ids["endoftext"]]
    model.generation_config.pad_token_id = ids["endoftext"]
    return model


def vae(sizes: Sizes = FIRST) -> AutoencoderKL:
    """An autoencoder of factor 4 or 8 with FLUX's 16 latent channels."""
    levels = len(sizes.vae_channels)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=list(sizes.vae_channels), layers_per_block=1, norm_num_groups=8, latent_channels=16,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False, sample_size=sizes.image,
        scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip


def flux_transformer() -> FluxTransformer2DModel:
    """FLUX at width 128: 2 double and 4 single blocks, no guidance embedding (as FLUX.1-schnell)."""
    return FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=False, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's scheduler settings; the shift follows from the number of image tokens."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True,
        base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
    )  # fmt: skip


def clip_tokenizer(words: Iterable[str]) -> transformers.CLIPTokenizer:
    """CLIP-format tokenizer; the end token has the highest id, which CLIP's pooling relies on."""
    vocab, merges = _bpe(sorted({word.lower() for word in words}), end="</w>")
    ends = [f"{byte}</w>" for byte in sorted(pre_tokenizers.ByteLevel.alphabet()) if f"{byte}</w>" not in vocab]
    for token in (*ends, "<|startoftext|>", "<|endoftext|>"):
        vocab[token] = len(vocab)
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_TOKENS)


def clip_text(tokenizer: transformers.CLIPTokenizer) -> transformers.CLIPTextModel:
    """FLUX's first text encoder, of which only the pooled vector is used."""
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=TEXT_TOKENS, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip


def t5_tokenizer(words: Iterable[str]) -> transformers.T5Tokenizer:
    """T5-format (Unigram) tokenizer over the words and the printable characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [("▁" + word, -2.0) for word in sorted(set(words))]
    known = {piece for piece, _ in pieces}
    pieces += [(chr(code), -10.0) for code in range(33, 127) if chr(code) not in known]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS)


def t5(tokenizer: transformers.T5Tokenizer) -> transformers.T5EncoderModel:
    """FLUX's second text encoder, which gives the token sequence."""
    return transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=192, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
    ))  # fmt: skip


def open_clip_config(vocabulary: int, sizes: Sizes = FIRST) -> dict[str, Any]:
    """An open_clip model card: a 3-layer image tower on patches of 16 px, and a 2-layer text tower."""
    return {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {"image_size": sizes.image, "layers": 3, "width": 96, "head_width": 32, "patch_size": 16},
            "text_cfg": {"context_length": TEXT_TOKENS, "vocab_size": vocabulary, "width": 64, "heads": 2, "layers": 2,
                         "hf_tokenizer_name": "."},
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic"},
    }  # fmt: skip
