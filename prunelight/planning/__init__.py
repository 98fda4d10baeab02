"""Decisions as data: plans, their steps, and the arithmetic that chooses.

Plans hold no tensors; fingerprints read them.
"""
