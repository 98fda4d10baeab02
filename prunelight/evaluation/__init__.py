"""Measurements of a model: perplexity, accuracy, speed, and the report of a run."""
