"""The pass over calibration data: hidden states block by block, hooks, and the statistics
that methods ask for.

May import the rooms from ``utils`` to ``distributed``.
"""
