"""Parquet and Hugging Face's data sets: their images' own bytes, through our reader."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_webdataset import image, refused

from bifrost_cli.config.schema import Latents
from bifrost_cli.data.images import BadImage
from bifrost_cli.data.sources.scan import scan
from bifrost_cli.errors import EnvironmentProblem

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
RULES = Latents()
SKIP = Latents(bad_image="skip", max_bad=1.0, missing_caption="skip")


def parquet(path: Path, group: int = 2, **columns: Sequence[Any]) -> Path:
    pq.write_table(pa.table(dict(columns)), path, row_group_size=group)
    return path


def test_images_inside_the_table(tmp_path: Path) -> None:
    images = [image(value) for value in range(5)]
    cells = [{"bytes": data, "path": "x.png"} for data in images]
    captions = [f"caption {i}" for i in range(5)]
    for name, column in (("hf", cells), ("plain", images)):
        path = parquet(tmp_path / f"{name}.parquet", image=column, text=captions, plan=["p", None, None, None, ""])
        found = scan(path, RULES)
        assert [(s.key, s.caption) for s in found.samples] == [(f"{i:09d}", f"caption {i}") for i in range(5)]
        assert [s.sha256 for s in found.samples] == [hashlib.sha256(data).hexdigest() for data in images]
        assert [s.load().rgb.mean() for s in reversed(found.samples)] == [4, 3, 2, 1, 0]
        assert [s.plan for s in found.samples] == ["p", None, None, None, None] and "text" in found.said[0]


def test_paths_and_parts(tmp_path: Path) -> None:
    for value, name in enumerate(("a.png", "b.png")):
        (tmp_path / name).write_bytes(image(value))
        parquet(tmp_path / f"part-{value}.parquet", file_name=[name], caption=["x"])
        parquet(tmp_path / f"inside-{value}.parquet", image=[image(value)], caption=["x"])
    assert [s.key for s in scan(tmp_path / "part-{0..1}.parquet", RULES).samples] == ["a", "b"]
    inside = scan(tmp_path / "inside-{0..1}.parquet", RULES).samples
    assert [s.key for s in inside] == ["inside-0/000000000", "inside-1/000000000"]
    outside = parquet(tmp_path / "c.parquet", image=["../a.png"], caption=["x"])
    assert "row 0: the path '../a.png' leaves" in refused(outside, "BF-DATA-005")


def test_null_cells_are_missing_captions_and_bad_images(tmp_path: Path) -> None:
    cells = [image(0), None, image(2), image(3)]
    path = parquet(tmp_path / "a.parquet", image=cells, caption=["a", "b", None, " "])
    assert "2 of 4 images" in refused(path, "BF-DATA-002")
    assert "a.parquet: row 1: the image cell is null" in refused(path, "BF-DATA-003", Latents(missing_caption="skip"))
    found = scan(path, SKIP)
    assert [s.key for s in found.samples] == ["000000000"] and len(found.events) == 3
    led = parquet(tmp_path / "c.parquet", image=[{"bytes": None, "path": str(path)}], caption=["a"])
    assert "row 0: the image cell holds a path and no bytes" in refused(led, "BF-DATA-003")
    paths = parquet(tmp_path / "b.parquet", image=[None, "a.png"], caption=["a", "b"])
    assert "row 0: the image cell is null" in refused(paths, "BF-DATA-003")


def test_columns_that_are_not_there_or_of_another_kind(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", picture=[image()], label=[3], nested=[[1]])
    message = refused(path, "BF-DATA-005")
    assert "no column known as image" in message and "it has picture, label, nested" in message
    message = refused(path, "BF-DATA-005", Latents(image_column="picture", caption_column="text"))
    assert "no column text" in message and "--caption-column" in message
    message = refused(path, "BF-DATA-005", Latents(image_column="picture", caption_column="label"))
    assert "column label of" in message and "int64, not text" in message
    message = refused(path, "BF-DATA-005", Latents(image_column="nested", caption_column="picture"))
    assert "not images or their paths" in message


def test_files_that_are_no_parquet(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", image=[image()], caption=["x"])
    whole = path.read_bytes()
    for data in (b"", b"text", whole[: len(whole) // 2], whole[:-9] + b"x" + whole[-8:]):
        path.write_bytes(data)
        assert "is no Parquet file, or is damaged" in refused(path, "BF-DATA-005", SKIP)
    assert "does not exist" in refused(tmp_path / "b.parquet", "BF-DATA-001")
    empty = pa.table({"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())})
    pq.write_table(empty, path)
    assert "has no rows" in refused(path, "BF-DATA-001")


def test_a_table_that_changes_after_the_scan_is_not_loaded(tmp_path: Path) -> None:
    noise = [image(i) + np.random.default_rng(i).bytes(20_000) for i in range(8)]  # longer than a file's buffer
    path = parquet(tmp_path / "a.parquet", group=1, image=noise, caption=["x"] * 8)
    samples = scan(path, RULES).samples
    path.write_bytes(b"PAR1" + b"\xff" * (path.stat().st_size - 4))
    with pytest.raises(BadImage, match="changed during the run"):
        samples[0].load()


def test_a_table_elsewhere(tmp_path: Path) -> None:
    import fsspec

    path = parquet(tmp_path / "a.parquet", image=[image(i) for i in range(3)], caption=["x"] * 3)
    fsspec.filesystem("memory").pipe_file("/tables/a.parquet", path.read_bytes())
    assert [s.load().rgb.mean() for s in scan("memory://tables/a.parquet", RULES).samples] == [0, 1, 2]
    assert "does not exist" in refused("memory://tables/b.parquet", "BF-DATA-001")
    fsspec.filesystem("memory").rm("/tables", recursive=True)


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, with its cache in a folder of the test's."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    return library


@pytest.mark.parametrize("form", ["saved", "saved splits", "parquet"])
def test_a_data_set_in_a_folder(datasets: Any, tmp_path: Path, form: str) -> None:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "on"]),
        }
    )
    images = [image(value) for value in range(3)]
    values = {"image": [{"bytes": data} for data in images], "caption": ["a", "b", "c"], "label": [0, 1, 1]}
    made = datasets.Dataset.from_dict(values, features=features)
    folder = tmp_path / "set"
    if form == "parquet":
        folder.mkdir()
        made.to_parquet(folder / "train.parquet")
    else:
        (made if form == "saved" else datasets.DatasetDict(train=made, test=made)).save_to_disk(folder)
    found = scan(f"hf:{folder}", RULES)
    assert [(s.key, s.caption) for s in found.samples] == [(f"{i:09d}", "abc"[i]) for i in range(3)]
    assert [s.sha256 for s in found.samples] == [hashlib.sha256(data).hexdigest() for data in images]
    assert [s.load().rgb.mean() for s in found.samples] == [0, 1, 2] and "split train, 3 rows" in found.said[0]
    classes = scan(f"hf:{folder}", Latents(caption_column="label"))
    assert [s.caption for s in classes.samples] == ["no", "on", "on"]
    assert "with split other" in refused(f"hf:{folder}:other", "BF-DATA-005")
    if form != "saved":
        assert len(scan(f"hf:{folder}:train", RULES).samples) == 3
    assert "holds string, not images" in refused(f"hf:{folder}", "BF-DATA-005", Latents(image_column="caption"))
    assert "no column text" in refused(f"hf:{folder}", "BF-DATA-005", Latents(caption_column="text"))


def test_a_data_set_that_is_not_there_and_a_library_that_is_not(
    datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused("hf:nobody/no-such-set", "BF-ENV-020", exit_code=3)
    script = tmp_path / "with_code"
    script.mkdir()
    (script / "with_code.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    assert "scripts are no longer supported" in refused(f"hf:{script}", "BF-DATA-005")
    assert not (tmp_path / "canary").exists()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentProblem, match="needs the package datasets"):
        scan("hf:any", RULES)


@pytest.mark.parametrize("column", ["image", "caption"])
def test_a_cell_that_unpacks_to_far_more_than_it_takes_is_not_unpacked(tmp_path: Path, column: str) -> None:
    cells = {"image": [image()], "caption": ["x"], column: [b"\0" * (1 << 29) + b"\0"]}
    types = {"image": pa.binary(), "caption": pa.string()}
    whole = pa.table({name: pa.array(cells[name], type=types[name]) for name in types})
    path = tmp_path / "a.parquet"
    pq.write_table(whole, path, compression="zstd", use_dictionary=False)
    del whole
    assert path.stat().st_size < 1 << 20
    expected = "BF-DATA-003" if column == "image" else "BF-DATA-005"
    assert "unpacks from" in refused(path, expected)
