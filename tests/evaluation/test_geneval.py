"""GenEval: verdicts known by hand, at the thresholds on both sides; a detector of random weights; files out and in."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig

from bifrost_cli.artifacts import Artifact, Draft
from bifrost_cli.cli.app import run
from bifrost_cli.config.load import load_recipe
from bifrost_cli.data.png import png_bytes
from bifrost_cli.errors import ArtifactError, DataError, EnvironmentProblem, UsageError
from bifrost_cli.evaluation.evaluate import evaluate
from bifrost_cli.evaluation.geneval_export import export_geneval, import_geneval
from bifrost_cli.evaluation.judges import ColourNamer
from bifrost_cli.evaluation.metrics.geneval import (
    PROMPTS,
    TASKS,
    Detection,
    counted,
    from_layout,
    geneval_row,
    read_asked,
    read_results,
    relations,
    verdict,
)
from bifrost_cli.evaluation.networks import load_detector
from bifrost_cli.generation.requests import read_prompts
from bifrost_cli.runtime.ui import Ui

# ---- the rules ------------------------------------------------------------------------------------------------------


def at(x: float, y: float, size: float = 10, score: float = 0.99) -> Detection:
    return Detection((x - size / 2, y - size / 2, x + size / 2, y + size / 2), score)


def no_colours(found, name):
    raise AssertionError("no colour was asked for")


def test_thresholds_are_above_not_at():
    found = {"dog": [at(0, 0, score=0.3), at(0, 0, score=0.31)], "cat": [at(0, 0, score=0.9), at(0, 0, score=0.91)]}
    assert [one.score for one in counted(found, "two_object")["dog"]] == [0.31]
    assert counted(found, "counting").keys() == {"cat"} and len(counted(found, "counting")["cat"]) == 1
    assert counted({"dog": [at(0, 0, score=0.1)]}, "colors") == {}


def test_at_most_sixteen_the_surest_first_and_none_merged():
    found = counted({"dog": [at(0, 0, score=0.5 + i / 100) for i in range(20)]}, "single_object")["dog"]
    assert len(found) == 16 and [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert found[0].score == pytest.approx(0.69)


@pytest.mark.parametrize(
    ("offset", "sides"),
    [((-30, 0), {"left of"}), ((30, 0), {"right of"}), ((0, -30), {"above"}), ((0, 30), {"below"}),
     ((30, 30), {"right of", "below"}), ((-30, 5), {"left of"}), ((0, 0), set()),
     ((2, 0), set()), ((2.0005, 0), set()),  # within a tenth of both sizes, and hardly beyond it
     ((4, 0), set()), ((4.1, 0), {"right of"}),  # beyond is half of the offset: (4 - 2)/4, and more
     ((30, 18), {"right of"}), ((30, 24), {"right of", "below"})],
)  # fmt: skip
def test_where_one_is_of_another(offset, sides):
    """Two boxes of 10 px: an offset loses 2 px on each axis, and a side needs more than half of what was there."""
    assert relations(at(50 + offset[0], 50 + offset[1]), at(50, 50)) == sides


CASES = [
    ("there", {"include": [{"class": "dog", "count": 1}]}, {"dog": [at(0, 0)]}, True, ""),
    ("not-there", {"include": [{"class": "dog", "count": 1}]}, {"cat": [at(0, 0)]}, False, "expected dog>=1, found 0"),
    ("two", {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]},
     {"dog": [at(0, 0)], "cat": [at(0, 0)]}, True, ""),
    ("one-of-two", {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]},
     {"dog": [at(0, 0)]}, False, "expected cat>=1, found 0"),
    ("three", {"include": [{"class": "dog", "count": 3}], "exclude": [{"class": "dog", "count": 4}]},
     {"dog": [at(0, 0)] * 3}, True, ""),
    ("four-for-three", {"include": [{"class": "dog", "count": 3}], "exclude": [{"class": "dog", "count": 4}]},
     {"dog": [at(0, 0)] * 4}, False, "expected dog<4, found 4"),
    ("two-for-three", {"include": [{"class": "dog", "count": 3}], "exclude": [{"class": "dog", "count": 4}]},
     {"dog": [at(0, 0)] * 2}, False, "expected dog>=3, found 2"),
    ("left", {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]},
     {"dog": [at(10, 0)], "cat": [at(60, 0)]}, True, ""),
    ("not-left", {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]},
     {"dog": [at(90, 0)], "cat": [at(60, 0)]}, False, "expected dog left of target, found right of target"),
    ("no-target", {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]},
     {"dog": [at(90, 0)]}, False, "expected cat>=1, found 0; no target for dog to be left of"),
    ("the-surest-counts", {"include": [{"class": "cat", "count": 1},
                                       {"class": "dog", "count": 1, "position": ["above", 0]}]},
     {"dog": [at(0, 90), at(0, 0)], "cat": [at(0, 50)]}, False, "expected dog above target, found below target"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "objects", "right", "why"), [case[1:] for case in CASES],
                         ids=[case[0] for case in CASES])  # fmt: skip
def test_verdicts_known_by_hand(asked, objects, right, why):
    assert verdict(asked, objects, no_colours) == (right, why)


@pytest.mark.parametrize(
    ("seen", "count", "right", "why"),
    [(["red"], 1, True, ""), (["blue"], 1, False, "expected red dog>=1, found 1 blue"),
     (["red", "red"], 2, True, ""), (["red", "blue"], 2, False, "expected red dog>=2, found 1 red, 1 blue")],
)  # fmt: skip
def test_colours_are_those_of_the_surest_objects(seen, count, right, why):
    asked = {"include": [{"class": "dog", "count": count, "color": "red"}]}
    given = []

    def colours(found, name):
        given.append((len(found), name))
        return seen

    assert verdict(asked, {"dog": [at(0, 0)] * 5}, colours) == (right, why)
    assert given == [(count, "dog")]


def test_the_summary_by_hand():
    """single_object 3 of 4, counting 1 of 4: the mean of the means is 1/2, whatever their sizes."""
    lines = [{"category": "single_object", "right": i < 3, "prompt": f"s{i // 2}"} for i in range(4)]
    lines += [{"category": "counting", "right": i == 0, "prompt": f"c{i}"} for i in range(4)]
    lines += [{"category": "counting", "right": False, "prompt": "c0"} for _ in range(4)]
    found = geneval_row(lines, "here")
    assert found["value"] == pytest.approx((3 / 4 + 1 / 8) / 2) and found["n_gen"] == 12
    assert [row["name"] for row in found["categories"]] == ["single_object", "counting"]
    assert found["details"] == ["4 of 12 images are right", "3 of 6 prompts have one that is right",
                                "not the benchmark's own 553 prompts: single_object 2 of 80, two_object 0 of 99, "
                                "counting 4 of 80, colors 0 of 94, position 0 of 100, color_attr 0 of 100"]  # fmt: skip
    errors = [row["error_by_prompt"] for row in found["categories"]]
    # single_object: clusters (1, 1), (1, 0) about 3/4: sums 1/2, -1/2 -> sqrt(2 (1/4 + 1/4)) / 4
    assert errors[0] == pytest.approx(0.25) and found["standard_error"] == pytest.approx(np.hypot(*errors) / 2)
    # its interval is that of 3/4 x 1/4 / 0.25^2 = 3 trials; the mean's is made of the tasks' half widths
    low, high = found["categories"][0]["interval95"]
    assert (low, high) == pytest.approx((0.2561, 0.9632), abs=1e-4)
    below = [row["value"] - row["interval95"][0] for row in found["categories"]]
    assert found["interval95"][0] == pytest.approx(found["value"] - np.hypot(*below) / 2)


def test_a_whole_benchmark_is_not_called_a_part():
    lines = [{"category": name, "right": True, "prompt": f"{name} {number}"}
             for name, count in PROMPTS.items() for number in range(count)]  # fmt: skip
    found = geneval_row(lines, "here")
    assert found["interval95"][1] == 1 > found["interval95"][0] > 0.97 and "100.0% to" not in found["spread"]
    assert found["value"] == 1 and found["details"] == ["553 of 553 images are right",
                                                        "553 of 553 prompts have one that is right"]  # fmt: skip
    assert "position 99 of 100" in geneval_row(lines[:-101] + lines[-100:], "here")["details"][-1]


# ---- a detector -----------------------------------------------------------------------------------------------------

LABELS = ("person", "dog", "mouse", "aeroplane")


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    """Random weights in the hub's layout; the classes are COCO's by the names that checkpoints have."""
    torch.manual_seed(0)
    backbone = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
                          window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = Mask2FormerConfig(backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
                               encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
                               num_attention_heads=2, num_queries=6,
                               id2label=dict(enumerate(LABELS)))  # fmt: skip
    folder = tmp_path_factory.mktemp("detector") / "tiny-mask2former"
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    processor = Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}, ignore_index=255)
    processor.save_pretrained(folder)
    return folder


def test_objects_have_the_benchmarks_names_and_the_boxes_of_their_masks(detector, monkeypatch):
    monkeypatch.setattr("bifrost_cli.evaluation.judges.THRESHOLD", 0.0)
    loaded = load_detector(str(detector), "cpu")
    assert set(loaded.classes.values()) == {"person", "dog", "computer mouse", "airplane"}
    found = loaded.objects(np.random.default_rng(0).integers(0, 255, (48, 40, 3), np.uint8))
    objects = [one for each in found.values() for one in each]
    assert objects and set(found) <= set(loaded.classes.values())
    for one in objects:
        left, top, right, bottom = map(int, one.box)
        assert one.mask_HW.shape == (48, 40) and one.mask_HW[top:bottom, left:right].sum() == one.mask_HW.sum() > 0
        assert one.mask_HW[top].any() and one.mask_HW[bottom - 1].any() and one.mask_HW[:, left].any()
    assert len(loaded.identity["weights"]) == 64 and str(detector.parent) not in str(loaded.identity)


def test_scores_that_are_no_numbers_are_an_error_not_an_empty_picture(detector):
    loaded = load_detector(str(detector), "cpu")
    loaded._model.class_predictor.bias.data[:] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        loaded.objects(np.zeros((32, 32, 3), np.uint8))


def test_what_is_no_detector_is_refused(detector, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(EnvironmentProblem):
        load_detector(str(tmp_path / "none"), "cpu")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in detector.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(detector / "model.safetensors")
    tensors.pop(next(name for name in tensors if "class_predictor" in name))
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="lacks 1 tensors"):
        load_detector(str(broken), "cpu")


def test_the_colour_is_of_the_object_not_of_what_is_behind_it():
    """A red square on blue, whose mask is the square alone: what the CLIP sees holds no blue."""
    seen = []

    class Scorer:
        identity = {"name": "by eye"}

        def prepare(self, rgb):
            seen.append(rgb)
            return rgb.reshape(-1, 3).mean(0)[None, None].astype(np.uint8)

        def features(self, pixels):
            return pixels.reshape(len(pixels), 3).astype(np.float32) - 100

        def texts(self, texts):
            colour = {"red": (1, -1, -1), "blue": (-1, -1, 1)}
            return np.array([colour.get(text.split(" a ")[1].split()[0].split("-")[0], (-1, 1, -1)) for text in texts],
                            np.float64)  # fmt: skip

    rgb = np.full((20, 20, 3), (0, 0, 255), np.uint8)
    rgb[5:10, 5:10] = (255, 0, 0)
    mask = np.zeros((20, 20), bool)
    mask[5:10, 5:9] = True
    found = Detection((5.0, 5.0, 10.0, 10.0), 0.9, mask)
    assert ColourNamer(Scorer()).colours(rgb, [found], "dog") == ["red"]
    assert seen[0].shape == (5, 5, 3) and (seen[0][:, :4] == (255, 0, 0)).all() and (seen[0][:, 4] == 0x99).all()


# ---- from images to a report --------------------------------------------------------------------------------------

ASKED = [
    {"tag": "single_object", "prompt": "a photo of a dog", "include": [{"class": "dog", "count": 1}]},
    {"tag": "two_object", "prompt": "a photo of a person and a dog",
     "include": [{"class": "person", "count": 1}, {"class": "dog", "count": 1}]},
    {"tag": "counting", "prompt": "a photo of two dogs", "include": [{"class": "dog", "count": 2}],
     "exclude": [{"class": "dog", "count": 3}]},
    {"tag": "colors", "prompt": "a photo of a red dog", "include": [{"class": "dog", "count": 1, "color": "red"}]},
    {"tag": "position", "prompt": "a photo of a dog left of a person",
     "include": [{"class": "person", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]},
    {"tag": "color_attr", "prompt": "a photo of a red dog and a blue person",
     "include": [{"class": "dog", "count": 1, "color": "red"}, {"class": "person", "count": 1, "color": "blue"}]},
]  # fmt: skip
COPIES = 2


@pytest.fixture
def recipe():
    return load_recipe("tiny")


@pytest.fixture
def metadata(tmp_path) -> Path:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in ASKED))
    return path


def rendered(path: Path, prompts, plan=None) -> Artifact:
    """Noise in the place of images, COPIES of each prompt."""
    recipe = load_recipe("tiny").model_dump(mode="json")
    with Draft.open(path, "samples", {"name": path.name}) as draft:
        lines = []
        for index in range(COPIES * len(prompts)):
            rgb = np.random.default_rng(index).integers(0, 255, (64, 64, 3), np.uint8)
            (draft.path / f"{index:05d}.png").write_bytes(png_bytes(rgb))
            lines.append({"index": index, "prompt": prompts[index // COPIES], "plan": plan, "seed": index % COPIES})
        (draft.path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return draft.commit({"recipe": recipe})


@pytest.fixture
def samples(tmp_path) -> Artifact:
    return rendered(tmp_path / "runs" / "samples-a", [line["prompt"] for line in ASKED])


def test_it_runs_end_to_end_and_says_by_which_detector(recipe, samples, metadata, detector, tmp_path, monkeypatch):
    monkeypatch.setattr("bifrost_cli.evaluation.judges.THRESHOLD", 0.0)
    monkeypatch.setattr("bifrost_cli.evaluation.metrics.geneval.THRESHOLD", 0.0)
    code = run(["eval", "--geneval", "--detector", str(detector), "--metadata", str(metadata), "--samples",
                str(samples.path), "-w", str(tmp_path / "runs"), "--device", "cpu"])  # fmt: skip
    assert code == 0
    (made,) = (tmp_path / "runs").glob("report-*")
    found = json.loads((made / "report.json").read_text())
    (result,) = found["results"]
    assert result["label"] == "GenEval by tiny-mask2former" and result["n_gen"] == 12
    assert [row["name"] for row in result["categories"]] == list(TASKS)
    assert all(row["count"] == COPIES for row in result["categories"])
    assert {line["category"] for line in found["pictures"]} == set(TASKS)
    assert all(line["right"] or line["why"] for line in found["pictures"])
    assert "--detector" in found["command"] and "--metadata" in found["command"]


def test_a_folder_of_the_benchmarks_layout_needs_no_metadata(recipe, samples, metadata, detector, tmp_path):
    folder = export_geneval(samples.path, metadata, tmp_path / "out", workspace=tmp_path / "runs")
    assert json.loads((folder / "00003" / "metadata.jsonl").read_text()) == ASKED[3]
    assert (folder / "00003" / "samples" / "0001.png").read_bytes() == samples.file("00007.png").read_bytes()
    options = {"metrics": ["geneval"], "detector": str(detector), "workspace": tmp_path / "runs", "device": "cpu"}
    one = evaluate(recipe, samples=folder, **options)
    other = evaluate(recipe, samples=samples.path, metadata=metadata, **options)
    values = [json.loads(made.file("report.json").read_text())["results"][0] for made in (one, other)]
    assert values[0]["value"] == values[1]["value"] and values[0]["categories"] == values[1]["categories"]
    with pytest.raises(UsageError, match="exists"):
        export_geneval(samples.path, metadata, folder, workspace=tmp_path / "runs")


def test_what_is_missing_is_an_error_not_a_smaller_number(recipe, samples, metadata, detector, tmp_path):
    folder = export_geneval(samples.path, metadata, tmp_path / "out", workspace=tmp_path / "runs")
    (folder / "00002" / "samples" / "0001.png").unlink()
    with pytest.raises(DataError, match="not as many images"):
        from_layout(folder, recipe.images)
    shutil.rmtree(folder / "00002")
    with pytest.raises(DataError, match="without a gap"):
        from_layout(folder, recipe.images)
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps(line) + "\n" for line in ASKED[:5]))
    options = {"metrics": ["geneval"], "detector": str(detector), "workspace": tmp_path / "runs", "device": "cpu"}
    with pytest.raises(DataError, match="12 images for 5 prompts"):
        evaluate(recipe, samples=samples.path, metadata=short, **options)
    with pytest.raises(UsageError, match="what each image"):
        evaluate(recipe, samples=samples.path, **options)


def test_rewritten_prompts_are_refused_and_plans_are_said(recipe, metadata, detector, tmp_path):
    prompts = [line["prompt"] for line in ASKED]
    other = rendered(tmp_path / "runs" / "samples-b", [*prompts[:5], "a beautiful red dog and a blue person, 8k"])
    options = {"metrics": ["geneval"], "detector": str(detector), "workspace": tmp_path / "runs", "device": "cpu"}
    with pytest.raises(DataError, match="another prompt"):
        evaluate(recipe, samples=other.path, metadata=metadata, **options)
    planned = rendered(tmp_path / "runs" / "samples-c", prompts, plan="a dog, left")
    made = evaluate(recipe, samples=planned.path, metadata=metadata, **options)
    assert any("plan" in line for line in json.loads(made.file("report.json").read_text())["warnings"])
    assert result_of(made)["painted_from"] == "a plan that the MLLM wrote of each prompt"
    plain = rendered(tmp_path / "runs" / "samples-d", prompts)
    made = evaluate(recipe, samples=plain.path, metadata=metadata, **options)
    assert result_of(made)["painted_from"] == "the prompts alone" in result_of(made)["sentence"]


def result_of(report: Artifact) -> dict:
    return json.loads(report.file("report.json").read_text())["results"][0]


def test_a_plan_goes_out_with_the_folder_and_comes_back_with_the_results(recipe, metadata, tmp_path):
    planned = rendered(tmp_path / "runs" / "samples-p", [line["prompt"] for line in ASKED], plan="a dog, left")
    folder = export_geneval(planned.path, metadata, tmp_path / "out", workspace=tmp_path / "runs")
    images, asked = from_layout(folder, recipe.images)
    assert {entry.plan for entry in images.entries} == {"a dog, left"}
    assert asked[-1] == {**ASKED[5], "plan": "a dog, left"}
    scored = [{**line, "metadata": json.dumps(asked[i])} for i, line in enumerate(RESULTS)]  # as the scorer copies it
    made = import_geneval(results_file(tmp_path / "planned.jsonl", scored), workspace=tmp_path / "runs")
    assert "plan" in result_of(made)["painted_from"]
    assert "plan" in json.loads(made.file("report.json").read_text())["warnings"][0]
    half = results_file(tmp_path / "half.jsonl", [*scored[:6], *RESULTS[6:]])
    with pytest.raises(DataError, match="6 of 12 images were generated from a plan"):
        import_geneval(half, workspace=tmp_path / "runs")
    plain = import_geneval(results_file(tmp_path / "plain.jsonl", RESULTS), workspace=tmp_path / "runs")
    assert "not known" in result_of(plain)["painted_from"]


def test_a_class_that_the_detector_does_not_know(recipe, samples, metadata, detector, tmp_path):
    strange = [{**line, "include": [{"class": "zebra", "count": 1}]} for line in ASKED]
    metadata.write_text("".join(json.dumps(line) + "\n" for line in strange))
    with pytest.raises(DataError, match="knows no zebra"):
        evaluate(recipe, metrics=["geneval"], samples=samples.path, metadata=metadata, detector=str(detector),
                 workspace=tmp_path / "runs", device="cpu")  # fmt: skip


# ---- files ----------------------------------------------------------------------------------------------------------


def test_the_benchmarks_file_is_a_file_of_prompts(metadata):
    assert read_prompts(metadata, Ui()) == [line["prompt"] for line in ASKED] and read_asked(metadata) == ASKED
    metadata.write_text('{"prompt": "a star"}\n{"text": "no"}\n')
    with pytest.raises(UsageError, match=":2 has no prompt"):
        read_prompts(metadata, Ui())


@pytest.mark.parametrize(
    "change",
    [{"tag": "poetry"}, {"prompt": None}, {"include": []}, {"include": [{"class": "dog"}]}, {"exclude": 3},
     {"include": [{"class": "dog", "count": 1, "color": "mauve"}]},
     {"include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]},
     {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", -1]}]},
     {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["near", 0]}]}],
)  # fmt: skip
def test_lines_that_ask_for_nothing_known(metadata, change):
    metadata.write_text(json.dumps(ASKED[0]) + "\n" + json.dumps({**ASKED[0], **change}) + "\n")
    with pytest.raises(DataError, match="metadata.jsonl:2"):
        read_asked(metadata)


def results_file(path: Path, lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


RESULTS = [{"filename": f"out/{prompt:05d}/samples/{copy:04d}.png", "tag": ASKED[prompt]["tag"],
            "prompt": ASKED[prompt]["prompt"], "correct": (prompt + copy) % 3 == 0, "reason": "", "metadata": "{}",
            "details": "{}"} for prompt in range(6) for copy in range(2)]  # fmt: skip


def test_results_of_the_original_scorer_come_in_under_its_name(tmp_path):
    made = import_geneval(results_file(tmp_path / "results.jsonl", RESULTS), workspace=tmp_path / "runs")
    (result,) = json.loads(made.file("report.json").read_text())["results"]
    assert result["label"] == "GenEval by the original scorer" and result["value"] == pytest.approx(4 / 12)
    assert "GenEval" in made.file("report.html").read_text()
    again = import_geneval(results_file(tmp_path / "results.jsonl", RESULTS), workspace=tmp_path / "runs")
    assert again.id == made.id


@pytest.mark.parametrize(
    ("lines", "why"),
    [([*RESULTS, RESULTS[0]], "more than once"), (RESULTS[:-1], "not as many images"), ([], "no result"),
     ([line for line in RESULTS if "00003" not in line["filename"]], "without a gap"),
     ([{**RESULTS[0], "filename": "0000.png"}], "not a GenEval result record"),
     ([{**RESULTS[0], "correct": "yes"}], "not a GenEval result record"),
     ([{**RESULTS[0], "tag": "x"}], "not a GenEval result record")],
)  # fmt: skip
def test_results_that_are_not_whole_are_refused(tmp_path, lines, why):
    with pytest.raises(DataError, match=why):
        read_results(results_file(tmp_path / "results.jsonl", lines))


def test_two_processes_make_the_same_bytes_whatever_their_hash_seed(tmp_path):
    path = results_file(tmp_path / "results.jsonl", RESULTS)
    script = ("import sys, pathlib; from bifrost_cli.evaluation.geneval_export import import_geneval; "
              "print(import_geneval(pathlib.Path(sys.argv[1]), output=sys.argv[2]).files)")  # fmt: skip
    said = {subprocess.run([sys.executable, "-c", script, str(path), str(tmp_path / seed)], capture_output=True,
                           text=True, check=True, env={"PYTHONHASHSEED": seed, "PATH": "",
                                                       "PYTHONPATH": str(Path(__file__).parents[2])}).stdout
            for seed in ("1", "2")}  # fmt: skip
    assert len(said) == 1 and "report.json" in said.pop()
