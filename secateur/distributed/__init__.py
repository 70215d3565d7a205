"""Several processes as one program: how they start together, what passes between them, and what is
said when one of them ends.

May import the rooms from ``utils`` to ``models``.
"""
