"""Artifacts of every kind: identity, digests, drafts, locks, kills, workspaces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from test_files import failing_calls

from bifrost_cli.artifacts import (
    KINDS,
    Artifact,
    Draft,
    Lock,
    default_path,
    find,
    identity_id,
    lineage,
    newest,
    resolve,
)
from bifrost_cli.artifacts.lock import is_held, is_locked
from bifrost_cli.artifacts.manifest import require_new
from bifrost_cli.artifacts.workspace import survey
from bifrost_cli.cli.app import run
from bifrost_cli.errors import ArtifactError, BifrostError, StoreError, UsageError

IDENTITY = {"encoder": {"name": "mllm", "weights": "8f3c"}, "rows": 3}


def make(path: Path, kind: str = "branch", identity: dict | None = None, parents=(), payload=b"payload") -> Artifact:
    with Draft.open(path, kind, identity or IDENTITY, parents) as draft:
        (draft.path / "sub").mkdir(exist_ok=True)
        (draft.path / "sub" / "data.bin").write_bytes(payload)
        (draft.path / "work").mkdir(exist_ok=True)
        (draft.path / "work" / "log.txt").write_text("not part of it")
        return draft.commit({"note": "n"}, made={"seed": 0}, cost={"samples": 3})


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_opens_as_it_was_made(self, tmp_path, kind):
        made = make(tmp_path / "a", kind)
        found = Artifact.open(tmp_path / "a")
        assert (found.kind, found.id, found.identity) == (kind, identity_id(kind, IDENTITY), IDENTITY)
        assert list(found.files) == ["sub/data.bin"] and found.manifest == made.manifest
        assert found.verify() == [] and found.strays() == []
        assert found.file("sub/data.bin").read_bytes() == b"payload"

    def test_identity_and_files_do_not_depend_on_place_or_time(self, tmp_path, kind):
        first, second = make(tmp_path / "a", kind), make(tmp_path / "b" / "c", kind)
        assert (first.id, first.files, first.identity) == (second.id, second.files, second.identity)

    def test_the_same_again_is_found_complete(self, tmp_path, kind):
        made = make(tmp_path / "a", kind)
        before = snapshot(tmp_path)
        draft = Draft.open(tmp_path / "a", kind, IDENTITY)
        assert draft.complete is not None and draft.complete.id == made.id
        assert snapshot(tmp_path) == before

    def test_another_thing_at_the_same_place_is_refused(self, tmp_path, kind):
        make(tmp_path / "a", kind)
        other = {"encoder": {"name": "mllm", "weights": "21aa"}, "rows": 3}
        with pytest.raises(ArtifactError) as caught:
            Draft.open(tmp_path / "a", kind, other)
        assert caught.value.at == "encoder.weights: 8f3c -> 21aa"
        assert caught.value.code == ("BF-STORE-003" if kind == "latents" else "BF-ART-003")
        assert isinstance(caught.value, StoreError) == (kind == "latents")

    def test_changed_missing_and_stray_files_are_told_apart(self, tmp_path, kind):
        found = make(tmp_path / "a", kind)
        payload = tmp_path / "a" / "sub" / "data.bin"
        (tmp_path / "a" / "stray").write_text("x")
        assert found.verify() == [] and found.strays() == ["stray"]
        payload.write_bytes(b"pazload")
        assert "was changed" in found.verify()[0]
        payload.write_bytes(b"short")
        assert "5 bytes, not 7" in found.verify()[0]
        payload.unlink()
        assert found.verify() == ["sub/data.bin is missing"]
        with pytest.raises(ArtifactError) as caught:
            found.check()
        assert caught.value.exit_code == 5


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_changed_field_of_the_identity_changes_the_id():
    ids = {identity_id("branch", value) for value in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {"a": {"b": 1}}, {})}
    assert len(ids) == 6
    assert identity_id("branch", {"a": 1}) != identity_id("controlnet", {"a": 1})


def test_parents_belong_to_the_identity(tmp_path):
    one, two = make(tmp_path / "one", "latents"), make(tmp_path / "two", "latents", {"x": 1})
    assert identity_id("branch", IDENTITY, [one]) != identity_id("branch", IDENTITY, [two])
    assert make(tmp_path / "b", parents=[one]).parents == [{"kind": "latents", "id": one.id, "path": "../one"}]


def test_every_flipped_bit_of_the_manifest_is_found(tmp_path):
    make(tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    data = path.read_bytes()
    for position in range(len(data)):
        for bit in range(8) if position % 31 == 0 else (position % 8,):
            path.write_bytes(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
            with pytest.raises(ArtifactError):
                Artifact.open(tmp_path / "a")


def test_every_flipped_bit_of_the_payload_is_found(tmp_path):
    found = make(tmp_path / "a")
    path = found.file("sub/data.bin")
    data = path.read_bytes()
    for position in range(len(data)):
        for bit in range(8):
            path.write_bytes(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
            assert found.verify()


def test_a_newer_format_asks_for_an_update(tmp_path):
    make(tmp_path / "a")
    edit(tmp_path / "a", format=99)
    with pytest.raises(ArtifactError, match="format 99") as caught:
        Artifact.open(tmp_path / "a")
    assert caught.value.fix == "update bifrost" and caught.value.exit_code == 5


@pytest.mark.parametrize(
    "changes", [{"kind": "poem"}, {"files": {"../../x": {"sha256": "", "size": 0}}}, {"files": 3}, {"id": 1}]
)
def test_an_edited_manifest_is_refused(tmp_path, changes):
    make(tmp_path / "a")
    edit(tmp_path / "a", **changes)
    with pytest.raises(ArtifactError):
        Artifact.open(tmp_path / "a")


@pytest.mark.parametrize(
    "changes",
    [
        *({"made": made} for made in ({"when": 1}, {"command": []}, {"versions": "x"})),
        *({"cost": {"seconds": seconds}} for seconds in ("x", -1, 10**400, None)), {"cost": {"devices": 1.5}},
        *({"info": {name: 1.5}} for name in ("recipe", "parameters", "funnel", "counts", "metrics")),
        *({"files": {"a": entry}} for entry in (1, {}, {"sha256": 1, "size": 1}, {"sha256": "", "size": "1"})),
        *({"parents": [parent]} for parent in (1, {}, {"kind": "branch", "id": 1, "path": ""},
                                               {"kind": "latents", "id": "branch-0123456789ab", "path": ""})),
        *({"id": id_} for id_ in ("", "branch-../../../x", "samples-0123456789ab", "branch-0123456789ab\n")),
    ],
    ids=str,
)  # fmt: skip
def test_an_odd_value_is_named_and_the_rest_is_there(tmp_path, changes, capsys):
    """Of somebody else, with the right digest, which is no signature."""
    good = make(tmp_path / "good")
    make(tmp_path / "odd", "branch", {"x": 1})
    edit(tmp_path / "odd", **changes)
    with pytest.raises(ArtifactError, match=r"makes no sense") as caught:
        Artifact.open(tmp_path / "odd")
    assert caught.value.code == "BF-ART-005" and "Traceback" not in caught.value.message
    assert run(["artifacts", "ls", "-w", str(tmp_path)]) == 0
    assert good.id in (shown := capsys.readouterr().out) and "(damaged)" in shown


def test_what_a_manifest_need_not_have_may_be_missing(tmp_path, capsys):
    make(tmp_path / "odd")
    edit(tmp_path / "odd", made={}, cost={}, info={})
    assert run(["artifacts", "ls", "-w", str(tmp_path)]) == 0
    assert Artifact.open(tmp_path / "odd").id in capsys.readouterr().out


def test_a_lineage_is_followed_once_and_has_an_end(tmp_path):
    before = []
    for number in range(30):  # each has the one before twice: a billion ways
        before = [make(tmp_path / str(number), "branch", {"n": number}, parents=before * 2)]
    lines = lineage(before[0])
    assert len({line.id for line in lines}) == 30 and len(lines) == 59 and all(line.artifact for line in lines)
    one, two = (Artifact.open(tmp_path / name) for name in "01")
    edit(one.path, parents=[{"kind": "branch", "id": two.id, "path": "../1"}])
    with pytest.raises(ArtifactError, match="was made from itself"):
        lineage(two)
    edit(one.path, parents=[{"kind": "branch", "id": one.id, "path": "not here"}])
    with pytest.raises(ArtifactError, match="was made from itself"):
        lineage(two)
    for number in range(30, 130):
        before = [make(tmp_path / str(number), "branch", {"n": number}, parents=before)]
    edit(one.path, parents=[])
    with pytest.raises(ArtifactError, match="no end"):
        lineage(before[0])


@pytest.mark.parametrize("path", ["\0", "x" * 300, "x/" * 5000, "..", "/"])
def test_a_parent_whose_place_is_odd_is_not_here(tmp_path, path):
    artifact = make(tmp_path / "a")
    edit(artifact.path, parents=[{"kind": "latents", "id": "latents-0123456789ab", "path": path}])
    assert [line.artifact is None for line in lineage(Artifact.open(artifact.path))] == [False, True]


def edit(folder: Path, **changes) -> None:
    """Change a manifest and give it the digest that its new content asks for."""
    from bifrost_cli.artifacts.files import write_json
    from bifrost_cli.artifacts.identity import digest_of

    manifest = {**json.loads((folder / "manifest.json").read_text()), **changes}
    del manifest["digest"]
    write_json(folder / "manifest.json", {**manifest, "digest": digest_of(manifest)})


def test_absent_unfinished_and_foreign_folders_are_told_apart(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        Artifact.open(tmp_path / "none")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="is not an artifact"):
        Artifact.open(tmp_path / "photos")
    with pytest.raises(UsageError, match="was not made by bifrost"):
        Draft.open(tmp_path / "photos", "branch", IDENTITY)
    with pytest.raises(UsageError, match="not a folder"):
        Draft.open(tmp_path / "photos" / "a.jpg", "branch", IDENTITY)
    Draft.open(tmp_path / "draft", "branch", IDENTITY).close()
    with pytest.raises(ArtifactError, match="unfinished"):
        Artifact.open(tmp_path / "draft")
    assert snapshot(tmp_path / "photos") == {"a.jpg": b"x"}


def test_a_draft_is_continued_and_its_leftovers_are_swept(tmp_path):
    with Draft.open(tmp_path / "a", "branch", IDENTITY) as draft:
        assert not draft.continued
        (draft.path / "kept").write_bytes(b"1")
        (draft.path / ".bifrost-tmp-9-9").write_bytes(b"2")
    with Draft.open(tmp_path / "a", "branch", IDENTITY) as draft:
        assert draft.continued and (draft.path / "kept").exists()
        assert list(draft.commit().files) == ["kept"]


def test_a_draft_of_something_else_is_refused(tmp_path):
    Draft.open(tmp_path / "a", "branch", IDENTITY).close()
    with pytest.raises(ArtifactError, match="unfinished branch of a different setup"):
        Draft.open(tmp_path / "a", "branch", {**IDENTITY, "rows": 4})


KILLED = """
    import os, signal, sys
    from pathlib import Path
    import bifrost_cli.artifacts.draft as module
    from bifrost_cli.artifacts import Draft
    place, when = sys.argv[1:]
    real = module.write_json
    def write(path, value):
        if Path(path).name == "manifest.json":
            if when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            real(path, value)
            os.kill(os.getpid(), signal.SIGKILL)
        real(path, value)
    module.write_json = write
    draft = Draft.open(place, "branch", {"encoder": {"name": "mllm", "weights": "8f3c"}, "rows": 3})
    (draft.path / "sub").mkdir()
    (draft.path / "sub" / "data.bin").write_bytes(b"payload")
    draft.commit()
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_around_the_manifest_leaves_a_draft_or_the_whole(tmp_path, when):
    killed = python(KILLED, str(tmp_path / "a"), when)
    assert killed.returncode == -9
    if when == "before":
        with pytest.raises(ArtifactError, match="unfinished"):
            Artifact.open(tmp_path / "a")
        assert survey(tmp_path).drafts == [tmp_path / "a"]
    else:
        assert Draft.open(tmp_path / "a", "branch", IDENTITY).complete is not None
    assert files_of(make_again(tmp_path / "a")) == files_of(make(tmp_path / "b"))
    assert not (tmp_path / "a" / "draft.json").exists()


