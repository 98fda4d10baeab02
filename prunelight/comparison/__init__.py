"""The contest of methods: a grid of cells at equal size, run, resumed and compared in pairs."""
