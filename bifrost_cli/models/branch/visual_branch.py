"""The visual generation branch: a trainable copy of the MLLM's decoder that reads the frozen model's keys and values.

In: known latents, a mask, a prompt `PromptCache`. Out: predicted latents, or the training loss. It knows no tokenizer, no
images and no frozen model once it is built (Bifrost-1, arXiv 2508.05954, section 3).
B batch, P patches, C latent channels, D decoder width, T text tokens, S = T + P.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from bifrost_cli.models.branch.decoder_adapters import decoder_config, new_decoder, with_cache
from bifrost_cli.models.branch.heads import HEADS
from bifrost_cli.models.branch.kv_prefix import FrozenCache, forward_subset
from bifrost_cli.models.branch.tuning import frozen_names, start_low_rank, stock_name, tune_decoder
from bifrost_cli.models.mllm.chat_template import additive, image_mask
from bifrost_cli.models.mllm.frozen_mllm import Mllm, PromptCache
from bifrost_cli.models.row_noise import NoiseSource

LOSS_ON = ("all", "masked")


class VisualBranch(nn.Module):
    """A stock decoder without its embedding table, a mask token, patch positions and a vision head.

    Every patch stands at rotary position 0; their order comes from the learned positions alone (as published). head:
    linear (mean squared error, as published) or flow (samples each token).
    normalize: the decoder sees and predicts latents divided by the stored channel statistics. tune: None (all of it is
    trained), {"layers": n} or {"rank": r}; the rest of the decoder is then the frozen MLLM's own.
    """

    def __init__(
        self,
        text_config: PreTrainedConfig,
        patches: int,
        channels: int,
        *,
        head: str = "linear",
        normalize: bool = False,
        tune: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"heads are {tuple(HEADS)}, not {head!r}")
        self.patches, self.channels, self.head_kind = patches, channels, head
        width = text_config.hidden_size
        self.decoder, self.tune = new_decoder(text_config), tune
        if tune:
            tune_decoder(self.decoder, tune)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, patches, width))
        self.input_projection = nn.Identity() if channels == width else nn.Linear(channels, width)
        self.vision_head = HEADS[head](width, channels)
        self.normalize = normalize
        if normalize:
            self.register_buffer("latents_mean_C", torch.zeros(channels))
            self.register_buffer("latents_std_C", torch.ones(channels))

    @classmethod
    def from_mllm(
        cls,
        mllm: Mllm,
        patches: int,
        channels: int | None = None,
        *,
        head: str = "linear",
        normalize: bool = False,
        tune: dict[str, int] | None = None,
        random_start: bool = False,
        generator: torch.Generator | None = None,
    ) -> VisualBranch:
        """A new branch: layers and final norm copied, mask token and positions zero, head small and random.

        random_start: the decoder's layers too are drawn anew, as their stock class draws them (an ablation).

        channels: of the latents, None = the MLLM's own. What is trained is float32 whatever the MLLM's type; what is
        not (see `tune`) is no copy but the MLLM's tensors themselves.
        """
        with init_empty_weights():
            branch = cls(mllm.text_config, patches, channels or mllm.width, head=head, normalize=normalize, tune=tune)
        weights = {name: torch.zeros(parameter.shape) for name, parameter in branch.named_parameters()
                   if not name.startswith("decoder.") or ".lora_" in name}  # fmt: skip
        frozen = branch.from_base(mllm)
        stock = mllm.decoder.state_dict()
        copied = branch.decoder.state_dict().keys() - {name.removeprefix("decoder.") for name in {*frozen, *weights}}
        weights |= frozen | {f"decoder.{name}": stock[name].to(torch.float32, copy=True) for name in copied}
        weights |= {name: buffer for name, buffer in branch.named_buffers() if name in branch.state_dict()}
        branch.load_state_dict(weights, assign=True)
        generator = generator or torch.Generator().manual_seed(0)
        branch._init_new(generator)
        if random_start:
            with torch.random.fork_rng(devices=[]):  # the stock initialisation draws from the global generator
                torch.manual_seed(generator.initial_seed())
                branch.decoder.apply(lambda module: _draw_anew(branch.decoder, module))
        return branch.to(mllm.device)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VisualBranch:
        """An untrained branch of the sizes that `config` (see the property) names."""
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
            "normalize": self.normalize,
            **({"tune": self.tune} if self.tune else {}),
        }

    def from_base(self, mllm: Mllm) -> dict[str, Tensor]:
        """Our name -> the MLLM's own parameter, for what is not trained and so in no checkpoint and no artifact."""
        stock = dict(mllm.decoder.named_parameters())
        return {f"decoder.{name}": stock[stock_name(name)] for name in frozen_names(self.decoder)}

    def set_statistics(self, mean_C: Tensor, std_C: Tensor) -> None:
        """Channel mean and deviation of the training latents; only with normalize. A deviation of zero counts as 1."""
        if not self.normalize:
            raise ValueError("this branch does not normalise: statistics would be ignored")
        self.latents_mean_C.copy_(mean_C)
        self.latents_std_C.copy_(torch.where(std_C > 0, std_C, torch.ones_like(std_C)))

    # ---- one pass ---------------------------------------------------------------------------------------------------

    def forward(self, known_BPC: Tensor, masked_BP: Tensor, prefix: PromptCache) -> Tensor:
        """Predicted latents_BPC (the flow head: their mean) at every patch; `known` counts where masked is False."""
        return self.from_decoder(self.vision_head.mean(self.hidden(known_BPC, masked_BP, prefix)))

    def hidden(
        self, known_BPC: Tensor, masked_BP: Tensor, prefix: PromptCache, wanted_Bn: Tensor | None = None
    ) -> Tensor:
        """hidden_BPD after the final norm, or hidden_BnD of the wanted patches alone, which is cheaper.

        The prefix is read, never extended: give the same one at every step.
        """
        batch, patches = masked_BP.shape
        known_BPD = self.input_projection(self.to_decoder(known_BPC))
        inputs_BPD = torch.where(masked_BP[..., None], self.mask_token, known_BPD) + self.position_embedding
        position_ids = torch.zeros(batch, patches, dtype=torch.long, device=inputs_BPD.device)
        if wanted_Bn is not None:
            return forward_subset(self.decoder, inputs_BPD, position_ids, prefix, wanted_Bn)
        return self.decoder(
            inputs_embeds=inputs_BPD,
            attention_mask=additive(image_mask(prefix.attention_BT, patches), inputs_BPD.dtype),
            position_ids=position_ids,
            **with_cache(self.decoder, FrozenCache(prefix)),
            use_cache=False,
        ).last_hidden_state

    def loss(
        self,
        latents_BPC: Tensor,
        prefix: PromptCache,
        masked_BP: Tensor,
        *,
        loss_on: str = "all",
        generator: NoiseSource | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss in float32 in the decoder's (normalised) space, and detached health numbers.

        Linear head: mean squared error over all patches (published), or the masked ones (`loss_on="masked"`).
        `generator` draws the flow head's noise. Metrics: cosine (predicted to true, mean over patches) and variance
        (of predicted to true latents over the batch: near 0 when the text is not heard).
        """
        if loss_on not in LOSS_ON:
            raise ValueError(f"loss_on is one of {LOSS_ON}, not {loss_on!r}")
        hidden_BPD, target_BPC = self.hidden(latents_BPC, masked_BP, prefix), self.to_decoder(latents_BPC)
        counted_BP = masked_BP if loss_on == "masked" else torch.ones_like(masked_BP)
        hidden_ND, target_NC = hidden_BPD[counted_BP], target_BPC[counted_BP]
        loss = self.vision_head.loss(hidden_ND, target_NC, generator)
        with torch.no_grad():
            predicted_NC = self.from_decoder(self.vision_head.mean(hidden_ND).float())
            return loss, _health(predicted_NC, self.from_decoder(target_NC).float())

    def to_decoder(self, latents_BPC: Tensor) -> Tensor:
        """Raw latents -> the decoder's space, in the branch's type."""
        latents_BPC = latents_BPC.to(self.mask_token.dtype)
        return (latents_BPC - self.latents_mean_C) / self.latents_std_C if self.normalize else latents_BPC

    def from_decoder(self, latents_BPC: Tensor) -> Tensor:
        """The decoder's space -> raw latents."""
        return latents_BPC * self.latents_std_C + self.latents_mean_C if self.normalize else latents_BPC

    def enable_gradient_checkpointing(self) -> None:
        """Keep only each layer's input for the gradient, and compute the layer once more there.

        The stock switch of transformers drops the prompt's keys and values without a word; a checkpoint around each
        layer keeps them, because our prefix is only read, so that the second pass sees the same.
        """
        for layer in self.decoder.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _init_new(self, generator: torch.Generator) -> None:
        for module in (self.input_projection, *self.vision_head.modules()):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
                nn.init.zeros_(module.bias)
        start_low_rank(self.decoder, generator)


def _draw_anew(decoder: nn.Module, module: nn.Module) -> None:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor._is_hf_initialized = False  # a mark of transformers that would keep the copied numbers
    decoder._init_weights(module)


def _health(predicted_NC: Tensor, true_NC: Tensor) -> dict[str, Tensor]:
    cosine = nn.functional.cosine_similarity(predicted_NC, true_NC, dim=-1).mean()
    spread = [rows_NC.var(dim=0, unbiased=False).mean() for rows_NC in (predicted_NC, true_NC)]
    return {"cosine": cosine, "variance": spread[0] / spread[1].clamp_min(1e-12)}
