"""DeciLM, vLLM's class for layers that differ."""
