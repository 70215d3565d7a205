"""What a run says of itself: the command that was typed, and the versions of what it ran with."""

import platform
import shlex
from collections.abc import Sequence

from secateur.version import __version__


def typed_command(arguments: Sequence[str]) -> str:
    """The command line as a person would type it again."""
    return shlex.join(["secateur", *arguments])


def versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
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
