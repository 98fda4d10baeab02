"""Quality of a model on text, alone and against a reference, with bootstrap intervals."""
