"""All knowledge of model families."""
