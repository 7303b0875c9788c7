"""Changes to training itself, and its cost."""
