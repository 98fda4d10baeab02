"""Carrying out plans, one file a kind of step."""
