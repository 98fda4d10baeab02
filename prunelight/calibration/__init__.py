"""Calibration windows, the walk over decoder layers, and statistics on the way."""

from prunelight.moved import serve_old_names

serve_old_names(__name__)
