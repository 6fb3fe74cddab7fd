"""WebDataset archives: what Python's tarfile writes is read back; a cut, a flip or a hostile name is never silent."""

from __future__ import annotations

import functools
import http.server
import io
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bifrost_cli.config.schema import Latents
from bifrost_cli.data.images import BadImage
from bifrost_cli.data.sources.scan import scan
from bifrost_cli.data.sources.webdataset import members
from bifrost_cli.errors import BifrostError, DataError

RULES = Latents()


def image(value: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def archive(path: Path, *parts: tuple[str, bytes | str], format: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar of (name, bytes), or (name, "link") and so on for a member of that type."""
    kinds = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "fifo": tarfile.FIFOTYPE, "folder": tarfile.DIRTYPE}
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in parts:
            member = tarfile.TarInfo(name)
            if isinstance(data, str):
                member.type, member.linkname = kinds[data], "/etc/passwd"
                tar.addfile(member)
            else:
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def refused(source: Path | str, code: str, rules: Latents = RULES, exit_code: int = 4) -> str:
    with pytest.raises(BifrostError) as caught:
        scan(source, rules)
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code), str(caught.value)
    return str(caught.value)


def test_samples_and_their_texts(tmp_path: Path) -> None:
    path = archive(
        tmp_path / "a.tar", (".", "folder"), ("./b.png", image(1)), ("./b.txt", "zwei größe\r\n".encode()),
        ("a.jpg", image(0)), ("a.json", b'{"caption": "one", "plan": "p", "score": 1}'), ("a.cls", b"1"),
        ("a.pkl", b"cos\nsystem\n(S'touch canary'\ntR."), ("a.seg.png", image(9)), ("lonely.txt", b"x"),
    )  # fmt: skip
    found = scan(path, RULES)
    assert [(s.key, s.caption, s.plan) for s in found.samples] == [("a", "one", "p"), ("b", "zwei größe", None)]
    assert [s.load().rgb.mean() for s in found.samples] == [0, 1]
    assert found.counts == {".pkl members": 1, ".seg.png members": 1, "samples without an image": 1}
    assert "score is not text" in refused(path, "BF-DATA-002", Latents(caption_column="score"))
    words = tmp_path / "words.txt"
    words.write_text("n01 tench\nn02 goldfish\n")
    named = scan(path, Latents(class_names=str(words), missing_caption="skip"))
    assert [(s.key, s.caption) for s in named.samples] == [("a", "goldfish")]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_and_long_names(tmp_path: Path, format: int) -> None:
    name = "folder/" + "n" * 90 + ("x" * 200 if format != tarfile.USTAR_FORMAT else "")
    parts = [(f"{name}.png", image()), (f"{name}.txt", b"long"), ("ü.png", image()), ("ü.txt", b"umlaut")]
    found = scan(archive(tmp_path / "a.tar", *parts, format=format), RULES)
    assert {s.key: s.caption for s in found.samples} == {name: "long", "%C3%BC": "umlaut"}


def test_shards_are_one_source_and_keys_say_which(tmp_path: Path) -> None:
    for shard in range(2):
        archive(tmp_path / f"s-{shard:03d}.tar", ("0.png", image(shard)), ("0.txt", b"x"))
    found = scan(tmp_path / "s-{000..001}.tar", RULES)
    assert [(s.key, s.load().rgb.mean()) for s in found.samples] == [("s-000/0", 0), ("s-001/0", 1)]
    assert "s-002.tar does not exist" in refused(tmp_path / "s-{000..002}.tar", "BF-DATA-001")


def test_a_picture_without_a_caption_is_the_missing_caption(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", ("0.png", image()), ("1.png", image()), ("1.json", b'{"caption": null}'))
    assert "2 of 2 images" in refused(path, "BF-DATA-002")
    assert [s.caption for s in scan(path, Latents(missing_caption="empty")).samples] == ["", ""]


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("../../evil.png", None, "a name that leaves the archive"),
        ("/abs/evil.png", None, "a name that leaves the archive"),
        ("C:\\evil.png", None, "a name that leaves the archive"),
        ("../evil.txt", b"x", "a name that leaves the archive"),
        ("1.png", "link", "a link in an archive"),
        ("1.txt", "link", "a link in an archive"),
        ("1.png", "hard", "a hard link in an archive"),
        ("1.png", "fifo", "a pipe in an archive"),
    ],
)
def test_hostile_members_stop_or_are_left_out(tmp_path: Path, name: str, data: object, why: str) -> None:
    path = archive(tmp_path / "a.tar", ("0.png", image()), ("0.txt", b"fine"), (name, data or image()))
    message = refused(path, "BF-DATA-003")
    assert why in message and f"a.tar: {name}" in message
    found = scan(path, Latents(bad_image="skip", max_bad=0.5))
    assert [s.key for s in found.samples] == ["0"] and found.events[0].reason == why
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tar"]


def test_two_of_one_sample_stop(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", ("0.png", image()), ("0.jpg", image()), ("0.txt", b"x"))
    assert "'0.jpg'" in refused(path, "BF-DATA-006") and "'0.png'" in refused(path, "BF-DATA-006")
    path = archive(tmp_path / "a.tar", ("0.png", image()), ("0.txt", b"x"), ("0.txt", b"y"))
    assert "two members 0.txt" in refused(path, "BF-DATA-006")


def test_captions_that_are_not_text_name_their_member(tmp_path: Path) -> None:
    for name, data, why in (("0.txt", b"\xff", "not UTF-8"), ("0.json", b"[1", "0.json"), ("0.json", b"[]", "object"),
                            ("0.json", b'{"caption": 3}', "caption is not text"), ("0.txt", b"a\0", "NUL"),
                            ("0.txt", b"x" * 300_000, "300000 bytes")):  # fmt: skip
        path = archive(tmp_path / "a.tar", ("0.png", image()), (name, data))
        assert why in refused(path, "BF-DATA-002"), name


def test_a_cut_anywhere_is_an_error_with_its_byte(tmp_path: Path) -> None:
    whole = archive(tmp_path / "a.tar", ("0.png", image()), ("0.txt", b"x"), ("1.png", image()), ("1.txt", b"y"))
    data = whole.read_bytes()
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    assert len(list(members(io.BytesIO(data[: end + 1024]), "a"))) == 4
    for cut in range(1, end + 1024, 41):
        with pytest.raises(DataError) as caught:
            list(members(io.BytesIO(data[:cut]), "a"))
        assert caught.value.code == "BF-DATA-005" and "byte" in caught.value.message
    with pytest.raises(DataError, match=f"single closing block at byte {end}"):
        list(members(io.BytesIO(data[: end + 512] + b"x" * 512), "a"))
    with pytest.raises(DataError, match="after its closing blocks"):
        list(members(io.BytesIO(data + data), "a"))
    (tmp_path / "a.tar").write_bytes(data[: end - 100])
    assert "a.tar is damaged" in refused(whole, "BF-DATA-005", Latents(bad_image="skip", max_bad=1.0))


def test_a_flipped_bit_in_a_header_is_found(tmp_path: Path) -> None:
    data = archive(tmp_path / "a.tar", ("0.png", image()), ("0.txt", b"x")).read_bytes()
    rng = np.random.default_rng(0)
    for byte in rng.integers(0, 500, 60).tolist():
        hurt = bytearray(data)
        hurt[byte] ^= 1 << int(rng.integers(8))
        with pytest.raises(DataError, match="no member begins at byte 0|compressed"):
            list(members(io.BytesIO(bytes(hurt)), "a"))


def test_compressed_and_empty_archives_say_so(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz"):
        pass
    assert "is compressed" in refused(tmp_path / "a.tar", "BF-DATA-005")
    assert "it holds nothing" in refused(archive(tmp_path / "b.tar"), "BF-DATA-001")
    (tmp_path / "c.tar").write_bytes(b"")
    assert "ends early at byte 0" in refused(tmp_path / "c.tar", "BF-DATA-005")


def test_an_archive_that_changes_after_the_scan_is_not_loaded(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", ("0.png", image()), ("0.txt", b"x"))
    sample = scan(path, RULES).samples[0]
    archive(path, ("0.png", image(7)), ("0.txt", b"x"))
    with pytest.raises(BadImage, match="changed during the run"):
        sample.load()
    path.write_bytes(b"")
    with pytest.raises(BadImage, match="changed during the run"):
        sample.load()


def test_archives_elsewhere(tmp_path: Path) -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe_file("/tars/0.tar", archive(tmp_path / "0.tar", ("0.png", image(3)), ("0.txt", b"x")).read_bytes())
    found = scan("memory://tars/{0..0}.tar", RULES)
    assert [s.load().rgb.mean() for s in found.samples] == [3]
    files.rm("/tars", recursive=True)


class WholeFiles(http.server.SimpleHTTPRequestHandler):
    """A server that knows no ranges."""

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_server_without_ranges_and_one_that_hangs_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    archive(tmp_path / "a.tar", ("0.png", image(3)), ("0.txt", b"x"))
    (tmp_path / "list.csv").write_text("image,text\n0.png,x\n")
    (tmp_path / "0.png").write_bytes(image(5))
    handler = functools.partial(WholeFiles, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_address[1]}"
        assert scan(f"{base}/list.csv?token=1", RULES).samples[0].load().rgb.mean() == 5
        assert "does not exist" in refused(f"{base}/other.tar", "BF-DATA-001")
        assert "whole files only" in refused(f"{base}/a.tar", "BF-ENV-020", exit_code=3)
        server.shutdown()
    assert "cannot be read" in refused(f"{base}/list.csv", "BF-ENV-020", exit_code=3)


def test_names_with_dots_are_samples_and_parts_of_a_sample_are_not(tmp_path: Path) -> None:
    members = [("12.5mm.png", image(1)), ("12.5mm.txt", b"one"), ("v1.2.png", image(2)), 
               ("v1.2.json", b'{"text": "two"}'),
               ("3.png", image(3)), ("3.txt", b"three"), ("3.mask.png", image(4)), ("3.tar.gz", b"x")]  # fmt: skip
    found = scan(archive(tmp_path / "a.tar", *members), RULES)
    assert [(s.key, s.caption) for s in found.samples] == [("12.5mm", "one"), ("3", "three"), ("v1.2", "two")]
    assert found.counts[".mask.png members"] == 1 and found.counts[".tar.gz members"] == 1


def test_a_pattern_reads_the_archives_that_are_there(tmp_path: Path) -> None:
    for number in (0, 2, 10):
        archive(tmp_path / f"s-{number:03d}.tar", (f"{number}.png", image(number)), (f"{number}.txt", b"x"))
    assert len(scan(f"{tmp_path}/s-*.tar", RULES).samples) == 3
    assert "quote a pattern" in refused(f"{tmp_path}/s-{{000..003}}.tar", "BF-DATA-001")
    assert "no file matches" in refused(f"{tmp_path}/t-*.tar", "BF-USE-001", exit_code=2)
