"""Secateur makes trained transformers smaller and faster.

The public names and their homes stand in ``__init__.pyi``; each is loaded when first used. The one
thing that happens on import: once transformers is (or gets) imported, its auto classes learn to
open per-layer checkpoints.
"""

from typing import Any

import lazy_loader
import wrapt

from secateur.version import __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]


def _register(_: Any) -> None:
    from secateur.models.register import register

    register()


# transformers takes seconds to import and has no entry points to be found by, so the registration
# waits for it instead of pulling it in for `secateur --help`. It hangs on the package itself: its
# submodules import each other in circles, in the middle of which no class can be made.
wrapt.register_post_import_hook(_register, "transformers")
