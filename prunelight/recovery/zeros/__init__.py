"""Zeros that stay zero while a model trains."""
