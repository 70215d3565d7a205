"""Decisions as files: plans that say the size of every unit, and recipes of several steps.

May import the rooms from ``utils`` to ``scoring``.
"""
