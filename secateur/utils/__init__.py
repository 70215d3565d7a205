"""What every other room may need and that knows nothing of models: errors, options of
dataclasses, registries, progress, number formats, memory.

May import nothing of this package.
"""
