"""Scores of layers, sublayers, weights and whole variants of a model; no model is changed."""
