"""A branch whose decoder starts random instead of as the MLLM's copy: what does the copy contribute?"""

from __future__ import annotations

from typing import Any

import torch

from bifrost_cli.models.branch.visual_branch import VisualBranch


def draw_decoder(branch: VisualBranch, seed: int) -> None:
    """Draw the decoder's layers anew, on the CPU, as their stock class initialises them."""
    device, decoder = branch.mask_token.device, branch.decoder.cpu()

    def draw(module: Any) -> None:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor._is_hf_initialized = False  # a mark of transformers that would keep the copied numbers
        decoder._init_weights(module)

    with torch.random.fork_rng(devices=[]):  # the stock initialisation draws from the global generator
        torch.manual_seed(seed)
        decoder.apply(draw)
    decoder.to(device)
