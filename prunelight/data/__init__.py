"""Text and instructions into token windows and training rows; no model."""

from prunelight.moved import serve_old_names

serve_old_names(__name__)
