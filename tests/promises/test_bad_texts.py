"""Bad inputs 24 to 35, as commands: keys that clash, captions and prompts that are no text, names, tables, places."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from fixtures_targets import Means, Noise, _part
from refusals import SMALL, refused, told
from test_bad_images import command, put
from test_images import encoded, texture
from test_webdataset import archive, image

from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.generation import pipeline
from bifrost_cli.loading.loaders import ModelLoader

PNG = encoded(texture(), "PNG")


@pytest.fixture(autouse=True)
def means(monkeypatch):
    monkeypatch.setattr(ModelLoader, "encoder", lambda *_, **__: Means(lambda: None))


@pytest.fixture
def inputs(tmp_path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


# ---- 24 to 28: keys and captions ------------------------------------------------------------------------------------


def test_24_two_pictures_of_one_key(inputs, tmp_path, capsys):
    put(inputs, "a.png", PNG)
    put(inputs, "a.jpg", encoded(texture(), "JPEG"))
    said = refused(capsys, inputs, 4, "DATA-006", "a.png", *command(inputs, tmp_path))
    assert "a.jpg" in said and not (tmp_path / "out").exists()


def test_24_a_member_twice_in_an_archive(inputs, tmp_path, capsys):
    path = archive(inputs / "a.tar", ("3.png", image(0)), ("3.txt", b"x"), ("3.png", image(1)))
    said = refused(capsys, inputs, 4, "DATA-006", "3.png", *command(path, tmp_path))
    assert "a.tar" in said and not (tmp_path / "out").exists()


def test_25_a_caption_that_is_missing(inputs, tmp_path, capsys):
    put(inputs, "a.png", PNG)
    (inputs / "b.png").write_bytes(PNG)
    refused(capsys, inputs, 4, "DATA-002", "b.png", *command(inputs, tmp_path))
    assert not (tmp_path / "out").exists()
    assert told(capsys, inputs, *command(inputs, tmp_path), "--missing-caption", "skip")[0] == 0
    assert LatentsStore.open(tmp_path / "out").keys == ["a"]
    empty = ["extract-latents", inputs, "-o", tmp_path / "empty", *SMALL, "--missing-caption", "empty"]
    assert told(capsys, inputs, *empty)[0] == 0
    assert LatentsStore.open(tmp_path / "empty").captions == ["a caption", ""]


@pytest.mark.parametrize("data", [b"", b"  \r\n ", b"\xef\xbb\xbf\r\n"], ids=["nothing", "spaces", "bom"])
def test_26_a_caption_of_nothing_is_missing(inputs, tmp_path, capsys, data):
    put(inputs, "a.png", PNG).with_suffix(".txt").write_bytes(data)
    refused(capsys, inputs, 4, "DATA-002", "a.", *command(inputs, tmp_path))


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"\xef\xbb\xbfa red circle\r\n", "a red circle"), ("a red circle".encode("utf-16"), "a red circle"),
     ("a\u0301 \U0001f600 \u0645\u0631".encode(), "a\u0301 \U0001f600 \u0645\u0631")],
    ids=["26-bom-and-crlf", "27-utf-16-with-its-mark", "28-emoji-right-to-left-combining"],
)  # fmt: skip
def test_26_27_28_captions_are_kept_as_they_are(inputs, tmp_path, capsys, data, text):
    put(inputs, "a.png", PNG).with_suffix(".txt").write_bytes(data)
    assert told(capsys, inputs, *command(inputs, tmp_path))[0] == 0
    assert LatentsStore.open(tmp_path / "out").captions == [text]


@pytest.mark.parametrize(
    ("data", "words"),
    [("caf\xe9".encode("latin-1"), "byte 3"), (b"a\xed\xa0\x80", "byte 1"), (b"a\0b", "NUL"),
     (b"x" * 1_000_000, "more than 65536")],
    ids=["27-latin-1", "27-lone-surrogate", "28-nul", "28-a-megabyte"],
)  # fmt: skip
def test_27_28_captions_that_are_no_text(inputs, tmp_path, capsys, data, words):
    put(inputs, "a.png", PNG).with_suffix(".txt").write_bytes(data)
    said = refused(capsys, inputs, 4, "DATA-002", "a.txt", *command(inputs, tmp_path))
    assert words in said and not (tmp_path / "out").exists(), said


# ---- 29: names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["-rf", "$(touch canary)", "a\nb", "x" * 251, "\u00e9"],
                         ids=["dash", "dollar", "newline", "255 bytes", "accent"])  # fmt: skip
def test_29_odd_names_are_escaped_keys(inputs, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    put(inputs, f"{name}.png", PNG)
    assert told(capsys, inputs, *command(inputs, tmp_path))[0] == 0
    (key,) = LatentsStore.open(tmp_path / "out").keys
    assert key.isascii() and key.isprintable() and not (tmp_path / "canary").exists()


def test_29_two_spellings_of_one_name(inputs, tmp_path, capsys):
    for name in ("caf\u00e9.png", "cafe\u0301.png"):
        put(inputs, name, PNG)
    if len(list(inputs.glob("*.png"))) < 2:
        pytest.skip("this file system has one spelling")
    refused(capsys, inputs, 4, "DATA-006", "cafe", *command(inputs, tmp_path))


# ---- 30, 31: prompts ------------------------------------------------------------------------------------------------


@pytest.fixture
def render(inputs, tmp_path, capsys, monkeypatch):
    """`bifrost generate --prompts` with a diffusion model of noise."""
    monkeypatch.setattr(pipeline, "BifrostPipeline", lambda *rest, **more: Noise(lambda: None, False))
    parts = [word for kind in ("branch", "controlnet") for word in (f"--{kind}", _part(tmp_path / "it", kind))]

    def run_it(text: str | bytes, *more: object) -> tuple[int, str]:
        (inputs / "prompts.txt").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        where = ["--prompts", inputs / "prompts.txt", "-o", tmp_path / "out", *parts, "--device", "cpu"]
        return told(capsys, inputs, "generate", *where, *more)

    return run_it


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "no prompt"), ("\n \n", "no prompt"), (b"a\xff", "UTF-8"), ("a\0b\n", "prompts.txt:1")],
    ids=["empty", "blank", "latin-1", "nul"],
)
def test_30_a_prompt_file_of_nothing(render, tmp_path, text, words):
    code, said = render(text)
    assert code == 2 and words in said and "prompts.txt" in said and not (tmp_path / "out").exists()


def test_30_blank_lines_repeats_and_number_signs(render, tmp_path):
    code, said = render("a star\n\n# a star\na star\n")
    assert code == 0 and "1 blank lines skipped" in said
    lines = [json.loads(line) for line in (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()]
    assert [(line["index"], line["prompt"], line["seed"]) for line in lines] == [
        (0, "a star", 0), (1, "# a star", 0), (2, "a star", 1)]  # fmt: skip


def test_30_a_million_lines_are_planned(render, tmp_path):
    code, said = render("a red circle\n" * 1_000_000, "--dry-run")
    assert code == 0 and "pictures: 1000000" in said and not (tmp_path / "out").exists()


def test_31_a_prompt_is_no_file_name(render, tmp_path):
    prompts = ["../../evil", "a/b", "x" * 300, 'it\'s "so" $(touch canary)']
    code, _ = render("\n".join(prompts))
    assert code == 0 and sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        f"{index:05d}.png" for index in range(4)]  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "inputs", "out"], "nothing was made elsewhere"


# ---- 32 to 35: tables, links, places --------------------------------------------------------------------------------


def test_32_a_line_that_is_no_json(inputs, tmp_path, capsys):
    put(inputs, "a.png", PNG)
    lines = [json.dumps({"image": "a.png", "caption": f"number {i}"}) for i in range(20)]
    lines[16] = lines[16][:-5]
    (inputs / "list.jsonl").write_text("\n".join(lines))
    refused(capsys, inputs, 4, "DATA-005", "list.jsonl:17", *command(inputs / "list.jsonl", tmp_path))


def test_32_a_column_that_is_not_there(inputs, tmp_path, capsys):
    put(inputs, "a.png", PNG)
    (inputs / "list.csv").write_text("image,caption\na.png,x\n")
    said = refused(capsys, inputs, 4, "DATA-005", "list.csv", *command(inputs / "list.csv", tmp_path),
                   "--caption-column", "text")  # fmt: skip
    assert "image" in said and "caption" in said, "the columns that are there"


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "~/x.png", "\\\\host\\share\\x.png"])
def test_33_a_path_out_of_the_folder(inputs, tmp_path, capsys, name):
    (inputs / "list.jsonl").write_text(json.dumps({"image": name, "caption": "x"}) + "\n")
    code, said = told(capsys, inputs, *command(inputs / "list.jsonl", tmp_path))
    assert code == 4 and "list.jsonl" in said and not (tmp_path / "out").exists(), said


def test_34_links_devices_and_pipes_are_never_opened(inputs, tmp_path, capsys):
    put(inputs, "good.png", PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    (inputs / "outside.png").symlink_to(tmp_path / "secret.png")
    (inputs / "loop.png").symlink_to(inputs / "loop.png")
    (inputs / "gone.png").symlink_to(inputs / "nothing.png")
    os.mkfifo(inputs / "pipe.png")
    for name in ("outside", "loop", "gone", "pipe"):
        (inputs / f"{name}.txt").write_text("x")
    said = refused(capsys, inputs, 4, "DATA-003", "outside.png", *command(inputs, tmp_path))
    assert all(f"{name}.png" in said for name in ("loop", "gone", "pipe"))
    code, said = told(capsys, inputs, *command(inputs, tmp_path), "--bad-image", "skip", "--max-bad", "0.9")
    assert code == 0 and LatentsStore.open(tmp_path / "out").keys == ["good"]


def test_35_an_output_that_is_a_link_or_lies_in_the_input(inputs, tmp_path, capsys):
    put(inputs, "a.png", PNG)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    refused(capsys, inputs, 2, "USE-002", "is a link", *command(inputs, tmp_path))
    inside = ["extract-latents", inputs, "-o", inputs / "out", *SMALL]
    refused(capsys, inputs, 2, "USE-001", "lies inside", *inside)
    assert not any((tmp_path / "elsewhere").iterdir())
