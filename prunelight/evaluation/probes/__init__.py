"""Cheap probes that show a collapse which perplexity hides, and samples of generated text."""
