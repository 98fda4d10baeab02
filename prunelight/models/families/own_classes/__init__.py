"""Model classes of our own: what no stock config can describe."""
