"""What a comparison says: its table, its verdict, its page."""
