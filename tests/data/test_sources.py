"""Sources: what counts as a sample, what stops, what is counted."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bifrost_cli.config.schema import Images, Latents
from bifrost_cli.data.images import BadImage
from bifrost_cli.data.sources import scan as scan_module
from bifrost_cli.data.sources.item import SourceError
from bifrost_cli.data.sources.listing import as_typed_in
from bifrost_cli.data.sources.scan import Job, scan
from bifrost_cli.errors import BifrostError, DataError, EnvironmentProblem, UsageError
from bifrost_cli.shapes.captions import held_out
from bifrost_cli.training.data_order import image_of

RULES = Latents()
SKIP = Latents(bad_image="skip", max_bad=1.0, missing_caption="skip")


def put(folder: Path, name: str, caption: str | bytes | None = "an image", value: int = 0) -> Path:
    """One small PNG and its caption."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(path, "PNG")
    if caption is not None:
        data = caption if isinstance(caption, bytes) else caption.encode()
        path.with_suffix(".txt").write_bytes(data)
    return path


def listed(folder: Path, *lines: object) -> Path:
    path = folder / "metadata.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def refused(source: Path | str, code: str, rules: Latents = RULES, exit_code: int = 4) -> str:
    with pytest.raises(BifrostError) as caught:
        scan(source, rules)
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code), str(caught.value)
    return str(caught.value)


def test_a_folder_gives_samples_in_key_order(tmp_path: Path) -> None:
    for value, name in enumerate(("b.png", "a.PNG", "c")):
        put(tmp_path, name, f" caption of {name}\r\n", value)
    found = scan(tmp_path, RULES)
    assert [(s.key, s.caption) for s in found.samples] == [
        (k, f"caption of {n}") for k, n in zip("abc", ("a.PNG", "b.png", "c"), strict=True)
    ]
    assert found.funnel == {"seen": 3, "readable": 3, "captioned": 3, "used": 3} and found.events == ()
    assert found.counts == {".txt files": 3}
    assert (
        found.samples[0].load().rgb.mean() == 1 and found.samples[0].plan is None and len(found.samples[0].sha256) == 64
    )


def test_folders_without_images_say_what_they_hold(tmp_path: Path) -> None:
    assert "no images" in refused(tmp_path, "BF-DATA-001") and "it holds nothing" in refused(tmp_path, "BF-DATA-001")
    put(tmp_path / "inner", "a.png")
    (tmp_path / "notes.txt").write_text("x")
    message = refused(tmp_path, "BF-DATA-001")
    assert "1 folders not entered, 1 .txt files" in message and "recursive=true" in message and "png/jpg" in message
    assert [s.key for s in scan(tmp_path, Latents(recursive=True)).samples] == ["inner/a"]
    assert "does not exist" in refused(tmp_path / "nowhere", "BF-DATA-001")
    assert "not a folder" in refused(tmp_path / "notes.txt", "BF-DATA-001")


def test_bad_images_stop_or_are_counted(tmp_path: Path) -> None:
    for i in range(10):
        put(tmp_path, f"{i}.png", value=i)
    for i in range(7):
        (tmp_path / f"{i}.png").write_bytes(b"" if i else b"<!DOCTYPE html>")
    message = refused(tmp_path, "BF-DATA-003")
    assert "7 of 10 images" in message and "0.png: not an image (starts with '<!DOCTYPE')" in message
    assert message.count("empty file") == 4 and "and 2 more" in message and "--bad-image skip" in message
    assert "more than max_bad 0.5" in refused(tmp_path, "BF-DATA-004", Latents(bad_image="skip", max_bad=0.5))
    found = scan(tmp_path, Latents(bad_image="skip", max_bad=0.7))
    assert found.funnel == {"seen": 10, "readable": 3, "captioned": 3, "used": 3}
    assert [event.event for event in found.events] == ["bad-image"] * 7
    with pytest.raises(SourceError) as caught:
        scan(tmp_path, RULES)
    assert len(caught.value.problems) == 7


