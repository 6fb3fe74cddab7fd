"""BifrostPipeline: the bytes of the command, loaded once; callbacks, cancellation, places, names and bad arguments."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fixtures_flux import System, save_part, save_system
from PIL import Image
from timing import within

import bifrost_cli
from bifrost_cli import BifrostPipeline, load_recipe
from bifrost_cli.artifacts import Artifact, Draft
from bifrost_cli.data.png import png_bytes, png_pixels
from bifrost_cli.errors import ArtifactError, BifrostError, Diverged, EnvironmentProblem, RecipeError, UsageError
from bifrost_cli.generation.arguments import seed_of
from bifrost_cli.generation.generate import generate
from bifrost_cli.generation.reconstruct import reconstruct
from bifrost_cli.loading import loaders
from bifrost_cli.loading.loaders import ModelLoader

PROMPTS = ["a star", "a red circle"]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> System:
    return save_system(tmp_path_factory.mktemp("system"), plan=True, branch_guidance=2.0)


@pytest.fixture(scope="module")
def pipe(system: System) -> BifrostPipeline:
    return BifrostPipeline(system.recipe, system.branch, system.controlnet, device="cpu")


def command(system: System, prompts, output: Path, **options):
    """The file or the folder that `bifrost generate` makes."""
    recipe = options.pop("recipe", system.recipe)
    parts = {"branch": system.branch.path, "controlnet": system.controlnet.path, "device": "cpu"}
    return generate(recipe, prompts, output=output, **parts, **options)


def pixels(path: Path) -> np.ndarray:
    return png_pixels(path.read_bytes())


def equal(image: Image.Image, path: Path) -> bool:
    return np.array_equal(np.asarray(image), pixels(path))


# ---- the same as the commands ----------------------------------------------------------------------------------------


def test_the_same_images_as_the_command_alone_or_among_others(system: System, pipe, tmp_path: Path) -> None:
    made = command(system, PROMPTS, tmp_path / "out", n=2, seed=3, save_latents=True)
    out = pipe(PROMPTS, num_images=2, seed=3)
    assert [equal(image, made.file(f"0000{i}.png")) for i, image in enumerate(out.images)] == [True] * 4
    assert out.prompts == ["a star", "a star", "a red circle", "a red circle"] and out.seeds == [3, 4, 3, 4]
    assert out.latents.shape == (4, 16, 128) and not out.interrupted
    assert out.cut == [True] * 4  # plans of 3 tokens end in the middle
    assert all(isinstance(plan, str) for plan in out.plans) and isinstance(out.images[0], Image.Image)
    assert set(out.timings) == {"plan", "prompt", "decode", "diffusion", "vae"} and min(out.timings.values()) > 0
    alone = pipe("a star", seed=4)
    assert np.array_equal(alone.images[0], out.images[1]) and torch.equal(alone.latents[0], out.latents[1])
    assert len({image.tobytes() for image in out.images}) == 4


def test_arguments_mean_what_the_recipe_keys_mean(system: System, pipe, tmp_path: Path) -> None:
    settings = {"steps": 3, "guidance_scale": 2.0, "decode_steps": 4, "branch_guidance": 1.0, "control_scale": 0.3}
    changed = system.recipe.generate.model_copy(update={**settings, "plan": False})
    recipe = system.recipe.model_copy(update={"generate": changed})
    file = command(system, "a star", tmp_path / "out.png", recipe=recipe)
    before = pipe("a star").images[0]
    given = {**settings, "num_inference_steps": settings["steps"], "plan": False}
    del given["steps"]
    out = pipe("a star", **given, height=64, width=64)
    assert equal(out.images[0], file) and out.plans == [None] and out.cut == [False]
    assert np.array_equal(before, pipe("a star").images[0])  # and the pipeline is as it was
    assert not np.array_equal(before, out.images[0])


def test_encode_and_decode_are_reconstruct(system: System, pipe, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    (tmp_path / "image.png").write_bytes(png_bytes(array))
    options = {"controlnet": system.controlnet.path, "device": "cpu"}
    file = reconstruct(system.recipe, tmp_path / "image.png", output=tmp_path / "out.png", **options)
    latents = pipe.encode(Image.fromarray(array))
    assert latents.shape == (16, 128) and equal(pipe.decode(latents), file)
    assert torch.equal(latents, pipe.encode(array)) and torch.equal(latents, pipe.encode(tmp_path / "image.png"))
    said = reconstruct(
        system.recipe, tmp_path / "image.png", output=tmp_path / "b.png", prompt="a star", seed=2, **options
    )
    assert equal(pipe.decode(latents, "a star", seed=2), said)


def test_the_halves_work_alone(system: System, pipe) -> None:
    whole = pipe("a star", seed=1)
    prior = BifrostPipeline(system.recipe, branch=system.branch, device="cpu").prior
    decoder = BifrostPipeline(system.recipe, controlnet=system.controlnet, device="cpu").decoder
    predicted = prior.predict("a star", 1)
    assert torch.equal(predicted.latents_PC, whole.latents[0]) and predicted.plan == whole.plans[0]
    assert np.array_equal(decoder.render("a star", predicted.latents_PC, 1), np.asarray(whole.images[0]))
    with pytest.raises(ArtifactError, match="no controlnet"):
        BifrostPipeline(system.recipe, branch=system.branch, device="cpu")("a star", height=64)


def test_an_image_of_numbers_that_are_not_finite_is_refused(pipe) -> None:
    latents = pipe("a", seed=0, output_type="latent").images[0]
    for bad in (float("nan"), float("inf")):
        latents.view(-1)[0] = bad
        with pytest.raises(Diverged, match="not finite") as told:
            pipe.decoder.decode(latents[None])
        assert told.value.exit_code == 7 and "models.dtype=float32" in str(told.value.fix)


def test_output_types(pipe) -> None:
    pil = np.stack([np.asarray(image) for image in pipe(PROMPTS).images])
    array, tensor = pipe(PROMPTS, output_type="np").images, pipe(PROMPTS, output_type="pt").images
    assert array.dtype == np.float32 and np.array_equal((array * 255).round().astype(np.uint8), pil)
    assert tensor.shape == (2, 3, 64, 64) and np.array_equal(tensor.movedim(1, -1).numpy(), array)
    latents = pipe(PROMPTS, output_type="latent").images
    assert latents.shape == (2, 16, 16, 16)
    assert np.array_equal(pipe.decoder.decode(latents[1:]), pil[1])
    assert pipe.decode(pipe("a star").latents[0], output_type="np").shape == (1, 64, 64, 3)


# ---- seeds and generators --------------------------------------------------------------------------------------------


def test_a_fresh_generator_is_its_seed_and_a_used_one_goes_on(pipe) -> None:
    generator = torch.Generator().manual_seed(7)
    first, second = pipe("a star", generator=generator), pipe("a star", generator=generator)
    assert first.seeds == [7] and np.array_equal(first.images[0], pipe("a star", seed=7).images[0])
    assert second.seeds != [7] and not np.array_equal(first.images[0], second.images[0])
    again = torch.Generator().manual_seed(7)
    assert [seed_of(again), seed_of(again)] == [7, second.seeds[0]]
    many = pipe("a star", num_images_per_prompt=2, generator=[torch.Generator().manual_seed(s) for s in (4, 1)])
    assert many.seeds == [4, 1] and np.array_equal(many.images[1], pipe("a star", seed=1).images[0])
    assert pipe("a star", num_images=2, generator=torch.Generator().manual_seed(7)).seeds == [7, 8]


@pytest.mark.gpu
def test_a_generator_of_another_device_is_the_same_seed(pipe) -> None:
    out = pipe("a star", generator=torch.Generator("cuda").manual_seed(7))
    assert out.seeds == [7] and np.array_equal(out.images[0], pipe("a star", seed=7).images[0])


# ---- callbacks and cancellation --------------------------------------------------------------------------------------


def test_each_step_is_seen_with_its_latents(pipe) -> None:
    seen = []

    def watch(pipeline, step, timestep, kwargs):
        assert pipeline is pipe
        kwargs["latents"].mul_(0)  # a copy: the image stays what it is
        seen.append((kwargs["index"], kwargs["stage"], step, float(timestep), tuple(kwargs["latents"].shape)))
        return kwargs

    out = pipe("a star", num_images=2, decode_steps=3, callback_on_step_end=watch)
    assert [entry[:3] for entry in seen] == [
        (image, stage, step) for image in (0, 1) for stage, count in (("decode", 3), ("diffusion", 2))
        for step in range(count)
    ]  # fmt: skip
    decode, diffusion = ([entry for entry in seen[:5] if entry[1] == stage] for stage in ("decode", "diffusion"))
    masked = [entry[3] for entry in decode]
    assert masked == sorted(masked, reverse=True) and masked[0] < 16 and masked[-1] == 0
    assert {entry[4] for entry in decode} == {(1, 16, 128)} and {entry[4] for entry in diffusion} == {(1, 16, 16, 16)}
    assert diffusion[0][3] == 1000.0 and diffusion[1][3] < 1000.0
    assert np.array_equal(out.images[0], pipe("a star", decode_steps=3).images[0])


@pytest.mark.parametrize("stage", ["decode", "diffusion"])
def test_interrupt_returns_the_whole_images(pipe, stage: str) -> None:
    def stop(pipeline, step, timestep, kwargs):
        pipeline.interrupt = kwargs["index"] == 1 and kwargs["stage"] == stage

    out = pipe("a star", num_images=3, callback_on_step_end=stop)
    assert out.interrupted and out.seeds == [0] and len(out.images) == len(out.plans) == len(out.latents) == 1
    after = pipe("a star")
    assert not after.interrupted and np.array_equal(after.images[0], out.images[0])


@pytest.mark.parametrize("offload", ["none", "model", "sequential"])
@pytest.mark.parametrize("stage", ["decode", "diffusion"])
def test_a_callback_that_raises_leaves_the_pipeline_as_it_was(system: System, tmp_path, monkeypatch, stage, offload):
    monkeypatch.chdir(tmp_path)
    pipe = BifrostPipeline(system.recipe, system.branch, system.controlnet, device="cpu")
    if offload != "none":
        getattr(pipe, f"enable_{offload}_cpu_offload")()
    before = pipe("a star", seed=5).images[0]

    def fail(pipeline, step, timestep, kwargs):
        if kwargs["stage"] == stage:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pipe("a red circle", callback_on_step_end=fail)
    assert np.array_equal(pipe("a star", seed=5).images[0], before) and list(tmp_path.iterdir()) == []


def test_a_callback_may_decode_a_preview_but_not_change_a_step(pipe) -> None:
    previews = []

    def preview(pipeline, step, timestep, kwargs):
        if kwargs["stage"] == "decode":
            previews.append(pipeline.decode(kwargs["latents"][0]))

    out = pipe("a star", callback_on_step_end=preview)
    assert len(previews) == 2 and np.array_equal(previews[-1], pipe.decode(out.latents[0]))

    def preview_and_stop(pipeline, step, timestep, kwargs):
        pipeline.interrupt = True
        pipeline.decode(kwargs["latents"][0])

    stopped = pipe("a star", callback_on_step_end=preview_and_stop)
    assert stopped.interrupted and stopped.images == [] and len(stopped.latents) == 0
    for kind in ("np", "pt", "latent"):
        assert len(pipe("a star", callback_on_step_end=preview_and_stop, output_type=kind).images) == 0
    with pytest.raises(UsageError, match="other latents"):
        pipe("a star", callback_on_step_end=lambda *rest: {"latents": rest[3]["latents"] + 1})


# ---- loaded once -----------------------------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    names: list[str] = []
    for name in ("mllm", "diffusion", "branch", "controlnet", "vae"):
        monkeypatch.setattr(ModelLoader, name, _counted(name, getattr(ModelLoader, name), names))
    monkeypatch.setattr(loaders, "load_open_clip", _counted("open_clip", loaders.load_open_clip, names))
    return names


def _counted(name: str, real, names: list[str]):
    def load(*args, **options):
        names.append(name)
        return real(*args, **options)

    return load


def test_a_pipeline_loads_once_and_outlives_its_folder(system: System, loads, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    made = save_system(folder, plan=True)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(made.recipe.model_dump(mode="json")))
    parts = {"branch": made.branch.path, "controlnet": made.controlnet.path}
    pipe = BifrostPipeline.from_pretrained(tmp_path / "own.yaml", **parts, device="cpu")
    assert sorted(loads) == ["branch", "controlnet", "diffusion", "mllm"]
    before, latents = pipe(PROMPTS), pipe.encode(np.zeros((64, 64, 3), np.uint8))
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(b"\0" * path.stat().st_size)  # in place: what is mapped would change
    shutil.rmtree(folder)
    after = pipe(PROMPTS)
    assert [a.tobytes() for a in after.images] == [b.tobytes() for b in before.images]
    assert torch.equal(latents, pipe.encode(np.zeros((64, 64, 3), np.uint8))) and len(loads) == 4


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloading_and_moving_change_no_byte(system: System, pipe, offload: str) -> None:
    expected = pipe("a star", seed=2).images[0]
    other = BifrostPipeline(system.recipe, system.branch, system.controlnet, device="cpu")
    other("a star")
    assert getattr(other, f"enable_{offload}_cpu_offload")() is other
    assert np.array_equal(other("a star", seed=2).images[0], expected)
    image = np.zeros((64, 64, 3), np.uint8)
    assert torch.equal(other.encode(image), pipe.encode(image))
    if offload == "sequential":
        assert {p.device.type for p in other.prior.mllm.decoder.layers.parameters()} == {"meta"}
        other.enable_model_cpu_offload()
        assert {p.device.type for p in other.prior.mllm.decoder.layers.parameters()} == {"cpu"}
    assert np.array_equal(other.to("cpu")("a star", seed=2).images[0], expected)
    with pytest.raises(EnvironmentProblem, match="no device"):
        other.to("cuda:99")


@pytest.fixture(scope="module")
def tiny() -> BifrostPipeline:
    return BifrostPipeline.from_pretrained("builtin", device="cpu")


def test_the_builtin_pipeline_is_the_builtin_command(tiny, tmp_path: Path) -> None:
    file = generate(load_recipe(), "a green star left of a yellow circle", output=tmp_path / "out.png",
                    branch="builtin", workspace=tmp_path, device="cpu", seed=7, sets=[])  # fmt: skip
    out = tiny("a green star left of a yellow circle", seed=7)
    assert equal(out.images[0], file) and out.plans == [None]
    linear = BifrostPipeline.from_pretrained("builtin", branch="builtin:branch-linear", device="cpu")
    file = generate(load_recipe(), "a green star", output=tmp_path / "linear.png", branch="builtin:branch-linear",
                    workspace=tmp_path, device="cpu", seed=7)  # fmt: skip
    out = linear("a green star", seed=7)
    assert equal(out.images[0], file) and out.plans[0]  # as with the tiny recipe, which it was shipped with


def test_a_second_call_loads_nothing_and_is_quick(tiny, loads) -> None:
    tiny("a red circle above a blue square")
    count = iter(range(1, 100))
    within(0.5, lambda: tiny("a red circle above a blue square", seed=next(count)))
    within(0.5, lambda: tiny(f"a green star, number {next(count)}"))
    assert loads == []


# ---- names -----------------------------------------------------------------------------------------------------------


def test_what_a_name_means(system: System, tmp_path: Path, monkeypatch, loads) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bifrost_cli.artifacts.workspace.BUILTIN", system.branch.path.parent)
    recipe, runs = system.recipe.model_dump(mode="json"), tmp_path / "runs"
    folders = {}
    for kind, artifact in (("branch", system.branch), ("controlnet", system.controlnet)):
        shutil.copytree(artifact.path, runs / kind)
        manifest = Artifact.open(runs / kind)
        folders[kind] = _with_recipe(manifest, recipe)
    samples = command(system, "a star", runs / "samples")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    expected = samples.file("00000.png")
    names = {
        "branch": folders["branch"], "controlnet": folders["controlnet"], "samples": samples.path,
        "a folder with both": runs, "a recipe file": tmp_path / "own.yaml",
    }  # fmt: skip
    for name, ref in names.items():
        pipe = BifrostPipeline.from_pretrained(ref, device="cpu")
        assert equal(pipe("a star").images[0], expected), name
    monkeypatch.setattr("bifrost_cli.generation.choose_models.from_hub", lambda ref: runs)
    hub = BifrostPipeline.from_pretrained("someone/bifrost", revision="main", device="cpu")
    assert equal(hub("a star").images[0], expected)


def _with_recipe(artifact: Artifact, recipe: dict) -> Path:
    """The artifact as a training makes it: its manifest holds the recipe."""
    path = artifact.path.with_name(f"{artifact.path.name}-trained")
    with Draft.open(path, artifact.kind, artifact.identity) as draft:
        for name in artifact.files:
            shutil.copy(artifact.path / name, path / name)
        draft.commit({"recipe": recipe})
    shutil.rmtree(artifact.path)
    return path


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("latents", ArtifactError, "is a latents artifact"),
        ("empty", ArtifactError, "holds no branch and no controlnet"),
        ("missing.yaml", RecipeError, "no recipe file"),
        ("no-such-recipe", RecipeError, "no recipe no-such-recipe"),
        ("orphan", ArtifactError, "is not here any more"),
    ],
)
def test_a_name_that_means_nothing(system: System, tmp_path: Path, monkeypatch, name, kind, message) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ModelLoader, "mllm", lambda *rest, **more: pytest.fail("weights were loaded"))
    (tmp_path / "empty").mkdir()
    save_part(tmp_path / "latents", "latents", torch.nn.Linear(1, 1), {}, {"x": 1})
    parent = save_part(tmp_path / "gone", "branch", torch.nn.Linear(1, 1), {}, {"x": 2})
    with Draft.open(tmp_path / "orphan", "samples", {"x": 3}, [parent]) as draft:
        draft.commit({"recipe": system.recipe.model_dump(mode="json")})
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(kind, match=message) as caught:
        BifrostPipeline.from_pretrained(name if "." in name or "-" in name else tmp_path / name, device="cpu")
    assert caught.value.fix


# ---- bad arguments ---------------------------------------------------------------------------------------------------

ONE = torch.Generator()


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("a star", {"num_images": 0}, "num_images=0"),
        ("a star", {"num_images": "4"}, "num_images='4'"),
        ("a star", {"num_images_per_prompt": -1}, "=-1"),
        ("a star", {"num_images": 2, "num_images_per_prompt": 3}, "num_images=2 and num_images_per_prompt=3"),
        ("", {}, "empty"),
        ([], {}, "no prompt"),
        (["a star", 7], {}, "prompt 2 is int"),
        ("a star", {"seed": -1}, "seed=-1"),
        ("a star", {"seed": 1.5}, "seed=1.5"),
        ("a star", {"seed": 1, "generator": ONE}, "seed and generator"),
        ("a star", {"generator": [ONE, ONE]}, "2 generators for 1 images"),
        ("a star", {"generator": [7]}, "1 generators"),
        ("a star", {"num_inference_steps": 0}, "num_inference_steps=0"),
        ("a star", {"guidance_scale": -1.0}, "guidance_scale=-1"),
        ("a star", {"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ("a star", {"decode_steps": 0}, "decode_steps=0"),
        ("a star", {"height": 96}, "height=96 does not fit: this ControlNet is for 64 pixels"),
        ("a star", {"height": 65}, "height=65 does not fit: this ControlNet is for 64 pixels"),
        ("a star", {"height": 0}, "height=0"),
        ("a star", {"width": 64.0}, "64.0 is not a number of pixels"),
        ("a star", {"height": 64, "width": 96}, "images are square"),
        ("a star", {"negative_prompt": "blur"}, "negative_prompt is not supported"),
        ("a star", {"output_type": "jpg"}, "output_type='jpg'"),
        ("a star", {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "prompt_embeds"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_generated(pipe, monkeypatch, prompt, options, message) -> None:
    pipe.decoder, pipe.prior  # noqa: B018 loaded
    monkeypatch.setattr(pipe, "predict", lambda *rest, **more: pytest.fail("latents were predicted"))
    with pytest.raises(UsageError) as caught:
        pipe(prompt, **options)
    assert message in caught.value.message and caught.value.fix


def test_bad_images_and_latents(pipe, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(BifrostError, match="not an image"):
        pipe.encode(tmp_path / "text.png")
    with pytest.raises(UsageError, match="uint8"):
        pipe.encode(np.zeros((64, 64, 3), np.float32))
    with pytest.raises(UsageError, match="P, C"):
        pipe.decode(torch.zeros(1, 16, 128))
    with pytest.raises(UsageError, match="height=96"):
        pipe.decode(torch.zeros(16, 128), height=96)


# ---- the package -----------------------------------------------------------------------------------------------------


def test_every_verb_is_a_function_of_the_package() -> None:
    for name in bifrost_cli.__all__:
        assert getattr(bifrost_cli, name) is not None
    verbs = {"extract_latents", "train_branch", "train_controlnet", "generate", "evaluate", "reconstruct", "ask",
             "report", "plan", "import_checkpoint", "export", "load_recipe", "BifrostPipeline",
             "LatentsStore"}  # fmt: skip
    assert verbs <= set(bifrost_cli.__all__) <= set(dir(bifrost_cli))
    with pytest.raises(AttributeError, match="no attribute 'paint'"):
        bifrost_cli.paint  # noqa: B018


# ---- a plan that is given --------------------------------------------------------------------------------------------


def test_a_plan_that_is_given_is_read_as_if_it_had_been_written(pipe) -> None:
    written = pipe("a star", seed=2, plan=True)
    again = pipe("a star", seed=2, plan=written.plans[0])
    other = pipe("a star", seed=2, plan="something else")
    assert again.plans == written.plans and other.plans == ["something else"]
    assert torch.equal(again.latents, written.latents) and not torch.equal(other.latents, written.latents)
    assert pipe.prior.write_plan("a star") == written.plans[0]
    with pytest.raises(UsageError, match="plan is empty"):
        pipe("a star", plan=" ")


def test_a_callback_sees_which_patches_are_masked(pipe) -> None:
    seen = []

    def watch(pipe, step, timestep, facts):
        seen.append((facts["stage"], timestep, facts["masked"]))

    pipe("a star", callback_on_step_end=watch)
    decoded = [(timestep, masked) for stage, timestep, masked in seen if stage == "decode"]
    assert [int(masked.sum()) for _, masked in decoded] == [timestep for timestep, _ in decoded]
    assert decoded[-1][0] == 0 and all(masked is None for stage, _, masked in seen if stage == "diffusion")
