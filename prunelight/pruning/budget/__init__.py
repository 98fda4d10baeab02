"""Which layers and neurons to remove so that a model costs no more than a budget."""