def test_missing_captions_stop_are_skipped_or_left_empty(tmp_path: Path) -> None:
    for i, caption in enumerate(("good", None, "", " \n\t", "\ufeff\r\n")):
        put(tmp_path, f"{i}.png", caption, i)
    message = refused(tmp_path, "BF-DATA-002")
    assert "4 of 5 images" in message and "--missing-caption skip" in message
    skipped = scan(tmp_path, Latents(missing_caption="skip"))
    assert [s.key for s in skipped.samples] == ["0"] and len(skipped.events) == 4
    assert skipped.funnel == {"seen": 5, "readable": 5, "captioned": 1, "used": 1}
    empty = scan(tmp_path, Latents(missing_caption="empty"))
    assert [s.caption for s in empty.samples] == ["good", "", "", "", ""] and empty.funnel["captioned"] == 1


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("\ufeffwith a mark\r\nand a line\r\n".encode(), "with a mark\nand a line"),
        ("utf-16 größe".encode("utf-16"), "utf-16 größe"),
        ("emoji 🦊, עברית, e\u0301 combining".encode(), "emoji 🦊, עברית, e\u0301 combining"),
        (b"x" * 65536, "x" * 65536),
    ],
)
def test_captions_are_kept_as_written(tmp_path: Path, data: bytes, text: str) -> None:
    put(tmp_path, "a.png", data)
    assert scan(tmp_path, RULES).samples[0].caption == text


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("na\u00efve".encode("latin-1"), "not UTF-8 at byte 2"),
        (b"\xff\xfea\x00b", "not UTF-16 at byte"),
        (b"half \xed\xa0\x80 a pair", "not UTF-8 at byte 5"),
        (b"a NUL \0 inside", "NUL character at 6"),
        (b"x" * 1_000_000, "1000000 bytes, more than 65536"),
        (b"x" * 65537, "65537 bytes, more than 65536"),
    ],
)
def test_captions_that_are_not_text_stop(tmp_path: Path, data: bytes, why: str) -> None:
    put(tmp_path, "a.png", data)
    message = refused(tmp_path, "BF-DATA-002", SKIP)
    assert why in message and "a.txt" in message


