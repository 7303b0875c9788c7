"""Errors as learners of English make them, put into clean sentences.

A sentence is a list of tokens, with punctuation and clitics ("n't", "'s") as tokens of their own.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

from core.errors import UserError
from datamodules.text import grammar_rules, spelling_rules
from datamodules.text.english import GRAMMAR_WORDS, UNKNOWN, lookup
from datamodules.text.places import Error, Place, Rule
from metrics.edits import Edit

KINDS = {  # relative frequency, roughly that of the learners' corpora
    "spelling": 20.0,
    "article": 14.0,
    "verb_form": 12.0,
    "punctuation": 12.0,
    "preposition": 11.0,
    "noun_number": 9.0,
    "agreement": 7.0,
    "confusion": 5.0,
    "missing_word": 4.0,
    "capitalisation": 4.0,
    "word_order": 3.0,
    "doubled_word": 1.0,
}
RULES = grammar_rules.RULES | spelling_rules.RULES  # of each kind, and how often each is the one
_TOKENS_PER_ERROR = 4  # no sentence gets more errors than one in so many tokens
_T = TypeVar("_T")


@dataclass(frozen=True)
class ErrorSynthesis:
    """Put errors into clean sentences, and know the edits that take them out again.

    The number of errors in a sentence is geometric, at least 1 and at most a quarter of its tokens.
    A sentence's errors depend on nothing but the seed, the epoch and its index.

    Args:
        weights: Relative frequency of each kind of error; kinds not named keep that of ``KINDS``,
            and 0 switches one off.
        clean: Fraction of the sentences that stay as they are.
        mean_errors: Mean number of errors in the others, before the limit for short ones.
        seed: Another seed gives other errors.

    Raises:
        UserError: A kind is unknown, or a number is out of its range.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    clean: float = 0.2
    mean_errors: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        for kind, weight in self.weights.items():
            if kind not in KINDS:
                raise UserError(
                    f"weights has the unknown kind of error {kind!r}; there are {', '.join(KINDS)}."
                )
            if not 0 <= weight < math.inf:
                raise UserError(
                    f"The weight of {kind} must be a number from 0 up, got {weight}; 0 switches "
                    f"the kind off."
                )
        if not any((KINDS | dict(self.weights)).values()):
            raise UserError(
                "All weights are 0; give a kind of error some weight, or set clean to 1."
            )
        if not 0 <= self.clean <= 1:
            raise UserError(f"clean must be a fraction from 0 to 1, got {self.clean}.")
        if not 1 <= self.mean_errors < math.inf:
            raise UserError(
                f"mean_errors must be at least 1, got {self.mean_errors}; a larger clean leaves "
                f"more sentences without errors."
            )

    def corrupt(
        self, tokens: Sequence[str], epoch: int, index: int
    ) -> tuple[list[str], list[Edit]]:
        """Put errors into a sentence; with it come the edits that restore the clean one.

        Args:
            tokens: The clean sentence; no token is empty or has white space in it.
            epoch: Each epoch has errors of its own.
            index: Number of the sentence.
        """
        key = hashlib.sha256(f"{self.seed} {epoch} {index}".encode()).digest()
        rng = Random(int.from_bytes(key[:8], "big"))
        if rng.random() < self.clean:
            return list(tokens), []
        number, limit = 1, max(1, len(tokens) // _TOKENS_PER_ERROR)
        while number < limit and rng.random() < 1 - 1 / self.mean_errors:
            number += 1
        return _rewrite(tokens, self.draw(tokens, number, rng))

    def draw(self, tokens: Sequence[str], number: int, rng: Random) -> list[Error]:
        """Draw up to ``number`` errors, with a token at least between any two of them."""
        lowered = _lower_start(tokens)
        kinds = {kind: weight for kind, weight in (KINDS | dict(self.weights)).items() if weight}
        rules: dict[str, dict[Rule, float]] = {}  # those that may still find a place
        errors: list[Error] = []
        while len(errors) < number and kinds:
            kind = _weighted(kinds, rng)
            left = rules.setdefault(kind, dict(RULES[kind]))
            while left:
                rule = _weighted(left, rng)
                if error := _find(rule, kind, tokens, lowered, errors, rng):
                    errors.append(error)
                    break
                del left[rule]  # without a place now, it has none later either
            else:
                del kinds[kind]
        return errors


def _weighted(weights: Mapping[_T, float], rng: Random) -> _T:
    left = rng.random() * math.fsum(weights.values())  # Python 3.12 changed sum()
    for option, weight in weights.items():
        left -= weight
        if left < 0:
            return option
    return option  # rounding left a rest


def _find(
    rule: Rule,
    kind: str,
    tokens: Sequence[str],
    lowered: Sequence[str],
    errors: Sequence[Error],
    rng: Random,
) -> Error | None:
    """Put an error at a random one of the places where the rule applies; None if there is none.

    Rules see the start of a sentence in lower case, except for those of capitalisation.
    """
    places = list(range(len(tokens)))
    capitals = kind == "capitalisation"
    while places:
        k = int(rng.random() * len(places))
        places[k], i = places[-1], places[k]
        places.pop()
        if error := rule(Place(tokens if capitals else lowered, i, rng)):
            start, end, wrong, _ = error if capitals else _restore_capital(error, tokens, lowered)
            if (
                wrong != tuple(tokens[start:end])
                and (wrong or len(tokens) > 1)
                and all(end < other.start or other.end < start for other in errors)
            ):
                return Error(start, end, wrong, kind)
    return None


def _rewrite(tokens: Sequence[str], errors: Sequence[Error]) -> tuple[list[str], list[Edit]]:
    source: list[str] = []
    edits: list[Edit] = []
    done = 0
    for start, end, wrong, kind in sorted(errors):
        source += tokens[done:start]
        correction = " ".join(tokens[start:end])
        edits.append(Edit(len(source), len(source) + len(wrong), correction, kind=kind))
        source += wrong
        done = end
    return source + list(tokens[done:]), edits


def _lower_start(tokens: Sequence[str]) -> list[str]:
    """Copy the tokens; a word at the start that is no name is in lower case."""
    lowered = list(tokens)
    for i, token in enumerate(tokens[:3]):
        if token[0].isalnum():
            small = token[0].lower() + token[1:]
            if token != "I" and (small in GRAMMAR_WORDS or lookup(small) != UNKNOWN):
                lowered[i] = small
            break
    return lowered


def _restore_capital(error: Error, tokens: Sequence[str], lowered: Sequence[str]) -> Error:
    """Turn the error of a lowered sentence into one of the sentence; its capital stays in front."""
    start, end, wrong, _ = error
    if start >= len(tokens) or tokens[start] == lowered[start]:
        return error
    if not wrong or end == start:  # the word at the start is dropped, or another put before it
        if end == len(tokens):
            return error
        wrong, end = (*wrong, lowered[end]), end + 1
    return Error(start, end, (wrong[0][0].upper() + wrong[0][1:], *wrong[1:]))
