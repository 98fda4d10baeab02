"""The version of prunelight."""

__version__ = "0.1.0"
