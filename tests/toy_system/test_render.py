"""shapes render: a folder that extract-latents reads, the same images every time, and only the split asked for."""

from __future__ import annotations

import json

import pytest

from bifrost_cli.config.load import load_recipe
from bifrost_cli.data.sources.scan import scan
from bifrost_cli.errors import UsageError
from bifrost_cli.shapes.captions import held_out
from bifrost_cli.shapes.checker import check
from bifrost_cli.toy_system import render
from bifrost_cli.toy_system.render import png_bytes, render_shapes


def test_the_folder_is_a_source_whose_pictures_are_right(tmp_path):
    found = scan(str(render_shapes(tmp_path / "s", n=12, seed=3)), load_recipe().latents)
    assert found.funnel["used"] == 12
    for sample in found.samples:
        assert sample.plan and not held_out(sample.caption)
        assert check(sample.caption, sample.load().rgb).right


def test_the_same_seed_gives_the_same_bytes_and_a_longer_folder_begins_alike(tmp_path):
    folders = [render_shapes(tmp_path / name, n=n, seed=5) for name, n in (("a", 4), ("b", 4), ("c", 6))]
    first, again, longer = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first == again
    assert all(longer[name] == data for name, data in first.items() if name.endswith(".png"))


def test_held_out_prompts_are_distinct_and_cover_the_categories(tmp_path):
    folder = render_shapes(tmp_path / "s", n=24, split="held-out")
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len({line["caption"] for line in lines}) == 24 and all(held_out(line["caption"]) for line in lines)
    assert len({line["category"] for line in lines}) == 6


def test_nothing_is_overwritten_and_splits_are_known(tmp_path):
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        render_shapes(tmp_path, n=1)
    with pytest.raises(UsageError, match="no split"):
        render_shapes(tmp_path / "s", n=1, split="test")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def stop(*arguments):
        if len(list(next(tmp_path.iterdir()).iterdir())) == 3:
            raise KeyboardInterrupt
        return png_bytes(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(render, "png_bytes", stop)
        with pytest.raises(KeyboardInterrupt):
            render_shapes(tmp_path / "s", n=5)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "s").mkdir()
    assert len(list(render_shapes(tmp_path / "s", n=5).iterdir())) == 6
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="current folder"):
        render_shapes(".", n=1)
