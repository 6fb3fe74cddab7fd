"""The optimizers: 8-bit averages are really 8 bits, and a resume restores them to the bit."""

from __future__ import annotations

import sys

import pytest
import torch
from fixtures_training import settings
from torch import nn

from bifrost_cli.artifacts.files import sha256_file
from bifrost_cli.errors import ArtifactError, Diverged, EnvironmentProblem, OutOfMemory, memory_errors
from bifrost_cli.training.loop import fit
from bifrost_cli.training.optimizer import make_optimizer, optimizer_tensors

ROWS, TARGETS = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)), torch.arange(64.0).sin()[:, None]


class WideTask:
    """One matrix above bitsandbytes' 4096 numbers, and the rest below."""

    def __init__(self, stop_at: int | None = None) -> None:
        torch.manual_seed(0)
        self.module, self.stop_at = nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 1)), stop_at

    def batch(self, step: int, micro: int) -> int:
        return step

    def loss(self, step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        noise = torch.randn(ROWS.shape, generator=generator)
        loss = (self.module(ROWS + 0.1 * noise) - TARGETS).square().mean()
        return loss * float("nan") if step == self.stop_at else loss, {}


def train_wide(folder, stop_at=None, **changes):
    train = settings(**{"optimizer": "adamw8bit", "ema": 0.0, "checkpoint_every": 7, **changes})
    return fit(WideTask(stop_at), train, folder)


def test_eight_bits_resume_to_the_bit(tmp_path):
    straight = train_wide(tmp_path / "straight")
    with pytest.raises(Diverged):  # ends after the checkpoint of step 7, as a kill would
        train_wide(tmp_path / "broken", stop_at=10)
    again = train_wide(tmp_path / "broken")
    assert all(torch.equal(value, again.ema_state[name]) for name, value in straight.ema_state.items())
    for name in ("losses.csv", "checkpoints/step-0000020/optimizer.safetensors"):
        assert sha256_file(tmp_path / "straight" / name) == sha256_file(tmp_path / "broken" / name)


def test_eight_bits_take_a_quarter_and_train_nearly_alike(tmp_path):
    task = WideTask()
    optimizer = make_optimizer(task.module, settings(optimizer="adamw8bit"))
    task.loss(0, torch.Generator().manual_seed(0))[0].backward()
    optimizer.step()
    kept = optimizer_tensors(optimizer, task.module)
    assert kept["0.weight/state1"].dtype == kept["0.weight/state2"].dtype == torch.uint8
    assert kept["2.weight/state1"].dtype == torch.float32 and kept["0.weight/step"].item() == 1
    moments = ("state1", "state2", "absmax1", "absmax2")
    assert sum(kept[f"0.weight/{name}"].nbytes for name in moments) < 0.26 * 2 * 4 * 96 * 64
    eight, full = (train_wide(tmp_path / name, optimizer=name) for name in ("adamw8bit", "adamw"))
    close, moved = eight.ema_state["0.weight"] - full.ema_state["0.weight"], full.ema_state["0.weight"]
    assert 0 < close.norm() < 0.1 * (moved - WideTask().module[0].weight).norm()


def test_weight_decay_acts_on_the_matrices_of_layers_alone():
    module = nn.Module()
    module.mask_token = nn.Parameter(torch.zeros(1, 1, 4))
    module.position_embedding = nn.Parameter(torch.zeros(1, 3, 4))
    module.norm, module.positions = nn.LayerNorm(4), nn.Module()
    module.positions.position_embedding = nn.Embedding(3, 4)
    module.inner, module.conv = nn.Linear(4, 4), nn.Conv2d(4, 4, 1)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = make_optimizer(module, settings(weight_decay=0.1)).param_groups
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {"inner.weight", "conv.weight"}
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_another_optimizer_does_not_continue(tmp_path):
    train_wide(tmp_path, steps=7)
    with pytest.raises(ArtifactError, match="other training settings") as found:
        train_wide(tmp_path, optimizer="adamw")
    assert "optimizer adamw8bit -> adamw" in found.value.at


def test_without_bitsandbytes_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(EnvironmentProblem, match="adamw8bit") as found:
        make_optimizer(WideTask().module, settings(optimizer="adamw8bit"))
    assert "bifrost-cli[quant]" in found.value.fix


def test_a_lack_of_memory_names_what_to_set_and_other_troubles_pass():
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ):  # fmt: skip
        with (
            pytest.raises(OutOfMemory, match="generating needs more memory") as found,
            memory_errors("generating", "less"),
        ):
            raise error
        assert found.value.exit_code == 6 and found.value.fix == "less"
    with pytest.raises(RuntimeError, match="shapes"), memory_errors("generating", "less"):
        raise RuntimeError("shapes differ")
    with pytest.raises(OutOfMemory), memory_errors("asking for all there is", "less"):
        torch.empty(2**60, dtype=torch.uint8)
