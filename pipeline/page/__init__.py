"""A page of runs or of a study: one HTML file that needs nothing else."""
