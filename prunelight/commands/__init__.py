"""Verbs of the command line that need no Trainer: evaluate, report, compare, export."""
