"""bifrost plan: the published sizes, the sums, what would make a stage fit, and that nothing is fetched or loaded."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures_flux import save_mllm, save_painter, tiny_painter
from fixtures_mllm import random_mllm
from torch.utils.flop_counter import FlopCounterMode

from bifrost_cli.cli.app import run
from bifrost_cli.cli.recipe_commands import parse_memory
from bifrost_cli.config.load import load_recipe, recipe_names, recipe_path, recipes_folder
from bifrost_cli.config.schema import Train
from bifrost_cli.errors import ArtifactError, RecipeError, UsageError
from bifrost_cli.planning import stages
from bifrost_cli.planning.meta_models import build, numbers
from bifrost_cli.planning.plan import plan

ROOT = Path(__file__).parents[2]
PUBLISHED = {"3B": (3.75, 2.78), "7B": (8.29, 6.54), "32B": (33.45, 31.23), "72B": (73.41, 70.28)}
ALONE = """
import socket, sys, time
def refuse(*args, **options): raise AssertionError("a socket")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
from bifrost_cli.cli.app import run
import bifrost_cli.planning.meta_models, bifrost_cli.planning.plan
imported = time.process_time()
code = run(["plan", "bifrost1-7b", "--json"])
print(time.process_time() - imported, imported, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize("size", PUBLISHED)
def test_qwen_has_the_published_number_of_parameters(size):
    system = build(load_recipe("bifrost1-7b", [f"models.mllm=Qwen/Qwen2.5-VL-{size}-Instruct"]))
    assert (round(numbers(system.mllm) / 1e9, 2), round(numbers(system.branch) / 1e9, 2)) == PUBLISHED[size]
    assert all(parameter.is_meta for parameter in system.mllm.parameters())


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_flux_has_the_published_number_of_parameters(name):
    system = build(load_recipe("bifrost1-7b", [f"models.diffusion=black-forest-labs/FLUX.1-{name}"]))
    parts = (system.transformer, system.text_encoder_2, system.text_encoder, system.vae)
    dev = name == "dev"
    assert [round(numbers(part) / 1e6) for part in parts] == [11901 if dev else 11891, 4762, 123, 84]
    assert system.transformer.config.guidance_embeds == dev


def test_a_plan_takes_no_longer_than_its_imports_and_opens_no_socket(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    planned, imported = map(float, done.stderr.splitlines()[-1].split())
    assert planned < imported
    assert {one["licence"] for one in found["downloads"]} == {"Apache-2.0", "FLUX.1 [dev] Non-Commercial License"}
    assert not list(tmp_path.rglob("*.safetensors"))


def test_sizes_and_sums_of_the_paper_scale():
    found = plan(load_recipe("bifrost1-7b"), images=1_000_000)
    assert found["disk"]["latents"] == pytest.approx(1.84e12, rel=0.01)  # 256 x 3584 float16 an image
    assert found["disk"]["vae_latents"] == 1_000_000 * 2 * 16 * 64 * 64
    trained = sum(part["parameters"] for part in found["parts"] if part["name"].startswith("branch"))
    need = found["stages"]["train branch"]["memory"]
    assert need["state"] == 12 * trained and need["gradients"] == 4 * trained
    assert need["held"] > 2 * 8.29e9 and need["peak"] > need["held"] + need["state"]
    assert found["stages"]["generate"]["memory"]["peak"] < 80e9
    step = found["stages"]["train branch"]["flops_each"]
    assert step == pytest.approx(32 * (6 * 6.53e9 * 256 + 2 * 6.5e9 * 300), rel=0.03)


def test_offloading_and_fewer_bits_need_less_to_paint():
    def generation_pipeline(*sets: str) -> dict[str, int]:
        return plan(load_recipe("bifrost1-7b", sets))["stages"]["generate"]["memory"]

    peaks = [generation_pipeline(f"generate.offload={way}")["peak"] for way in ("none", "model", "sequential")]
    assert peaks[0] > 1.8 * peaks[1] and peaks[1] > 3 * peaks[2]
    held = [generation_pipeline(f"models.weights={kind}", "generate.offload=model")["held"] for kind in ("int8", "nf4")]
    assert peaks[1] > held[0] > held[1] > 8e9


def test_more_devices_take_less_time_and_other_devices_other_times():
    recipe = load_recipe("tiny")
    one, four, old = plan(recipe), plan(recipe, gpus=4), plan(recipe, gpu="a100")
    hours = [found["stages"]["train branch"]["hours"] for found in (one, four, old)]
    assert hours[0] == pytest.approx(4 * hours[1]) and hours[2] == pytest.approx(hours[0] * 989 / 312)


def test_what_would_make_a_stage_fit_really_does():
    recipe = load_recipe("bifrost1-7b")
    stages = plan(recipe, memory_limit=80_000_000_000)["stages"]
    assert stages["extract-latents"]["fits"] and stages["extract-latents"]["fits_with"] == []
    wanted = stages["train controlnet"]
    assert not wanted["fits"] and wanted["fits_with"]
    again = plan(load_recipe("bifrost1-7b", wanted["fits_with"]), memory_limit=80_000_000_000)["stages"]
    assert again["train controlnet"]["fits"]
    assert plan(recipe, memory_limit=1_000_000)["stages"]["generate"]["fits_with"] is None


@pytest.mark.parametrize("encoder", ["builtin:open_clip", "vae"])
def test_other_encoders_are_planned(encoder):
    system = build(load_recipe("tiny", [f"latents.encoder={encoder}"]))
    assert (system.grid, system.channels) == {"builtin:open_clip": (4, 96), "vae": (4, 256)}[encoder]
    assert plan(system.recipe)["stages"]["extract-latents"]["memory"]["peak"] > 0


def test_smaller_batches_keep_the_rows_of_a_step():
    found = plan(load_recipe("tiny"), memory_limit=50_000_000)["stages"]["train branch"]["fits_with"]
    values = dict(entry.removeprefix("branch.train.").split("=") for entry in found)
    assert int(values["batch_size"]) * int(values["accumulate"]) == 64


@pytest.mark.parametrize(("text", "size"), [("24GB", 24e9), ("80 gb", 80e9), ("1.5G", 1.5e9)])
def test_memory_is_read(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "24", "0GB", "-1GB", "many", "24TBs"])
def test_memory_that_is_none_is_refused(text):
    with pytest.raises(UsageError):
        parse_memory(text)


def test_a_model_that_is_not_kept_is_named_with_those_that_are():
    with pytest.raises(RecipeError) as caught:
        plan(load_recipe("bifrost1-7b", ["models.mllm=Someone/Else"]))
    assert caught.value.code == "BF-RECIPE-004" and "Qwen/Qwen2.5-VL-7B-Instruct" in str(caught.value.at)


def test_a_local_folder_is_planned_from_its_own_configuration(tmp_path):
    mllm, diffusion = save_mllm(random_mllm(), tmp_path / "m"), save_painter(tiny_painter(), tmp_path / "p")
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    found = plan(load_recipe("tiny", [f"models.mllm={mllm}", f"models.diffusion={diffusion}"]))
    assert found["parts"][0]["parameters"] > 0 and found["downloads"] == []
    (mllm / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ArtifactError):
        plan(load_recipe("tiny", [f"models.mllm={mllm}", f"models.diffusion={diffusion}"]))


def test_every_hub_model_of_a_shipped_recipe_is_kept_with_its_licence():
    for name in recipe_names():
        models = load_recipe(name).models
        for ref in (models.mllm, models.diffusion):
            if not ref.startswith("builtin:"):
                kept = recipes_folder() / "configs" / ref.replace("/", "--")
                assert json.loads((kept / "about.json").read_text())["licence"]


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_can_be_planned(name, capsys):
    assert run(["plan", name, "--gpus", "2"]) == 0
    assert "2 x h100 at 40%" in capsys.readouterr().out


def test_settings_that_contradict_each_other_are_no_advice(capsys):
    assert run(["plan", "bifrost1-24gb", "--memory", "16GB", "--gpus", "2"]) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out and "fsdp" not in out  # fsdp and adamw8bit exclude each other


def test_json_is_one_object_and_bad_options_are_usage_errors(capsys):
    assert run(["plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "tiny"
    assert run(["plan", "--memory", "much"]) == 2
    assert run(["plan", "--gpus", "0"]) == 2
    assert run(["plan", "nothing"]) == 2


def test_more_devices_share_batches_and_with_fsdp_what_is_trained():
    def need(gpus: int, *sets: str) -> dict[str, int]:
        return plan(load_recipe("bifrost1-7b", sets), gpus=gpus)["stages"]["train branch"]["memory"]

    one, ddp, cut = need(1), need(4), need(4, "branch.train.parallel=fsdp")
    assert ddp["state"] == one["state"] and ddp["activations"] < one["activations"]
    assert ddp["held"] - one["held"] > 0.9 * one["gradients"]  # DDP's buckets
    assert cut["state"] == one["state"] // 4 and cut["gradients"] == one["gradients"] // 4
    recipe = load_recipe("bifrost1-7b")
    fits = plan(recipe, gpus=8, memory_limit=80_000_000_000)["stages"]["train branch"]["fits_with"]
    assert 'branch.train.parallel="fsdp"' in fits and not any("tune" in one for one in fits)


# ---- what is said of the recipes -------------------------------------------------------------------------------------

NEEDS = re.compile(r"^# Needs on one device \(bifrost plan (\S+)\): (.*)\.$", flags=re.MULTILINE)
LARGE = [name for name in recipe_names() if not load_recipe(name).models.mllm.startswith("builtin:")]


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_tells_its_memory_and_its_licences_as_they_are(name):
    text = recipe_path(name).read_text()
    found = plan(load_recipe(name))
    (match,) = NEEDS.finditer(text)
    assert match[1] == name
    peaks = {stage: f"{facts['memory']['peak'] / 1e9:.1f} GB" for stage, facts in found["stages"].items()}
    assert match[2] == ", ".join(f"{stage} {peak}" for stage, peak in peaks.items())
    for one in found["downloads"]:
        assert one["licence"] in text.replace("\n# ", " ")
    rows = re.findall(rf"^\| `{name}` \|(.*)\|$", (ROOT / "recipes" / "README.md").read_text(), flags=re.MULTILINE)
    cells = [[cell.strip() for cell in row.split("|")][:4] for row in rows]
    assert [peak.removesuffix(" GB") for peak in peaks.values()] in cells


def test_the_recipe_for_24_gb_fits_into_them():
    stages = plan(load_recipe("bifrost1-24gb"), memory_limit=24_000_000_000)["stages"]
    assert all(stage["fits"] for stage in stages.values())


# ---- the formulas ----------------------------------------------------------------------------------------------------


def test_the_state_of_a_training():
    assert stages.trained_state(100, Train()) == 1200
    assert stages.trained_state(100, Train(ema=0.9)) == 1600
    assert stages.trained_state(25600, Train(optimizer="adamw8bit")) == 4 * 25600 + 2 * 25600 + 2 * 4 * 100


def test_gradients_replace_activations_unless_they_are_there_already():
    assert stages.training_peak(10, 7, 1, 5, accumulates=False) == 18
    assert stages.training_peak(10, 7, 1, 5, accumulates=True) == 23


def counted(run) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_flops_are_those_that_torch_counts_on_the_meta_models():
    """A formula leaves out norms, embedders and modulation: a percent or two at paper scale."""
    recipe = load_recipe("bifrost1-7b")
    system = build(recipe)
    text, tokens, config = recipe.models.diffusion_text_tokens, system.image_tokens, system.transformer.config
    latents, width = recipe.branch.max_text_tokens, system.mllm.config.text_config.hidden_size

    def empty(*shape: int, **kind: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, device="meta", **kind)

    inputs = {
        "encoder_hidden_states": empty(1, text, config.joint_attention_dim),
        "pooled_projections": empty(1, config.pooled_projection_dim),
        "timestep": empty(1),
        "guidance": empty(1),
        "img_ids": empty(tokens, 3),
        "txt_ids": empty(text, 3),
    }
    flux = counted(lambda: system.transformer(empty(1, tokens, config.in_channels), **inputs))
    assert stages.flux_pass(system) == pytest.approx(flux, rel=0.01)
    ids = empty(1, latents, dtype=torch.long).expand(3, 1, -1)
    decoder = system.mllm.model.language_model
    prompt = counted(lambda: decoder(inputs_embeds=empty(1, latents, width), position_ids=ids))
    assert stages.prompt_pass(system) == pytest.approx(prompt, rel=0.01)
    t5 = counted(lambda: system.text_encoder_2(empty(1, text, dtype=torch.long)))
    assert stages.linear(numbers(system.text_encoder_2), text) == pytest.approx(t5, rel=0.01)


def test_the_vae_decodes_at_more_than_twice_the_cost_of_encoding():
    system = build(load_recipe("bifrost1-7b"))
    encode, decode = (stages.vae_pass(system, 512, decode=decode) for decode in (False, True))
    assert encode == pytest.approx(1.118e12, rel=0.001) and decode == pytest.approx(2.515e12, rel=0.001)
    assert stages.vae_pass(system, 256) == pytest.approx(encode / 4, rel=0.03)  # attention is cheaper


LIGHT = """
import sys, time
from bifrost_cli.cli.app import run
code = run(sys.argv[1:])
print(sorted({"torch", "transformers", "diffusers"} & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    "options", [["nothing"], ["--memory", "much"], ["--set", "models.mllm=Someone/Else"],
                ["--set", "branch.target=queries"], ["--set", "controlnet.control=concat"]]
)  # fmt: skip
def test_a_refusal_imports_no_model_library(options):
    done = subprocess.run([sys.executable, "-c", LIGHT, "plan", *options], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
