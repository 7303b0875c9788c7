"""A spelling checker that needs no training: a noisy channel over a dictionary and word pairs.

A word that is in no dictionary and in no book becomes the one of which it is most likely a
misspelling, between its neighbours (Kernighan, Church and Gale 1990).

Dimensions: V words, L letters, C candidates.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from math import log
from typing import Any, NamedTuple

import numpy as np

from core.errors import UserError
from datamodules.text.english import GRAMMAR_WORDS, inflection

_MAX_EDITS = 2
_MIN_COUNT = 2  # of a word or a pair in the books; what stands there once may be a slip
_ENDINGS = (("ily$", "y"), ("(?<!e)(ly|ness|less|like)$", ""))  # of words, and what stands before
_MISSPELLED_END = re.compile("(full|e[ai]ble)$")  # wonder and full are words, wonderfull is none
_VOWELS = frozenset(b"aeiouy")
_AN = re.compile(r"(?!eu|ewe|uni[^mn]|us[aeu]|ut[ei]|ubi|one|once)[aeiou]|hour|honest|hono|heir")


class Weights(NamedTuple):
    """Costs in nats, fitted on made misspellings of the validation books (docs/grammar.md).

    Made ones leave the first letter and the blanks alone: ``first`` and ``split`` are set by hand.
    """

    edit: float = 6.25  # a letter dropped, added or taken for another
    transposition: float = 3.0
    doubling: float = 2.5  # a letter written once for twice, or twice for once
    vowel: float = 5.86  # a vowel for another
    first: float = 3.0  # another first letter, besides
    split: float = 4.0  # a blank left out
    context: float = 0.75  # weight of the neighbours and the frequency
    keep: float = 18.75  # a word stays if no candidate costs less
    capital: float = 10.5  # likewise with a capital at the start, where it may be a name


UNIT = Weights(1, 1, 1, 1, 0)


class Speller:
    """Corrects what is no word, and three slips that need no dictionary.

    A word is known if lemminflect's tables have it, or the books at least twice in lower case. What
    may be a name, an abbreviation or a term stays: words with capitals inside a sentence, with
    other signs than a to z, words that come twice in a line, what is made of known words, and lines
    of which most is unknown, such as those in another language.

    Args:
        text: The weights, then how often words and pairs of them stand in books, ``N word`` or
            ``N word word`` a line, as :meth:`learn` counts them.

    Raises:
        UserError: It is no such text.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        weights, *lines = text.split("\n")
        try:
            self.weights = Weights._make(map(float, weights.split(" ")))
            counts = (line.partition(" ") for line in lines)
            self.number = {words: int(count) for count, _, words in counts}
        except (TypeError, ValueError):
            raise UserError("the counts of the speller are damaged; train a new run.") from None
        self.total = sum(count for words, count in self.number.items() if " " not in words)

    @classmethod
    def learn(cls, sentences: Iterable[str]) -> "Speller":
        """Learn the words of sentences, which stand between blanks."""
        found = Counter[str]()
        for sentence in sentences:
            tokens = sentence.split(" ")
            found.update(tokens)  # with their capitals, so that names are known
            found.update(" ".join(pair).lower() for pair in pairwise(tokens))
        counts = (f"{n} {words}" for words, n in found.items() if n >= _MIN_COUNT)
        return cls("\n".join((" ".join(map(str, Weights())), *counts)))

    @cached_property
    def words(self) -> frozenset[str]:
        """All that are known, in lower case."""
        table: dict[str, Any] = inflection().Lemmatizer()._getLemmaDict()
        return frozenset(filter(_is_plain, {*table, *self.number, *GRAMMAR_WORDS}))

    @cached_property
    def index(self) -> "Index":
        return Index(sorted(self.words))

    def correct(
        self, words: Sequence[str], beginnings: Iterable[int] = (0,), kept: Collection[int] = ()
    ) -> list[str]:
        """Correct spelling, capitals and articles.

        Args:
            words: Those of a line, punctuation and clitics being words of their own.
            beginnings: Where its sentences begin.
            kept: Numbers of words to leave alone.

        Returns:
            As many; where a blank was left out, one of them holds it.
        """
        right = put_right(self.spell(words, beginnings), beginnings)
        return [
            old if i in kept else new for i, (old, new) in enumerate(zip(words, right, strict=True))
        ]

    def spell(self, words: Sequence[str], beginnings: Iterable[int] = (0,)) -> list[str]:
        """Correct the spelling alone, see :meth:`correct`."""
        starts = {_first_word(words, start) for start in beginnings}
        small = [w.lower() if i in starts and w.istitle() else w for i, w in enumerate(words)]
        unknown = [
            i
            for i, word in enumerate(small)
            if _is_plain(word) and words[i] not in self.number and not self.is_known(word)
        ]
        spelled = list(words)
        if len(unknown) > max(3, sum(map(_is_plain, small)) * 2 / 3):
            return spelled
        for i in unknown:
            if len(small[i]) == 1 or words.count(words[i]) > 1:
                continue
            is_small = small[i] == words[i]
            before = spelled[i - 1].lower().rpartition(" ")[2] if i else ""
            after = words[i + 1].lower() if i + 1 < len(words) else ""
            limit = self.weights.keep if is_small else self.weights.capital
            if found := self.best(small[i], before, after, limit):
                spelled[i] = found if is_small else _capitalised(found)
        return spelled

    def is_known(self, word: str) -> bool:
        """Say if a word is known itself, or the parts that it is made of."""
        cuts = range(4, len(word) - 3) if not _MISSPELLED_END.search(word) else ()
        return (
            word in self.words
            or any(word[:k] in self.number and word[k:] in self.number for k in cuts)
            or any(re.sub(end, stem, word) in self.words for end, stem in _ENDINGS)
        )

    def best(self, word: str, before: str, after: str, limit: float) -> str | None:
        """Likeliest candidate of a word between two others; None if it costs the limit."""
        scored = [
            (cost - self.weights.context * self.fit(before, candidate.split(" "), after), candidate)
            for candidate, cost in self.candidates(word)
        ]
        cost, found = min(scored, default=(limit, ""))
        return found if cost < limit else None

    def fit(self, before: str, candidate: list[str], after: str) -> float:
        """Log probability of one or two words after another, and of the next given them."""
        pairs = zip((before, *candidate), candidate, strict=False)
        known = sum(log(self.probability(word, left)) for left, word in pairs)
        return known + log(self.probability(after, candidate[-1]) / self.probability(after))

    def probability(self, word: str, before: str = "") -> float:
        """Probability of a word after another one (half of pairs, half of it alone), or alone."""
        alone = (self.number.get(word, 0) + 0.5) / (self.total + 50_000)
        follows = self.number.get(before, 0)
        if not follows or not before:
            return alone
        return 0.5 * alone + 0.5 * self.number.get(f"{before} {word}", 0) / follows

    @lru_cache(100_000)  # noqa: B019  a run has one speller
    def candidates(self, word: str) -> list[tuple[str, float]]:
        """Known words at most two edits away, or two with a blank between, and their costs."""
        found = self.index.near(word, self.weights)
        splits = (f"{word[:k]} {word[k:]}" for k in range(1, len(word)))
        return found + [(split, self.weights.split) for split in splits if split in self.number]


