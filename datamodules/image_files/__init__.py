"""Reading image files and archives safely and fast."""
