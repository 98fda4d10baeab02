"""README.md of a saved directory: the card that the hub shows."""
