"""A branch whose decoder starts random: nothing of it is copied, the rest is as with a copy."""

from __future__ import annotations

import torch
from fixtures_mllm import tiny_mllm  # noqa: F401

from bifrost_cli.ablations.random_start import draw_decoder
from bifrost_cli.models.branch.visual_branch import VisualBranch


def test_a_random_start_copies_nothing_and_repeats(tiny_mllm):  # noqa: F811
    copied, drawn, again = (VisualBranch.from_mllm(tiny_mllm, 4) for _ in range(3))
    state = torch.get_rng_state()
    draw_decoder(drawn, 0)
    draw_decoder(again, 0)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, one), other, same in zip(copied.decoder.named_parameters(), drawn.decoder.parameters(),
                                        again.decoder.parameters(), strict=True):  # fmt: skip
        assert torch.equal(other, same)
        if one.ndim == 2:
            assert not torch.equal(one, other) and 0.01 < other.std() < 0.05, name
    assert all(map(torch.equal, copied.vision_head.parameters(), drawn.vision_head.parameters()))
