"""Run-time modules for shapes that stock transformers classes cannot express."""

# First of all: its import registers our classes, which needs the modules below to be importable.
import transformers  # noqa: F401
