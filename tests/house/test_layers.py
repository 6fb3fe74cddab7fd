"""The rooms of the package: imports point down only, and each room keeps to its materials."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "bifrost_cli"
ROOMS = (
    "errors",
    "stats",
    "artifacts",
    "config",
    "shapes",
    "runtime",
    "data",
    "models",
    "loading",
    "extraction",
    "training",
    "interop",
    "reports",
    "generation",
    "toy_system",
    "planning",
    "evaluation",
    "ablations",
    "serve",
    "cli",
)  # from the bottom up
ENTRANCE = ("__init__", "__main__")
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem not in ENTRANCE)


def imports(path: Path) -> list[tuple[str, int]]:
    """Every imported module, wherever the import stands, with its line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "bifrost_cli" else [base]
            found += [(name, node.lineno) for name in names]
    return found


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_down(path):
    own = ROOMS.index(path.relative_to(PACKAGE).with_suffix("").parts[0])
    for name, line in imports(path):
        parts = tuple(name.split("."))
        if parts[0] == "bifrost_cli" and len(parts) > 1 and parts[1] != "__version__":
            assert ROOMS.index(parts[1]) <= own, f"{path}:{line} imports {name} from a room above"


ALLOWED = {
    "errors": set(),
    "artifacts": set(),
    "config": {"pydantic", "yaml"},
    "shapes": {"numpy", "PIL", "scipy"},
    "stats": {"numpy", "scipy", "torch"},
    "cli": {"typer", "yaml"},
}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_each_room_keeps_to_its_materials(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    roots = {name.split(".")[0] for name, _ in imports(path)} - set(sys.stdlib_module_names) - {"bifrost_cli"}
    if room in ALLOWED:
        assert roots <= ALLOWED[room]
    if room == "data":
        assert not roots & {"transformers", "diffusers", "open_clip"}


@pytest.mark.parametrize("path", [p for p in MODULES if relative(p).startswith("models/")], ids=relative)
def test_models_know_no_path(path):
    assert "pathlib" not in {name for name, _ in imports(path)}
    assert "from_pretrained(" not in path.read_text()


def test_every_room_is_known():
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in MODULES} <= set(ROOMS)
