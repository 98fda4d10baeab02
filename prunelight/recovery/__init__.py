"""Bringing a pruned model back: adapters, precision, sharding, zeros, distillation."""
