"""Whole jobs from a model to a checked checkpoint. Read ``compress.py`` first.

May import every room but ``sweeps`` and ``cli``.
"""
