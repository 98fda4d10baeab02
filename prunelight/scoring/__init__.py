"""Scores of layers, sublayers, weights and whole variants of a model; nothing is changed."""

from prunelight.moved import serve_old_names

serve_old_names(__name__)
