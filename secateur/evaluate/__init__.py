"""Judging a model: perplexity, speed, memory, a sample, and whether a reload is faithful."""
