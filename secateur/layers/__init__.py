"""Run-time modules for shapes that stock transformers classes cannot express."""
