"""Removing: never what another artifact needs, never what is not ours; and artifacts that lie outside the workspace."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bifrost_cli.artifacts import Artifact, Draft, Lock, lineage, resolve
from bifrost_cli.artifacts.files import new_file, new_folder
from bifrost_cli.artifacts.workspace import (
    BUILTIN,
    OUTSIDE,
    find,
    leftovers,
    remember_outside,
    removable,
    remove_all,
    survey,
)
from bifrost_cli.errors import ArtifactError, UsageError


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("runs")


def make(path: Path, kind: str = "latents", parents=()) -> Artifact:
    with Draft.open(path, kind, {"name": path.name}, parents) as draft:
        (path / "data").write_bytes(b"12345")
        return draft.commit()


# ---- rm --------------------------------------------------------------------------------------------------------------


def test_what_another_artifact_was_made_from_stays_unless_both_go(runs):
    latents = make(runs / "latents")
    branch = make(runs / "branch", "branch", [latents])
    with pytest.raises(ArtifactError, match=f"{latents.id} is needed: {branch.id} was made from it") as caught:
        removable(runs, [latents.id])
    assert caught.value.code == "BF-ART-011" and latents.path.is_dir()
    both = removable(runs, [latents.id, str(branch.path)])
    assert [item.path for item in both] == [latents.path, branch.path]
    remove_all(removable(runs, [branch.id]))
    remove_all(removable(runs, [latents.id]))
    assert list(runs.iterdir()) == []


def test_a_copy_that_stays_is_enough(runs):
    latents, copy = make(runs / "latents"), make(runs / "copy" / "latents")
    assert latents.id == copy.id
    remember_outside(runs, copy.path)
    make(runs / "branch", "branch", [latents])
    remove_all(removable(runs, [str(latents.path)]))
    assert not latents.path.exists() and copy.path.is_dir()


def test_an_artifact_outside_is_needed_and_needs_as_any_other(runs):
    latents = make(runs / "latents")
    remember_outside(runs, make(Path("elsewhere"), "branch", [latents]).path)
    with pytest.raises(ArtifactError, match="is needed"):
        removable(runs, [latents.id])
    remove_all(removable(runs, [latents.id, "elsewhere"]))
    assert not Path("elsewhere").exists() and find(runs) == []


def test_what_is_not_ours_or_in_use_is_refused(runs):
    artifact = make(runs / "latents")
    with pytest.raises(UsageError, match="ships with bifrost"):
        removable(runs, ["builtin:branch"])
    with pytest.raises(ArtifactError, match="no artifact nothing"):
        removable(runs, [artifact.id, "nothing"])
    (artifact.path / "mine.txt").write_text("kept")
    with pytest.raises(UsageError, match="not part of the artifact") as caught:
        removable(runs, [artifact.id])
    assert caught.value.at == "mine.txt"
    (artifact.path / "mine.txt").unlink()
    with Lock(artifact.path), pytest.raises(ArtifactError, match="is being written"):
        removable(runs, [artifact.id])
    assert artifact.verify() == [] and (BUILTIN / "branch" / "manifest.json").is_file()


def test_an_unfinished_folder_can_be_removed_by_its_path(runs):
    Draft.open(runs / "draft", "branch", {}).close()
    (item,) = removable(runs, [str(runs / "draft")])
    assert item.what == "unfinished"
    remove_all([item])
    assert not (runs / "draft").exists()


# ---- gc --------------------------------------------------------------------------------------------------------------


def test_leftovers_are_what_nobody_writes_any_more(runs):
    artifact = make(runs / "latents")
    Draft.open(runs / "left", "branch", {"x": 1}).close()
    (runs / "left" / ".bifrost-tmp-1-1").write_bytes(b"1")
    (artifact.path / ".bifrost-tmp-1-2").write_bytes(b"12")
    for name, age in (("old", 7200), ("new", 0)):
        path = runs / f".bifrost-tmp-2-{name}"
        path.write_bytes(b"123")
        os.utime(path, (time.time() - age,) * 2)
    with Draft.open(runs / "busy", "branch", {"x": 2}):
        items = leftovers(runs)
        assert [(item.path.name, item.what) for item in items] == [
            ("left", "unfinished"), (".bifrost-tmp-2-old", "leftover"), (".bifrost-tmp-1-2", "leftover")]  # fmt: skip
        assert [item.size for item in items[1:]] == [3, 2]
        remove_all(items)
        assert leftovers(runs) == []
    assert {path.name for path in runs.iterdir()} == {"latents", "busy", ".bifrost-tmp-2-new"}
    assert artifact.verify() == [] and leftovers(runs / "none") == []


def test_what_a_process_still_holds_is_no_leftover_however_old(runs):
    runs.mkdir()
    long_ago = (time.time() - 7200,) * 2
    with new_file(runs / "a.bin") as write, new_folder(runs / "b"):
        write(b"1")
        for path in runs.iterdir():
            os.utime(path, long_ago)
        assert len(list(runs.iterdir())) == 2 and leftovers(runs) == []
    (runs / ".bifrost-tmp-left").write_bytes(b"")
    os.utime(runs / ".bifrost-tmp-left", long_ago)
    assert [item.path.name for item in leftovers(runs)] == [".bifrost-tmp-left"]


# ---- artifacts elsewhere ---------------------------------------------------------------------------------------------


def test_an_artifact_elsewhere_is_found_by_its_workspace_and_never_taken_unasked(runs):
    latents = make(runs / "latents")
    samples = make(Path("images"), "samples", [latents])
    for _ in range(2):
        remember_outside(runs, samples.path)
    remember_outside(runs, latents.path)
    assert (runs / OUTSIDE).read_text() == '"../images"\n'
    assert [a.path for a in survey(runs, outside=True).artifacts] == [Path("images"), latents.path]
    assert find(runs, "samples") == [] and resolve(runs, samples.id).path == Path("images")
    Path("images").rename("moved")
    assert [a.id for a in survey(runs, outside=True).artifacts] == [latents.id]
    assert [line.id for line in lineage(Artifact.open("moved"), runs)] == [samples.id, latents.id]


def test_the_list_survives_a_damaged_line_and_what_cannot_be_written(runs):
    artifact = make(Path("images"), "samples")
    runs.mkdir()
    (runs / OUTSIDE).write_text('{"no": 1}\n7\n"../im')
    remember_outside(runs, artifact.path)
    assert [a.id for a in survey(runs, outside=True).artifacts] == []  # the half line took the next one with it
    remember_outside(runs, artifact.path)
    assert [a.id for a in survey(runs, outside=True).artifacts] == [artifact.id]
    Path("file").touch()
    remember_outside(Path("file"), artifact.path)
