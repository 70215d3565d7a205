"""Classes by the names that the command line and plans give them."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from secateur.utils.errors import InputError, nearest, shown


def by_name(homes: Mapping[str, str], name: str, what: str) -> Any:
    """The class that ``homes`` places under a name as "module:class"; imported only now.

    Raises:
        InputError: nothing has that name.
    """
    if name not in homes:
        raise InputError(f"unknown {what} {shown(name)}. {nearest(name, homes)}")
    module, attribute = homes[name].split(":")
    return getattr(import_module(module), attribute)
