"""Sequences that a rule makes, and last names."""