class Index:
    """Find the words that are few edits away from one."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words
        self.lengths = np.array([len(word) for word in words])
        width = int(self.lengths.max()) + 1
        padded = "".join(word.ljust(width) for word in words)
        self.letters = np.frombuffer(padded.encode(), np.uint8).reshape(len(words), -1)  # (V, L)
        codes = np.frombuffer("".join(words).encode(), np.uint8).astype(int) - ord("a")
        owners = np.repeat(np.arange(len(words)), self.lengths)
        counts = np.bincount(26 * owners + codes, minlength=26 * len(words))
        self.histograms = counts.reshape(-1, 26).astype(np.int8)  # (V, 26)
        self.sets = (self.histograms > 0) @ (1 << np.arange(26))  # (V,) letters as bits

    def near(self, word: str, weights: Weights) -> list[tuple[str, float]]:
        """Words at most two edits away, and what these cost."""
        rows = self.rows(word)
        costs = self.costs(word, rows, weights).tolist()
        return [(self.words[row], cost) for row, cost in zip(rows, costs, strict=True)]

    @lru_cache(100_000)  # noqa: B019  as above
    def rows(self, word: str) -> np.ndarray:
        """Indices of the words at most two edits away, int64 (C,)."""
        histogram = np.bincount(np.frombuffer(word.encode(), np.uint8) - ord("a"), minlength=26)
        letters = (histogram > 0) @ (1 << np.arange(26))
        # an edit changes the length by one at most, and the letters there are by two
        close = (abs(self.lengths - len(word)) <= _MAX_EDITS) & (
            np.bitwise_count(self.sets ^ letters) <= 2 * _MAX_EDITS
        )
        rows = np.flatnonzero(close)
        rows = rows[abs(self.histograms[rows] - histogram).sum(1) <= 2 * _MAX_EDITS]
        return rows[self.costs(word, rows, UNIT) <= _MAX_EDITS]

    def costs(self, word: str, rows: np.ndarray, weights: Weights) -> np.ndarray:
        """Cost of taking each of some words (C,) for this one: the cheapest edits, float (C,).

        The distance of Damerau and Levenshtein (optimal string alignment), next to its diagonal.
        """
        lengths, right = self.lengths[rows], self.letters[rows].T  # (L, C)
        wrong = word.encode()
        far = np.full(len(rows), np.inf)
        table: dict[tuple[int, int], np.ndarray] = {(0, 0): np.zeros(len(rows))}
        for i in range(len(wrong) + 1):
            for j in range(max(0, i - _MAX_EDITS), min(i + _MAX_EDITS + 1, len(right))):
                paths = [table[i, j]] if i == j == 0 else []
                if (i, j - 1) in table:  # a letter was dropped
                    twice = j > 1 and right[j - 1] == right[j - 2]
                    paths.append(table[i, j - 1] + np.where(twice, weights.doubling, weights.edit))
                if (i - 1, j) in table:  # one was added
                    twice = i > 1 and wrong[i - 1] == wrong[i - 2]
                    paths.append(table[i - 1, j] + (weights.doubling if twice else weights.edit))
                if i and j:
                    vowels = wrong[i - 1] in _VOWELS and np.isin(right[j - 1], list(_VOWELS))
                    other = np.where(vowels, weights.vowel, weights.edit)
                    other = other + (weights.first if i == j == 1 else 0)
                    same = right[j - 1] == wrong[i - 1]
                    paths.append(table[i - 1, j - 1] + np.where(same, 0, other))
                if i > 1 and j > 1 and (i - 2, j - 2) in table:
                    swapped = (right[j - 1] == wrong[i - 2]) & (right[j - 2] == wrong[i - 1])
                    paths.append(
                        table[i - 2, j - 2] + np.where(swapped, weights.transposition, far)
                    )
                table[i, j] = np.minimum.reduce(paths)
        ends = {j: costs for (i, j), costs in table.items() if i == len(wrong)}
        return np.select([lengths == j for j in ends], list(ends.values()), np.inf)


def _is_plain(word: str) -> bool:
    return word.isascii() and word.isalpha() and word.islower()


def _first_word(words: Sequence[str], start: int) -> int:
    """Index of the first word of a sentence that is no quotation mark or the like."""
    return next((i for i in range(start, len(words)) if words[i][0].isalnum()), -1)


def put_right(words: Sequence[str], beginnings: Iterable[int] = (0,)) -> list[str]:
    """Put words right by three rules: I for i, a capital at the start, a or an before its noun."""
    right = ["I" if word == "i" else word for word in words]
    for i, (word, after) in enumerate(pairwise(right)):
        is_article = word in ("a", "an", "An") or (word == "A" and not i)  # "vitamin A is" stays
        before_noun = after[:2].isalpha() and not after.isupper() and after not in GRAMMAR_WORDS
        if is_article and before_noun:
            right[i] = word[0] + ("n" if _AN.match(after.lower()) else "")
    for start in beginnings:
        if (i := _first_word(right, start)) >= 0 and right[i].islower():
            right[i] = _capitalised(right[i])
    return right


def _capitalised(word: str) -> str:
    return word[0].upper() + word[1:]
