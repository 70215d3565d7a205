"""A model from transformers seen as blocks: loading, checks of its config, canonical
attention, linear layers, and blocks that stay on disk.

May import the rooms from ``utils`` to ``data``.
"""
