"""Layouts that people have: each is read, or one line says what to type; several sources, and several captions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bifrost_cli.cli.app import run
from bifrost_cli.config.schema import Latents
from bifrost_cli.data.sources.scan import scan
from bifrost_cli.data.sources.several import as_one, parts_of
from bifrost_cli.errors import DataError
from bifrost_cli.extraction.source import refuse_output

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aaaa\nsize 5\n"


def image(path: Path, **captions: str) -> Path:
    """An image, and beside it a text file of each ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shade = int.from_bytes(os.fsencode(path.name)[-5:]) % 200
    Image.fromarray(np.full((40, 40, 3), shade, np.uint8)).save(path)
    for ending, text in captions.items():
        path.with_suffix(f".{ending}").write_text(text)
    return path


def parquet(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cell = {"bytes": image(path.with_name("x.png")).read_bytes(), "path": "x.png"}
    path.with_name("x.png").unlink()
    pq.write_table(pa.table({"image": [cell], "text": ["c"]}), path)
    return path


def img2dataset(root: Path) -> Path:
    image(root / "00000" / "000000000.jpg", txt="c", json="{}")
    parquet(root / "00000.parquet")
    return root


def hub_clone(root: Path) -> Path:
    parquet(root / "data" / "train-00000-of-00001.parquet")
    (root / "README.md").write_text("---\n---\n")
    return root


def written(name: str, text: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        root.mkdir()
        (root / name).write_text(text)
        return root / name

    return make


def folder_of(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    return lambda root: make(root).parent


TOLD = {
    "caption": (folder_of(lambda root: image(root / "a.jpg", caption="c")), "--caption-extension caption"),
    "json beside": (folder_of(lambda root: image(root / "a.jpg", json="{}")), "metadata.jsonl"),
    "img2dataset": (img2dataset, "latents.recursive=true"),
    "hub clone": (hub_clone, "data/*.parquet'"),
    "zip": (written("z.zip", "PK"), "unzip "),
    "folder of zips": (folder_of(written("z.zip", "PK")), "unzip "),
    "tar.gz": (written("z.tar.gz", "x"), "unpack it first"),
    "json list": (written("z.json", "[]"), "jq -c '.[]' "),
    "list of names": (written("z.txt", "a.jpg\n"), "file_name,caption"),
    "one image": (lambda root: image(root / "a.jpg"), "give its folder: "),
    "saved to disk": (folder_of(written("data-00000-of-00001.arrow", "x")), "to_parquet"),
    "pointer to a tar": (written("z.tar", POINTER), "git lfs pull"),
    "pointer to a table": (written("z.parquet", POINTER), "git lfs pull"),
}


@pytest.mark.parametrize("name", TOLD)
def test_a_layout_that_is_not_read_says_what_to_type(name, tmp_path):
    make, fix = TOLD[name]
    with pytest.raises(DataError) as told:
        scan(make(tmp_path / "in"), Latents())
    assert fix in str(told.value.fix), told.value.fix


def test_what_was_said_works(tmp_path):
    captions = folder_of(lambda root: image(root / "a.jpg", caption="one"))(tmp_path / "captions")
    assert scan(captions, Latents(caption_extension="caption")).samples[0].caption == "one"
    assert scan(img2dataset(tmp_path / "i2d"), Latents(recursive=True)).funnel["used"] == 1
    assert scan(f"{hub_clone(tmp_path / 'hub')}/data/*.parquet", Latents()).funnel["used"] == 1
    assert scan(image(tmp_path / "upper" / "A.JPG", TXT="two").parent, Latents()).samples[0].caption == "two"


def test_a_pointer_in_the_place_of_an_image_is_named(tmp_path):
    image(tmp_path / "a.jpg", txt="c")
    (tmp_path / "a.jpg").write_text(POINTER)
    with pytest.raises(DataError) as told:
        scan(tmp_path, Latents())
    assert "a git-lfs pointer" in str(told.value.at)


def test_several_sources_are_one_and_say_which(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("p-one", "p-two"):
        image(Path(name) / "same.png", txt=name)
    both = scan(as_one(["p-two", "p-one"]), Latents())
    assert [(sample.key, sample.caption) for sample in both.samples] == [("1/same", "p-two"), ("2/same", "p-one")]
    pattern = scan("p-*", Latents())
    assert [(sample.key, sample.caption) for sample in pattern.samples] == [("1/same", "p-one"), ("2/same", "p-two")]
    assert both.funnel["used"] == pattern.funnel["used"] == 2
    with pytest.raises(Exception, match="lies inside the source p-one"):
        refuse_output(as_one(["p-two", "p-one"]), "p-one/out", "runs")


def test_one_source_is_itself_and_a_list_is_only_a_list():
    assert as_one(["a b"]) == "a b" and parts_of("a b") == ["a b"]
    assert parts_of(as_one(["a", "b[1]"])) == ["a", "b[1]"]
    assert [parts_of(text) for text in ("[1]", "[x", "[]")] == [["[1]"], ["[x"], ["[]"]]


@pytest.mark.parametrize(("rule", "captions"), [("all", ["one", "two", "three"]), ("first", ["one"]), ("random", None)])
def test_captions_of_an_image(tmp_path, rule, captions):
    lines = []
    for name in "abcdefgh":
        image(tmp_path / f"{name}.png")
        lines += [json.dumps({"file_name": f"{name}.png", "text": text}) for text in ("one", "two", "three")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    found = scan(tmp_path, Latents(captions_per_image=rule))
    chosen = {key: [s.caption for s in found.samples if s.key.partition("#")[0] == key] for key in "abcdefgh"}
    if captions:
        assert all(chosen[key] == captions for key in chosen)
    else:
        assert all(len(texts) == 1 for texts in chosen.values()) and len({texts[0] for texts in chosen.values()}) > 1
        again = scan(tmp_path, Latents(captions_per_image=rule))
        assert [sample.caption for sample in again.samples] == [sample.caption for sample in found.samples]
    assert found.counts.get("other captions of an image", 0) == (0 if rule == "all" else 16)


def test_bad_lines_and_a_missing_column_are_told_together(tmp_path, capsys):
    (tmp_path / "t.jsonl").write_text('{"file_name": "a.jpg", "zzz": "c"}\n{bad\n')
    assert run(["data", "check", str(tmp_path / "t.jsonl")]) == 8
    out, err = capsys.readouterr()
    assert "no column known as caption" in out and "t.jsonl:2" in out and "found metadata 2; " in err


def test_the_last_line_counts_by_cause(tmp_path, capsys):
    image(tmp_path / "a.png", txt="c")
    image(tmp_path / "b.png")
    image(tmp_path / "c.png", txt="c").write_bytes(b"")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    assert run(["data", "check", str(tmp_path), "--json"]) == 8
    told = json.loads(capsys.readouterr().out)
    assert told["causes"] == {"bad-image": 1, "caption": 1, "missing-caption": 1}
    assert told["error"]["message"].startswith("found bad-image 1, caption 1, missing-caption 1; extract-latents would")


@pytest.mark.parametrize(("flag", "fix"), [("--num-workers", "threads"), ("--output-dir", "-o"), ("--none", "--help")])
def test_options_of_other_programs_are_answered(flag, fix, capsys):
    assert run(["extract-latents", "x", flag, "4"]) == 2
    assert fix in capsys.readouterr().err
