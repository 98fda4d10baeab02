"""Files that appear whole, are known to be whole, and have one writer."""
