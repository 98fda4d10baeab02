"""Fewer bits for the weights of a model, made up for by the weights that come later (GPTQ)."""
