"""Scores of experts."""
