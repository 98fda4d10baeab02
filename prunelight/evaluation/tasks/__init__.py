"""Zero-shot tasks through lm-eval on the live model, from the hub or local files; flips."""
