"""eval: the report's numbers, its choices when nothing is said, its refusals, and a page that holds hostile prompts."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from fixtures_clip import save_tiny_clip
from PIL import Image

from bifrost_cli.artifacts import Artifact, Draft
from bifrost_cli.config.schema import Evaluate, Models, Recipe
from bifrost_cli.data.image_sets import drawn
from bifrost_cli.data.image_sets import from_folder as pictures_of
from bifrost_cli.data.images import read_image
from bifrost_cli.data.png import png_bytes
from bifrost_cli.errors import ArtifactError, DataError, UsageError
from bifrost_cli.evaluation.evaluate import evaluate
from bifrost_cli.evaluation.feature_statistics import load_statistics
from bifrost_cli.evaluation.inputs import WORLD_SEED
from bifrost_cli.reports.page import SCRIPT
from bifrost_cli.shapes.captions import held_out_prompts, sample_scene
from bifrost_cli.shapes.draw import draw

COUNT = 24


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture
def recipe(clip):
    settings = Evaluate(features=f"open_clip:local-dir:{clip}", min_samples=COUNT)
    return Recipe(name="test", models=Models(diffusion="builtin:flux"), evaluate=settings)


@pytest.fixture
def workspace(tmp_path):
    return tmp_path / "runs"


def right_pictures(count: int) -> list[tuple[str, np.ndarray]]:
    prompts = held_out_prompts(count)
    return [(p.text, draw(sample_scene(np.random.default_rng(i), p))) for i, p in enumerate(prompts)]


def make_samples(workspace, images, name: str = "samples-a") -> Artifact:
    lines = []
    with Draft.open(workspace / name, "samples", {"name": name}) as draft:
        for index, (prompt, rgb) in enumerate(images):
            (draft.path / f"{index:05d}.png").write_bytes(png_bytes(rgb, {"prompt": prompt}))
            lines.append(json.dumps({"index": index, "prompt": prompt, "plan": "white aa none", "seed": index}))
        (draft.path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
        return draft.commit()


def save_folder(folder, images, names=None):
    folder.mkdir(parents=True)
    for index, (_, rgb) in enumerate(images):
        (folder / f"{index if names is None else names[index]}.png").write_bytes(png_bytes(rgb))
    return folder


def kept_of(workspace, images):
    """The file of statistics that was kept for these pictures."""
    files = (workspace / "statistics").glob("*.safetensors")
    return next(path for path in files if load_statistics(path).identity["pictures"] == images.content)


def read(artifact: Artifact) -> dict:
    return json.loads(artifact.file("report.json").read_text())


def result(artifact: Artifact, metric: str = "frechet_distance") -> dict:
    return next(found for found in read(artifact)["results"] if found["metric"] == metric)


# ---------------------------------------------------------------- what it measures


def test_report_of_right_pictures(recipe, workspace):
    samples = make_samples(workspace, right_pictures(COUNT))
    artifact = evaluate(recipe, samples=samples.id, metrics=["fid", "shapes"], workspace=workspace)
    report = read(artifact)
    assert artifact.kind == "report" and [parent["id"] for parent in artifact.parents] == [samples.id]
    assert report["schema"] == "bifrost.eval/3" and report["n_gen"] == report["n_ref"] == COUNT
    distance, shapes = result(artifact), result(artifact, "shapes_accuracy")
    assert distance["value"] >= 0 and distance["standard_error"] > 0 and np.isfinite(distance["raw"])
    assert distance["extractor"]["weights"] and "not Inception FID" in distance["sentence"]
    assert distance["value"] < 20 * distance["floor"]["value"], "true images score as true images do"
    assert shapes["right"] == shapes["count"] == COUNT and shapes["interval95"][1] == 1.0
    assert sum(row["count"] for row in shapes["categories"]) == COUNT and len(shapes["categories"]) == 6
    assert report["lineage"][0]["id"] == samples.id
    assert report["command"].startswith(f"bifrost eval --fid --shapes --samples {samples.id} --workspace")
    assert len(artifact.info["headline"]) == 2 and "24 of 24" in artifact.info["headline"][0]
    assert sorted(artifact.files) == ["report.html", "report.json"]


def test_wrong_pictures_are_counted_and_explained(recipe, workspace):
    images = right_pictures(COUNT)
    blank = [(prompt, np.full_like(rgb, 252)) for prompt, rgb in images[:6]]
    artifact = evaluate(
        recipe, samples=make_samples(workspace, blank + images[6:]).path, metrics=["shapes"], workspace=workspace
    )
    shapes = result(artifact, "shapes_accuracy")
    assert (shapes["right"], shapes["value"]) == (COUNT - 6, 0.75)
    low, high = shapes["interval95"]
    assert low < 0.75 < high
    wrong = [line for line in read(artifact)["pictures"] if not line["right"]]
    assert len(wrong) == 6 and all(line["why"] for line in wrong)
    assert artifact.file("report.html").read_text().count('class="is-wrong"') == 6


def test_pictures_against_themselves_are_at_zero(recipe, workspace, tmp_path):
    folder = save_folder(tmp_path / "same", right_pictures(COUNT))
    distance = result(evaluate(recipe, samples=folder, reference=folder, workspace=workspace))
    assert abs(distance["raw"]) < 1e-6 and "floor" not in distance


def test_names_and_order_change_nothing(recipe, workspace, tmp_path):
    images = right_pictures(COUNT)
    names = np.random.default_rng(0).permutation(COUNT)
    one = evaluate(recipe, samples=save_folder(tmp_path / "one", images), workspace=workspace)
    two = evaluate(recipe, samples=save_folder(tmp_path / "two", images, names), workspace=workspace)
    assert one.id != two.id and result(one)["raw"] == result(two)["raw"]


def test_the_same_again_is_the_same_report(recipe, workspace, tmp_path):
    samples = make_samples(workspace, right_pictures(COUNT))
    first = evaluate(recipe, metrics=["fid", "shapes"], workspace=workspace)
    assert evaluate(recipe, metrics=["fid", "shapes"], workspace=workspace).manifest == first.manifest
    options = {"samples": samples.path, "metrics": ["fid", "shapes"], "output": tmp_path / "other"}
    elsewhere = evaluate(recipe, **options, workspace=workspace)
    assert elsewhere.id == first.id
    assert elsewhere.files == first.files


# ---------------------------------------------------------------- references


def test_kept_statistics_are_a_reference(recipe, workspace, tmp_path):
    samples = make_samples(workspace, right_pictures(COUNT))
    folder = save_folder(tmp_path / "ref", right_pictures(2 * COUNT)[COUNT:])
    from_folder = evaluate(recipe, samples=samples.id, reference=folder, workspace=workspace)
    kept = kept_of(workspace, pictures_of(folder, recipe.images))
    from_file = evaluate(recipe, samples=samples.id, reference=kept, workspace=workspace)
    assert result(from_file)["raw"] == result(from_folder)["raw"] and result(from_file)["n_ref"] == COUNT


def test_a_damaged_cache_is_computed_again(recipe, workspace, tmp_path):
    samples = make_samples(workspace, right_pictures(COUNT))
    first = evaluate(recipe, samples=samples.id, workspace=workspace)
    kept = kept_of(workspace, drawn(COUNT, seed=WORLD_SEED))
    good = kept.read_bytes()
    kept.write_bytes(good[: len(good) // 2])
    again = evaluate(recipe, samples=samples.id, workspace=workspace, output=tmp_path / "again")
    assert result(again)["raw"] == result(first)["raw"] and kept.read_bytes() == good


def test_statistics_of_other_features_are_refused(recipe, workspace, tmp_path):
    samples = make_samples(workspace, right_pictures(COUNT))
    evaluate(recipe, samples=samples.id, workspace=workspace)
    kept = kept_of(workspace, drawn(COUNT, seed=WORLD_SEED))
    other = save_tiny_clip(tmp_path / "tiny", seed=1)
    settings = Evaluate(features=f"open_clip:local-dir:{other}", min_samples=COUNT)
    changed = recipe.model_copy(update={"evaluate": settings})
    with pytest.raises(ArtifactError, match="other features") as caught:
        evaluate(changed, samples=samples.id, reference=kept, workspace=workspace)
    assert caught.value.code == "BF-ART-004" and "weights" in caught.value.at


# ---------------------------------------------------------------- which samples


def test_newest_with_enough_pictures(recipe, workspace, monkeypatch):
    enough = make_samples(workspace, right_pictures(COUNT))
    make_samples(workspace, right_pictures(1), "samples-b")
    said = []
    ui = quiet(said)
    artifact = evaluate(recipe, workspace=workspace, ui=ui)
    assert artifact.parents[0]["id"] == enough.id and enough.id in said[0]


def quiet(said: list[str]):
    from bifrost_cli.runtime.ui import Ui

    class Listening(Ui):
        def say(self, line: str) -> None:
            said.append(line)

    return Listening()


def test_a_default_set_is_made_when_there_is_none(recipe, workspace, monkeypatch):
    """Also when there is one, but something was trained since."""
    asked = []

    def generate(recipe, prompts, *, save_latents, workspace, device, ui, sets):
        assert save_latents and sets == ["generate.plan=true"]  # latents for the plots of true beside predicted latents
        asked.append(prompts)
        return make_samples(workspace, right_pictures(COUNT), f"samples-{len(asked)}")

    monkeypatch.setitem(sys.modules, "bifrost_cli.generation.generate", SimpleNamespace(generate=generate))
    said = []
    evaluate(recipe, workspace=workspace, ui=quiet(said), sets=["generate.plan=true"])
    assert asked == [[prompt.text for prompt in held_out_prompts(COUNT)]]
    assert any("held-out prompts" in line for line in said)
    with Draft.open(workspace / "branch-x", "branch", {"x": 1}) as draft:
        trained = draft.commit()
    evaluate(recipe, workspace=workspace, ui=quiet(said), sets=["generate.plan=true"])
    assert len(asked) == 2 and any(trained.id in line for line in said)


# ---------------------------------------------------------------- refusals


def test_a_dry_run_names_the_inputs_and_makes_nothing(recipe, workspace, monkeypatch):
    monkeypatch.setattr("bifrost_cli.evaluation.networks.load_features", None)
    plan = evaluate(recipe, metrics=["fid", "shapes"], workspace=workspace, dry_run=True)
    assert plan["samples"] == f"{COUNT} images of held-out prompts, made first" and not workspace.exists()
    made = make_samples(workspace, right_pictures(COUNT))
    plan = evaluate(recipe, metrics=["fid", "shapes"], workspace=workspace, dry_run=True)
    assert made.id in plan["samples"] and plan["pictures"] == COUNT and plan["measures"] == ["fid", "shapes"]
    assert plan["features"] == recipe.evaluate.features and plan["reference"]
    assert evaluate(recipe, metrics=["shapes"], workspace=workspace, dry_run=True)["reference"] is None
    with pytest.raises(DataError, match="at least"):
        evaluate(recipe, metrics=["fid"], samples=made.path, min_samples=COUNT + 1, workspace=workspace, dry_run=True)
    assert list(workspace.iterdir()) == [made.path]


def test_too_few_pictures_are_refused(recipe, workspace):
    samples = make_samples(workspace, right_pictures(COUNT - 1))
    with pytest.raises(DataError, match=f"{COUNT - 1} images; at least {COUNT}") as caught:
        evaluate(recipe, samples=samples.id, workspace=workspace)
    assert (caught.value.exit_code, caught.value.code) == (4, "BF-DATA-008")
    assert "--min-samples" in caught.value.fix and "generate" in caught.value.fix
    assert result(evaluate(recipe, samples=samples.id, min_samples=10, workspace=workspace))["n_gen"] == COUNT - 1


@pytest.mark.parametrize("options", [{"metrics": []}, {"metrics": ["beauty"]}, {"min_samples": 0}, {"min_samples": -5}])
def test_options_that_make_no_sense(recipe, workspace, options):
    with pytest.raises(UsageError):
        evaluate(recipe, workspace=workspace, **options)


def test_prompts_of_another_world_are_not_judged(recipe, workspace):
    images = [(f"a photograph of cat {i}", rgb) for i, (_, rgb) in enumerate(right_pictures(COUNT))]
    samples = make_samples(workspace, images)
    with pytest.raises(DataError, match="built-in world"):
        evaluate(recipe, samples=samples.id, metrics=["shapes"], workspace=workspace)
    assert not list(workspace.glob("report-*/manifest.json"))


def test_damaged_samples_are_refused(recipe, workspace):
    samples = make_samples(workspace, right_pictures(COUNT))
    image = samples.path / "00003.png"
    image.write_bytes(image.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match="00003.png") as caught:
        evaluate(recipe, samples=samples.id, workspace=workspace)
    assert caught.value.exit_code == 5


def test_a_recipe_of_another_world_has_no_default_reference(recipe, workspace):
    samples = make_samples(workspace, right_pictures(COUNT))
    large = recipe.model_copy(update={"models": Models()})
    with pytest.raises(UsageError, match="no default reference"):
        evaluate(large, samples=samples.id, workspace=workspace)
    with pytest.raises(DataError, match="no default set"):
        evaluate(large, min_samples=COUNT + 1, workspace=workspace)


# ---------------------------------------------------------------- the page


class Tags(HTMLParser):
    """What a browser makes of the page: its tags, counted, and all attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]


