"""generate: what is chosen, what is refused, what is written, and that an image depends on (prompt, seed) alone."""

from __future__ import annotations

import io
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fixtures_flux import System, save_part, save_system
from PIL import Image
from safetensors.numpy import load_file
from torch import nn

from bifrost_cli.artifacts import Artifact
from bifrost_cli.cli.app import run
from bifrost_cli.config.load import load_recipe
from bifrost_cli.data.png import png_bytes, png_pixels, png_text
from bifrost_cli.data.xmp import GENERATED
from bifrost_cli.errors import ArtifactError, RecipeError, Stopped, UsageError
from bifrost_cli.generation.choose_models import choose_models
from bifrost_cli.generation.generate import generate
from bifrost_cli.generation.requests import image_requests, read_prompts
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.runtime.ui import Ui


class Heard(Ui):
    """Keeps what is said; `on_picture` is called after each image."""

    def __init__(self, on_picture=lambda: None) -> None:
        self.lines: list[str] = []
        self.on_picture = on_picture

    def say(self, line: str) -> None:
        self.lines.append(line)

    def progress(self, total: int, what: str):
        ui = self

        class Bar:
            def __enter__(self):
                return self

            def __exit__(self, *error) -> None: ...

            def advance(self, n: int = 1) -> None:
                ui.on_picture()

        return Bar()


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> System:
    return save_system(tmp_path_factory.mktemp("system"), plan=True)


def render(system: System, prompts, output: Path | None, **options):
    options = {"branch": system.branch.path, "controlnet": system.controlnet.path, "device": "cpu", **options}
    return generate(options.pop("recipe", system.recipe), prompts, output=output, **options)


def test_one_picture_carries_what_made_it(system: System, tmp_path: Path) -> None:
    ui = Heard()
    file = render(system, "a red circle", tmp_path / "new" / "out.png", seed=7, timings=True, ui=ui)
    text = png_text(file.read_bytes())
    assert png_pixels(file.read_bytes()).shape == (64, 64, 3)
    assert text["prompt"] == "a red circle" and text["seed"] == "7" and "plan" in text
    assert json.loads(text["artifacts"]) == {"branch": system.branch.id, "controlnet": system.controlnet.id}
    assert json.loads(text["settings"])["decode_steps"] == 2 and "torch" in json.loads(text["versions"])
    assert str(tmp_path) not in json.dumps(text)
    assert ui.lines[0].startswith(f"{system.branch.id} and {system.controlnet.id}")
    assert any(line == f"plan 0: {text['plan']}" for line in ui.lines)
    assert all(stage in ui.lines[-1] for stage in ("plan", "prompt", "decode", "diffusion", "vae"))
    assert [path.name for path in file.parent.iterdir()] == ["out.png"]


