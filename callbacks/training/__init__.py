"""What changes training itself, and what it costs."""
