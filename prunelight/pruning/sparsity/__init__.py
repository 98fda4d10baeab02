"""Putting zeros into weights (magnitude, Wanda, SparseGPT)."""
