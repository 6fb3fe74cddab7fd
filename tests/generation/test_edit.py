"""edit, vary, mix and decode: what is not masked stays in the latents, the rest follows from prompt and seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_flux import System, save_part, save_system
from PIL import Image
from torch import nn

from bifrost_cli import BifrostPipeline, decode, edit, mix, vary
from bifrost_cli.cli.app import run
from bifrost_cli.data.png import png_bytes, png_pixels, png_text
from bifrost_cli.data.xmp import EDITED, GENERATED
from bifrost_cli.errors import ArtifactError, UsageError
from bifrost_cli.generation import regions
from bifrost_cli.generation.generate import generate
from bifrost_cli.generation.reconstruct import reconstruct
from bifrost_cli.interop.privacy import file_facts
from bifrost_cli.models.branch.masking import random_orders, sample_masked
from bifrost_cli.models.mllm.frozen_mllm import Completion, Mllm
from bifrost_cli.shapes.checker import check
from bifrost_cli.shapes.draw import draw
from bifrost_cli.shapes.scene import Scene, Thing


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> System:
    return save_system(tmp_path_factory.mktemp("system"))


@pytest.fixture(scope="module")
def pipe(system: System) -> BifrostPipeline:
    return BifrostPipeline(system.recipe, system.branch, system.controlnet, device="cpu")


@pytest.fixture(scope="module")
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.fixture
def image(rgb: np.ndarray, tmp_path: Path) -> Path:
    (tmp_path / "image.png").write_bytes(png_bytes(rgb))
    return tmp_path / "image.png"


# ---- decoding from what is known -------------------------------------------------------------------------------------


def test_known_patches_stay_and_the_rest_is_what_a_hand_written_loop_predicts(pipe: BifrostPipeline) -> None:
    branch, mllm = pipe.prior.branch, pipe.prior.mllm
    cache = mllm.encode_prompts(mllm.tokenize_prompts(["a star"], 16))
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(1, 16, branch.channels, generator=generator)
    masked = torch.zeros(1, 16, dtype=torch.bool)
    masked[0, [2, 3, 7, 11, 13]] = True
    orders, seen = random_orders(1, 16, generator), []
    out = sample_masked(branch, cache, steps=5, orders_BP=orders, known=(known, masked),
                        callback=lambda step, latents, still: seen.append(still.clone()))  # fmt: skip
    assert torch.equal(out[~masked], known[~masked])
    assert [int(still.sum()) for still in seen] == [4, 3, 2, 1, 0] and not any((s & ~masked).any() for s in seen)
    latents, still = known.clone(), masked.clone()
    with torch.no_grad():
        for patch in [int(p) for p in orders[0].flip(0) if masked[0, p]]:  # decoding reveals an order from its end
            latents[0, patch] = branch(latents, still, cache)[0, patch]
            still[0, patch] = False
    assert torch.allclose(out, latents, atol=1e-5)


def test_rows_with_different_numbers_of_masked_patches_are_refused(pipe: BifrostPipeline) -> None:
    branch, mllm = pipe.prior.branch, pipe.prior.mllm
    cache = mllm.encode_prompts(mllm.tokenize_prompts(["a", "b"], 16))
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[0, :3] = masked[1, :4] = True
    orders = random_orders(2, 16, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="different numbers"):
        sample_masked(branch, cache, steps=4, orders_BP=orders, known=(torch.zeros(2, 16, branch.channels), masked))


# ---- regions ---------------------------------------------------------------------------------------------------------


def test_a_mask_grows_to_whole_patches_and_follows_the_square_cut() -> None:
    mask = regions.mask_of_boxes([(15, 0, 2, 1)], 64, 64)
    assert np.flatnonzero(regions.masked_patches(mask, 64, (4, 4))).tolist() == [0, 1]
    wide = regions.mask_of_boxes([(32, 0, 16, 16)], 64, 128)  # the cut begins at 32
    assert np.flatnonzero(regions.masked_patches(wide, 64, (4, 4))).tolist() == [0]
    with pytest.raises(UsageError, match="empty within the centre square"):
        regions.masked_patches(regions.mask_of_boxes([(0, 0, 20, 20)], 64, 128), 64, (4, 4))


@pytest.mark.parametrize(
    ("answer", "boxes"),
    [
        ('```json\n[{"bbox_2d": [4, 8, 20, 40], "label": "a"}]\n```', [(4, 8, 16, 32)]),
        ("[1, 2, 3, 4] and [10.5,0, 20, 8]", [(1, 2, 2, 2), (10.5, 0, 9.5, 8)]),
        ("[9, 9, 3, 4]", []),
        ("Top left.", [(0, 0, 50, 20)]),
        ("bottom", [(25, 20, 50, 20)]),
        ("in the middle", [(25, 10, 50, 20)]),
        ("I see no such thing", []),
    ],
)
def test_where_an_answer_says_a_thing_is(answer: str, boxes: list) -> None:
    assert regions.region_boxes(answer, 40, 100) == boxes


def test_kept_pixels_are_the_originals_but_for_a_seam(rgb: np.ndarray) -> None:
    patches, made = np.zeros(16, bool), 255 - rgb
    patches[5] = True
    kept = regions.keep_pixels(rgb, made, patches, (4, 4))
    assert np.array_equal(kept[18:30, 18:30], made[18:30, 18:30])
    assert np.array_equal(kept[:, 44:], rgb[:, 44:]) and np.array_equal(kept[44:], rgb[44:])


# ---- the pipeline and the commands -----------------------------------------------------------------------------------


def test_an_edit_keeps_the_latents_that_stay_and_repeats_to_the_byte(pipe: BifrostPipeline, rgb: np.ndarray) -> None:
    first, again = (pipe.edit(rgb, "a star", box=(16, 16, 32, 16), seed=3) for _ in "ab")
    assert first.masked is not None and first.masked[0].nonzero().flatten().tolist() == [5, 6]
    assert torch.equal(first.latents[0][~first.masked[0]], pipe.encode(rgb)[~first.masked[0]])
    assert not torch.equal(first.latents[0][5], pipe.encode(rgb)[5])
    assert np.array_equal(first.images[0], again.images[0]) and first.prompts == ["a star"] and first.seeds == [3]
    other = pipe.edit(rgb, "a circle", box=(16, 16, 32, 16), seed=3)
    assert not torch.equal(other.latents, first.latents)
    half = pipe.edit(rgb, "a star", box=(0, 0, 64, 32), strength=0.5)
    assert half.masked is not None and int(half.masked.sum()) == 4 and not half.masked[0, 8:].any()


def test_variations_differ_and_have_seeds_that_count_up(pipe: BifrostPipeline, rgb: np.ndarray) -> None:
    out = pipe.vary(rgb, "a star", num_images=3, strength=0.25, seed=7)
    assert out.seeds == [7, 8, 9] and out.masked is not None and out.masked.sum(1).tolist() == [4, 4, 4]
    assert len({tuple(row.tolist()) for row in out.masked}) == 3
    alone = pipe.vary(rgb, "a star", num_images=1, strength=0.25, seed=8)
    assert np.array_equal(alone.images[0], out.images[1])


def test_a_mix_goes_from_one_image_to_the_other(pipe: BifrostPipeline, rgb: np.ndarray) -> None:
    ends = pipe.mix(rgb, 255 - rgb, weight=[0, 0.5, 1])
    assert np.array_equal(ends.images[0], pipe.decode(pipe.encode(rgb), seed=0))
    assert np.array_equal(ends.images[2], pipe.decode(pipe.encode(255 - rgb), seed=0))
    assert torch.allclose(ends.latents[1], (ends.latents[0] + ends.latents[2]) / 2, atol=1e-6)
    assert pipe.mix(rgb, rgb, weight=[0, 1], output_type="np").images.shape == (2, 64, 64, 3)


def test_files_are_written_with_what_made_them(system: System, image: Path, tmp_path: Path) -> None:
    parts = {"branch": system.branch.path, "controlnet": system.controlnet.path, "device": "cpu"}
    made = edit(system.recipe, image, "a star", output=tmp_path / "e.png", box=(0, 0, 16, 16), **parts,
                show_mask=tmp_path / "m.png", keep_pixels=True)  # fmt: skip
    text = png_text(made.read_bytes())
    assert text["prompt"] == "a star" and '"masked": "1000000000000000"' in text["settings"]
    assert system.branch.id in text["artifacts"]
    pale = png_pixels((tmp_path / "m.png").read_bytes())
    assert np.array_equal(pale[:16, :16], png_pixels(image.read_bytes())[:16, :16]) and pale[20:].min() > 170
    folder = vary(system.recipe, image, output=tmp_path / "v", n=2, **parts)
    assert sorted(path.name for path in folder.iterdir()) == ["00000.png", "00001.png", "grid.png"]
    for marked in (made, *folder.iterdir()):
        assert file_facts(marked)["DigitalSourceType"] == EDITED
    assert "DigitalSourceType" not in file_facts(tmp_path / "m.png")  # the given image, made pale
    lossless = edit(system.recipe, image, "a star", output=tmp_path / "e.webp", box=(0, 0, 16, 16), keep_pixels=True,
                    **parts)  # fmt: skip
    assert file_facts(lossless) == file_facts(made)
    assert np.array_equal(np.asarray(Image.open(lossless)), png_pixels(made.read_bytes()))
    strip = mix(system.recipe, image, image, output=tmp_path / "s.png", strip=3, controlnet=parts["controlnet"])
    assert png_pixels(strip.read_bytes()).shape == (64, 192, 3)
    again = reconstruct(system.recipe, image, output=tmp_path / "r.png", controlnet=parts["controlnet"])
    assert np.array_equal(png_pixels(strip.read_bytes())[:, :64], png_pixels(again.read_bytes()))


def test_decode_gives_the_pixels_of_the_command_that_kept_the_latents(system: System, tmp_path: Path) -> None:
    parts = {"controlnet": system.controlnet.path, "device": "cpu"}
    made = generate(system.recipe, "a star", output=tmp_path / "a.png", branch=system.branch.path, seed=4,
                    save_latents=True, **parts)  # fmt: skip
    again = decode(
        system.recipe, tmp_path / "a.safetensors", output=tmp_path / "b.png", prompt="a star", seed=4, **parts
    )
    assert np.array_equal(png_pixels(made.read_bytes()), png_pixels(again.read_bytes()))
    assert file_facts(made)["DigitalSourceType"] == file_facts(again)["DigitalSourceType"] == GENERATED


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "not marked, or twice"),
        ({"box": (0, 0, 8, 8), "region": "the star"}, "not marked, or twice"),
        ({"box": (70, 0, 8, 8)}, "holds nothing of the image"),
        ({"box": (0, 0, 0, 8)}, "holds nothing of the image"),
        ({"box": (0, 0, 64, 64)}, "covers the whole image"),
        ({"mask_image": np.zeros((32, 64, 3), np.uint8)}, "another size than the image"),
        ({"mask_image": np.zeros((64, 64, 3), np.uint8)}, "the mask is empty"),
        ({"box": (0, 0, 8, 8), "strength": 0.0}, "strength=0.0"),
        ({"box": (0, 0, 8, 8), "decode_steps": 0}, "decode_steps=0"),
    ],
)
def test_what_cannot_be_edited_is_refused(pipe: BifrostPipeline, rgb: np.ndarray, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipe.edit(rgb, "a star", **options)


def test_a_region_that_the_mllm_does_not_find_is_said_and_nothing_is_made(
    system: System, image: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(Mllm, "answer", lambda *a, **k: Completion("there is none", False))
    parts = {"branch": system.branch.path, "controlnet": system.controlnet.path, "device": "cpu"}
    with pytest.raises(UsageError, match="does not say where the star is") as caught:
        edit(system.recipe, image, "a star", output=tmp_path / "e.png", region="the star", **parts)
    assert "there is none" in str(caught.value.at) and not (tmp_path / "e.png").exists()


def test_latents_that_do_not_fit_are_refused(system: System, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for name, tensors in (("other", {"x": torch.zeros(2)}), ("wide", {"latents": torch.zeros(16, 3)})):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(ArtifactError, match="patch latents|3 channels"):
            decode(system.recipe, tmp_path / f"{name}.safetensors", output=tmp_path / "o.png",
                   controlnet=system.controlnet.path, device="cpu")  # fmt: skip
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ArtifactError):
        decode(system.recipe, tmp_path / "bad.safetensors", output=tmp_path / "o.png", device="cpu")


def test_a_branch_of_another_encoders_latents_is_refused(system: System, rgb: np.ndarray, tmp_path: Path) -> None:
    identity = {**system.branch.identity, "encoder": {**system.encoder, "weights": "f" * 64}}
    config = {}
    stranger = save_part(tmp_path / "branch-x", "branch", nn.Linear(1, 1), config, identity)
    pipe = BifrostPipeline(system.recipe, system.branch, system.controlnet, device="cpu")
    pipe.prior.artifact = stranger
    with pytest.raises(ArtifactError, match="another encoder"):
        pipe.edit(rgb, "a star", box=(0, 0, 8, 8))


def test_the_command_refuses_before_a_model_is_loaded(image: Path, tmp_path: Path, capsys) -> None:
    for words, message in (
        (["--box", "1,2,3"], "not X,Y,WIDTH,HEIGHT"),
        ([], "not marked"),
        (["--box", "0,0,8,8", "--mask", str(tmp_path / "none.png")], "not marked, or twice"),
        (["--mask", str(tmp_path / "none.png")], "none.png"),
    ):
        assert run(["edit", str(image), "a star", "-o", str(tmp_path / "o.png"), *words]) in (2, 4)
        assert message in capsys.readouterr().err
    assert run(["mix", str(image), str(image), "-o", str(tmp_path / "o.gif")]) == 2
    assert run(["vary", str(image), "-n", "2", "-o", str(image)]) == 2


# ---- the built-in system ---------------------------------------------------------------------------------------------


def test_the_builtin_pipeline_edits_by_box_and_by_words(tmp_path: Path) -> None:
    scene = Scene("white", (Thing("circle", "red", 0, 1), Thing("square", "blue", 2, 2)))
    (tmp_path / "a.png").write_bytes(png_bytes(draw(scene)))
    wanted, out = "a green circle above a blue square", tmp_path / "b.png"
    where = ["-o", str(out), "-w", str(tmp_path / "runs")]
    assert run(["edit", str(tmp_path / "a.png"), wanted, "--region", "the red circle", *where]) == 0
    assert check(wanted, png_pixels(out.read_bytes())).right
