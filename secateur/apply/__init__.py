"""A plan applied: weights change here, and only here. Blocks are compressed one after the
other, renumbered where some are gone, and written.

May import the rooms from ``utils`` to ``methods``.
"""
