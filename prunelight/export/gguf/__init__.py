"""GGUF, the format of llama.cpp, written with the package gguf for families whose logits agree."""
