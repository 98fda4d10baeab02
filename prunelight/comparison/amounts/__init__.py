"""How much a method removes: arguments for a target, and the largest amount that keeps a quality."""
