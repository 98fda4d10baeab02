"""How much a method removes: for a target share, or as far as a quality is kept."""
