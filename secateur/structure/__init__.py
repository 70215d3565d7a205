"""What can be compressed, as plain data: units with their sizes and exact costs, forms
of matrices, error curves, budgets, and the sizes that runtimes read.

May import ``utils``, ``layers`` and ``families``.
"""
