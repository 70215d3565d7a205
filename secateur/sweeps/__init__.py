"""Sweeps: many runs on one model, what they share done once, and their frontier.

May import every room but ``cli``.
"""
