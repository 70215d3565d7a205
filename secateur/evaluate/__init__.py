"""Measurements of a model: perplexity, tasks, speed, memory, and whether a reload is faithful.

May import the rooms from ``utils`` to ``planning``.
"""
