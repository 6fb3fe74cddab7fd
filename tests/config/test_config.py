"""Recipes: what is refused, with which place and hint; what loads; what an artifact gives back."""

from __future__ import annotations

import json
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timing import within

from bifrost_cli.artifacts import Draft
from bifrost_cli.config.load import RENAMED, all_keys, load_recipe, recipe_names, recipe_path
from bifrost_cli.config.schema import Recipe
from bifrost_cli.config.section import identity_of
from bifrost_cli.config.strict_yaml import parse
from bifrost_cli.errors import RecipeError

# text of a recipe, code, line:column, words of the message
REFUSED = {
    "unknown key": ("branch:\n  trian:\n    lr: 1e-4\n", "002", "2:3", "branch.trian; did you mean branch.train?"),
    "key of another section": ("lr: 1e-4", "002", "1:1", "lr; did you mean branch.train.lr?"),
    "duplicate key": ("name: a\nclaim: b\nname: c", "001", "3:1", "name is given twice; first at"),
    "no is no boolean": ("latents:\n  vae: no", "003", "2:3", 'latents.vae is "no"'),
    "yes is no number": ("branch:\n  train:\n    lr: yes", "003", "3:5", "branch.train.lr"),
    "true is no number": ("branch:\n  train:\n    lr: true", "003", "3:5", "branch.train.lr is true"),
    "true is no count": ("branch:\n  train:\n    steps: true", "003", "3:5", "branch.train.steps is true"),
    "a fraction is no count": ("branch:\n  train:\n    steps: 1.5", "003", "3:5", "branch.train.steps is 1.5"),
    "negative steps": ("branch:\n  train:\n    steps: -5", "003", "3:5", "branch.train.steps is -5"),
    "negative size": ("images:\n  input_size: -448", "003", "2:3", "images.input_size is -448"),
    "a leading zero": ("branch:\n  train:\n    steps: 010", "001", "3:12", "010 starts with 0"),
    "sexagesimal": ("branch:\n  train:\n    steps: 12:30:45", "003", "3:5", "12:30:45"),
    "an underscore": ("branch:\n  train:\n    steps: 1_000", "003", "3:5", "1_000"),
    "not a number": ("branch:\n  train:\n    lr: .nan", "001", "3:9", ".nan is not a finite number"),
    "infinity": ("branch:\n  train:\n    lr: -.Inf", "001", "3:9", "not a finite number"),
    "overflow": ("branch:\n  train:\n    lr: 1e999", "003", "3:5", "finite"),
    "a python tag": ("name: !!python/object/apply:os.system [ls]", "001", "1:7", "tags"),
    "a private tag": ("name: !x y", "001", "1:7", "tags"),
    "an anchor": ("name: &a b", "001", "1:7", "anchors"),
    "an alias": ("name: *a", "001", "1:7", "aliases"),
    "a bomb of brackets": ("name: " + "[" * 20_000, "001", "1:39", "more than 32 levels"),
    "two documents": ("name: a\n---\nname: b", "001", "2:1", "a second document"),
    "a list": ("- name", "001", "1:1", "sections"),
    "text": ("hello", "001", "1:1", "sections"),
    "a tab": ("branch:\n\ttrain: 1", "001", "2:1", "not valid YAML"),
    "a key that is a list": ("[a, b]: c", "001", "1:1", "a key must be a plain word"),
    "a section that is a number": ("branch: 3", "003", "1:1", "branch is a section"),
    "an empty section": ("branch:", "003", "1:1", "branch is a section"),
    "contradicting masks": ("branch: {mask_low: 0.9, mask_high: 0.8}", "005", "1:1", "mask_low (0.9) is above"),
    "contradicting rows": ("latents:\n  shard_rows: 100\n  chunk_rows: 16", "005", "1:1", "shard_rows (100)"),
    "a plan without prompt": ("generate:\n  plan_instruction: generate", "005", "1:1", "{prompt}"),
    "codes without their head": ("branch:\n  codes: 8", "005", "1:1", "head codebook and codes belong together"),
    "no such choice": ("branch:\n  head: quadratic", "003", "2:3", "'linear', 'flow' or 'codebook'"),
    "no such encoder": ("latents:\n  encoder: siglip", "003", "2:3", "mllm (its own visual encoder), open_clip"),
    "a newer format": ("format: 9", "006", "1:1", "newer format"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_place_and_reason_within_a_second(tmp_path, case):
    text, code, place, words = REFUSED[case]
    path = tmp_path / "r.yaml"
    path.write_text(text)
    caught = within(1, lambda: pytest.raises(RecipeError, load_recipe, path))
    assert caught.value.exit_code == 2 and caught.value.code == f"BF-RECIPE-{code}"
    assert words in caught.value.message
    assert str(caught.value.at).startswith(f"{path}:{place}")


@pytest.mark.parametrize("raw", [b"", b"# a\n", b"\xff\xfe", b"name: \x00", b"x" * 1_000_001, b"\xef\xbb\xbf"])
def test_files_that_are_no_recipe(tmp_path, raw):
    path = tmp_path / "r.yaml"
    path.write_bytes(raw)
    with pytest.raises(RecipeError):
        load_recipe(path)


def test_numbers_and_words_mean_what_they_look_like():
    text = b"a: 1e-4\nb: 1.\nc: .5\nd: -3\ne: 'true'\nf: off\ng: ~\nh: 1:30\ni: [1, 2.0]\nj: \"1\"\nk: 2026-01-01\n"
    assert parse(text, "x").data == {
        "a": 1e-4, "b": 1.0, "c": 0.5, "d": -3, "e": "true", "f": "off", "g": None, "h": "1:30", "i": [1, 2.0],
        "j": "1", "k": "2026-01-01",
    }  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.text() | st.binary())
def test_any_text_is_read_or_refused(data):
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    try:
        parse(raw, "x")
    except RecipeError as error:
        assert error.at


def test_several_problems_are_told_together(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("branch:\n  train:\n    lr: -1\n    steps: 0\n    clip: -1\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    lines = str(caught.value.at).splitlines()
    assert sorted(line.split()[0].split(":")[-2] for line in lines) == ["3", "4", "5"]


def test_set_wins_over_the_recipe_and_is_as_strict():
    recipe = load_recipe("tiny", ["branch.train.lr=1e-4", "branch.train.betas=[0.8, 0.9]", "models.mllm_revision=null"])
    assert recipe.branch.train.lr == 1e-4 and recipe.branch.train.betas == (0.8, 0.9)
    assert recipe.branch.train.steps == load_recipe("tiny").branch.train.steps
    for entry in (
        "lr",
        "=1",
        "branch..lr=1",
        "branch.train.lr=",
        "branch.train.lr=x",
        "branch.lr=1",
        "a.b=1",
        "models.mllm.x=1",
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe("tiny", [entry])
        assert str(caught.value.at).startswith("--set")


def test_a_missing_recipe_names_what_exists(tmp_path):
    with pytest.raises(RecipeError, match="did you mean tiny") as caught:
        load_recipe("tinny")
    assert "bifrost1-7b" in str(caught.value.at)
    with pytest.raises(RecipeError, match="no recipe file"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_opens_with_its_claim(name):
    recipe = load_recipe(name)
    assert recipe.claim and recipe_path(name).read_text().startswith("#")
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_the_defaults_are_the_papers():
    paper, shipped = Recipe(), load_recipe("bifrost1-7b")
    assert (paper.images.input_size, paper.images.output_size) == (448, 512)
    assert (paper.branch.mask_mean, paper.branch.mask_sd, paper.branch.mask_low, paper.branch.mask_high) == (
        1,
        0.25,
        0.7,
        1,
    )
    assert (paper.branch.head, paper.branch.loss_on) == ("linear", "all")
    assert (paper.controlnet.double_blocks, paper.controlnet.single_blocks) == (4, 1)
    assert (paper.generate.steps, paper.generate.guidance_scale, paper.generate.control_scale) == (28, 3.5, 0.7)
    for section in ("models", "latents"):
        assert getattr(paper, section) == getattr(shipped, section)


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValueError):
        load_recipe().branch.train.lr = 1.0


def test_every_key_has_a_meaning():
    assert [key for key, info in all_keys(Recipe) if not info.description] == []


def test_an_artifact_is_a_recipe(tmp_path):
    recipe = load_recipe("tiny", ["branch.train.seed=7"])
    with Draft.open(tmp_path / "a", "branch", {}) as draft:
        draft.commit({"recipe": recipe.model_dump(mode="json")})
    assert load_recipe(tmp_path / "a") == recipe
    assert load_recipe(tmp_path / "a", ["branch.train.seed=8"]).branch.train.seed == 8
    with Draft.open(tmp_path / "b", "branch", {"x": 1}) as draft:
        draft.commit()
    with pytest.raises(RecipeError, match="has no recipe"):
        load_recipe(tmp_path / "b")


def test_hash_seed_and_locale_do_not_matter():
    script = "from bifrost_cli import load_recipe; print(load_recipe('tiny').model_dump_json())"
    root = str(Path(__file__).parents[2])
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": root, "PYTHONHASHSEED": seed, "LC_ALL": locale},
            capture_output=True,
            check=True,
        ).stdout
        for seed, locale in (("1", "C"), ("2", "C.UTF-8"))
    }
    assert len(outputs) == 1


# The format that wrote a key last, the key, its value there, and the keys and the value that it is read as.
OLD_KEYS = [
    (1, "models.flux", "some/folder", ["models.diffusion"], "some/folder"),
    (1, "generate.flux_guidance", 2.5, ["generate.guidance_scale"], 2.5),
    (1, "generate.max_flux_tokens", 7, ["models.diffusion_text_tokens"], 7),
    (2, "models.painter", "some/folder", ["models.diffusion"], "some/folder"),
    (2, "models.revision", "abc", ["models.mllm_revision", "models.diffusion_revision"], "abc"),
    (2, "latents.image_size", 28, ["images.input_size"], 28),
    (2, "latents.paint_size", 32, ["images.output_size"], 32),
    (2, "latents.background", "black", ["images.background"], "black"),
    (2, "latents.max_pixels", 99, ["images.max_pixels"], 99),
    (2, "latents.min_side", 9, ["images.min_side"], 9),
    (2, "latents.animated", "skip", ["images.animated"], "skip"),
    (2, "generate.guidance", 1.5, ["generate.branch_guidance"], 1.5),
    (2, "generate.painter_guidance", 2.5, ["generate.guidance_scale"], 2.5),
    (2, "generate.painter_tokens", 7, ["models.diffusion_text_tokens"], 7),
    *(
        (2, f"{section}.tensorboard", value, [f"{section}.report_to"], read)
        for section in (
            "branch.train",
            "controlnet.train",
            "shapes.vae",
            "shapes.mllm",
            "shapes.open_clip",
            "shapes.flux",
        )
        for value, read in ((True, ("tensorboard",)), (False, ()))
    ),
]


def test_the_list_of_old_keys_is_whole() -> None:
    assert {(format_ - 1, old) for format_, names in RENAMED.items() for old in names} == {
        (format_, old) for format_, old, *_ in OLD_KEYS if (format_ + 1) in RENAMED and old in RENAMED[format_ + 1]
    }
    assert {now for names in RENAMED[max(RENAMED)].values() for now in names} <= {key for key, _ in all_keys(Recipe)}


@pytest.mark.parametrize(("written", "old", "value", "now", "read"), OLD_KEYS)
def test_an_old_key_is_read_and_a_new_recipe_says_what_it_is_called(tmp_path, written, old, value, now, read) -> None:
    text = json.dumps(value)
    for part in reversed(old.split(".")):
        text = f"{{{part}: {text}}}"
    path = tmp_path / "old.yaml"
    for format_ in range(1, written + 1):
        if written == 1 or old not in ("models.painter", "generate.painter_guidance", "generate.painter_tokens"):
            path.write_text(f"{{format: {format_}, {text[1:]}")
            recipe = load_recipe(path)
            assert recipe.format == 3
            assert all(operator.attrgetter(key)(recipe) == read for key in now)
    path.write_text(text)
    for refused in (lambda: load_recipe(path), lambda: load_recipe("tiny", [f"{old}={json.dumps(value)}"])):
        with pytest.raises(RecipeError) as caught:
            refused()
        assert caught.value.code == "BF-RECIPE-002"
        assert f"unknown key {old}; since format 3 it is {' and '.join(now)}" in caught.value.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{format: 2, latents: {image_size: 28}, images: 3}", "images is a section"),
        ("{format: 2, latents: 3}", "latents is a section"),
        ("{format: 2, branch: {train: {tensorboard: 1}}}", "branch.train.report_to is 1"),
        ("{format: 2, models: {flux: x}}", "unknown key models.flux"),
        ("{branch: {train: {report_to: [excel]}}}", "'tensorboard', 'wandb', 'trackio' or 'mlflow'"),
    ],
)
def test_a_broken_recipe_of_an_older_format_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert words in caught.value.message


def test_where_results_are_tracked_changes_no_identity() -> None:
    plain, tracked = (load_recipe("tiny", [f"branch.train.report_to={value}"]) for value in ("[]", "[wandb, mlflow]"))
    assert tracked.branch.train.report_to == ("wandb", "mlflow")
    assert identity_of(plain.branch) == identity_of(tracked.branch)


def test_the_built_in_artifacts_recipe_is_read(tmp_path: Path) -> None:
    from bifrost_cli.loading.resolve import BUILTIN

    assert load_recipe(BUILTIN / "branch").models.diffusion_text_tokens == 24