def test_hostile_prompts_stay_text(recipe, workspace):
    hostile = [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "'); alert(1); ('",
        "</bdi></main><style>*{display:none}</style>",
        "\u202egnp.exe\u0000\u001b[31m",
        "\u0645\u0631\u062d\u0628\u0627 \U0001f600 & &amp;",
    ]
    images = [*zip(hostile, (rgb for _, rgb in right_pictures(COUNT)), strict=False), *right_pictures(COUNT)[6:]]
    samples = make_samples(workspace, images)
    artifact = evaluate(recipe, samples=samples.id, metrics=["shapes"], workspace=workspace)
    page = artifact.file("report.html").read_text("utf-8")
    seen = Tags()
    seen.feed(page)
    assert not seen.tags.keys() & {"iframe", "link", "object", "form"} and seen.tags["style"] == 1
    assert seen.tags["script"] == 1 and page.count(f"<script>{SCRIPT}</script>") == 1, "the page's own line alone"
    assert seen.tags["img"] == COUNT and "&lt;script&gt;" in page
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert all(value.startswith("#") for name, value in seen.attributes if name == "href"), "links stay on the page"
    assert all(value.startswith("data:image/png;base64,") for name, value in seen.attributes if name == "src")
    assert "url(" not in page and "@import" not in page, "the page asks for nothing outside"
    assert "\u202e" not in page and "\x1b" not in page and "\x00" not in page
    assert result(artifact, "shapes_accuracy")["not_judged"] == 6


