"""Plug-ins by entry point: found, loaded when used, and each way to be wrong is one of our errors."""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path

import pytest
from fixtures_plugins import install as install_package

from bifrost_cli.errors import BifrostError, EnvironmentProblem, UsageError
from bifrost_cli.runtime.plugins import Plugins

GROUP = "bifrost.test_plugins"


def install(folder: Path, package: str, points: dict[str, str], code: str = "class Thing:\n    pass\n") -> None:
    install_package(folder, package, points, code, GROUP)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("added_")]:
        del sys.modules[name]


def test_builtin_and_installed_ones_by_name_and_nothing_is_imported_before_it_is_used(site: Path):
    install(site, "added_one", {"mine": "added_one:Thing"})
    known = Plugins(GROUP, {"dict": dict, "late": "collections:OrderedDict"})
    assert list(known) == ["dict", "late", "mine"] and len(known) == 3
    assert "mine" in known and "other" not in known and known.get("other") is None
    assert "added_one" not in sys.modules
    assert known["dict"] is dict and known["late"] is OrderedDict and known["mine"].__module__ == "added_one"


def test_what_is_installed_later_is_found(site: Path):
    known = Plugins(GROUP, {})
    assert list(known) == []
    install(site, "added_two", {"mine": "added_two:Thing"})
    assert list(known) == ["mine"]


def _refusal(site: Path, name: str, **options) -> BifrostError:
    with pytest.raises(BifrostError) as caught:
        Plugins(GROUP, {"dict": dict}, **options)[name]
    return caught.value


def test_an_unknown_name_lists_those_that_are_known(site: Path):
    error = _refusal(site, "dcit")
    assert isinstance(error, UsageError) and (error.code, error.exit_code) == ("BF-USE-003", 2)
    assert "known: dict" in error.at and "pip install" in error.fix


@pytest.mark.parametrize("name", ["mine", "dict"])
def test_two_of_one_name_are_both_named_and_others_stay_usable(site: Path, name: str):
    install(site, "added_three", {name: "added_three:Thing", "free": "added_three:Thing"})
    if name != "dict":
        install(site, "added_four", {name: "added_four:Thing"})
    error = _refusal(site, name)
    assert isinstance(error, EnvironmentProblem) and (error.code, error.exit_code) == ("BF-ENV-003", 3)
    assert "added_three:Thing (added_three)" in error.at
    assert ("built in" if name == "dict" else "added_four:Thing (added_four)") in error.at
    assert error.fix.startswith("pip uninstall added_")
    assert Plugins(GROUP, {"dict": dict})["free"].__name__ == "Thing"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import no_such_module_anywhere", "ModuleNotFoundError"),
        ("1/0", "ZeroDivisionError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("Other = 1", "AttributeError"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_one_that_does_not_import_is_named_with_its_package(site: Path, code: str, says: str):
    install(site, "added_five", {"mine": "added_five:Thing"}, code)
    error = _refusal(site, "mine")
    assert isinstance(error, EnvironmentProblem) and (error.code, error.exit_code) == ("BF-ENV-004", 3)
    assert says in error.at and "added_five" in error.message and "pip uninstall added_five" in error.fix
    assert Plugins(GROUP, {"dict": dict})["dict"] is dict


def test_one_of_another_kind_is_refused(site: Path):
    install(site, "added_six", {"mine": "added_six:Thing", "right": "collections:OrderedDict"})
    error = _refusal(site, "mine", base=dict)
    assert error.code == "BF-ENV-004" and error.at == "added_six:Thing is not a dict"
    assert Plugins(GROUP, {}, base=dict)["right"] is OrderedDict
