"""Distillation: a pruned model learns from the dense model."""
