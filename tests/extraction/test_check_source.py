"""data check: it lists all that is wrong, and says what extract-latents would say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_webdataset import archive, image

from bifrost_cli.cli.app import run
from bifrost_cli.config.schema import Latents, Recipe
from bifrost_cli.data.sources.scan import scan
from bifrost_cli.errors import BifrostError
from bifrost_cli.extraction.source import check_source


def folder(path: Path) -> Path:
    """Nine images: one is broken, two have no caption."""
    path.mkdir()
    for i in range(9):
        (path / f"{i}.png").write_bytes(image(i) if i != 4 else b"<html>")
        if i not in (2, 3):
            (path / f"{i}.txt").write_text(f"caption {i}")
    return path


def recipe(**rules: object) -> Recipe:
    return Recipe(latents=Latents(**rules))


def test_everything_that_is_wrong_is_listed_at_once(tmp_path: Path) -> None:
    found = check_source(recipe(), str(folder(tmp_path / "a")))
    assert sorted(problem.event for problem in found.problems) == ["bad-image", "missing-caption", "missing-caption"]
    assert found.funnel == {"seen": 9, "readable": 8, "captioned": 6, "used": 6}
    assert found.stops is not None and found.stops.code == "BF-DATA-002"


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"missing_caption": "skip"},
        {"missing_caption": "skip", "bad_image": "skip", "max_bad": 0.1},
        {"missing_caption": "empty", "bad_image": "skip", "max_bad": 0.2},
    ],
)
def test_it_stops_where_the_extraction_stops(tmp_path: Path, rules: dict) -> None:
    source = str(folder(tmp_path / "a"))
    found, code = check_source(recipe(**rules), source), None
    try:
        real = scan(source, Latents(**rules))
    except BifrostError as error:
        code = error.code
    else:
        assert (found.funnel, found.counts) == (real.funnel, real.counts)
    assert (found.stops.code if found.stops else None) == code


def test_the_command_exits_with_8_and_its_json_holds_all(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = folder(tmp_path / "a")
    assert run(["data", "check", str(source), "--json"]) == 8
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["stops"]["code"] == "BF-DATA-002" and len(told["problems"]) == 3 and told["funnel"]["seen"] == 9
    assert "extract-latents would stop: 2 of 9 images" in err and "--missing-caption skip" in err
    mild = ["--missing-caption", "skip", "--bad-image", "skip", "--max-bad", "0.5"]
    assert run(["data", "check", str(source), *mild]) == 0
    out = capsys.readouterr().out
    assert "bad-image  " in out and "used 6" in out and "would not stop" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_what_cannot_be_listed_is_a_finding_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tar = archive(tmp_path / "a.tar", ("0.png", image()), ("0.txt", b"x"))
    tar.write_bytes(tar.read_bytes()[:900])
    assert run(["data", "check", str(tar)]) == 8
    assert "ends after the archive does" in capsys.readouterr().err
    (tmp_path / "list.jsonl").write_text('{"file_name": "a.png", "caption": "x"}\nnot json\n[]\n')
    assert run(["data", "check", str(tmp_path / "list.jsonl")]) == 8
    assert "list.jsonl:2: " in capsys.readouterr().out
    assert run(["data", "check", "ssh://host/a.csv"]) == 2
    assert run(["data", "check", "shapes:3", "--set", "latents.flip=true"]) == 2


@pytest.mark.parametrize(
    ("name", "text", "rules", "told"),
    [
        ("tags.csv", "image,tags\na.png,x\n", [], ("known as caption", "it has image, tags;", "--caption-column NAME")),
        (
            "space.csv",
            "image, caption\na.png,x\n",
            [],
            ("known as caption", "it has image,  caption;", "--caption-column"),
        ),
        (
            "tags.tsv",
            "image\ttags\na.png\tx\n",
            [],
            ("known as caption", "it has image, tags;", "--caption-column NAME"),
        ),
        ("tags.jsonl", '{"image": "a.png", "tags": "x"}\n', [], ("known as caption", "it has image, tags;")),
        (
            "photo.csv",
            "photo,caption\na.png,x\n",
            [],
            ("known as image", "it has photo, caption;", "--image-column NAME"),
        ),
        (
            "named.csv",
            "image,tags\na.png,x\n",
            ["--caption-column", "tag"],
            ("has no column tag", "it has image, tags"),
        ),
    ],
)
def test_of_columns_the_check_says_what_the_extraction_says(tmp_path, capsys, name, text, rules, told) -> None:
    (tmp_path / name).write_text(text)
    (tmp_path / "a.png").write_bytes(image())
    assert run(["data", "check", str(tmp_path / name), *rules]) == 8
    check = capsys.readouterr().err
    assert run(["extract-latents", str(tmp_path / name), *rules, "-o", str(tmp_path.parent / "out"), "--dry-run"]) == 4
    extraction = capsys.readouterr().err
    assert all(words in check and words in extraction for words in told)
