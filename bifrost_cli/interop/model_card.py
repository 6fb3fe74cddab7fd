"""The model card of an exported part, from its manifest alone.

In: a branch or ControlNet artifact. Out: README.md as the hub reads it: what it is, how to use it, what it was trained
on, how, with what result, and under which licences its bases stand. No folder of this machine is named in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from bifrost_cli import __version__
from bifrost_cli.artifacts import Artifact, lineage
from bifrost_cli.loading.compatibility import trained_on

# hub id -> (the hub's short name, what the licence is called); only what their model pages say.
LICENCES = {
    "Qwen/Qwen2.5-VL-3B-Instruct": ("other", "Qwen Research License: non-commercial"),
    "Qwen/Qwen2.5-VL-7B-Instruct": ("apache-2.0", "Apache-2.0"),
    "Qwen/Qwen2.5-VL-32B-Instruct": ("apache-2.0", "Apache-2.0"),
    "Qwen/Qwen2.5-VL-72B-Instruct": ("other", "Qwen License"),
    "black-forest-labs/FLUX.1-dev": ("other", "FLUX.1 [dev] Non-Commercial License: gated, non-commercial"),
    "black-forest-labs/FLUX.1-schnell": ("apache-2.0", "Apache-2.0"),
}
_SHIPPED = ("apache-2.0", "Apache-2.0, ships with Bifrost")
_UNKNOWN = ("other", "see the base model")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

_ABOUT = {
    "branch": """\
The visual generation branch of a [Bifrost](https://arxiv.org/abs/2508.05954): it predicts the patch-level CLIP latents
of an image from what the frozen MLLM makes of a prompt. `model.safetensors` has the names of the published code; what
that code has no name for begins with `bifrost.`, and the published code does not read it.""",
    "controlnet": """\
The latent ControlNet of a [Bifrost](https://arxiv.org/abs/2508.05954): it lets frozen FLUX generate what patch-level CLIP
latents say.""",
}
_USE = {
    "branch": """\
With its ControlNet in `flux_controlnet/` beside these files:

```sh
bifrost import FOLDER -o runs/imported --recipe RECIPE
```

RECIPE names the frozen bases below.""",
    "controlnet": """\
In `flux_controlnet/` beside its branch, with a RECIPE that names the frozen bases below:

```sh
bifrost import FOLDER -o runs/imported --recipe RECIPE
```

Stock diffusers reads every block; the embedder of the latents is not stock, and its tensors (`up_sampling_block.*`,
`controlnet_x_embedder.*`) are left over:

```python
FluxControlNetModel.from_pretrained(FOLDER, ignore_mismatched_sizes=True, low_cpu_mem_usage=False)
```""",
}
_MLLM = """\
The multimodal LLM is not part of these files and was not changed for them: lmms-eval, or any other program, takes it
directly from the folder or hub id named below, and its scores are the base model's."""


def model_card(artifact: Artifact) -> str:
    """The whole card."""
    bases = _bases(artifact)
    sections = [
        ("", _ABOUT[artifact.kind]),
        ("Use", _USE[artifact.kind]),
        ("Understanding", _MLLM),
        ("Data", "\n".join(_data(artifact))),
        ("Training", _training(artifact)),
        ("Metrics", "\n".join(_metrics(artifact))),
        ("Licences", _licences(bases)),
    ]
    body = "\n\n".join((f"## {title}\n\n" if title else "") + text for title, text in sections)
    return f"---\n{_front_matter(bases)}---\n\n# {artifact.id}\n\n{body}\n\nMade with bifrost {__version__}.\n"


def _bases(artifact: Artifact) -> dict[str, str]:
    """What each base is for -> its name; a local folder by its last name alone."""
    recipe = artifact.info.get("recipe", {})
    models, encoder = recipe.get("models", {}), str(artifact.identity.get("encoder", {}).get("name", "unknown"))
    diffusion = models.get("diffusion") or models.get("painter") or models.get("flux", "unknown")
    found = {"MLLM": models.get("mllm", "unknown")} if artifact.kind == "branch" or encoder == "mllm" else {}
    found |= {"FLUX": diffusion} if artifact.kind == "controlnet" else {}
    found |= {"encoder": encoder} if encoder != "mllm" else {}
    return {part: name if _public(name) else Path(name).name for part, name in found.items()}


def _public(name: str) -> bool:
    return name.startswith(("builtin:", "open_clip:")) or bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def _front_matter(bases: dict[str, str]) -> str:
    kinds = {_licence(name)[0] for name in bases.values()}
    hub = [name for name in bases.values() if _HUB_ID.fullmatch(name)]
    fields: dict[str, Any] = {"library_name": "bifrost-cli", "license": kinds.pop() if len(kinds) == 1 else "other"}
    return yaml.safe_dump({**fields, **({"base_model": hub} if hub else {})}, sort_keys=False)


def _licence(name: str) -> tuple[str, str]:
    return _SHIPPED if name.startswith("builtin:") else LICENCES.get(name, _UNKNOWN)


def _data(artifact: Artifact) -> Iterator[str]:
    ancestors = lineage(artifact)[1:]
    for ancestor in ancestors:
        info = ancestor.artifact.info if ancestor.artifact else {}
        funnel = ", ".join(f"{name} {count}" for name, count in info.get("funnel", {}).items())
        yield f"- `{ancestor.id}` ({ancestor.kind}): {funnel or 'not at hand when this card was written'}"
    if source := artifact.info.get("source"):
        commit = f", commit {artifact.info['commit']}" if artifact.info.get("commit") else ""
        yield f"- imported from {source if _public(source) else Path(source).name}{commit}, which may say more"
    shared = trained_on(artifact)
    encoder, grid = shared["encoder"], "x".join(map(str, shared["grid"]))
    yield f"- latents: encoder `{encoder.get('name')}`, {encoder.get('image_size')} px, grid {grid}, "
    yield f"  {shared['channels']} channels, weights sha256 `{encoder.get('weights')}`"
    yield "\nPictures and captions stand under licences of their own, which this card does not know."


def _training(artifact: Artifact) -> str:
    settings = artifact.identity.get("settings")
    if settings is None:
        return "Not trained here."
    text = yaml.safe_dump({artifact.kind: settings}, sort_keys=False, allow_unicode=True, width=100)
    cost = artifact.manifest["cost"]
    return f"{cost.get('seconds')} s on {cost.get('device')}.\n\n```yaml\n{text}```"


def _metrics(artifact: Artifact) -> Iterator[str]:
    metrics = artifact.info.get("metrics") or {}
    if not metrics:
        yield "None were measured here."
        return
    yield "On rows held out of the training:\n"
    yield "| metric | value |"
    yield "|---|---|"
    for name, value in metrics.items():
        yield f"| {name} | {value:.4g} |"


def _licences(bases: dict[str, str]) -> str:
    rows = "\n".join(f"| {part} | {name} | {_licence(name)[1]} |" for part, name in bases.items())
    return (
        "What was trained from a base or for it inherits the terms of that base.\n\n"
        f"| base | name | licence |\n|---|---|---|\n{rows}"
    )
