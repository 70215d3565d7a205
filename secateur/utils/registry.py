"""Classes by the names that the command line, recipes and plans give them."""

from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from inspect import isabstract
from sys import path as search_path
from typing import Any

from secateur.utils.errors import InputError, first_line, nearest, shown
from secateur.utils.options import undeclared

OWN = "secateur"
#: what importing a module of another package, and looking up a name in it, may raise
BROKEN = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError),
    *(OSError, RuntimeError, SyntaxError, TypeError, ValueError),
)


class Registry:
    """The project's own classes of one kind, and those that installed packages declare.

    The project's own are a table in the source, not entry points: these are read from metadata that
    pip writes on installing, which in a source checkout are as old as its last installation. So
    every class is declared in one place only. A name that several packages declare can't be asked
    for; nothing is imported before a class is.

    Args:
        what: what they are, in messages.
        group: the group of entry points in which packages declare more of them.
        own: name → "module:class" of the project's own.
        base: the class that all of them extend.
    """

    def __init__(self, what: str, group: str, own: Mapping[str, str], base: type) -> None:
        self.what = what
        self.group = group
        self.own = own
        self.base = base

    def get(self, name: str, package: str | None = None) -> Any:
        """The class of a name; ``package`` is what a file says that declares it.

        Raises:
            InputError: no package here declares the name, several do, or its class can't be used.
        """
        found = self._declared().get(name, [])
        owners = [OWN] * (name in self.own) + [owner(entry) for entry in found]
        if len(owners) > 1:
            raise InputError(
                f"{self.what} {shown(name)} is declared by several packages: {', '.join(owners)}. "
                f"Uninstall all of them but one, or ask for another {self.what}."
            )
        if not owners:
            raise InputError(self._unknown(name, package))
        if found:
            return self._load(found[0])
        module, attribute = self.own[name].split(":")
        return getattr(import_module(module), attribute)

    def package(self, name: str) -> str | None:
        """The package, with its version, that declares a name; None for the project's own."""
        found = self._declared().get(name)
        return owner(found[0]) if found and name not in self.own else None

    def survey(self) -> tuple[dict[str, Any], list[str]]:
        """All classes that can be used, by name, and why others can't, a sentence each."""
        usable: dict[str, Any] = {}
        problems = []
        for name in [*self.own, *sorted(self._declared().keys() - self.own.keys())]:
            try:
                usable[name] = self.get(name)
            except InputError as error:
                problems.append(str(error))
        return usable, problems

    def _declared(self) -> dict[str, list[EntryPoint]]:
        """What installed packages declare, by name."""
        found: dict[str, list[EntryPoint]] = {}
        for entry in declared(self.group, tuple(search_path)):
            found.setdefault(entry.name, []).append(entry)
        return found

    def _load(self, entry: EntryPoint) -> Any:
        whose = f"{self.what} {shown(entry.name)} of package {owner(entry)}"
        advice = "Repair, update or uninstall that package."
        try:
            found = entry.load()
        except BROKEN as error:
            said = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"{whose} can't be loaded: {said}. {advice}") from error
        if fault := self._fault(found, entry.name):
            raise InputError(f"{whose} can't be used: {fault}. {advice}")
        return found

    def _fault(self, found: Any, name: str) -> str | None:
        """Why what an entry point leads to is no class of this kind, or None."""
        if not isinstance(found, type) or not issubclass(found, self.base):
            return f"{shown(found)} is no class that extends secateur.extend.{self.base.__name__}"
        if isabstract(found):
            return f"{found.__name__} lacks {', '.join(sorted(vars(found)['__abstractmethods__']))}"
        if lacking := [x for x in ("name", "summary", "source") if not hasattr(found, x)]:
            return f"{found.__name__} lacks {', '.join(lacking)}"
        if found.name != name:  # type: ignore[attr-defined]
            return f"{found.__name__}.name is {shown(found.name)}"  # type: ignore[attr-defined]
        return undeclared(found)

    def _unknown(self, name: str, package: str | None) -> str:
        said = f"unknown {self.what} {shown(name)}."
        if package is not None:
            return (
                f"{said} Package {shown(package)} declared it when this file was written, and is "
                f"not installed here. Install it beside secateur if you trust it."
            )
        known = nearest(name, {*self.own, *self._declared()})
        return (
            f"{said} {known} If it belongs to an extension, install its package beside secateur; "
            f"`secateur ls` shows what is found."
        )


@lru_cache
def declared(group: str, _search_path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The entry points of a group; the files of all installed packages are read once a path."""
    return tuple(entry_points(group=group))


def owner(entry: EntryPoint) -> str:
    """The package of an entry point, with its version."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "without a name"