def test_drawings_are_a_function_of_number_and_seed():
    assert drawn(12, seed=3).digest == drawn(12, seed=3).digest != drawn(12, seed=4).digest
    assert all(entry.load().shape == (64, 64, 3) for entry in drawn(12).entries)


# ---------------------------------------------------------------- what was left out, and how files were compressed


@pytest.mark.parametrize("side", ["samples", "reference"])
def test_what_a_folder_holds_and_is_not_measured_is_said(recipe, workspace, tmp_path, side):
    flat, nested = save_folder(tmp_path / "flat", right_pictures(COUNT)), tmp_path / "nested"
    save_folder(nested, right_pictures(COUNT), names=[f"a{index}" for index in range(COUNT)])
    save_folder(nested / "more", right_pictures(4))
    frames = [Image.fromarray(rgb) for _, rgb in right_pictures(2)]
    frames[0].save(nested / "film.gif", save_all=True, append_images=frames[1:])
    recipe = recipe.model_copy(update={"images": recipe.images.model_copy(update={"animated": "skip"})})
    folders = {"samples": flat, "reference": flat, side: nested}
    report = read(evaluate(recipe, **folders, metrics=["fid"], workspace=workspace))
    said = [line for line in report["warnings"] if line.startswith("Left out")]
    assert said == [f"Left out of {nested}: folders not entered 1, images that cannot be used 1 "
                    "(--set latents.recursive=true enters folders)."]  # fmt: skip
    assert (report["n_gen"], report["n_ref"], report["skipped"]["unreadable"]) == (COUNT, COUNT, int(side == "samples"))

    entering = recipe.model_copy(update={"latents": recipe.latents.model_copy(update={"recursive": True})})
    report = read(evaluate(entering, **folders, metrics=["fid"], workspace=workspace))
    assert report["n_gen" if side == "samples" else "n_ref"] == COUNT + 4
    assert not any("folders" in line for line in report["warnings"])
    assert "latents.recursive=true" in report["command"]


