"""Text and instructions into token windows and training rows; no model."""
