"""Sweeps: many runs on one model, which share measurements, and their frontier.

May import every room but ``cli``.
"""
