"""Budgets over units; one strategy, one file."""
