"""The published code's numbers, through tests/parity.py; and that parity.py can fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import parity
import pytest
from safetensors.torch import load_file, save_file

FOLDERS = sorted(path.parent for path in parity.VECTORS.rglob("outputs.safetensors"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_vectors(folder: Path):
    rows = list(parity.rows_of(folder))
    assert rows and not [row for row in rows if not row[1] <= row[2]]


def test_every_kind_of_vector_is_there():
    kinds = {parity.kind_of(folder).__name__ for folder in FOLDERS}
    assert kinds == {"check_layout", "check_branch", "check_decode", "check_visual", "check_controlnet",
                     "check_flux_denoise"}  # fmt: skip


def test_a_wrong_number_fails_and_is_named(tmp_path, capsys):
    folder = tmp_path / "deeper" / "layout"
    shutil.copytree(parity.VECTORS / "prompt_layout", folder)
    outputs = load_file(folder / "outputs.safetensors")
    outputs["n16.input_ids"][0, 0] += 1
    save_file(outputs, folder / "outputs.safetensors")
    assert parity.main([str(tmp_path)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("fail")]
    assert len(failed) == 1 and failed[0].startswith("layout/n16.input_ids  1  ")


@pytest.mark.parametrize("broken", ["unknown", "missing"])
def test_a_folder_that_cannot_be_run_fails_and_says_why(tmp_path, capsys, broken):
    folder = tmp_path / "branch"
    shutil.copytree(parity.VECTORS / "branch_n16", folder)
    if broken == "unknown":
        save_file({"strange": load_file(folder / "outputs.safetensors")["loss"]}, folder / "outputs.safetensors")
    else:
        config = json.loads((folder / "config.json").read_text())
        config["qwen2_5_vl"]["num_hidden_layers"] = 2
        (folder / "config.json").write_text(json.dumps(config))
    assert parity.main([str(tmp_path)]) == 1
    assert "fail" in capsys.readouterr().out


def test_no_vectors_is_a_failure(tmp_path):
    assert parity.main([str(tmp_path)]) == 1