def make_again(path: Path) -> Artifact:
    with Draft.open(path, "branch", IDENTITY) as draft:
        done = draft.complete
    return done or make(path)


def files_of(artifact: Artifact) -> dict:
    return artifact.files


def test_a_fault_at_any_call_can_be_continued_to_the_same_files(tmp_path, monkeypatch):
    wanted = make(tmp_path / "undisturbed").files
    for failing in range(1, 60):
        place = tmp_path / f"run-{failing}"
        with failing_calls(monkeypatch, failing) as calls:
            try:
                make(place)
            except (OSError, BifrostError):
                pass
        assert files_of(make_again(place)) == wanted
        if calls["made"] < failing:
            return
    raise AssertionError("making an artifact never passed")


def python(script: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


SECOND = """
    import sys, time
    from bifrost_cli.artifacts import Draft
    from bifrost_cli.errors import ArtifactError
    began = time.monotonic()
    try:
        Draft.open(sys.argv[1], "branch", {"encoder": {"name": "mllm", "weights": "8f3c"}, "rows": 3})
    except ArtifactError as error:
        print(time.monotonic() - began)
        print(error)
        sys.exit(error.exit_code)
"""


def test_a_second_process_is_told_at_once_who_writes(tmp_path):
    with Draft.open(tmp_path / "a", "branch", IDENTITY) as draft:
        second = python(SECOND, str(tmp_path / "a"))
        seconds, *message = second.stdout.splitlines()
        assert second.returncode == 5 and float(seconds) < 1
        assert f"locked by pid {os.getpid()} on" in message[0] and "BF-ART-006" in message[0]
        assert draft.commit().verify() == []
    assert python(SECOND, str(tmp_path / "a")).returncode == 0


def test_a_lock_ends_with_its_process(tmp_path):
    script = (
        "import sys, os; from bifrost_cli.artifacts import Lock; Lock(sys.argv[1]).acquire(); os.kill(os.getpid(), 9)"
    )
    assert python(script, str(tmp_path)).returncode == -9
    with Lock(tmp_path):
        pass
    assert (tmp_path / ".lock").read_bytes() == b""


def test_a_workspace_lists_newest_first_and_reports_the_rest(tmp_path):
    old = make(tmp_path / "old", "latents")
    time.sleep(0.001)
    new = make(tmp_path / "new", "latents", {"x": 1})
    Draft.open(tmp_path / "draft", "branch", IDENTITY).close()
    make(tmp_path / "broken")
    (tmp_path / "broken" / "manifest.json").write_text("{}")
    (tmp_path / "a-file").write_text("")
    assert [a.id for a in find(tmp_path)] == [new.id, old.id]
    assert find(tmp_path, "samples") == [] and find(tmp_path / "none") == []
    found = survey(tmp_path)
    assert found.drafts == [tmp_path / "draft"] and [path for path, _ in found.broken] == [tmp_path / "broken"]


def test_newest_says_which_command_makes_one(tmp_path):
    with pytest.raises(ArtifactError) as caught:
        newest(tmp_path, "latents")
    assert caught.value.fix == "make one: bifrost extract-latents" and caught.value.exit_code == 5


def test_a_reference_is_a_folder_an_id_or_its_beginning(tmp_path):
    one = make(tmp_path / "one", "latents")
    make(tmp_path / "two", "branch")
    digits = one.id.split("-")[1]
    for ref in (tmp_path / "one", one.id, one.id[:12], digits, digits[:6]):
        assert resolve(tmp_path, ref).id == one.id
    with pytest.raises(ArtifactError, match="not branch"):
        resolve(tmp_path, one.id, "branch")
    with pytest.raises(ArtifactError, match="no artifact zzz"):
        resolve(tmp_path, "zzz")
    many = [make(tmp_path / f"n{n}", "branch", {"n": n}).id.split("-")[1] for n in range(17)]
    twice = next(digits[0] for digits in many if sum(other[0] == digits[0] for other in many) > 1)
    with pytest.raises(ArtifactError, match=f"{twice} can mean"):
        resolve(tmp_path, twice)
    with pytest.raises(UsageError, match="empty"):
        resolve(tmp_path, "")


def test_what_ships_with_the_package_has_a_name_wherever_a_reference_is_taken(tmp_path):
    for kind in ("branch", "controlnet"):
        assert resolve(tmp_path, f"builtin:{kind}").kind == resolve(tmp_path, "builtin", kind).kind == kind
    with pytest.raises(ArtifactError, match="is a branch artifact, not controlnet"):
        resolve(tmp_path, "builtin:branch", "controlnet")
    for ref, kind in (("builtin:mllm", None), ("builtin", None), ("builtin", "latents"), ("builtin:../cli", None)):
        with pytest.raises(ArtifactError, match="builtin:branch|ships with") as caught:
            resolve(tmp_path, ref, kind)
        assert "builtin:branch" in caught.value.fix


def test_default_path_is_the_id():
    assert default_path("runs", "latents", "latents-0123") == Path("runs/latents-0123")
    assert default_path("runs", "latents", "0123") == Path("runs/latents-0123")


def test_lineage_follows_ids_and_survives_a_move(tmp_path):
    latents = make(tmp_path / "w" / "latents", "latents")
    branch = make(tmp_path / "w" / "branch", "branch", parents=[latents])
    samples = make(tmp_path / "elsewhere" / "samples", "samples", parents=[branch])
    assert [(line.depth, line.kind) for line in lineage(samples)] == [(0, "samples"), (1, "branch"), (2, "latents")]
    (tmp_path / "w").rename(tmp_path / "moved")
    assert [line.artifact is None for line in lineage(samples)] == [False, True]
    assert [line.artifact is None for line in lineage(samples, tmp_path / "moved")] == [False, False, False]


@pytest.mark.parametrize("kind", ["link", "folder", "second name"])
def test_a_lock_that_is_no_file_is_refused_and_left_as_it_is(tmp_path, kind):
    (tmp_path / "precious").write_text("kept")
    lock = tmp_path / "a" / ".lock"
    (tmp_path / "a").mkdir()
    make = {"link": lock.symlink_to, "second name": lock.hardlink_to, "folder": lambda _: lock.mkdir()}[kind]
    make(tmp_path / "precious")
    with pytest.raises(ArtifactError, match="not a regular file") as caught:
        Draft.open(tmp_path / "a", "branch", IDENTITY)
    assert caught.value.code == "BF-ART-006"
    assert (tmp_path / "precious").read_text() == "kept" and not (tmp_path / "a" / "draft.json").exists()


def test_whether_a_folder_is_being_written_can_be_seen(tmp_path):
    assert not is_locked(tmp_path)
    with Lock(tmp_path):
        assert is_locked(tmp_path) and f'"pid": {os.getpid()}' in (tmp_path / ".lock").read_text()
    assert not is_locked(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be deleted")
def test_who_deletes_the_lock_lets_no_second_writer_in(tmp_path):
    with Draft.open(tmp_path / "a", "branch", IDENTITY) as draft:
        (tmp_path / "a" / ".lock").unlink()
        assert is_held(tmp_path / "a")
        second = python(SECOND, str(tmp_path / "a"))
        assert second.returncode == 5 and "another process" in second.stdout
        assert is_locked(tmp_path / "a")  # the refused one has left its .lock, which nobody holds
        assert draft.commit().verify() == []


@pytest.mark.parametrize("folders", [True, False], ids=["the folder is locked", "a disk that locks no folder"])
def test_a_draft_whose_place_was_replaced_is_not_committed(tmp_path, monkeypatch, folders):
    if not folders:
        monkeypatch.setattr("bifrost_cli.artifacts.lock.hold", lambda descriptor: None)
    with Draft.open(tmp_path / "a", "branch", IDENTITY) as draft:
        if folders:
            (tmp_path / "a").rename(tmp_path / "b")
        else:
            (tmp_path / "a" / ".lock").unlink()
        with Draft.open(tmp_path / "a", "branch", IDENTITY) as second:
            with pytest.raises(ArtifactError, match="was removed or replaced") as caught:
                draft.commit()
            assert caught.value.code == "BF-ART-006"
            assert second.commit().verify() == []


def test_a_private_folder_is_reported_and_the_rest_is_there(tmp_path, monkeypatch):
    mine, theirs = make(tmp_path / "mine", "latents"), make(tmp_path / "theirs", "latents", {"x": 1})
    is_file = Path.is_file

    def private(path):
        if theirs.path in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", private)
    seen = survey(tmp_path)
    assert [artifact.id for artifact in seen.artifacts] == [mine.id] and resolve(tmp_path, mine.id).id == mine.id
    assert seen.broken == [(theirs.path, f"{theirs.path} cannot be read: Permission denied")]


def test_no_output_lies_inside_an_artifact(tmp_path):
    made = make(tmp_path / "a", "latents")
    Draft.open(tmp_path / "draft", "branch", IDENTITY).close()
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text('{"name": "a page"}')
    (tmp_path / "link").symlink_to("a")
    for inside in (tmp_path / "a" / "b" / "c", tmp_path / "draft" / "b", tmp_path / "link" / "b"):
        for refuse in (require_new, lambda path: Draft.open(path, "branch", IDENTITY)):
            with pytest.raises(UsageError, match="lies inside the artifact") as caught:
                refuse(inside)
            assert caught.value.code == "BF-USE-002"
    require_new(tmp_path / "web" / "b")
    assert made.verify() == made.strays() == []
