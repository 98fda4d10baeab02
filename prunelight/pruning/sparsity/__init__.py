"""Puts zeros into weights (magnitude, Wanda, SparseGPT)."""
