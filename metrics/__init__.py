"""Scores of a correction: plain Python on lines of tokens, without torch."""
