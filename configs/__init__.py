"""The YAML files of runs; find them with importlib.resources."""
