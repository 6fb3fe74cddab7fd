"""The model card of an exported branch or ControlNet, from its manifest alone.

What the part is, how to use it, what it was trained on, how, with what result, under which licences its bases stand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from typing import NamedTuple

import yaml

from bifrost_cli import __version__
from bifrost_cli.artifacts import Artifact, lineage
from bifrost_cli.interop.published_names import HUB_ID, public_name
from bifrost_cli.loading.compatibility import trained_on


class Licence(NamedTuple):
    """The hub's short name of a licence, what it is called, and for "other" its `license_name` and file on the hub."""

    kind: str
    terms: str
    name: str | None = None
    file: str = "LICENSE"


_APACHE = Licence("apache-2.0", "Apache-2.0")
LICENCES = {  # by hub id; only what their model pages say
    "Qwen/Qwen2.5-VL-3B-Instruct": Licence("other", "Qwen Research License: non-commercial", "qwen-research"),
    "Qwen/Qwen2.5-VL-7B-Instruct": _APACHE,
    "Qwen/Qwen2.5-VL-32B-Instruct": _APACHE,
    "Qwen/Qwen2.5-VL-72B-Instruct": Licence("other", "Qwen License", "qwen"),
    "black-forest-labs/FLUX.1-dev": Licence("other", "FLUX.1 [dev] Non-Commercial License: gated, non-commercial",
                                            "flux-1-dev-non-commercial-license", "LICENSE.md"),
    "black-forest-labs/FLUX.1-schnell": _APACHE,
}  # fmt: skip
_SHIPPED = Licence("apache-2.0", "Apache-2.0, ships with Bifrost")
_UNKNOWN = Licence("other", "see the base model")


def model_card(artifact: Artifact, hub_id: str | None = None) -> str:
    """The whole card: YAML front matter as the hub reads it, and Markdown.

    `hub_id` names an artifact that lies there as it is; None is an export in the published layout.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData  # a second of imports

    bases, shared, settings = _bases(artifact), trained_on(artifact), artifact.identity.get("settings")
    licences, metrics = {name: _licence(name) for name in bases.values()}, artifact.info.get("metrics") or {}
    kinds = {licence.kind for licence in licences.values()}
    other = [name for name, licence in licences.items() if licence.kind == "other"]
    licence = licences[other[0]] if len(other) == 1 else _UNKNOWN
    head = ModelCardData(
        library_name="bifrost-cli",
        license=kinds.pop() if len(kinds) == 1 else "other",
        license_name=(licence.name or "see-base-models") if other else None,
        license_link=f"https://huggingface.co/{other[0]}/blob/main/{licence.file}" if licence.name else None,
        pipeline_tag="text-to-image",
        tags=["bifrost", artifact.kind, "arxiv:2508.05954"],
        base_model=[name for name in bases.values() if HUB_ID.fullmatch(name)] or None,
        model_name=artifact.id,
        eval_results=[
            EvalResult("text-to-image", "held-out-rows", "rows held out of the training", name, float(value))
            for name, value in metrics.items()
        ]
        or None,
    )
    template = resources.files(__package__).joinpath("templates", "model_card.md.j2").read_text("utf-8")
    card = ModelCard.from_template(
        head,
        template_str=re.sub(r"^(\{%.*%\})\n", r"\1", template, flags=re.M),  # a tag alone leaves no empty line
        artifact=artifact,
        hub_id=hub_id,
        ancestors=list(_ancestors(artifact)),
        encoder=shared["encoder"],
        grid="x".join(map(str, shared["grid"])),
        channels=shared["channels"],
        settings=settings and yaml.safe_dump({artifact.kind: settings}, sort_keys=False, allow_unicode=True, width=100),
        metrics=metrics,
        licences=[(part, name, licences[name].terms) for part, name in bases.items()],
        version=__version__,
    )
    return str(card.content)


def _bases(artifact: Artifact) -> dict[str, str]:
    """What each base is for -> its name; a local folder by its last name alone."""
    recipe = artifact.info.get("recipe", {})
    models, encoder = recipe.get("models", {}), str(artifact.identity.get("encoder", {}).get("name", "unknown"))
    diffusion = models.get("diffusion") or models.get("painter") or models.get("flux", "unknown")
    bases = {"MLLM": models.get("mllm", "unknown")} if artifact.kind == "branch" or encoder == "mllm" else {}
    bases |= {"FLUX": diffusion} if artifact.kind == "controlnet" else {}
    bases |= {"encoder": encoder} if encoder != "mllm" else {}
    return {part: public_name(name) for part, name in bases.items()}


def _licence(name: str) -> Licence:
    return _SHIPPED if name.startswith("builtin:") else LICENCES.get(name, _UNKNOWN)


def _ancestors(artifact: Artifact) -> Iterator[str]:
    """What it was made from, a line each."""
    for ancestor in lineage(artifact)[1:]:
        info = ancestor.artifact.info if ancestor.artifact else {}
        funnel = ", ".join(f"{name} {count}" for name, count in info.get("funnel", {}).items())
        yield f"`{ancestor.id}` ({ancestor.kind}): {funnel or 'not at hand when this card was written'}"
    if source := artifact.info.get("source"):
        commit = f", commit {artifact.info['commit']}" if artifact.info.get("commit") else ""
        yield f"imported from {public_name(source)}{commit}, which may say more"
