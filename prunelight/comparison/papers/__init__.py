"""The four papers: their tables as contests, and the figures that they published."""
