"""Loading, running, placing and saving models."""
