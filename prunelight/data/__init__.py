"""Texts and instructions become token windows and training rows; nothing here needs a model."""

from prunelight.moved import serve_old_names

serve_old_names(__name__)
