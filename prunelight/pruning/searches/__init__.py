"""Searches for what to remove, in which each candidate is healed before it is judged."""