def test_two_images_with_one_key_stop(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    put(tmp_path, "a.jpg")
    message = refused(tmp_path, "BF-DATA-006")
    assert "'a.jpg' and 'a.png'" in message


def test_two_spellings_of_one_name_stop(tmp_path: Path) -> None:
    put(tmp_path, "caf\u00e9.png")
    put(tmp_path, "cafe\u0301.png")
    message = refused(tmp_path, "BF-DATA-006")
    assert r"'cafe\u0301.png' and 'caf\xe9.png'" in message


def test_odd_names_become_escaped_keys(tmp_path: Path) -> None:
    names = ["-leading", "$(touch x)", "new\nline", "ü" * 125, "a b"]
    for value, name in enumerate(names):
        put(tmp_path, name + ".png", value=value)
    keys = {sample.key for sample in scan(tmp_path, RULES).samples}
    assert keys == {"-leading", "%24%28touch%20x%29", "new%0Aline", "%C3%BC" * 125, "a%20b"}


def test_the_same_bytes_twice_are_kept_and_counted(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        put(tmp_path, name)
    found = scan(tmp_path, RULES)
    assert len(found.samples) == 2 and found.counts["duplicates"] == 1


def test_animations_can_be_left_out(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "b.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "b.txt").write_text("moving")
    assert scan(tmp_path, RULES).counts["first-frame"] == 1
    found = scan(tmp_path, Latents(), Images(animated="skip"))
    assert [s.key for s in found.samples] == ["a"] and found.events[0].event == "animated"


def test_metadata_names_captions_and_plans(tmp_path: Path) -> None:
    put(tmp_path / "sub", "b.png", None, 1)
    put(tmp_path, "a.png", None)
    put(tmp_path, "unlisted.png", None)
    lines = ({"file_name": "sub/b.png", "text": "second"}, "", {"file_name": "a.png", "caption": "first", "plan": "p"})
    metadata = listed(tmp_path, *lines)
    for source in (tmp_path, metadata):
        found = scan(source, RULES)
        assert [(s.key, s.caption, s.plan) for s in found.samples] == [("a", "first", "p"), ("sub/b", "second", None)]
        assert found.counts["images not in metadata.jsonl"] == 1


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"file_name": "a.png", ', "metadata.jsonl:2"),
        ("[1, 2]", "not a JSON object"),
        ('{"image": "a.png", "caption": "x"}', "no file_name; it has image, caption"),
        ('{"file_name": 3}', "file_name is not text"),
        ('{"file_name": "b.png", "caption": "half \\ud800"}', "half a surrogate pair"),
        ('{"file_name": "b.png", "caption": "nul \\u0000"}', "NUL"),
        ("[" * 100_000, "metadata.jsonl:2"),
    ],
)
def test_broken_metadata_lines_name_their_number(tmp_path: Path, line: str, why: str) -> None:
    put(tmp_path, "a.png", None)
    listed(tmp_path, {"file_name": "a.png", "caption": "x"}, line)
    message = refused(tmp_path, "BF-DATA-005")
    assert "metadata.jsonl:2:" in message and why in message


@pytest.mark.parametrize(
    "name", ["../out.png", "sub/../../out.png", "/etc/passwd", "~/x.png", "\\\\host\\x.png", "C:/x.png", "C:\\x.png"]
)
def test_metadata_does_not_leave_its_folder(tmp_path: Path, name: str) -> None:
    listed(tmp_path, {"file_name": name, "caption": "x"})
    assert "leaves the source folder" in refused(tmp_path, "BF-DATA-005", SKIP)


def test_metadata_may_leave_when_allowed(tmp_path: Path) -> None:
    put(tmp_path, "out.png", None)
    (tmp_path / "in").mkdir()
    listed(tmp_path / "in", {"file_name": "../out.png", "caption": "x"})
    assert len(scan(tmp_path / "in", Latents(allow_outside=True)).samples) == 1


def test_an_empty_list_and_a_missing_file(tmp_path: Path) -> None:
    listed(tmp_path)
    assert "no lines" in refused(tmp_path, "BF-DATA-001")
    listed(tmp_path, {"file_name": "gone.png", "caption": "x"})
    assert "file not found" in refused(tmp_path, "BF-DATA-003")


def test_several_captions_of_one_image_are_rows_of_their_own(tmp_path: Path) -> None:
    put(tmp_path, "a.png", None)
    put(tmp_path, "b.png", None)
    rows = [{"file_name": name, "caption": text} for name, text in (("a.png", "x"), ("b.png", "z"), ("a.png", "y"))]
    listed(tmp_path, *rows, rows[0])
    samples = scan(tmp_path, RULES).samples
    assert [(s.key, s.caption) for s in samples] == [("a", "x"), ("a#1", "y"), ("b", "z")]
    assert {image_of(s.key) for s in samples} == {"a", "b"}, "an image's rows stay on one side of validation"
    flipped = scan(tmp_path, Latents(flip=True)).samples
    assert [s.key for s in flipped] == ["a", "a#flip", "a#1", "a#1#flip", "b", "b#flip"]


def test_one_problem_hides_no_other(tmp_path: Path) -> None:
    """A caption that is no text, a broken image and two of one key: each costs its own image, and all are listed."""
    for name in ("a", "b", "c", "d", "e"):
        put(tmp_path, f"{name}.png")
    put(tmp_path, "a.jpg")
    (tmp_path / "b.txt").write_bytes(b"the artist\x92s dot")
    (tmp_path / "c.png").write_bytes(b"<html>404</html>")
    (tmp_path / "d.txt").unlink()
    assert "1 captions in" in refused(tmp_path, "BF-DATA-002", SKIP)
    found = scan(tmp_path, SKIP, stop=False)
    assert [s.key for s in found.samples] == ["e"] and found.funnel["seen"] == 3
    assert sorted(event.event for event in found.events) == ["bad-image", "caption", "key", "missing-caption"]
    (tmp_path / "b.txt").write_text("a dot")
    assert "'a.jpg' and 'a.png'" in refused(tmp_path, "BF-DATA-006", SKIP)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_tables_of_an_imagefolder_are_read_and_those_below_are_named(tmp_path: Path, name: str) -> None:
    put(tmp_path / "train", "a.png", None)
    rows = '{"file_name": "a.png", "text": "x"}\n' if name.endswith("jsonl") else "file_name,text\na.png,x\n"
    (tmp_path / "train" / name).write_text(rows)
    assert [s.caption for s in scan(tmp_path / "train", RULES).samples] == ["x"]
    for rules in (RULES, Latents(recursive=True)):
        message = refused(tmp_path, "BF-DATA-002", rules)
        assert f"train/{name}" in message and f"give the folder of one: {tmp_path / 'train'}" in message


def test_paths_into_the_folder_of_the_table_do_not_leave_it(tmp_path: Path) -> None:
    put(tmp_path / "sub", "a.png", None)
    put(tmp_path, "b.png", None)
    listed(
        tmp_path, {"file_name": str(tmp_path / "b.png"), "caption": "x"}, {"file_name": "sub\\a.png", "caption": "y"}
    )
    assert [(s.key, s.caption) for s in scan(tmp_path, RULES).samples] == [("b", "x"), ("sub/a", "y")]
    for name in (str(tmp_path / ".." / tmp_path.name / "b.png"), str(tmp_path.parent / "b.png"), "sub\\..\\..\\b.png"):
        listed(tmp_path, {"file_name": name, "caption": "x"})
        assert "--set latents.allow_outside=true" in refused(tmp_path, "BF-DATA-005")


def test_linked_folders_are_named_with_the_way_to_read_them(tmp_path: Path) -> None:
    put(tmp_path / "real", "a.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "batch").symlink_to(tmp_path / "real")
    message = refused(tmp_path / "set", "BF-DATA-001", Latents(recursive=True))
    assert "give the folder that one leads to" in message and "recursive=true" not in message
    (tmp_path / "set" / "b.png").symlink_to(put(tmp_path, "b.png"))
    (tmp_path / "set" / "b.txt").write_text("x")
    assert "--set latents.allow_outside=true" in refused(tmp_path / "set", "BF-DATA-003")


def test_a_folder_may_have_the_name_of_an_archive(tmp_path: Path) -> None:
    put(tmp_path / "photos.tar", "a.png")
    assert [s.key for s in scan(tmp_path / "photos.tar", RULES).samples] == ["a"]


def test_links_devices_and_pipes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    put(source, "a.png")
    outside = put(tmp_path, "outside.png")
    (source / "b.png").symlink_to(outside)
    (source / "inside.png").symlink_to(source / "a.png")
    (source / "dangling.png").symlink_to(source / "nowhere")
    (source / "loop.png").symlink_to(source / "loop.png")
    (source / "device.png").symlink_to("/dev/zero")
    (source / "folder").symlink_to(tmp_path)
    os.mkfifo(source / "pipe.png")
    os.mkfifo(source / "pipe")
    for name in ("b", "inside", "dangling", "loop", "device", "pipe"):
        (source / f"{name}.txt").write_text("x")
    found = scan(source, Latents(bad_image="skip", max_bad=1.0, recursive=True))
    assert [s.key for s in found.samples] == ["a", "inside"] and found.counts["linked folders not entered"] == 1
    reasons = {Path(event.where).name: event.reason for event in found.events}
    assert "outside the source folder" in reasons["b.png"] and "outside" in reasons["device.png"]
    assert reasons["dangling.png"] == "dangling link" and reasons["pipe.png"] == "not a regular file"
    assert "links" in reasons["loop.png"]
    allowed = scan(source, Latents(bad_image="skip", max_bad=1.0, allow_outside=True))
    assert [s.key for s in allowed.samples] == ["a", "b", "inside"]
    assert {Path(e.where).name: e.reason for e in allowed.events}["device.png"] == "not a regular file"


def test_a_caption_linked_from_outside_is_not_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    put(source, "a.png", None)
    (tmp_path / "secret").write_text("secret")
    (source / "a.txt").symlink_to(tmp_path / "secret")
    message = refused(source, "BF-DATA-002")
    assert "outside the source folder" in message and "secret\n" not in message


def test_an_image_that_changes_after_the_scan_is_not_loaded(tmp_path: Path) -> None:
    path = put(tmp_path, "a.png")
    sample = scan(tmp_path, RULES).samples[0]
    put(tmp_path, "a.png", value=9)
    with pytest.raises(BadImage, match="changed during the run"):
        sample.load()
    path.unlink()
    with pytest.raises(BadImage, match="file not found"):
        sample.load()


def test_the_source_is_left_as_it_was(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    scan(tmp_path, RULES)
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}


def test_the_built_in_world_is_a_function_of_seed_and_row() -> None:
    short, long, other = scan("shapes:5", RULES), scan("shapes:9:0", RULES), scan("shapes:5:1", RULES)
    for a, b in zip(short.samples, long.samples[:5], strict=True):
        assert (a.key, a.caption, a.plan, a.sha256) == (b.key, b.caption, b.plan, b.sha256)
        assert np.array_equal(a.load().rgb, b.load().rgb) and a.load().rgb.shape == (64, 64, 3)
        assert not held_out(a.caption) and a.plan
    assert [s.key for s in long.samples] == sorted(s.key for s in long.samples)
    assert [s.sha256 for s in short.samples] != [s.sha256 for s in other.samples]
    assert short.funnel == {"seen": 5, "readable": 5, "captioned": 5, "used": 5}


@pytest.mark.parametrize(
    "source", ["shapes:", "shapes:0", "shapes:-3", "shapes:x", "shapes:3:4:5", "shapes:3:-1", "shapes:²"]
)
def test_a_malformed_world_is_a_usage_error(source: str) -> None:
    with pytest.raises(UsageError):
        scan(source, RULES)


def test_nothing_left_to_use_stops(tmp_path: Path) -> None:
    put(tmp_path, "a.png", None)
    with pytest.raises(DataError, match="nothing in"):
        scan(tmp_path, SKIP)


# ---- tables ----------------------------------------------------------------------------------------------------------


def table(folder: Path, name: str, data: str | bytes) -> Path:
    """A table beside two images, a.png and b.png."""
    for value, image in enumerate(("a.png", "b.png")):
        put(folder, image, None, value)
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder / name


def test_a_csv_gives_samples_and_says_which_columns(tmp_path: Path) -> None:
    text = '\ufeffimage,text,score\r\nb.png,"two\nlines, and ""quotes""",1\r\na.png,größe,2\r\n'
    found = scan(table(tmp_path, "list.csv", text), RULES)
    assert [(s.key, s.caption) for s in found.samples] == [("a", "größe"), ("b", 'two\nlines, and "quotes"')]
    assert "images from image, captions from text" in found.said[0] and "--caption-column" in found.said[0]
    tsv = scan(table(tmp_path, "list.tsv", "wo\twas\tcaption\na.png\tein Bild\tx\n"),
               Latents(image_column="wo", caption_column="was"))  # fmt: skip
    assert [s.caption for s in tsv.samples] == ["ein Bild"] and tsv.said == ()
    assert tsv.counts["images not in list.tsv"] == 1


def test_a_quotation_mark_in_a_tsv_swallows_no_row(tmp_path: Path) -> None:
    rows = [
        'a.png\t"half of a quote',
        'b.png\tends with a quote"',
        'c.png\t"whole, ""inner"" too"',
        'd.png\t"a" and "b"',
    ]
    for name in "cd":
        put(tmp_path, f"{name}.png", None)
    found = scan(table(tmp_path, "list.tsv", "image\tcaption\n" + "\n".join(rows) + "\n"), RULES)
    assert [s.caption for s in found.samples] == [
        '"half of a quote', 'ends with a quote"', 'whole, "inner" too', '"a" and "b"']  # fmt: skip


def test_a_long_cell_that_nobody_reads_stops_no_table(tmp_path: Path) -> None:
    found = scan(table(tmp_path, "list.csv", f"image,text,base64\na.png,x,{'A' * 200_000}\n"), RULES)
    assert [s.caption for s in found.samples] == ["x"]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("größe,text\n".encode("latin-1"), "not UTF-8 at byte 2"),
        (b"", "is empty"),
        (b"image,image,text\n", "names a column twice: image"),
        (b"image,text\na.png,x,y\n", "list.csv:2: 3 fields, where the first line names 2"),
        (b"image,text\na.png,nul \0\n", "list.csv:2: text: a NUL character"),
        (b'image,text\na.png,"open\nb.png,x\n', "list.csv:3: unexpected end of data"),
        (b"image,text\n../a.png,x\n", "leaves the source folder"),
        (b"image,text\nhttps://host/a.png,x\n", "leaves the source folder"),
        (b"image,text\n,x\n", "list.csv:2: no image; it has image, text"),
        (b"wo,text\na.png,x\n", "no column known as image"),
        (b"image,was\na.png,x\n", "it has image, was"),
    ],
)
def test_tables_that_cannot_be_read_say_why(tmp_path: Path, data: bytes, why: str) -> None:
    assert why in refused(table(tmp_path, "list.csv", data), "BF-DATA-005")


