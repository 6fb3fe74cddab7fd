"""Sources of other packages: found by their scheme, and each way to be wrong is one of our errors."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bifrost_cli.config.schema import Latents
from bifrost_cli.data.sources.scan import scan
from bifrost_cli.errors import BifrostError

CODE = """
import io
import numpy as np
from PIL import Image
from bifrost_cli.data.sources.item import Listing, SourceItem

def png():
    stream = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), 7, np.uint8)).save(stream, "PNG")
    return stream.getvalue()

def listing(rest, rules):
    if rest == "raise":
        raise KeyError("no such table")
    if rest == "none":
        return None
    return Listing((SourceItem("a", rest, png, f"from {rest}, {rules.missing_caption}"),), said=("read by a plug-in",))
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("source_of_")]:
        del sys.modules[name]


def install(site: Path, package: str, points: str, code: str = CODE) -> None:
    """What pip leaves of a small package."""
    (site / f"{package}.py").write_text(code)
    folder = site / f"{package}-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[bifrost.sources]\n{points}\n")


def refused(source: str, code: str) -> str:
    with pytest.raises(BifrostError) as caught:
        scan(source, Latents())
    assert caught.value.code == code, str(caught.value)
    return str(caught.value)


def test_a_scheme_is_read_by_its_package(site: Path) -> None:
    install(site, "source_of_one", "mine = source_of_one:listing")
    found = scan("mine:some/table", Latents())
    assert [(s.key, s.caption) for s in found.samples] == [("a", "from some/table, stop")]
    assert found.samples[0].load().rgb.mean() == 7 and found.said == ("read by a plug-in",)
    assert [s.caption for s in scan("mine://host/x", Latents()).samples] == ["from //host/x, stop"]
    assert "KeyError: 'no such table'" in refused("mine:raise", "BF-ENV-004")
    assert "not a Listing" in refused("mine:none", "BF-ENV-004")
    assert "does not exist" in refused("other:x", "BF-DATA-001")


def test_a_file_of_that_name_comes_first(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "source_of_two", "mine = source_of_two:listing")
    monkeypatch.chdir(site)
    stream = io.BytesIO()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(stream, "PNG")
    Path("mine:x").mkdir()
    Path("mine:x/b.png").write_bytes(stream.getvalue())
    Path("mine:x/b.txt").write_text("in a folder")
    assert [s.caption for s in scan("mine:x", Latents()).samples] == ["in a folder"]


@pytest.mark.parametrize("name", ["hf", "https"])
def test_the_names_of_ours_cannot_be_taken(site: Path, name: str) -> None:
    install(site, "source_of_three", f"{name} = source_of_three:listing")
    assert f"2 plug-ins are called {name}" in refused(f"{name}:3", "BF-ENV-003")


def test_two_of_one_name_and_one_that_does_not_load(site: Path) -> None:
    install(site, "source_of_four", "mine = source_of_four:listing")
    install(site, "source_of_five", "mine = source_of_five:listing")
    assert "2 plug-ins are called mine" in refused("mine:x", "BF-ENV-003")
    install(site, "source_of_six", "broken = source_of_six:listing", "import no_such_module")
    assert "cannot be used" in refused("broken:x", "BF-ENV-004")