def test_images_that_a_table_does_not_name_are_told(tmp_path, recipe):
    folder = save_folder(tmp_path / "photos", right_pictures(3))
    assert pictures_of(folder, recipe.images).warnings == ()
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a\n1.png,b\n")
    (line,) = pictures_of(folder, recipe.images).warnings
    assert line == f"Left out of {folder}: images not in metadata.csv 1."


def test_lossy_files_against_others_are_told(recipe, workspace, tmp_path):
    png = save_folder(tmp_path / "png", right_pictures(COUNT))
    forms = {"jpeg": {"quality": 75}, "webp": {"quality": 75}, "mixed": {}, "lossless": {"lossless": True}}
    for name, options in forms.items():
        (tmp_path / name).mkdir()
        for index, (_, rgb) in enumerate(right_pictures(COUNT)):
            form = {"mixed": "jpeg" if index % 4 == 0 else "png", "lossless": "webp"}.get(name, name)
            Image.fromarray(rgb).save(tmp_path / name / f"{index}.{form}", form, **options)

    def told(samples, reference) -> list[str]:
        report = read(
            evaluate(recipe, samples=samples, reference=reference, metrics=["fid", "kid"], workspace=workspace)
        )
        return [line.partition(" images of the")[0] for line in report["warnings"] if "lossy" in line]

    assert told(png, tmp_path / "jpeg") == [f"0 of {COUNT} samples and {COUNT} of {COUNT}"]
    assert told(tmp_path / "webp", png) == [f"{COUNT} of {COUNT} samples and 0 of {COUNT}"]
    assert told(tmp_path / "mixed", png) == [f"{COUNT // 4} of {COUNT} samples and 0 of {COUNT}"]
    assert told(tmp_path / "jpeg", tmp_path / "webp") == told(tmp_path / "lossless", png) == []


@pytest.mark.parametrize(
    ("form", "options", "lossy"),
    [
        ("JPEG", {}, True), ("MPO", {"save_all": True}, True), ("WEBP", {"quality": 80}, True),
        ("WEBP", {"quality": 80, "exif": b"Exif\0\0"}, True), ("WEBP", {"lossless": True}, False),
        ("WEBP", {"lossless": True, "exif": b"Exif\0\0"}, False), ("PNG", {}, False), ("BMP", {}, False),
        ("TIFF", {"compression": "jpeg"}, True), ("TIFF", {"compression": "tiff_lzw"}, False), ("GIF", {}, False),
    ],
)  # fmt: skip
def test_which_files_are_lossy(form, options, lossy):
    data = io.BytesIO()
    Image.fromarray(right_pictures(1)[0][1]).save(data, form, **options)
    assert read_image(data.getvalue(), Recipe(name="test").images).lossy is lossy
