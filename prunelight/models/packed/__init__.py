"""Weights that lie on an integer grid, and the packed form of them that other programs load."""
