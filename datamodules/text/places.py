"""A word in its sentence: what it is there, and the errors that can be put at its place.

A sentence is a sequence of words, with punctuation and clitics ("n't", "'s") as words of their own.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple, TypeVar

from datamodules.text.english import (
    ADVERBS,
    BEFORE_BASE_FORM,
    DETERMINERS,
    HAVE,
    SUBJECTS,
    Word,
    lookup,
)

_T = TypeVar("_T")


class Error(NamedTuple):
    """The clean words ``start`` to ``end`` (without it) become ``wrong``."""

    start: int
    end: int
    wrong: tuple[str, ...]
    kind: str = ""


class Place(NamedTuple):
    """Word ``i`` of a sentence; beyond its ends there are empty words."""

    words: Sequence[str]
    i: int
    rng: Random

    # What stands there

    @property
    def word(self) -> str:
        return self.words[self.i] if 0 <= self.i < len(self.words) else ""

    @property
    def before(self) -> str:
        return self.shift(-1).word

    @property
    def after(self) -> str:
        return self.shift(1).word

    def shift(self, offset: int) -> "Place":
        return Place(self.words, self.i + offset, self.rng)

    @property
    def previous(self) -> str:
        """Word before; adverbs do not count."""
        words, i = self.words, self.i - 1
        while i > 0 and (
            words[i] in ADVERBS or (words[i].endswith("ly") and lookup(words[i]).adverb)
        ):
            i -= 1
        return words[i] if i >= 0 else ""

    @property
    def noun(self) -> Word | None:
        """Readings of the word, if it is almost certainly a noun."""
        word = lookup(self.word)
        if not word.number or word.adjective or word.adverb:
            return None
        if word.tags:  # "watch" is a noun after an article or adjective
            near = lookup(self.before)
            if self.before not in DETERMINERS and not (near.adjective and not near.tags):
                return None
        after = lookup(self.after)
        if after.number and not after.tags and not after.adjective:
            return None  # the first of two, as in "school book"
        return word

    @property
    def verb(self) -> Word | None:
        """Readings of the word, if it is almost certainly a verb."""
        word = lookup(self.word)
        if not word.tags:
            return None
        if not word.only_verb:  # "watch" is a verb after a pronoun
            before = self.previous
            if before in BEFORE_BASE_FORM or (before in SUBJECTS and before != "it"):
                return word
            if not (before in HAVE and "VBN" in word.tags):
                return None
        return None if self.before in DETERMINERS and "VBD" not in word.tags else word

    @property
    def phrase(self) -> Word | None:
        """Noun of a phrase that begins here, with an adjective before it or without."""
        word = lookup(self.word)
        adjective = word.adjective and not (word.tags or word.adverb or word.number)
        return self.shift(1).noun if adjective else self.noun

    # Errors

    def pick(self, options: Sequence[_T]) -> _T:
        # of the methods of Random, only random() is promised to be the same in all Pythons
        return options[int(self.rng.random() * len(options))]

    def drop(self) -> Error:
        return Error(self.i, self.i + 1, ())

    def insert(self, *wrong: str) -> Error:
        return Error(self.i, self.i, wrong)

    def replace(self, *wrong: str, count: int = 1) -> Error:
        """Put other words instead of ``count`` words."""
        return Error(self.i, self.i + count, wrong)

    def swap(self) -> Error:
        return self.replace(self.after, self.word, count=2)


Rule = Callable[[Place], Error | None]  # None where it does not apply
