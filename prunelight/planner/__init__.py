"""Plans apart from a run: score a model, decide, look at what was decided, carry it out, save."""