def test_same_seed_same_bytes_alone_or_among_others(system: System, tmp_path: Path) -> None:
    many = render(system, ["a star", "a red circle", "a star"], tmp_path / "many", n=2, seed=3)
    alone = render(system, "a star", tmp_path / "alone.png", seed=4).read_bytes()
    assert many.file("00001.png").read_bytes() == alone
    names = [name for name in sorted(many.files) if name.endswith(".png")]
    assert len({many.files[name]["sha256"] for name in names}) == len(names) == 6
    lines = [json.loads(line) for line in many.file("prompts.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line["seed"]) for line in lines[:2]] == [("a star", 3), ("a star", 4)]
    assert [line["seed"] for line in lines[4:]] == [5, 6]  # the prompt that comes again goes on counting


@pytest.mark.parametrize("head", ["flow", "codebook"])
def test_sampling_heads_and_guidance_repeat_too(tmp_path: Path, head: str) -> None:
    system = save_system(tmp_path, head=head, branch_guidance=2.0)
    first, second = (render(system, "a star", tmp_path / f"{name}.png", seed=1).read_bytes() for name in "ab")
    assert first == second != render(system, "a star", tmp_path / "c.png", seed=2).read_bytes()


def test_grid_latents_and_a_workspace_of_its_own(system: System, tmp_path: Path) -> None:
    options = {"workspace": tmp_path / "runs", "n": 3, "grid": True, "save_latents": True}
    made = render(system, "a star", None, **options)
    assert made.path.parent == tmp_path / "runs" and made.path.name == made.id
    assert png_pixels(made.file("grid.png").read_bytes()).shape == (140, 140, 3)
    latents = load_file(made.file("latents/00002.safetensors"))["latents"]
    assert latents.shape == (16, 128) and latents.dtype == np.float32
    assert not (made.path / "work").exists() and not made.strays()
    assert made.parents[0]["id"] == system.branch.id and made.manifest["cost"]["stages"]["diffusion"] > 0


def test_a_finished_folder_is_verified_and_kept(system: System, tmp_path: Path) -> None:
    made = render(system, ["a star", "a red circle"], tmp_path / "out")
    again = Heard()
    assert render(system, ["a star", "a red circle"], tmp_path / "out", ui=again).id == made.id
    assert any("verified" in line for line in again.lines)
    with pytest.raises(ArtifactError, match="different setup"):
        render(system, ["a star", "a red circle"], tmp_path / "out", seed=1)
    made.file("00000.png").write_bytes(b"")
    with pytest.raises(ArtifactError, match="damaged"):
        render(system, ["a star", "a red circle"], tmp_path / "out")


def test_a_signal_stops_between_pictures_and_the_rest_follows(system: System, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a star\n\n a red circle \na blue square\n")
    stopping = Heard(on_picture=lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="stopped after 1 of 3"):
        render(system, prompts, tmp_path / "out", ui=stopping)
    kept = (tmp_path / "out" / "00000.png").stat().st_mtime_ns
    going_on = Heard()
    made = render(system, prompts, tmp_path / "out", ui=going_on)
    assert made.file("00000.png").stat().st_mtime_ns == kept and "1 of 3 images are there already" in going_on.lines
    assert any("1 blank lines skipped" in line for line in going_on.lines)
    assert render(system, prompts, tmp_path / "straight").files == made.files


def test_a_damaged_picture_of_an_unfinished_folder_is_made_again(system: System, tmp_path: Path) -> None:
    stopping = Heard(on_picture=lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped):
        render(system, ["a star", "a red circle"], tmp_path / "out", ui=stopping)
    (tmp_path / "out" / "00000.png").write_bytes(b"half")
    with open(tmp_path / "out" / "work" / "pictures.jsonl", "a") as log:
        log.write('{"index": 1, "fi')
    made = render(system, ["a star", "a red circle"], tmp_path / "out")
    assert made.files == render(system, ["a star", "a red circle"], tmp_path / "straight").files


@pytest.mark.parametrize(
    ("prompts", "output", "options", "message"),
    [
        ("  ", "out.png", {}, "empty"),
        ([], "out.png", {}, "no prompt"),
        ("a\0b", "out.png", {}, "NUL"),
        ("a\udcff", "out.png", {}, "not valid text"),
        ("x" * 70_000, "out.png", {}, "70000 bytes"),
        ("a", "there.png", {}, "exists already"),
        ("a", "there", {}, "exists already"),
        ("a", "out.gif", {}, "would be no PNG, JPEG or WebP"),
        ("a", "there.webp", {}, "exists already"),
        (["a", "b"], "out.png", {}, "2 images do not fit"),
        ("a", "out.png", {"n": 0}, "0 images"),
        ("a", "out.png", {"grid": True}, "--grid"),
        (Path("missing.txt"), "out", {}, "cannot be read"),
        (Path("blank.txt"), "out", {}, "holds no prompt"),
        (Path("latin.txt"), "out", {}, "not UTF-8"),
    ],
)
def test_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch, prompts, output, options, message) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.png").write_bytes(b"mine")
    Path("there").write_bytes(b"mine")
    Path("there.webp").write_bytes(b"mine")
    Path("blank.txt").write_text("\n \n")
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=message):
        generate(None, prompts, output=output, **options)
    assert sorted(tmp_path.iterdir()) == before and Path("there.png").read_bytes() == b"mine"


def test_a_dry_run_says_what_is_there_and_reads_no_weight(system: System, tmp_path: Path, monkeypatch) -> None:
    half = render(system, ["a star"], tmp_path / "out", n=2)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(ModelLoader, "mllm", lambda *a, **k: pytest.fail("weights were loaded"))
    plan = render(system, ["a star", "a circle"], half.path, n=2, dry_run=True)
    assert (plan["prompts"], plan["pictures"], plan["pictures_there"]) == (2, 4, 2)
    assert plan["branch"] == system.branch.id and plan["controlnet"] == system.controlnet.id
    assert plan["branch_passes"] == plan["diffusion_steps"] == 2 and plan["plan_tokens"] == 3
    assert render(system, "a star", tmp_path / "one.png", dry_run=True)["output"].endswith("one.png")
    with pytest.raises(UsageError, match="exists already"):
        render(system, "a star", half.file("00000.png"), dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_jpeg_and_webp_say_the_same_of_the_same_image(system: System, tmp_path: Path, capsys) -> None:
    said = []
    for name in ("a.png", "a.JPG", "a.webp"):
        file = render(system, "a red circle", tmp_path / name, seed=7)
        assert run(["show", str(file), "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1] == said[2] and said[0]["DigitalSourceType"] == GENERATED and said[0]["seed"] == "7"
    pixels = [np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "a.JPG", "a.webp")]
    assert np.array_equal(pixels[0], pixels[2]) and np.abs(pixels[0].astype(int) - pixels[1]).mean() < 6  # of noise


def test_a_folder_that_an_older_version_left_goes_on_with_marked_images(system: System, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        "bifrost_cli.generation.generate.image_bytes", lambda pixels, text, **_: png_bytes(pixels, text)
    )
    stopping = Heard(on_picture=lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        render(system, ["a star", "a red circle"], tmp_path / "out", ui=stopping)
    older = (tmp_path / "out" / "00000.png").read_bytes()
    monkeypatch.undo()
    made = render(system, ["a star", "a red circle"], tmp_path / "out", grid=False)
    assert made.file("00000.png").read_bytes() == older and not made.verify()
    assert ["xmp" in Image.open(made.file(f"0000{index}.png")).info for index in (0, 1)] == [False, True]
    alike = render(system, ["a star", "a red circle"], tmp_path / "straight").file("00000.png").read_bytes()
    assert np.array_equal(png_pixels(alike), png_pixels(older))


def test_long_and_foreign_prompts(system: System, tmp_path: Path) -> None:
    ui = Heard()
    file = render(system, "a red circle " * 770, tmp_path / "long.png", ui=ui)
    assert png_text(file.read_bytes())["prompt"] == "a red circle " * 770
    assert any("1 of the images had a prompt or a plan longer" in line for line in ui.lines)
    foreign = render(system, "一个红色的圆 🙂 דג <|im_end|>", tmp_path / "foreign.png")
    assert png_text(foreign.read_bytes())["prompt"] == "一个红色的圆 🙂 דג <|im_end|>"


def test_parts_that_do_not_fit_are_named_before_loading(system: System, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ModelLoader, "mllm", lambda *a, **k: pytest.fail("weights were loaded"))
    other = {"encoder": {**system.encoder, "weights": "f" * 64}, "grid": [8, 8], "channels": 128}
    stranger = save_part(tmp_path / "other", "controlnet", nn.Linear(1, 1), {}, other)
    with pytest.raises(ArtifactError) as caught:
        render(system, "a star", tmp_path / "out.png", controlnet=stranger.path)
    assert caught.value.code == "BF-ART-004" and caught.value.exit_code == 5
    assert system.encoder["weights"][:12] in str(caught.value) and "ffffffffffff, grid 8x8" in str(caught.value)


def test_a_branch_of_another_mllm_is_refused(system: System, tmp_path: Path) -> None:
    shared = {key: system.branch.identity[key] for key in ("encoder", "grid", "channels")}
    other = save_part(tmp_path / "b", "branch", nn.Linear(1, 1), {}, {**shared, "mllm": "e" * 64})
    with pytest.raises(ArtifactError, match="another mllm") as caught:
        render(system, "a star", tmp_path / "out.png", branch=other.path)
    assert "eeeeeeeeeeee" in str(caught.value) and caught.value.code == "BF-ART-004"


def test_a_controlnet_of_another_painter_is_refused(system: System, tmp_path: Path) -> None:
    identity = {**system.controlnet.identity, "painter": "d" * 64}
    other = save_part(tmp_path / "c", "controlnet", nn.Linear(1, 1), {}, identity)
    with pytest.raises(ArtifactError, match="another painter|another diffusion"):
        render(system, "a star", tmp_path / "out.png", controlnet=other.path)


def test_a_paint_size_that_does_not_fit_says_which_does(system: System, tmp_path: Path) -> None:
    images = system.recipe.images.model_copy(update={"output_size": 96})
    with pytest.raises(RecipeError, match="output_size 96") as caught:
        render(system, "a star", tmp_path / "out.png", recipe=system.recipe.model_copy(update={"images": images}))
    assert caught.value.fix == "--set images.output_size=64"


def test_the_newest_pair_that_fits_else_the_builtin(system: System, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("bifrost_cli.artifacts.workspace.BUILTIN", system.branch.path.parent)
    workspace, one = tmp_path / "runs", nn.Linear(1, 1)
    shared = {key: system.branch.identity[key] for key in ("encoder", "grid", "channels")}
    assert choose_models(None, None, workspace).branch.id == system.branch.id
    fitting = save_part(workspace / "branch-a", "branch", one, {}, {**shared, "mllm": "a", "try": 1})
    save_part(workspace / "controlnet-a", "controlnet", one, {}, {**shared, "grid": [9, 9]})
    found = choose_models(None, None, workspace)
    assert found.branch.id == system.branch.id and "1 branch and 1 controlnet" in found.why
    fits = save_part(workspace / "controlnet-b", "controlnet", one, {}, {**shared, "try": 2})
    save_part(workspace / "branch-b", "branch", one, {}, {**shared, "channels": 9, "mllm": "a"})
    found = choose_models(None, None, workspace)
    assert (found.branch.id, found.controlnet.id) == (fitting.id, fits.id) and "the newest from" in found.why
    half = choose_models(system.branch.path, None, workspace)
    assert (half.branch.id, half.controlnet.id) == (system.branch.id, fits.id)


def test_orders_and_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeff# one\r\n../x/y\r\na\u2028b\r\n".encode())
    prompts = read_prompts(path, Ui())
    assert prompts == ["# one", "../x/y", "a\u2028b"]
    made = [(order.name, order.seed) for order in image_requests(prompts, 2, 5)]
    assert made[:3] == [("00000.png", 5), ("00001.png", 6), ("00002.png", 5)]


@pytest.mark.parametrize(
    ("branch", "sets", "plan_tokens", "passes"),
    [("builtin", [], 0, 32), ("builtin", ["generate.plan=true", "generate.branch_guidance=1"], 24, 16),
     ("builtin:branch-linear", [], 24, 1), ("builtin", None, 24, 1)],
)  # fmt: skip
def test_without_a_recipe_the_branchs_own_generates(branch, sets, plan_tokens, passes, tmp_path: Path) -> None:
    options = {"branch": branch, "workspace": tmp_path, "device": "cpu", "dry_run": True, "sets": sets}
    plan = generate(load_recipe("tiny"), "a star", **options)
    assert (plan["plan_tokens"], plan["branch_passes"]) == (plan_tokens, passes)


def test_the_command_generates_by_the_branchs_recipe_and_set_changes_it(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for options, passes in ([], 32), (["--set", "generate.decode_steps=3"], 6), (["--recipe", "tiny"], 1):
        assert run(["generate", "a star", "--dry-run", "--json", *options]) == 0
        assert json.loads(capsys.readouterr().out)["branch_passes"] == passes


JSON_PROMPTS = {
    "p.json": '["a star", {"prompt": "a\\nsquare"}]',
    "P.JSON": '[{"prompt": "a star"}, "a\\nsquare"]',
    "p.jsonl": '{"prompt": "a star"}\n\n{"prompt": "a\\nsquare", "tag": 3}\n',
    "P.JSONL": '{"prompt": "a star"}\n{"prompt": "a\\nsquare"}',
}


@pytest.mark.parametrize("name", JSON_PROMPTS)
def test_prompts_of_json_are_never_its_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(JSON_PROMPTS[name])
    assert read_prompts(tmp_path / name, Ui()) == ["a star", "a\nsquare"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("[", "is no JSON"), ('{"prompt": "a star"}', "not a list of prompts"), ("[]", "not a list of prompts"),
     ('["a star", 3]', r"p.json\[1\] has no prompt"), ('["a star", ""]', r"p.json\[1\] is empty"),
     ("[" * 100_000, "is no JSON")],
)  # fmt: skip
def test_a_json_file_that_is_no_list_of_prompts_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_prompts(tmp_path / "p.json", Ui())


def test_prompts_from_standard_input_can_be_read_twice(monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a star\n\na square\n")))
    assert [read_prompts(Path("-"), Ui()) for _ in range(2)] == [["a star", "a square"]] * 2


def test_reading_a_weight_that_does_not_fit(system: System, tmp_path: Path) -> None:
    config = json.loads(system.controlnet.file("config.json").read_text())
    identity = {**system.controlnet.identity, "broken": True}
    broken = save_part(tmp_path / "c", "controlnet", nn.Linear(1, 1), config, identity)
    with pytest.raises(ArtifactError, match="do not fit its config.json") as caught:
        render(system, "a star", tmp_path / "out.png", controlnet=broken.path)
    assert "unexpected" in str(caught.value) or "missing" in str(caught.value)
    damaged = replace(Artifact.open(broken.path))
    damaged.file("model.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(ArtifactError, match="damaged"):
        render(system, "a star", tmp_path / "out.png", controlnet=broken.path)


def test_a_kill_between_latents_and_image_lets_the_same_command_go_on(system: System, tmp_path: Path) -> None:
    file, latents = tmp_path / "out.png", tmp_path / "out.safetensors"
    render(system, "a star", file, save_latents=True)
    image, data = file.read_bytes(), latents.read_bytes()
    file.unlink()
    render(system, "a star", file, save_latents=True)
    assert (file.read_bytes(), latents.read_bytes()) == (image, data)
    file.unlink()
    for other in ("a circle", "a star"):  # another image's latents; somebody's own file
        with pytest.raises(UsageError, match="out.safetensors exists already"):
            render(system, other, file, save_latents=True)
        assert not file.exists() and latents.read_bytes() == data
        data = b"mine"
        latents.write_bytes(data)


def test_of_two_runs_for_one_file_the_later_is_refused(system: System, tmp_path: Path, monkeypatch) -> None:
    from bifrost_cli.generation.pipeline import BifrostPipeline

    file, paint = tmp_path / "out.png", BifrostPipeline.render_batch

    def meanwhile(self, *arguments):
        if not file.exists():
            file.write_bytes(b"the other one's")
        return paint(self, *arguments)

    monkeypatch.setattr(BifrostPipeline, "render_batch", meanwhile)
    with pytest.raises(UsageError, match="exists already") as caught:
        render(system, "a star", file)
    assert caught.value.code == "BF-USE-002"
    assert file.read_bytes() == b"the other one's" and list(tmp_path.iterdir()) == [file]
