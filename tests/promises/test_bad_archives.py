"""Bad inputs 36 to 41, as commands: archives that are cut, hostile or compressed, and files we may not read."""

from __future__ import annotations

import contextlib
import ctypes
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures_targets import Means
from refusals import SMALL, refused, told, tree
from test_webdataset import archive, image

from bifrost_cli.cli.app import run
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.loading.loaders import ModelLoader

SKIP = ["--bad-image", "skip", "--max-bad", "0.5"]


@pytest.fixture(autouse=True)
def means(monkeypatch):
    monkeypatch.setattr(ModelLoader, "encoder", lambda *_, **__: Means(lambda: None))


@pytest.fixture
def inputs(tmp_path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def samples(count: int) -> list[tuple[str, bytes]]:
    return [part for i in range(count) for part in ((f"{i}.png", image(i)), (f"{i}.txt", b"x"))]


def test_36_a_shard_that_is_cut_at_any_border(inputs, tmp_path, capsys):
    """At the border of two members nothing but the closing blocks is missing; half a shard is not an image to skip."""
    whole = archive(inputs / "s-0.tar", *samples(3)).read_bytes()
    path = inputs / "s-1.tar"
    for border in range(512, whole.rindex(b"\0\0\0ustar") // 512 * 512, 512):
        path.write_bytes(whole[:border])
        said = refused(capsys, inputs, 4, "DATA-005", f"{path} is damaged", "extract-latents", inputs / "s-{0..1}.tar",
                       "-o", tmp_path / "out", *SMALL, *SKIP)  # fmt: skip
        assert f"byte {border}" in said or "ends after the archive does" in said, said
        assert not (tmp_path / "out").exists()


def test_36_good_work_is_kept_when_a_shard_breaks_later(inputs, tmp_path, capsys):
    path = archive(inputs / "a.tar", *samples(6))
    assert told(capsys, inputs, "extract-latents", path, "-o", tmp_path / "out", *SMALL)[0] == 0
    before = tree(tmp_path / "out")
    path.write_bytes(path.read_bytes()[:2048])
    refused(capsys, inputs, 4, "DATA-005", f"{path} is damaged", "extract-latents", path, "-o", tmp_path / "out",
            *SMALL)  # fmt: skip
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize(("name", "data"), [("../../evil.png", b"x"), ("/abs/evil.png", b"x"), ("1.png", "link"),
                                            ("1.png", "hard"), ("1.png", "fifo")])  # fmt: skip
def test_37_hostile_members_are_refused_and_counted(inputs, tmp_path, capsys, name, data):
    path = archive(inputs / "a.tar", *samples(1), (name, data))
    command = ["extract-latents", path, "-o", tmp_path / "out", *SMALL]
    refused(capsys, inputs, 4, "DATA-003", f"{path}: {name}", *command)
    code, said = told(capsys, inputs, *command, *SKIP)
    assert code == 0 and "seen 2, readable 1" in said, said
    event = json.loads((tmp_path / "out" / "work" / "events.jsonl").read_text())
    assert event["event"] == "bad-image" and f"{path}: {name}" in event.values(), event
    assert LatentsStore.open(tmp_path / "out").keys == ["0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_38_members_that_hold_code_are_counted_and_a_pipe_is_no_shard(inputs, tmp_path, capsys):
    path = archive(inputs / "a.tar", *samples(1), ("0.pkl", b"x"), ("0.pyd", b"x"))
    code, said = told(capsys, inputs, "extract-latents", path, "-o", tmp_path / "out", *SMALL)
    assert code == 0 and "counted: .pkl members 1, .pyd members 1" in said, said
    for source in ("pipe:cat a.tar", "pipe:cat a.tar #.tar"):
        refused(capsys, inputs, 4, "DATA-001", source, "extract-latents", source, "-o", tmp_path / "b", *SMALL)


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("a.tar", "DATA-005", "is compressed"),
        ("a.tar.gz", "DATA-001", "is not a folder, a table or an archive"),
        ("a.tgz", "DATA-001", "is not a folder, a table or an archive"),
    ],
)
def test_39_a_compressed_archive_is_not_unpacked(inputs, tmp_path, capsys, name, code, words):
    path = inputs / name
    path.write_bytes(gzip.compress(archive(inputs / "plain", *samples(1)).read_bytes()))
    refused(capsys, inputs, 4, code, f"{path} {words}", "extract-latents", path, "-o", tmp_path / "out", *SMALL)


# ---- 40 --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nobody_special() -> Iterator[None]:
    """Inside, modes of files hold for root too: without the right to pass over them, which comes back at the end."""
    if sys.platform != "linux":
        pytest.skip("root's rights are laid down in Linux's way")
    libc = ctypes.CDLL(None, use_errno=True)
    header, rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, rights) == 0
    effective = rights[0]
    rights[0] = effective & ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, rights) == 0
    try:
        yield
    finally:
        rights[0] = effective
        assert libc.capset(header, rights) == 0


def test_40_what_we_may_not_read_is_named_with_its_mode(inputs, tmp_path, capsys):
    for i in range(4):
        (inputs / f"{i}.png").write_bytes(image(i))
        (inputs / f"{i}.txt").write_text("x")
    command = ["extract-latents", inputs, "-o", tmp_path / "out", *SMALL]
    assert told(capsys, inputs, *command, "--dry-run")[0] == 0
    (inputs / "0.png").chmod(0)
    code, said = unread(capsys, *command)
    assert code == 4 and "error[BF-DATA-003]" in said, said
    assert f"{inputs / '0.png'}: not readable by this user (mode ----" in said
    code, said = unread(capsys, *command, *SKIP)
    assert code == 0 and "seen 4, readable 3" in said, said
    (inputs / "0.png").chmod(0o644)
    (inputs / "1.txt").chmod(0)
    code, said = unread(capsys, *command)
    assert code == 4 and "error[BF-DATA-002]" in said and f"{inputs / '1.txt'}: not readable by this user" in said, said


@pytest.mark.parametrize("mode", [0o000, 0o600, 0o300])
def test_40_a_folder_we_may_not_enter_or_list_stops(inputs, tmp_path, capsys, mode):
    folder = inputs / "inner"
    folder.mkdir()
    for place in (inputs, folder):
        (place / "a.png").write_bytes(image())
        (place / "a.txt").write_text("x")
    folder.chmod(mode)
    try:
        for source in (folder, inputs):
            code, said = unread(capsys, "extract-latents", source, "-o", tmp_path / "out", *SMALL, "--set",
                                "latents.recursive=true")  # fmt: skip
            assert code == 4 and "error[BF-DATA-00" in said and str(folder) in said, f"{source}: {code} {said}"
            assert not (tmp_path / "out").exists()
    finally:
        folder.chmod(0o700)


@pytest.mark.parametrize("name", ["a.tar", "a.csv", "a.jsonl", "recipe.yaml", "prompts.txt"])
def test_40_a_file_that_is_the_whole_input(inputs, tmp_path, capsys, name):
    path = inputs / name
    path.write_bytes(b"x")
    path.chmod(0)
    command = {"recipe.yaml": ["recipes", "show", path], "prompts.txt": ["generate", "--prompts", path]}.get(
        name, ["extract-latents", path, "-o", tmp_path / "out", *SMALL]
    )
    code, said = unread(capsys, *command)
    assert code in (2, 4) and "error[BF-" in said and str(path) in said and "BUG" not in said, f"{code}: {said}"


def unread(capsys, *command: object) -> tuple[int, str]:
    capsys.readouterr()
    with nobody_special():
        code = run([str(word) for word in command])
    return code, "".join(capsys.readouterr())
