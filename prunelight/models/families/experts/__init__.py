"""Experts of a model: where they stand, which weights are theirs, and how they are called."""
