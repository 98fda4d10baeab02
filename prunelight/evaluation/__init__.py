"""Measurements of a model: perplexity, accuracy, speed, and the report of a run."""

from prunelight.moved import serve_old_names

serve_old_names(__name__)
