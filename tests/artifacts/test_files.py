"""Files that last: whole or absent, whatever fails, and one clear message when there is no room."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bifrost_cli.artifacts.files import (
    TEMP_PREFIX,
    append,
    canonical_json,
    new_file,
    new_folder,
    read_json,
    sha256_file,
    sweep,
    write_bytes,
    write_json,
    write_new,
)
from bifrost_cli.errors import ArtifactError, BifrostError, DiskFull, UsageError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def test_write_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a"
    write_bytes(path, b"old")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_the_mode_follows_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        write_bytes(tmp_path / "a", b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_name_of_255_bytes(tmp_path):
    write_bytes(tmp_path / ("n" * 255), b"x")


@given(JSON)
def test_canonical_json_reads_back(value):
    try:
        data = canonical_json(value)
    except UnicodeEncodeError:  # lone surrogates have no UTF-8
        return
    assert json.loads(data) == value
    assert canonical_json(json.loads(data)) == data


def test_canonical_json_does_not_depend_on_order():
    assert canonical_json({"b": 1, "a": [1.5, "é"]}) == '{"a":[1.5,"é"],"b":1}'.encode()
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


@pytest.mark.parametrize(
    "text", ["", "{", '{"a": 1, "a": 2}', "[" * 100_000, "NaN", '"\\x"', "\udcff".encode("utf-8", "surrogatepass")]
)
def test_garbage_json_is_an_artifact_error(tmp_path, text):
    path = tmp_path / "m.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ArtifactError) as caught:
        read_json(path)
    assert str(path) in caught.value.message


def test_json_has_a_size_limit(tmp_path):
    write_json(tmp_path / "m.json", ["x" * 100])
    with pytest.raises(ArtifactError, match="more than"):
        read_json(tmp_path / "m.json", limit=50)


def test_sweep_removes_leftovers_and_nothing_else(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".bifrost-tmp-1-0").write_bytes(b"")
    (tmp_path / "sub" / ".bifrost-tmp-2-0").mkdir()
    (tmp_path / "sub" / "kept").write_bytes(b"")
    assert sweep(tmp_path) == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kept", "sub"]


def test_sha256_is_sha256sum(tmp_path):
    write_bytes(tmp_path / "a", b"abc")
    assert sha256_file(tmp_path / "a").startswith("ba7816bf8f01cfea")


def test_a_fault_at_any_call_leaves_the_old_or_the_new_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    for failing in range(1, 20):
        write_bytes(path, b"old" * 1000)
        with failing_calls(monkeypatch, failing) as calls:
            try:
                write_bytes(path, b"new" * 2000)
            except (OSError, BifrostError):
                pass
        assert path.read_bytes() in (b"old" * 1000, b"new" * 2000)
        assert os.listdir(tmp_path) == ["a"]
        if calls["made"] < failing:
            return
    raise AssertionError("the write never passed")


@contextmanager
def failing_calls(monkeypatch, failing: int):
    """The `failing`th of all fsync, replace and write calls fails as a broken disk does."""
    calls = {"made": 0}

    def wrap(real):
        def call(*args, **kwargs):
            calls["made"] += 1
            if calls["made"] == failing:
                raise OSError(5, "Input/output error")
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", wrap(os.fsync))
        patch.setattr(os, "replace", wrap(os.replace))
        patch.setattr(os, "write", wrap(os.write))
        yield calls


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for 1 MB; None where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], stderr=subprocess.DEVNULL
    )
    yield folder if mounted else None
    if mounted:
        subprocess.check_call(["umount", str(folder)])


def test_a_full_disk_is_told_and_keeps_the_old_file(small_disk):
    if small_disk is None:
        pytest.skip("mounting a tmpfs needs root; the limit on file sizes stands in for it below")
    path = small_disk / "weights"
    write_bytes(path, b"old")
    with pytest.raises(DiskFull) as caught:
        write_bytes(path, b"x" * 2_000_000)
    assert caught.value.exit_code == 3
    assert "need 2 MB" in caught.value.message and "free 1 MB" in caught.value.message
    assert path.read_bytes() == b"old" and os.listdir(small_disk) == ["weights"]
    write_bytes(path, b"y" * 100_000)


def test_a_limit_on_file_sizes_is_a_full_disk(tmp_path):
    script = """
        import resource, sys
        from pathlib import Path
        from bifrost_cli.artifacts.files import write_bytes
        from bifrost_cli.errors import DiskFull
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_bytes(Path(sys.argv[1]), b"x" * 5000)
        except DiskFull:
            sys.exit(33)
    """
    path = tmp_path / "a"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(path)], cwd=tmp_path, env=_env())
    assert done.returncode == 33
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(BifrostError) as caught:
        write_bytes(tmp_path / "a", b"x")
    assert caught.value.exit_code == 3


def _env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


# ---- several processes, one folder -----------------------------------------------------------------------------------


def test_writers_of_one_process_id_do_not_meet(tmp_path, monkeypatch):
    """Containers all have process id 1: temporary names that come of it are one name."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    name = "from bifrost_cli.artifacts.files import _temp_path; from pathlib import Path; print(_temp_path(Path('a')))"
    patched = f"import os; os.getpid = lambda: 1; {name}"
    names = {subprocess.check_output([sys.executable, "-c", patched], text=True) for _ in range(2)}
    assert len(names) == 2
    with new_file(tmp_path / "a") as first, new_file(tmp_path / "b") as second:
        first(b"a")
        second(b"b")
    assert (tmp_path / "a").read_bytes() == b"a" and (tmp_path / "b").read_bytes() == b"b"


@pytest.mark.parametrize("links", [True, False], ids=["links", "a disk without hard links"])
def test_of_two_writers_of_a_new_file_one_is_refused(tmp_path, monkeypatch, links):
    def refuse(*arguments):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UsageError, match="exists already") as caught, new_file(tmp_path / "a", replace=False) as late:
        write_new(tmp_path / "a", b"early")
        late(b"late")
    assert caught.value.code == "BF-USE-002"
    assert (tmp_path / "a").read_bytes() == b"early" and os.listdir(tmp_path) == ["a"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError):
        write_new(tmp_path / "link", b"x")
    assert not (tmp_path / "nowhere").exists() and sorted(os.listdir(tmp_path)) == ["a", "link"]


def test_of_two_writers_of_a_new_folder_one_is_refused(tmp_path):
    with pytest.raises(UsageError, match="exists already"), new_folder(tmp_path / "a") as late:
        with new_folder(tmp_path / "a") as early:
            write_bytes(early / "x", b"early")
        write_bytes(late / "x", b"late")
    assert (tmp_path / "a" / "x").read_bytes() == b"early" and os.listdir(tmp_path) == ["a"]


def test_nothing_is_appended_through_a_link(tmp_path):
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "losses.csv").symlink_to("mine")
    with pytest.raises(ArtifactError, match="is a link"):
        append(tmp_path / "losses.csv", "1,2")
    assert (tmp_path / "mine").read_text() == "kept"


def test_what_another_process_has_just_made_is_no_leftover(tmp_path):
    """On a slow disk minutes may pass between making a temporary name and locking it."""
    made, old = tmp_path / f"{TEMP_PREFIX}made", tmp_path / f"{TEMP_PREFIX}old"
    for folder, age in ((made, 600), (old, 7200)):
        folder.mkdir()
        os.utime(folder, (time.time() - age,) * 2)
    write_new(tmp_path / "file", b"data")
    with new_folder(tmp_path / "folder"):
        pass
    assert made.is_dir() and not old.exists()
