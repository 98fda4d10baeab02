"""Texts and instructions become token windows and training rows; nothing here needs a model."""
