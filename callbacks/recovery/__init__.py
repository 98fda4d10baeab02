"""Callbacks that act while a model trains."""
