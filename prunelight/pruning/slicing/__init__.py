"""Cuts the hidden states to their principal components (SliceGPT)."""
