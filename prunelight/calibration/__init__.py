"""Calibration windows, the walk over decoder layers, and the statistics taken on it."""
