"""Slicing the hidden states (SliceGPT)."""
