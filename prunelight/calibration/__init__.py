"""Calibration windows, the walk over decoder layers, and the statistics taken on it."""

from prunelight.moved import serve_old_names

serve_old_names(__name__)