def test_a_named_column_must_be_there(tmp_path: Path) -> None:
    path = table(tmp_path, "list.csv", "image,text\na.png,x\n")
    message = refused(path, "BF-DATA-005", Latents(caption_column="label"))
    assert "no column label" in message and "it has image, text" in message and "--caption-column" in message


def test_an_empty_cell_is_a_missing_caption(tmp_path: Path) -> None:
    path = table(tmp_path, "list.csv", "image,text\na.png,\nb.png,x\n")
    assert "1 of 2 images" in refused(path, "BF-DATA-002")
    assert [s.key for s in scan(path, Latents(missing_caption="skip")).samples] == ["b"]


def test_parts_of_a_table_are_one_source(tmp_path: Path) -> None:
    table(tmp_path, "part-0.jsonl", json.dumps({"image": "b.png", "caption": "second"}))
    table(tmp_path, "part-1.jsonl", json.dumps({"image": "a.png", "caption": "first"}))
    found = scan(tmp_path / "part-{0..1}.jsonl", RULES)
    assert [(s.key, s.caption) for s in found.samples] == [("a", "first"), ("b", "second")]
    assert "part-2.jsonl does not exist" in refused(tmp_path / "part-{0..2}.jsonl", "BF-DATA-001")
    with pytest.raises(UsageError, match="no range"):
        scan(tmp_path / "part-{2..0}.jsonl", RULES)


