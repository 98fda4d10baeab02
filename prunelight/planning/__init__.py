"""Decisions as data: plans, their steps, and the arithmetic that chooses; no tensors."""
