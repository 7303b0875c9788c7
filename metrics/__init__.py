"""How good a correction is: plain Python on lines of tokens, without torch."""