def test_columns_and_classes_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    path = table(tmp_path, "list.csv", "image,text\na.png,x\n")
    refused(tmp_path, "BF-RECIPE-005", Latents(image_column="image"), 2)
    refused(path, "BF-RECIPE-005", Latents(captions="folders"), 2)
    refused("shapes:3", "BF-RECIPE-005", Latents(caption_column="text"), 2)
    refused(tmp_path, "BF-RECIPE-005", Latents(class_names="words.txt"), 2)


# ---- folders that are classes ----------------------------------------------------------------------------------------


def test_a_folder_for_each_class_gives_captions(tmp_path: Path) -> None:
    for value, name in enumerate(("n02/x.png", "n01/y.png", "n01/z.JPEG")):
        put(tmp_path / "train", name, None, value)
    plain = scan(tmp_path / "train", Latents(captions="folders"))
    assert [(s.key, s.caption) for s in plain.samples] == [("n01/y", "n01"), ("n01/z", "n01"), ("n02/x", "n02")]
    words = tmp_path / "LOC_synset_mapping.txt"
    words.write_text("n01 tench, Tinca tinca\nn02\tgold fish\nn03 other\n")
    rules = Latents(captions="folders", class_names=str(words))
    found = scan(tmp_path / "train", rules)
    assert [s.caption for s in found.samples] == ["tench, Tinca tinca"] * 2 + ["gold fish"]
    assert found.said == (f"captions: 2 classes, from {words}",)
    put(tmp_path / "train", "n09/x.png", None, 9)
    assert "1 of 3 classes have no name" in refused(tmp_path / "train", "BF-DATA-002", rules)
    (tmp_path / "train" / "n09" / "x.png").rename(tmp_path / "train" / "top.png")
    assert "1 of 4 images" in refused(tmp_path / "train", "BF-DATA-002", rules)
    words.unlink()
    assert "cannot be read: file not found" in refused(tmp_path / "train", "BF-DATA-002", rules)


