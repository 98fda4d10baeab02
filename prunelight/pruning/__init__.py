"""Carries out plans: `apply`, and one file for each kind of step."""
