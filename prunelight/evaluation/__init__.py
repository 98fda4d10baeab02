"""What a model is worth: perplexity, accuracy, speed, and the report of a run."""
