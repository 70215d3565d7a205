"""Run-time modules for shapes that stock transformers classes cannot express.

Files called ``*_secateur.py`` are also copied beside the weights, so they stand alone: they import
each other and nothing else of the package. The rest may import ``utils``.
"""

# First of all: its import registers our classes, which needs the modules below to be importable.
import transformers  # noqa: F401
