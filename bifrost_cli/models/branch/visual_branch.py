"""The visual generation branch: a trainable copy of the MLLM's decoder behind the frozen model's keys and values.

From known latents, a mask and a `PromptCache` it predicts latents (Bifrost-1, arXiv 2508.05954, section 3). Legend: B
batch, P patches, n selected patches, C latent channels, D width, T text tokens, N counted patches of all images, h
key-value heads, d head width.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicLayer, PreTrainedConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from bifrost_cli.models.branch.decoder_adapters import decoder_config, new_decoder, tune_decoder, with_cache
from bifrost_cli.models.branch.heads import HEADS
from bifrost_cli.models.mllm.chat_template import additive, image_mask
from bifrost_cli.models.mllm.frozen_mllm import Mllm, PromptCache
from bifrost_cli.models.row_noise import NoiseSource
from bifrost_cli.models.transfer import to_device

LOSS_ON = ("all", "masked")
# Devices with attention kernels that know no mask. The CPU's is as quick with one, which keeps older trainings' bits.
MASKLESS = ("cuda",)


class VisualBranch(nn.Module):
    """A stock decoder without its embedding table, a mask token, patch positions and a vision head.

    Every patch has rotary position 0; their order comes from the learned positions alone, as published.

    Args:
        text_config: the MLLM's decoder.
        patches: P.
        channels: C.
        head: `linear` (as published), or one that samples each token: `flow` or `codebook`.
        codes: K of a codebook head.
        code_levels: how many codes it sums to a latent.
        normalize: the decoder reads and predicts latents normalised by the stored channel statistics.
        tune: what of the decoder is trained: None (all of it), {"layers": n} or {"rank": r}; the rest is the MLLM's.
    """

    latents_mean_C: Tensor
    latents_std_C: Tensor

    def __init__(
        self, text_config: PreTrainedConfig, patches: int, channels: int, *, head: str = "linear",
        codes: int | None = None, code_levels: int = 1, normalize: bool = False, tune: dict[str, int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"heads are {tuple(HEADS)}, not {head!r}")
        self.patches, self.channels, self.head_kind = patches, channels, head
        self.codes, self.code_levels, self.normalize, self.tune = codes, code_levels, normalize, tune
        width = text_config.hidden_size
        decoder: Any = new_decoder(text_config)
        for layer in decoder.layers:
            layer.self_attn.is_causal = False  # patches see each other: no mask must not mean a causal one
        self.decoder: Any = decoder
        if tune:
            tune_decoder(self.decoder, tune)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, patches, width))
        self.input_projection = nn.Identity() if channels == width else nn.Linear(channels, width)
        self.vision_head: Any = HEADS[head](width, channels, *([codes, code_levels] if codes else []))
        if normalize:
            self.register_buffer("latents_mean_C", torch.zeros(channels))
            self.register_buffer("latents_std_C", torch.ones(channels))

    @classmethod
    def from_mllm(
        cls, mllm: Mllm, patches: int, channels: int | None = None, *, generator: torch.Generator | None = None,
        **form: Any,
    ) -> VisualBranch:  # fmt: skip
        """A new branch: layers and final norm copied; mask token and positions zero; head small and random.

        What is trained is float32 whatever the MLLM's dtype; what is not (see `tune`) is the MLLM's tensors themselves.

        Args:
            mllm: the frozen model.
            patches: P.
            channels: C; None is the MLLM's own width.
            generator: of what is random; None is seed 0.
            form: `head`, `codes`, `code_levels`, `normalize` and `tune`, as for the class.
        """
        with init_empty_weights():
            branch = cls(mllm.text_config, patches, channels or mllm.width, **form)
        weights = {name: torch.zeros(parameter.shape) for name, parameter in branch.named_parameters()
                   if not name.startswith("decoder.") or ".lora_" in name}  # fmt: skip
        frozen = branch.from_base(mllm)
        stock = mllm.decoder.state_dict()
        copied = branch.decoder.state_dict().keys() - {name.removeprefix("decoder.") for name in {*frozen, *weights}}
        weights |= frozen | {f"decoder.{name}": stock[name].to(torch.float32, copy=True) for name in copied}
        weights |= {name: buffer for name, buffer in branch.named_buffers() if name in branch.state_dict()}
        branch.load_state_dict(weights, assign=True)
        generator = generator or torch.Generator().manual_seed(0)
        for module in (branch.input_projection, *branch.vision_head.modules()):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
                nn.init.zeros_(module.bias)
        for name, parameter in branch.decoder.named_parameters():
            if ".lora_A." in name:  # as nn.Linear draws its weights; B is zero, so that LoRA changes nothing yet
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
        return branch.to(mllm.device)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VisualBranch:
        """An untrained branch of the form that `config` (see the property) describes."""
        sizes = {name: value for name, value in config.items() if name != "text_config"}
        return cls(decoder_config(config["text_config"]), **sizes)

    @property
    def config(self) -> dict[str, Any]:
        """Everything needed to build a branch of the same form, as plain JSON values."""
        text_config = self.decoder.config.to_diff_dict()
        text_config.pop("transformers_version")
        return {
            "text_config": text_config,
            "patches": self.patches,
            "channels": self.channels,
            "head": self.head_kind,
            **({"codes": self.codes} if self.codes else {}),
            **({"code_levels": self.code_levels} if self.code_levels > 1 else {}),
            "normalize": self.normalize,
            **({"tune": self.tune} if self.tune else {}),
        }

    def from_base(self, mllm: Mllm) -> dict[str, Tensor]:
        """The MLLM's parameters, under our names, that are frozen here and so in no checkpoint and no artifact."""
        stock = dict(mllm.decoder.named_parameters())
        frozen = [name for name, parameter in self.decoder.named_parameters() if not parameter.requires_grad]
        return {f"decoder.{name}": stock[name.replace(".base_layer.", ".")] for name in frozen}  # peft's word

    def set_statistics(self, mean_C: Tensor, std_C: Tensor) -> None:
        """Set mean and standard deviation of each channel of the training latents; a deviation of 0 counts as 1."""
        if not self.normalize:
            raise ValueError("this branch does not normalise: statistics would be ignored")
        self.latents_mean_C.copy_(mean_C)
        self.latents_std_C.copy_(torch.where(std_C > 0, std_C, torch.ones_like(std_C)))

    def enable_gradient_checkpointing(self) -> None:
        """Keep only each layer's input for the gradient, and compute the layer again in the backward pass."""
        # The stock switch of transformers silently drops the prompt's keys and values. A checkpoint around each layer
        # keeps them, and because our cache is only read, the second pass sees the same.
        for layer in self.decoder.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    # ---- one pass ---------------------------------------------------------------------------------------------------

    def forward(self, known_BPC: Tensor, masked_BP: Tensor, prompt_cache: PromptCache) -> Tensor:
        """Predicted latents_BPC at every patch (of a sampling head: their mean); see `hidden`."""
        return self.from_decoder(self.vision_head.mean(self.hidden(known_BPC, masked_BP, prompt_cache)))

    def hidden(
        self, known_BPC: Tensor, masked_BP: Tensor, prompt_cache: PromptCache, subset_Bn: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the final norm, hidden_BPD, or hidden_BnD of the subset.

        Args:
            known_BPC: latents, read where `masked_BP` is False.
            masked_BP: True where the mask token stands, on any device.
            prompt_cache: the prompts; it is read and never extended, so one serves every step.
            subset_Bn: indices of the patches that are needed, which is cheaper; None is all of them.
        """
        masked_BP = to_device(masked_BP, known_BPC.device)
        known_BPD = self.input_projection(self.to_decoder(known_BPC))
        inputs_BPD = torch.where(masked_BP[..., None], self.mask_token, known_BPD) + self.position_embedding
        position_ids_BP = torch.zeros(inputs_BPD.shape[:2], dtype=torch.long, device=inputs_BPD.device)
        rotary = self.decoder.rotary_emb(inputs_BPD, position_ids_BP)
        mask = None  # where nothing is padded every patch sees everything
        if prompt_cache.padded or inputs_BPD.device.type not in MASKLESS:
            mask = additive(image_mask(prompt_cache.attention_BT, masked_BP.shape[1]), inputs_BPD.dtype)
        pairs = zip(prompt_cache.keys, prompt_cache.values, strict=True)
        cache, layers = Cache(layers=[_FrozenLayer(*pair) for pair in pairs]), self.decoder.layers
        # Not the stock decoder's own loop: it would read a mask that is None as a causal one.
        hidden_BPD = inputs_BPD
        for layer in layers if subset_Bn is None else layers[:-1]:
            hidden_BPD = layer(hidden_BPD, attention_mask=mask, position_embeddings=rotary, **with_cache(layer, cache))
        if subset_Bn is not None:
            hidden_BPD = _last_of_subset(layers[-1], hidden_BPD, mask, rotary, cache, subset_Bn)
        return self.decoder.norm(hidden_BPD)

    def loss(
        self, latents_BPC: Tensor, prompt_cache: PromptCache, masked_BP: Tensor, *, loss_on: str = "all",
        generator: NoiseSource | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Training loss in the decoder's (normalised) space.

        Args:
            latents_BPC: true latents.
            prompt_cache: their prompts.
            masked_BP: what the branch does not see; on the CPU, where the loss can count it without waiting for a GPU.
            loss_on: `all` patches (published), or only the `masked` ones.
            generator: draws the flow head's noise.

        Returns:
            A float32 scalar, and detached metrics: `cosine` (predicted to true latents, mean over patches) and
            `variance` (of predicted to true latents over the batch: near 0 when the text is ignored).
        """
        if loss_on not in LOSS_ON:
            raise ValueError(f"loss_on is one of {LOSS_ON}, not {loss_on!r}")
        hidden_BPD, target_BPC = self.hidden(latents_BPC, masked_BP, prompt_cache), self.to_decoder(latents_BPC)
        if loss_on == "masked":
            index_N = to_device(masked_BP.flatten().nonzero().squeeze(-1), hidden_BPD.device)
            hidden_ND, target_NC = (x.flatten(0, 1).index_select(0, index_N) for x in (hidden_BPD, target_BPC))
        else:  # no index: it would copy, and find its length by waiting for the GPU
            hidden_ND, target_NC = hidden_BPD.flatten(0, 1), target_BPC.flatten(0, 1)
        loss = self.vision_head.loss(hidden_ND, target_NC, generator)
        with torch.no_grad():
            predicted_NC = self.from_decoder(self.vision_head.mean(hidden_ND).float())
            true_NC = self.from_decoder(target_NC).float()
            cosine = nn.functional.cosine_similarity(predicted_NC, true_NC, dim=-1).mean()
            predicted, true = (rows_NC.var(dim=0, unbiased=False).mean() for rows_NC in (predicted_NC, true_NC))
            return loss, {"cosine": cosine, "variance": predicted / true.clamp_min(1e-12)}

    def to_decoder(self, latents_BPC: Tensor) -> Tensor:
        """Raw latents -> the decoder's space, in the branch's type."""
        latents_BPC = latents_BPC.to(self.mask_token.dtype)
        return (latents_BPC - self.latents_mean_C) / self.latents_std_C if self.normalize else latents_BPC

    def from_decoder(self, latents_BPC: Tensor) -> Tensor:
        """The decoder's space -> raw latents."""
        return latents_BPC * self.latents_std_C + self.latents_mean_C if self.normalize else latents_BPC


class _FrozenLayer(DynamicLayer):
    """One layer's cache that never grows: returns its keys and values in front of the new ones, and stores nothing."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys = torch.cat([self.keys.to(key_states.dtype), key_states], dim=-2)
        return keys, torch.cat([self.values.to(value_states.dtype), value_states], dim=-2)


def _last_of_subset(
    last: Any, hidden_BPD: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor], cache: Cache, subset_Bn: Tensor
) -> Tensor:
    """hidden_BnD of some patches only, after the last layer and before the final norm.

    It needs keys and values of all patches, but queries and its MLP only where a prediction is needed: with
    L layers this saves about 1/L of a decode step.
    """
    attention, count = last.self_attn, subset_Bn.shape[1]
    last_cache: Any = cache.layers[-1]
    normed_BPD, heads = last.input_layernorm(hidden_BPD), (-1, attention.head_dim)
    keys_BPhd, values_BPhd = (part(normed_BPD).unflatten(-1, heads) for part in (attention.k_proj, attention.v_proj))
    if hasattr(attention, "k_norm"):  # Qwen3 norms the keys of every head
        keys_BPhd = attention.k_norm(keys_BPhd)
    keys_BhPd = keys_BPhd.transpose(1, 2)
    # Every decoder of decoder_adapters rotates whole heads, by this formula.
    keys_BhPd, _ = apply_rotary_pos_emb(keys_BhPd, keys_BhPd, *rotary)
    cache.layers[-1] = _FrozenLayer(*last_cache.update(keys_BhPd, values_BPhd.transpose(1, 2)))
    # The stock layer appends the selected patches' own keys once more: those columns are masked.
    seen = last_cache.keys.shape[-2] + hidden_BPD.shape[1]
    columns = hidden_BPD.new_zeros(len(hidden_BPD), 1, count, seen) if mask is None else mask[:, :, :count]
    repeated = columns.new_full((*columns.shape[:2], count, count), torch.finfo(columns.dtype).min)
    return last(
        take(hidden_BPD, subset_Bn),
        attention_mask=torch.cat([columns, repeated], dim=-1),
        position_embeddings=tuple(take(part, subset_Bn) for part in rotary),
        **with_cache(last, cache),
    )


def take(value_BPD: Tensor, subset_Bn: Tensor) -> Tensor:
    """value_BnD of the selected patches."""
    return value_BPD.gather(1, subset_Bn[..., None].expand(-1, -1, value_BPD.shape[-1]))
