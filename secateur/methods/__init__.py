"""One paper, one file. Names serve the command line; in Python, pass the object."""

from secateur.methods.base import Method
from secateur.named import by_name

#: name → "module:class". Imported only when asked for, as importing a method imports torch.
METHODS = {
    "auto": "secateur.methods.auto:Auto",
    "modegpt": "secateur.methods.modegpt:MoDeGPT",
    "flap": "secateur.methods.flap:FLAP",
    "wanda-sp": "secateur.methods.wanda_sp:WandaSP",
}


def method_class(name: str) -> type[Method]:
    """The method class of a name.

    Raises:
        InputError: no method has it.
    """
    found: type[Method] = by_name(METHODS, name, "method")
    return found
