"""Calibration windows, the walk over decoder layers, and statistics on the way."""
