"""What other packages add by entry point: diffusion models, MLLM families, metrics, sources.

A package declares in its pyproject.toml

    [project.entry-points."bifrost.diffusion_models"]
    MyModel = "my_package.my_module:MyModel"

Nothing is imported before it is used, so that a broken plug-in fails the command that uses it and no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from bifrost_cli.errors import EnvironmentProblem, UsageError


class Plugins(Mapping[str, Any]):
    """A mapping of names to implementations: `builtin`, and what installed packages declare for `group`.

    A built-in one can be `module:attribute`, imported when it is first used; `base` is what a plug-in has to be an
    instance or a subclass of. UsageError for an unknown name, EnvironmentProblem for one that two have or that fails.
    """

    def __init__(self, group: str, builtin: Mapping[str, Any], *, base: type | None = None) -> None:
        self.group, self._builtin, self._base = group, builtin, base

    def __iter__(self) -> Iterator[str]:
        """The names: built-in ones first, then the others in alphabetical order."""
        return iter(dict.fromkeys([*self._builtin, *sorted(entry_points(group=self.group).names)]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in list(iter(self))

    def get(self, name: str, default: Any = None) -> Any:
        """As a dictionary's: `default` for an unknown name; a plug-in that does not load is an error here, too."""
        return self[name] if name in self else default

    def __getitem__(self, name: str) -> Any:
        points = list(entry_points(group=self.group, name=name))  # at each look: packages come while a notebook runs
        builtin = name in self._builtin
        if len(points) + builtin > 1:
            sources = ["built in"] * builtin + [f"{point.value} ({package_of(point)})" for point in points]
            what = f"{len(sources)} plug-ins are called {name} in {self.group}"
            fix = f"pip uninstall {package_of(points[-1])}"
            raise EnvironmentProblem(what, at="\n".join(sources), fix=fix, code="BF-ENV-003")
        if builtin:
            value = self._builtin[name]
            return EntryPoint(name, value, self.group).load() if isinstance(value, str) else value
        if not points:
            fix = f"check the name, or pip install a package with an entry point {name} in {self.group}"
            what, at = f"there is no plug-in {name!r} in {self.group}", f"known: {', '.join(self)}"
            raise UsageError(what, at=at, fix=fix, code="BF-USE-003")
        point, cause = points[0], None
        try:
            loaded, base = point.load(), self._base
            if base is None or isinstance(loaded, base) or (isinstance(loaded, type) and issubclass(loaded, base)):
                return loaded
            at = f"{point.value} is not a {base.__name__}"
        except (Exception, SystemExit) as error:  # whatever somebody else's module does when it is imported
            at, cause = f"{type(error).__name__}: {error}", error
        package = package_of(point)
        what, fix = f"the plug-in {name} of {package} cannot be used", f"pip install --upgrade {package}"
        raise EnvironmentProblem(what, at=at, fix=f"{fix}, or pip uninstall {package}", code="BF-ENV-004") from cause


def package_of(point: EntryPoint) -> str:
    """The name of the installed package that declares an entry point."""
    return point.dist.name if point.dist is not None else point.value.partition(":")[0]
