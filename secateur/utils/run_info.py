"""The command that started a run, and the versions that it ran with."""

import platform
import shlex
from collections.abc import Sequence

from secateur.version import __version__


def typed_command(arguments: Sequence[str]) -> str:
    """The command line as a user would type it."""
    return shlex.join(["secateur", *arguments])


def versions() -> dict[str, str]:
    """Versions of the libraries that can change a figure."""
    import numpy
    import safetensors
    import torch
    import transformers

    return {
        "secateur": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "numpy": numpy.__version__,
    }
