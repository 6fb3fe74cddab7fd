"""What CI installs is pinned by hash and within the bounds; a release carries its list and its attestations."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PINNED = (ROOT / ".ci" / "requirements.txt").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def steps(workflow: str) -> str:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / workflow).read_text("utf-8"))["jobs"]
    return "\n".join(str(step) for job in jobs.values() for step in job["steps"])


def test_every_version_has_hashes():
    entries = re.split(r"\n(?=\S)", PINNED.strip())
    assert len(entries) > 80
    for entry in entries:
        assert re.match(r"[\w.-]+==[\w.+!-]+", entry) and re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry), entry


@pytest.mark.parametrize("wanted", [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"],
                                    *PROJECT["project"]["optional-dependencies"]["dev"][1:]])  # fmt: skip
def test_what_is_pinned_is_within_the_bounds(wanted):
    requirement = Requirement(wanted)
    versions = re.findall(rf"^{canonicalize_name(requirement.name).replace('-', '[-_]')}==(\S+)", PINNED, re.M | re.I)
    assert versions and all(requirement.specifier.contains(version, prereleases=True) for version in versions)


def test_ci_installs_by_hash_and_looks_for_known_holes():
    ci = steps("ci.yml")
    assert ci.count("pip install --require-hashes -r .ci/requirements.txt") == 2
    assert ci.count("pip-audit --require-hashes") == ci.count("pip-audit --skip-editable") == 1
    assert ci.count("--no-deps --no-build-isolation -e .") == 2


def test_a_release_is_attested_with_a_list_of_what_it_runs_with():
    release = steps("release.yml")
    assert "attest-build-provenance" in release and "attest-sbom" in release and "cyclonedx-py" in release
