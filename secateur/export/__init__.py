"""Checkpoints for other programs: stock classes of transformers, dense weights, ONNX, GGUF.

May import the rooms from ``utils`` to ``report``.
"""
