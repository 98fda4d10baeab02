"""Scores of layers, sublayers, weights and whole variants of a model; nothing is changed."""
