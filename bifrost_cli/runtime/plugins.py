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
    """Built-in implementations and those of installed packages, by name; see `plugins`."""

    def __init__(self, group: str, builtin: Mapping[str, Any], base: type | None) -> None:
        self.group, self._builtin, self._base = group, builtin, base

    def __iter__(self) -> Iterator[str]:
        """The names: built-in ones first, then the others in alphabetical order."""
        return iter(dict.fromkeys([*self._builtin, *sorted(point.name for point in self._installed())]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in list(iter(self))

    def __getitem__(self, name: str) -> Any:
        points = [point for point in self._installed() if point.name == name]
        builtin = name in self._builtin
        if len(points) + builtin > 1:
            sources = ["built in"] * builtin + [f"{point.value} ({package_of(point)})" for point in points]
            raise EnvironmentProblem(
                f"{len(sources)} plug-ins are called {name} in {self.group}",
                at="\n".join(sources),
                fix=f"pip uninstall {package_of(points[-1])}",
                code="BF-ENV-003",
            )
        if builtin:
            value = self._builtin[name]
            return EntryPoint(name, value, self.group).load() if isinstance(value, str) else value
        if not points:
            raise UsageError(
                f"there is no plug-in {name!r} in {self.group}",
                at=f"known: {', '.join(self)}",
                fix=f"check the name, or pip install a package with an entry point {name} in {self.group}",
                code="BF-USE-003",
            )
        return self._load(points[0])

    def get(self, name: str, default: Any = None) -> Any:
        """As a dictionary's: `default` for an unknown name; a plug-in that does not load is an error here, too."""
        return self[name] if name in self else default

    def _installed(self) -> list[EntryPoint]:
        """Read again at each look: packages come and go while a notebook runs."""
        return list(entry_points(group=self.group))

    def _load(self, point: EntryPoint) -> Any:
        try:
            loaded = point.load()
        except (Exception, SystemExit) as error:  # whatever somebody else's module does when it is imported
            raise self._broken(point, f"{type(error).__name__}: {error}") from error
        if self._base is not None and not _is_a(loaded, self._base):
            raise self._broken(point, f"{point.value} is not a {self._base.__name__}")
        return loaded

    def _broken(self, point: EntryPoint, at: str) -> EnvironmentProblem:
        package = package_of(point)
        return EnvironmentProblem(
            f"the plug-in {point.name} of {package} cannot be used",
            at=at,
            fix=f"pip install --upgrade {package}, or pip uninstall {package}",
            code="BF-ENV-004",
        )


def plugins(group: str, builtin: Mapping[str, Any], *, base: type | None = None) -> Plugins:
    """A read-only mapping of names to implementations: `builtin`, and what installed packages declare for `group`.

    Args:
        group: of entry points, for example `bifrost.metrics`.
        builtin: name -> implementation, or name -> `module:attribute` to import it when it is first used.
        base: what a plug-in has to be an instance or a subclass of; None takes anything.

    Raises:
        UsageError: looking up a name that is unknown (BF-USE-003).
        EnvironmentProblem: looking up a name that two have (BF-ENV-003), or one that does not load (BF-ENV-004).
    """
    return Plugins(group, builtin, base)


def package_of(point: EntryPoint) -> str:
    """The name of the installed package that declares an entry point."""
    return point.dist.name if point.dist is not None else point.value.partition(":")[0]


def _is_a(value: Any, base: type) -> bool:
    return isinstance(value, base) or (isinstance(value, type) and issubclass(value, base))
