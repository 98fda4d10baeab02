"""Healing: weights fitted anew in closed form, so that the pruned model follows the dense one."""
