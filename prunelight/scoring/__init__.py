"""Scores of layers, sublayers, weights and whole variants of a model; no model is changed."""

from prunelight.moved import serve_old_names

serve_old_names(__name__)
