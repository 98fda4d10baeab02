"""Recovery of a pruned model: adapters, precision, sharding, zeros, distillation."""

from prunelight.moved import serve_old_names

serve_old_names(__name__)
