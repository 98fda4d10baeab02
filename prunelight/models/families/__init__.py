"""All knowledge of model families: names, config fields, and our own model classes."""
