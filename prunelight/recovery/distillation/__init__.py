"""Learning from the dense model."""
