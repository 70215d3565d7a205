"""Sweeps: many runs on one model, what they share done once, and their frontier."""
