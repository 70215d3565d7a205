"""One paper, one file. Names serve the command line; in Python, pass the object."""

from importlib import import_module

from secateur.errors import InputError, nearest
from secateur.methods.base import Method

#: name → "module:class". Imported only when asked for, as importing a method imports torch.
METHODS = {
    "auto": "secateur.methods.auto:Auto",
    "modegpt": "secateur.methods.modegpt:MoDeGPT",
}


def method_class(name: str) -> type[Method]:
    """The method class of a name.

    Raises:
        InputError: no method has it.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}. {nearest(name, METHODS)}")
    module, attribute = METHODS[name].split(":")
    found: type[Method] = getattr(import_module(module), attribute)
    return found
