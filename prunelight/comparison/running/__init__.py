"""How a cell is run: what a process holds, the pruning or the fit, what is measured, and where."""
