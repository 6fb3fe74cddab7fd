"""The loop against plain recurrences: learning rate, EMA, accumulation, clipping, golden losses, divergence."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from fixtures_training import SmallTask, settings
from torch import nn

from bifrost_cli.artifacts.identity import provenance
from bifrost_cli.errors import ArtifactError, Diverged, UsageError
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.training import loop
from bifrost_cli.training.checkpoint import Checkpoints
from bifrost_cli.training.loop import fit, learning_rate

GOLDEN = [4.03355742, 3.39865303, 3.35033393, 3.65250921, 3.82225657, 3.16039729]


class Plain:
    """A linear least-squares task without any randomness; records the weights before each step."""

    def __init__(self, train, rows: int = 32) -> None:
        self.module, self.train, self.seen = nn.Linear(4, 2), train, []
        for parameter in self.module.parameters():
            parameter.data = torch.cos(torch.arange(parameter.numel()) * 1.0).reshape(parameter.shape)
        self.x = torch.cos(torch.arange(rows * 4) * 1.3).reshape(rows, 4)
        self.y = torch.sin(torch.arange(rows * 2) * 0.9).reshape(rows, 2)

    def batch(self, step, micro):
        size, number = self.train.batch_size, step * self.train.accumulate + micro
        return [row % len(self.x) for row in range(number * size, (number + 1) * size)]

    def loss(self, batch, generator):
        self.seen.append(self.module.weight.detach().clone())
        return (self.module(self.x[batch]) - self.y[batch]).square().mean(), {}


def test_learning_rate_warms_up_and_falls_to_zero():
    train = settings(steps=10, warmup=4, lr=1.0)
    rates = [learning_rate(step, train) for step in range(11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[7] == pytest.approx(0.5) and rates[10] == pytest.approx(0.0)


def test_ema_is_its_recurrence(tmp_path):
    train = settings(steps=12, ema=0.8)
    task = Plain(train)
    averaged = fit(task, train, tmp_path).ema_state["weight"]
    after = [*task.seen[1:], task.module.weight.detach()]
    expected = after[0].clone()
    for weight in after[1:]:
        expected = 0.8 * expected + 0.2 * weight
    torch.testing.assert_close(averaged, expected, rtol=1e-6, atol=1e-7)


def test_averaging_every_few_steps_has_the_same_memory(tmp_path):
    train = settings(steps=13, ema=0.8, ema_every=3)
    task = Plain(train)
    averaged = fit(task, train, tmp_path).ema_state["weight"]
    after = [*task.seen[1:], task.module.weight.detach()]
    expected = after[0].clone()
    for weight in after[3::3]:
        expected = 0.8**3 * expected + (1 - 0.8**3) * weight
    torch.testing.assert_close(averaged, expected, rtol=1e-6, atol=1e-7)


def test_a_warmed_up_average_does_not_hold_the_start(tmp_path):
    """A decay of 0.997 alone leaves 64 % of the first weights in the average after 150 steps."""
    start = SmallTask(settings()).module.state_dict()
    far = {}
    for warmup in (True, False):
        train = settings(steps=150, warmup=1, ema=0.997, ema_warmup=warmup, checkpoint_every=150, validate_every=0)
        task = SmallTask(train)
        result = fit(task, train, tmp_path / str(warmup))
        raw, names = task.module.state_dict(), [name for name, _ in task.module.named_parameters()]
        gone = torch.cat([(raw[name] - start[name]).flatten() for name in names]).norm()
        far[warmup] = float(torch.cat([(raw[name] - result.ema_state[name]).flatten() for name in names]).norm() / gone)
        held = result.raw_state if warmup else raw
        assert all(torch.equal(held[name], value) for name, value in raw.items())
    assert far[True] < 0.1 and far[False] > 0.25, far


def test_warm_up_is_its_recurrence_and_averages_batch_statistics_too(tmp_path):
    train = settings(steps=30, ema=0.8, ema_warmup=True, checkpoint_every=30, validate_every=0)
    task, seen = SmallTask(train), []
    plain = task.batch
    task.batch = lambda step, micro: (seen.append(copy.deepcopy(task.module.state_dict())), plain(step, micro))[1]
    result = fit(task, train, tmp_path)
    after = [*seen[1:], task.module.state_dict()]
    for name in ("layers.0.weight", "layers.1.running_mean", "layers.1.running_var"):
        expected = after[0][name].clone()
        for step, state in enumerate(after[1:], 1):
            decay = min(0.8, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * state[name]
        torch.testing.assert_close(result.ema_state[name], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(result.ema_state["layers.1.num_batches_tracked"], after[-1]["layers.1.num_batches_tracked"])


def test_a_warmed_up_average_resumes_to_the_bit_and_other_settings_do_not(tmp_path):
    train = settings(ema_warmup=True)
    whole = fit(SmallTask(train), train, tmp_path / "whole")
    part = SmallTask(train)
    plain = part.batch

    def stop(step, micro):
        if step == 7:
            raise KeyboardInterrupt
        return plain(step, micro)

    part.batch = stop
    with pytest.raises(KeyboardInterrupt):
        fit(part, train, tmp_path / "part")
    with pytest.raises(ArtifactError, match="other training settings"):
        fit(SmallTask(settings()), settings(), tmp_path / "part")
    again = fit(SmallTask(train), train, tmp_path / "part")
    for one, other in ((whole.ema_state, again.ema_state), (whole.raw_state, again.raw_state)):
        assert one and all(torch.equal(value, other[name]) for name, value in one.items())


def test_without_ema_the_raw_weights_come_back(tmp_path):
    train = settings(steps=3, ema=0.0)
    task = SmallTask(train)
    result = fit(task, train, tmp_path)
    assert all(torch.equal(value, result.ema_state[name]) for name, value in task.module.state_dict().items())
    assert not list(tmp_path.rglob("ema.safetensors"))


def test_accumulation_equals_the_large_batch(tmp_path):
    large, small = settings(batch_size=8), settings(batch_size=2, accumulate=4)
    one, other = fit(Plain(large), large, tmp_path / "a"), fit(Plain(small), small, tmp_path / "b")
    assert one.samples_seen == other.samples_seen == 160
    for name, value in one.ema_state.items():
        torch.testing.assert_close(other.ema_state[name], value, rtol=1e-6, atol=1e-6)


def test_the_update_is_adamw_with_clipping_and_no_decay_on_vectors(tmp_path):
    train = settings(steps=6, clip=0.05, weight_decay=0.1, ema=0.0)
    task, reference = Plain(train), Plain(train)
    fit(task, train, tmp_path)
    linear = reference.module
    groups = [{"params": [linear.weight]}, {"params": [linear.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=train.betas, weight_decay=0.1)
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, train)
        optimizer.zero_grad()
        reference.loss(reference.batch(step, 0), None)[0].backward()
        nn.utils.clip_grad_norm_(linear.parameters(), 0.05)
        optimizer.step()
    torch.testing.assert_close(task.module.state_dict(), linear.state_dict(), rtol=1e-5, atol=1e-7)


def test_golden_losses(tmp_path):
    train = settings(steps=6)
    fit(Plain(train), train, tmp_path)
    rows = (tmp_path / "losses.csv").read_text().splitlines()
    assert rows[0] == "step,loss,grad_norm,lr"
    assert [float(row.split(",")[1]) for row in rows[1:]] == pytest.approx(GOLDEN, rel=1e-5)


def test_validation_runs_on_the_averaged_weights_and_leaves_no_trace(tmp_path):
    train = settings(validate_every=0, ema=0.5, steps=8)
    task = SmallTask(train)
    result = fit(task, train, tmp_path)
    judge = SmallTask(train)
    judge.module.load_state_dict(result.ema_state)
    with torch.no_grad():
        judge.module.eval()
        assert result.metrics["loss"] == pytest.approx(float(judge.validate()["loss"]), rel=1e-6)
    busy = settings(validate_every=1, ema=0.5, steps=8)
    again = fit(SmallTask(busy), busy, tmp_path / "busy")
    assert all(torch.equal(again.ema_state[name], value) for name, value in result.ema_state.items())


def test_bf16_runs_in_autocast_on_float32_weights(tmp_path):
    train = settings(steps=4, precision="bf16")
    result = fit(SmallTask(train), train, tmp_path)
    assert all(value.dtype != torch.bfloat16 for value in result.ema_state.values())


def test_samples_go_to_their_folder_when_due(tmp_path):
    train, drawn = settings(sample_every=8), []
    task = SmallTask(train)
    task.samples = lambda folder, step: drawn.append((folder.name, step, task.module.training))
    fit(task, train, tmp_path)
    assert drawn == [("samples", 8, False), ("samples", 16, False), ("samples", 20, False)]


def test_a_bad_row_stops_before_the_step_and_keeps_the_last_checkpoint(tmp_path):
    train = settings(checkpoint_every=1)
    task = SmallTask(train, poison=7)
    with pytest.raises(Diverged) as stopped:
        fit(task, train, tmp_path)
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert stopped.value.exit_code == 7 and "row-7" in report["keys"]
    kept = Checkpoints(tmp_path / "checkpoints").newest()
    assert kept.step == report["step"] - 1 > 0
    assert all(
        torch.isfinite(tensor).all()
        for group in ("model", "ema", "optimizer")
        for _, tensor in kept.read(group, task.module)
    )
    assert all(torch.isfinite(parameter).all() for parameter in task.module.parameters())


def test_weights_that_overflow_are_never_saved(tmp_path):
    train = settings(lr=1e39, clip=0.0, warmup=0, checkpoint_every=1, validate_every=0)
    with pytest.raises(Diverged):
        fit(Plain(train), train, tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").steps() == []


def test_other_settings_do_not_continue(tmp_path):
    fit(SmallTask(settings()), settings(), tmp_path)
    with pytest.raises(ArtifactError, match=r"lr 0.01 -> 0.02"):
        fit(SmallTask(settings()), settings(lr=0.02), tmp_path)
    with pytest.raises(UsageError):
        fit(SmallTask(settings()), settings(), tmp_path, resume=False)


def test_going_on_under_other_versions_is_said(tmp_path, monkeypatch):
    said, ui, train = [], Ui(), settings(steps=6, checkpoint_every=3)
    monkeypatch.setattr(ui, "say", said.append)
    made = provenance()
    monkeypatch.setattr(loop, "provenance", lambda: {"versions": {**made["versions"], "torch": "9.9.9"}})
    stopping = Plain(train)
    plain = stopping.loss
    stopping.loss = lambda batch, generator: plain(batch, generator) if len(stopping.seen) < 4 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(stopping, train, tmp_path, ui=ui)
    assert not any("versions" in line for line in said)
    monkeypatch.undo()
    monkeypatch.setattr(ui, "say", said.append)
    fit(Plain(train), train, tmp_path, ui=ui)
    assert any(f"torch 9.9.9 -> {made['versions']['torch']}" in line for line in said), said
    assert "torch 9.9.9 -> " in (tmp_path / "train.log").read_text()


def test_a_finished_training_is_not_trained_again(tmp_path):
    first = fit(SmallTask(settings()), settings(), tmp_path)
    task = SmallTask(settings())
    task.loss = None
    again = fit(task, settings(), tmp_path)
    assert again.metrics == first.metrics and math.isclose(again.seconds, first.seconds)
    assert all(torch.equal(again.ema_state[name], value) for name, value in first.ema_state.items())


def test_the_lines_say_where_it_stands(tmp_path):
    lines = []
    ui = type("Lines", (), {"say": staticmethod(lines.append)})
    fit(SmallTask(settings()), settings(), tmp_path, ui=ui)
    assert any("step 20/20  loss 0." in line and "samples/s" in line for line in lines)
    assert any("validation" in line for line in lines)
    assert (tmp_path / "train.log").read_text().count("\n") == len(lines)


@pytest.mark.parametrize(("taken", "asked"), [(19.0, None), (62.0, 300), (200.0, 420)])
def test_a_checkpoint_that_takes_longer_than_a_killer_waits_is_told_once(tmp_path, monkeypatch, taken, asked):
    clock, lines, save = [0.0], [], Checkpoints.save

    def slow(self, *arguments, **options):
        clock[0] += taken
        save(self, *arguments, **options)

    monkeypatch.setattr(Checkpoints, "save", slow)
    monkeypatch.setattr("bifrost_cli.training.train_log.time.monotonic", lambda: clock[0])
    fit(SmallTask(settings()), settings(), tmp_path, ui=type("Lines", (), {"say": staticmethod(lines.append)}))
    told = [line for line in lines if "warning: a checkpoint takes" in line]
    assert len(told) == (asked is not None)
    assert all(f"{taken:.0f} s" in line and f"TERM@{asked})" in line for line in told)


def test_deterministic_changes_no_number_here_and_is_undone(tmp_path):
    """On the CPU; what it does on a GPU is PyTorch's promise."""
    losses = []
    for asked in (False, True):
        train = settings(steps=4, validate_every=0, deterministic=asked)
        task, seen = SmallTask(train), []
        plain = task.batch
        task.batch = lambda *of, plain=plain, seen=seen: (
            seen.append(torch.are_deterministic_algorithms_enabled()), plain(*of))[1]  # fmt: skip
        fit(task, train, tmp_path / str(asked))
        losses.append((tmp_path / str(asked) / "losses.csv").read_bytes())
        assert set(seen) == {asked} and not torch.are_deterministic_algorithms_enabled()
    assert losses[0] == losses[1]
