"""Several processes as one program: how they meet, what they share, and what is said when
one of them dies.

May import the rooms from ``utils`` to ``models``.
"""
