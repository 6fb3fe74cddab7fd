"""train.compile: one graph for texts of all lengths, and a way back that is said."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fixtures_mllm import random_mllm
from torch._dynamo.utils import counters

from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.training.compiled import Compiled


@pytest.fixture(autouse=True)
def forgotten():
    yield
    torch._dynamo.reset()


def test_texts_of_all_lengths_share_a_graph_and_give_the_same(monkeypatch):
    monkeypatch.setattr("bifrost_cli.training.compiled.BACKEND", "eager")  # the graph alone: no C++ is made
    mllm = random_mllm(layers=1)
    branch, said = VisualBranch.from_mllm(mllm, 16), []
    plain = branch.hidden
    branch.hidden = Compiled(plain, "the branch", SimpleNamespace(say=said.append))
    counters.clear()
    for words in (3, 9, 30, 14):
        texts = ["red", " ".join(["circle"] * words)]
        cache = mllm.encode_prompts(mllm.tokenize_prompts(texts, 300))
        known_BPC, masked_BP = torch.randn(2, 16, branch.channels), torch.rand(2, 16) < 0.7
        torch.testing.assert_close(branch.hidden(known_BPC, masked_BP, cache), plain(known_BPC, masked_BP, cache))
        assert counters["stats"]["unique_graphs"] == 1, counters
    assert not said and not counters["graph_break"]


def test_what_cannot_be_compiled_runs_as_it_was_and_says_so_once(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("bifrost_cli.training.compiled.BACKEND", broken)
    said: list[str] = []
    double = Compiled(lambda x: 2 * x, "the branch", SimpleNamespace(say=said.append))
    assert [float(double(torch.tensor(value))) for value in (1.0, 2.0, 3.0)] == [2.0, 4.0, 6.0]
    assert len(said) == 1 and said[0].startswith("the branch is not compiled") and "no C++ compiler" in said[0]
