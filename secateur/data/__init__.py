"""Text, images and labels: what a model reads, cut into windows of tokens, and the kinds
of model (``tasks``) that say what counts as an answer.

May import ``utils``, ``families`` and ``io``.
"""
