"""Studies: the grid, the runner of its points, the report."""
