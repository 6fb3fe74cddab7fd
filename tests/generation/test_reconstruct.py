"""reconstruct and ask: an image through the latents and back, and the frozen MLLM's answer about it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fixtures_flux import System, save_part, save_system
from fixtures_loading import load_mllm
from torch import nn

from bifrost_cli.data.images import BadImage
from bifrost_cli.data.png import XMP_CHUNK, png_bytes, png_pixels, png_text
from bifrost_cli.data.xmp import EDITED
from bifrost_cli.errors import ArtifactError, UsageError
from bifrost_cli.generation.ask import answer, ask
from bifrost_cli.generation.choose_models import choose_controlnet
from bifrost_cli.generation.reconstruct import reconstruct
from bifrost_cli.loading.resolve import resolve_device
from bifrost_cli.models.mllm.frozen_mllm import Completion, Mllm
from bifrost_cli.runtime.ui import Ui


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> System:
    return save_system(tmp_path_factory.mktemp("system"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    (tmp_path / "image.png").write_bytes(png_bytes(pixels))
    return tmp_path / "image.png"


def test_the_latents_decide_the_picture(system: System, image: Path, tmp_path: Path) -> None:
    options = {"controlnet": system.controlnet.path, "device": "cpu", "workspace": tmp_path / "runs"}
    first, again = (
        reconstruct(system.recipe, image, output=tmp_path / "new" / f"{name}.png", **options).read_bytes()
        for name in "ab"
    )
    assert first == again and png_pixels(first).shape == (64, 64, 3)
    assert EDITED in png_text(first)[XMP_CHUNK]
    assert png_text(first)["reconstruction"] == "yes" and system.controlnet.id in png_text(first)["artifacts"]
    settings = json.loads(png_text(first)["settings"])  # the models do not ship with the package: their files count
    assert settings["mllm_files"] != settings["painter_files"] and len(settings["mllm_files"]) == 64
    image.write_bytes(png_bytes(np.zeros((64, 64, 3), np.uint8)))
    other = reconstruct(system.recipe, image, output=tmp_path / "c.png", **options).read_bytes()
    assert not np.array_equal(png_pixels(other), png_pixels(first))


def test_the_controlnet_is_found_and_must_fit(system: System, image: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("bifrost_cli.artifacts.workspace.BUILTIN", system.branch.path.parent)
    assert choose_controlnet(None, system.encoder, tmp_path)[0].id == system.controlnet.id
    identity = {**system.controlnet.identity, "encoder": {**system.encoder, "weights": "f" * 64}}
    stranger = save_part(tmp_path / "runs" / "controlnet-x", "controlnet", nn.Linear(1, 1), {}, identity)
    assert choose_controlnet(None, system.encoder, tmp_path / "runs")[0].id == system.controlnet.id
    with pytest.raises(ArtifactError, match="another encoder") as caught:
        reconstruct(system.recipe, image, output=tmp_path / "o.png", controlnet=stranger.path, device="cpu")
    assert caught.value.code == "BF-ART-004" and "ffffffffffff" in str(caught.value)


def test_bad_places_and_pictures(system: System, image: Path, tmp_path: Path) -> None:
    for output in (image, tmp_path / "folder", tmp_path / "out.gif"):
        with pytest.raises(UsageError):
            reconstruct(system.recipe, image, output=output)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(BadImage):
        reconstruct(system.recipe, tmp_path / "text.png", output=tmp_path / "out.png")


def test_ask_is_the_frozen_mllm(system: System, image: Path) -> None:
    text = ask(system.recipe, image, "What is above?", max_tokens=4, device="cpu")
    mllm = load_mllm(system.recipe.models.mllm, resolve_device("cpu"))
    assert text == mllm.answer(png_pixels(image.read_bytes()), "What is above?", 4).text
    with pytest.raises(UsageError, match="empty"):
        ask(system.recipe, image, " ")


def test_an_answer_that_is_cut_is_said_to_be(system: System, image: Path, monkeypatch) -> None:
    said: list[str] = []
    ui = Ui()
    monkeypatch.setattr(ui, "say", said.append)
    ask(system.recipe, image, "What is above?", max_tokens=1, device="cpu", ui=ui)
    assert any("longer than 1 tokens, and was cut" in line for line in said), said
    assert answer(system.recipe, image, "What is above?", max_tokens=1, device="cpu").cut
    said.clear()
    monkeypatch.setattr(Mllm, "answer", lambda *a, **k: Completion("red", False))
    assert ask(system.recipe, image, "What is above?", device="cpu", ui=ui) == "red" and not said
