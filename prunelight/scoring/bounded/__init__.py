"""A search for layers to merge whose cost has a bound."""