# ---- elsewhere -------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[str]:
    """A list and its images in fsspec's memory."""
    import fsspec

    files = fsspec.filesystem("memory")
    for value, name in enumerate(("a.png", "b.png")):
        files.pipe_file(f"/remote/{name}", put(tmp_path, name, None, value).read_bytes())
    files.pipe_file("/remote/list.csv", b"image,text\na.png,first\nb.png,second\n")
    yield "memory://remote"
    files.rm("/remote", recursive=True)


def test_a_table_elsewhere_is_read_through_fsspec(memory: str) -> None:
    found = scan(f"{memory}/list.csv", RULES)
    assert [(s.key, s.caption, s.load().rgb.mean()) for s in found.samples] == [("a", "first", 0), ("b", "second", 1)]
    import fsspec

    fsspec.filesystem("memory").rm("/remote/b.png")
    with pytest.raises(BadImage, match="file not found"):
        found.samples[1].load()
    assert "does not exist" in refused(f"{memory}/other.csv", "BF-DATA-001")
    assert "folders are read locally only" in refused(memory, "BF-DATA-001")


@pytest.mark.parametrize(
    ("source", "code", "exit_code", "why"),
    [
        ("s3://bucket/list.csv", "BF-ENV-002", 3, "pip install s3fs"),
        ("ssh://host/list.csv", "BF-USE-001", 2, "ssh:// is not read"),
        ("simplecache::s3://bucket/list.csv", "BF-USE-001", 2, "is not read"),
        ("pipe:touch x://h/x.csv", "BF-USE-001", 2, "is not read"),
    ],
)
def test_addresses_that_cannot_be_opened(source: str, code: str, exit_code: int, why: str,
                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert why in refused(source, code, exit_code=exit_code)


def test_a_network_that_fails_is_no_bad_picture(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    sample = scan(f"{memory}/list.csv", RULES).samples[0]

    def broken(self: object, *arguments: object) -> bytes:
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", broken)
    with pytest.raises(EnvironmentProblem, match="reset by peer"):
        sample.load()


# ---- mirror images ---------------------------------------------------------------------------------------------------


def test_a_flip_is_a_second_row(tmp_path: Path) -> None:
    for name, caption in (("a.png", "a cat to the Left"), ("a b.png", "a dog")):
        rgb = np.random.default_rng(len(name)).integers(0, 255, (40, 40, 3), np.uint8)
        put(tmp_path, name, caption)
        Image.fromarray(rgb).save(tmp_path / name)
    found = scan(tmp_path, Latents(flip=True))
    assert [s.key for s in found.samples] == ["a", "a#flip", "a%20b", "a%20b#flip"]
    assert [s.key for s in found.samples] == sorted(s.key for s in found.samples)
    row, flip = found.samples[:2]
    assert (row.caption, row.sha256) == (flip.caption, flip.sha256) and flip.load().notes == ("flipped",)
    assert np.array_equal(row.load().rgb[:, ::-1], flip.load().rgb)
    assert found.funnel == {"seen": 2, "readable": 2, "captioned": 2, "used": 4, "flipped": 2}
    assert found.said == ("flip: 1 of 2 captions say left or right, which is wrong of their flipped row",)
    assert "say where things are" in refused("shapes:3", "BF-RECIPE-005", Latents(flip=True), 2)


def test_a_source_that_was_typed_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "a-0.tar").touch()
    found = {
        "photos": f"{tmp_path}/photos", "hf:photos:test": f"hf:{tmp_path}/photos:test",
        "a-*.tar": f"{tmp_path}/a-*.tar", "a-{0..3}.tar": f"{tmp_path}/a-{{0..3}}.tar",
    }  # fmt: skip
    as_they_are = (
        "other",
        "hf:me/data:test",
        "s3://me/*.tar",
        "hf://datasets/me/a.csv",
        "shapes:90:3",
        "/photos",
        "b-*.tar",
    )
    for source, place in found.items():
        assert as_typed_in(tmp_path, source) == place
    for source in as_they_are:
        assert as_typed_in(tmp_path, source) == source


# ---- several processes, and what is decoded once --------------------------------------------------------------------


def test_processes_share_a_scan_and_all_have_all_of_it(tmp_path: Path) -> None:
    for value in range(5):
        put(tmp_path, f"{value}.png", value=value)
    (tmp_path / "3.png").write_bytes(b"no image")
    barrier, values = threading.Barrier(2), {}
    checked: dict[int, int] = {0: 0, 1: 0}

    def job(number: int) -> Job:
        """Process `number` of two, which are threads here."""

        def gather(value: list) -> list:
            values[number], checked[number] = value, len(value)
            barrier.wait(20)
            return [values[0], values[1]]

        def part(items):
            return items[number * len(items) // 2 : (number + 1) * len(items) // 2]

        return Job(lambda work: work(), part, gather, first=number == 0)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda number: scan(tmp_path, SKIP, job=job(number)), range(2))
    alone = scan(tmp_path, SKIP)
    assert checked == {0: 2, 1: 3}
    for found in (first, second):
        assert (found.funnel, found.events) == (alone.funnel, alone.events)
        assert [(s.key, s.sha256) for s in found.samples] == [(s.key, s.sha256) for s in alone.samples]


def test_a_small_source_is_decoded_once_and_read_again(tmp_path: Path, monkeypatch) -> None:
    for value in range(3):
        put(tmp_path, f"{value}.png", value=value)
    monkeypatch.setattr(scan_module, "KEPT", 2 * 32 * 32 * 3)
    decoded, read = [], scan_module.read_image
    monkeypatch.setattr(scan_module, "read_image", lambda *given: decoded.append(1) or read(*given))
    samples = scan(tmp_path, RULES).samples
    assert len(decoded) == 3
    assert [int(sample.load().rgb[0, 0, 0]) for sample in samples] == [0, 1, 2]
    assert len(decoded) == 4, "there is room for two"
