"""What a recovery keeps in memory, told before it begins."""
