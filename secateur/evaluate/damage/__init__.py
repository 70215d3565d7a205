"""What perplexity does not show: confidence, repetition, recall, classes, and other texts."""
