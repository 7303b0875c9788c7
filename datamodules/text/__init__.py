"""Sentences of books: subwords, errors, corrections, gaps."""
