"""The benchmarks: their frame pairs and spreads truly, and each of them runs small."""

from __future__ import annotations

import importlib
import json
import time

import pytest
import torch

from bifrost_cli.cli.app import run
from bifrost_cli.config.load import load_recipe
from bifrost_cli.errors import UsageError
from bifrost_cli.planning.bench import BENCHES
from bifrost_cli.planning.bench.paired import BenchRow, BenchSetup, Timing, compare, run_bench

CPU = BenchSetup(load_recipe("tiny"), torch.device("cpu"))
SMALL = {
    "decode": {"hidden": 128, "layers": 2, "tokens": 16, "text": 60, "steps": 3},
    "extract": {"images": 12},
    "generate": {"pixels": 64, "steps": 1},
    "store": {"rows": 64},
    "train": {"hidden": 256, "layers": 2, "tokens": 128, "text": 300, "rows": 2},
}


def spend(seconds: float) -> float:
    """Use the processor, however busy it is."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return seconds


def test_two_ways_are_timed_in_turns_and_their_ratio_is_that_of_their_time():
    order: list[str] = []

    def way(name: str, seconds: float) -> float:
        order.append(name)
        return spend(seconds)

    row = compare("waiting", lambda: way("ours", 0.02), lambda: way("theirs", 0.08), baseline="a slow one", setup=CPU,
                  before=lambda: order.append("before"), difference=lambda a, b: b - a, repeats=2)  # fmt: skip
    timed = ["before", "theirs", "before", "ours", "before", "ours", "before", "theirs"]
    assert order == ["ours", "theirs", *timed], "warmed up, then in turns"
    assert 3 < row.ratio < 5 and row.ratios() == sorted(row.ratios()) and len(row.ratios()) == 2
    assert row.difference == pytest.approx(0.06)
    assert "times the speed of a slow one" in str(row)


def test_what_takes_long_is_timed_once():
    row = compare("waiting", lambda: spend(0.02), lambda: spend(0.02), baseline="x", setup=CPU, repeats=9, seconds=0.05)
    assert len(row.ratios()) == 1


def test_a_share_of_the_matrix_rate_is_operations_in_seconds():
    one = (Timing(cpu=2.0, wall=4.0, memory=5),)
    row = BenchRow("x", "y", "cpu", one, (Timing(1.0, 8.0, None),), flops=10.0, matrix_rate=10.0, work=(4, "rows"))
    assert (row.share, row.ratio, row.ratios("wall")) == (0.5, 0.5, [2.0])
    assert "2 against 4 rows a CPU s" in str(row) and "50% of the measured matrix rate" in str(row)
    assert row.values()["ratios"]["wall"]["median"] == 2.0 and row.values()["ours"]["peak_memory"] == 5


def test_memory_is_what_a_run_holds():
    row = compare("holding", lambda: torch.ones(16, 1024, 1024), lambda: torch.ones(1), baseline="x", setup=CPU,
                  warm_up=False, repeats=1)  # fmt: skip
    assert row.memory("ours") is None or 60e6 < row.memory("ours") < 90e6
    assert row.memory("theirs") is None or row.memory("theirs") < 30e6


@pytest.mark.parametrize("name", SMALL)
def test_each_runs(name, capsys):
    flags = [word for size, value in SMALL[name].items() for word in (f"--{size}", str(value))]
    assert run(["bench", name, *flags, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows and all(row["ratio"] > 0 and row["ours"]["seconds"] > 0 for row in rows)
    if name == "decode":
        assert all(row["difference"] < 1e-4 and 0 < row["share_of_matrix_rate"] < 1.5 for row in rows)
    if name == "store":  # half of what is aimed at: 400 MB a CPU second, 0.6 of the memory map's
        writing, reading = rows[:2]
        assert writing["work"][0] / writing["ours"]["seconds"] > 200, writing["ours"]
        assert reading["ratio"] > 0.3 and reading["difference"] == 0, reading["ratios"]
    if name == "train":  # it is about 4 here
        assert all(row["difference"] < 1e-5 and row["ratio"] > 2 for row in rows)


@pytest.mark.parametrize("name", BENCHES)
def test_each_is_found(name):
    module, _, function = BENCHES[name].function.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_a_width_that_is_no_number_of_heads_is_refused():
    with pytest.raises(UsageError, match="width"):
        run_bench("decode", sizes={"hidden": 100})
