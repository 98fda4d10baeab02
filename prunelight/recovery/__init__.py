"""Recovery of a pruned model: adapters, precision, sharding, zeros, distillation."""
