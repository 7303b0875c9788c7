"""Errors as learners of English make them, put into clean sentences.

A sentence is a list of tokens, with punctuation and clitics ("n't", "'s") as tokens of their own.
"""

import hashlib
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, TypeVar

from core.errors import UserError, needed
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
TOKENS_PER_ERROR = 4  # no sentence gets more errors than one in so many tokens


@dataclass(frozen=True)
class ErrorSynthesis:
    """Puts errors into clean sentences, and knows the edits that take them out again.

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
        """A sentence with errors, and the edits of it that restore the clean one.

        Args:
            tokens: The clean sentence; no token is empty or has white space in it.
            epoch: Each epoch has errors of its own.
            index: Number of the sentence.
        """
        key = hashlib.sha256(f"{self.seed} {epoch} {index}".encode()).digest()
        rng = random.Random(int.from_bytes(key[:8], "big"))
        if rng.random() < self.clean:
            return list(tokens), []
        number, limit = 1, max(1, len(tokens) // TOKENS_PER_ERROR)
        while number < limit and rng.random() < 1 - 1 / self.mean_errors:
            number += 1
        return rewrite(tokens, self.draw(tokens, number, rng))

    def draw(self, tokens: Sequence[str], number: int, rng: random.Random) -> list["Error"]:
        """Up to ``number`` errors, with a token at least between any two of them."""
        lowered = lower_start(tokens)
        kinds = {kind: weight for kind in KINDS if (weight := self.weight(kind)) > 0}
        rules: dict[str, dict[Propose, float]] = {}  # those that may still find a place
        errors: list[Error] = []
        while len(errors) < number and kinds:
            kind = weighted(kinds, rng)
            left = rules.setdefault(kind, dict(RULES[kind]))
            while left:
                rule = weighted(left, rng)
                if error := find(rule, kind, tokens, lowered, errors, rng):
                    errors.append(error)
                    break
                del left[rule]  # without a place now, it has none later either
            else:
                del kinds[kind]
        return errors

    def weight(self, kind: str) -> float:
        return self.weights.get(kind, KINDS[kind])


# --- from rules to errors -------------------------------------------------------------------------


class Error(NamedTuple):
    """The clean tokens ``start`` to ``end`` (without it) become ``wrong``."""

    start: int
    end: int
    wrong: tuple[str, ...]
    kind: str = ""


# From a sentence and the index of a token: an error there, or None where the rule does not apply.
Propose = Callable[[Sequence[str], int, random.Random], Error | None]
T = TypeVar("T")

# For each kind its rules, and how often each is meant to be the one.
RULES: dict[str, dict[Propose, float]] = {kind: {} for kind in KINDS}


def rule(kind: str, weight: float) -> Callable[[Propose], Propose]:
    """Enter a function among the rules of a kind, whose weights add up to 1.

    Rules see the start of a sentence in lower case, except for those of capitalisation.
    """

    def enter(propose: Propose) -> Propose:
        RULES[kind][propose] = weight
        return propose

    return enter


def pick(options: Sequence[T], rng: random.Random) -> T:
    # of the methods of Random, only random() is promised to be the same in all versions of Python
    return options[int(rng.random() * len(options))]


def weighted(weights: Mapping[T, float], rng: random.Random) -> T:
    left = rng.random() * math.fsum(weights.values())  # Python 3.12 changed sum()
    for option, weight in weights.items():
        left -= weight
        if left < 0:
            return option
    return option  # rounding left a rest


def find(
    propose: Propose,
    kind: str,
    tokens: Sequence[str],
    lowered: Sequence[str],
    errors: Sequence[Error],
    rng: random.Random,
) -> Error | None:
    """An error at a random one of the places where the rule applies; None if there is none."""
    places = list(range(len(tokens)))
    capitals = kind == "capitalisation"
    while places:
        k = int(rng.random() * len(places))
        places[k], i = places[-1], places[k]
        places.pop()
        if error := propose(tokens if capitals else lowered, i, rng):
            start, end, wrong, _ = error if capitals else restore_capital(error, tokens, lowered)
            if (
                wrong != tuple(tokens[start:end])
                and (wrong or len(tokens) > 1)
                and all(end < other.start or other.end < start for other in errors)
            ):
                return Error(start, end, wrong, kind)
    return None


def rewrite(tokens: Sequence[str], errors: Sequence[Error]) -> tuple[list[str], list[Edit]]:
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


def lower_start(tokens: Sequence[str]) -> list[str]:
    """The tokens; a word at the start that is no name is in lower case."""
    lowered = list(tokens)
    for i, token in enumerate(tokens[:3]):
        if token[0].isalnum():
            small = token[0].lower() + token[1:]
            if token != "I" and (small in GRAMMAR_WORDS or lookup(small) != UNKNOWN):
                lowered[i] = small
            break
    return lowered


def restore_capital(error: Error, tokens: Sequence[str], lowered: Sequence[str]) -> Error:
    """The error of a lowered sentence as one of the sentence; a capital stays at the start."""
    start, end, wrong, _ = error
    if start >= len(tokens) or tokens[start] == lowered[start]:
        return error
    if not wrong or end == start:  # the word at the start is dropped, or another put before it
        if end == len(tokens):
            return error
        wrong, end = (*wrong, lowered[end]), end + 1
    return Error(start, end, (wrong[0][0].upper() + wrong[0][1:], *wrong[1:]))


def replace(i: int, *wrong: str) -> Error:
    return Error(i, i + 1, wrong)


def drop(i: int) -> Error:
    return Error(i, i + 1, ())


def insert(i: int, *wrong: str) -> Error:
    return Error(i, i, wrong)


# --- words ----------------------------------------------------------------------------------------


def listed(words: str) -> frozenset[str]:
    return frozenset(words.split())


BE = listed("am is are was were be been being 'm 're")
HAVE = listed("have has had having 've")
BEFORE_BASE_FORM = listed(
    "to can could will would shall should may might must do does did ca wo 'll"
)
SUBJECTS = listed("I i you he she it we they who")
PRONOUNS = SUBJECTS | listed("me him her us them himself herself myself itself")
ARTICLES = frozenset(("a", "an", "the"))
DETERMINERS = ARTICLES | listed(
    "my your his her its our their this that these those some any every each no another all "
    "both one two three four five six seven eight nine ten many few several such much what "
    "which whose 's more most less other same own"
)
PREPOSITIONS = {  # and what they are taken for
    "in": ("on", "at", "at", "on", "into", "to"),
    "on": ("in", "in", "at", "about", "of"),
    "at": ("in", "in", "on", "to"),
    "to": ("for", "at", "in", "of", "with"),
    "for": ("to", "to", "of", "about", "in"),
    "of": ("for", "from", "in", "about", "on", "to"),
    "with": ("by", "of", "to", "from"),
    "by": ("with", "from", "of", "for"),
    "from": ("of", "by", "in", "since"),
    "about": ("of", "on", "for"),
    "into": ("in", "in", "to"),
    "onto": ("on",),
    "upon": ("on", "in"),
    "during": ("in", "for", "while"),
    "since": ("from", "for"),
    "between": ("among", "in"),
    "among": ("between", "in"),
    "until": ("to", "by"),
    "through": ("by", "across"),
    "against": ("to", "with"),
    "towards": ("to", "against"),
    "toward": ("to",),
    "after": ("since",),
    "over": ("on", "above"),
    "under": ("in", "below"),
    "within": ("in",),
}
CONJUNCTIONS = listed(
    "and or but because that if when while although though as than so where how why"
)
ADVERBS = listed(
    "not n't never always often also just ever only still already soon sometimes usually really "
    "now then quite even almost hardly"
)
GRAMMAR_WORDS = (
    BE | HAVE | BEFORE_BASE_FORM | PRONOUNS | DETERMINERS | CONJUNCTIONS | ADVERBS
    | frozenset(PREPOSITIONS) | listed("there here yes very too up down out off away oh ah")
)  # fmt: skip


class Word(NamedTuple):
    """What a dictionary knows of a word by itself."""

    number: str = ""  # NN singular, NNS plural, "" no noun
    other_number: str = ""
    tags: tuple[str, ...] = ()  # of a verb: VB, VBZ, VBD, VBN, VBG
    verb: Mapping[str, str] = {}
    adjective: bool = False
    adverb: bool = False
    only_verb: bool = False


UNKNOWN = Word()


@cache
def inflection() -> Any:
    """The library that knows the forms of words."""
    return needed("lemminflect", "putting errors into sentences")


@cache
def lookup(word: str) -> Word:
    """The readings of a content word in lower case; grammar words have none."""
    if word in GRAMMAR_WORDS or len(word) < 2 or not (word.isalpha() and word.islower()):
        return UNKNOWN
    lemmas = inflection().getAllLemmas(word)
    number, other = noun_forms(word, lemmas.get("NOUN", ()))
    verb = verb_forms(lemmas.get("VERB", ("",))[0])
    tags = tuple(tag for tag, form in verb.items() if form == word)
    adjective, adverb = word in lemmas.get("ADJ", ()), "ADV" in lemmas
    noun = "NOUN" in lemmas
    if "VBG" in tags:  # most -ing forms are in dictionaries as nouns, too
        noun, number, other = False, "", ""
    only_verb = bool(tags) and not (noun or adjective or adverb)
    return Word(number, other, tags, verb, adjective, adverb, only_verb)


def noun_forms(word: str, lemmas: Sequence[str]) -> tuple[str, str]:
    """Number of a noun, and its form in the other one; empty if the two are the same."""
    for lemma in lemmas:
        forms = inflection().getAllInflections(lemma, upos="NOUN")
        singular, plurals = forms.get("NN", ("",))[0], forms.get("NNS", ())
        if plurals and word == singular and word not in plurals[:1]:
            return "NN", plurals[0]
        if word in plurals and singular and word != singular:
            return "NNS", singular
    return "", ""


def verb_forms(lemma: str) -> dict[str, str]:
    forms = inflection().getAllInflections(lemma, upos="VERB") if lemma else {}
    if not {"VB", "VBZ", "VBD", "VBG"} <= forms.keys():
        return {}
    participle = forms.get("VBN", forms["VBD"])  # left out where it is like the past
    return {tag: those[0] for tag, those in (forms | {"VBN": participle}).items()}


def at(words: Sequence[str], i: int) -> str:
    """The word at a place; nothing beyond the ends of the sentence."""
    return words[i] if 0 <= i < len(words) else ""


def previous(words: Sequence[str], i: int) -> str:
    """The word before a place; adverbs do not count."""
    i -= 1
    while i > 0 and (words[i] in ADVERBS or (words[i].endswith("ly") and lookup(words[i]).adverb)):
        i -= 1
    return words[i] if i >= 0 else ""


def noun_at(words: Sequence[str], i: int) -> Word | None:
    """The word there, if it is almost certainly a noun."""
    word = lookup(at(words, i))
    if not word.number or word.adjective or word.adverb:
        return None
    if word.tags:  # "watch" is a noun behind an article or adjective
        before = at(words, i - 1)
        near = lookup(before)
        if before not in DETERMINERS and not (near.adjective and not near.tags):
            return None
    after = lookup(at(words, i + 1))
    if after.number and not after.tags and not after.adjective:
        return None  # the first of two, as in "school book"
    return word


def verb_at(words: Sequence[str], i: int) -> Word | None:
    """The word there, if it is almost certainly a verb."""
    word = lookup(at(words, i))
    if not word.tags:
        return None
    if not word.only_verb:  # "watch" is a verb behind a pronoun
        before = previous(words, i)
        if before in BEFORE_BASE_FORM or (before in SUBJECTS and before != "it"):
            return word
        if not (before in HAVE and "VBN" in word.tags):
            return None
    return None if at(words, i - 1) in DETERMINERS and "VBD" not in word.tags else word


def phrase_at(words: Sequence[str], i: int) -> Word | None:
    """The noun of a phrase that begins there, with an adjective before it or without."""
    word = lookup(at(words, i))
    if word.adjective and not word.tags and not word.adverb and not word.number:
        return noun_at(words, i + 1)
    return noun_at(words, i)


# --- article --------------------------------------------------------------------------------------


@rule("article", 0.5)
def missing_article(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    return drop(i) if words[i] in ARTICLES and at(words, i + 1).isalpha() else None


@rule("article", 0.25)
def superfluous_article(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    if not (noun := phrase_at(words, i)):
        return None
    before = at(words, i - 1)
    if before and before not in PREPOSITIONS and not verb_at(words, i - 1):
        return None
    return insert(i, "the" if noun.number == "NNS" or rng.random() < 0.75 else a_or_an(words[i]))


@rule("article", 0.2)
def other_article(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    if words[i] not in ARTICLES or not at(words, i + 1).isalpha():
        return None
    if words[i] != "the":
        return replace(i, "the")
    noun = phrase_at(words, i + 1)
    return replace(i, a_or_an(words[i + 1])) if noun and noun.number == "NN" else None


@rule("article", 0.05)
def a_for_an(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    swapped = {"a": "an", "an": "a"}
    return replace(i, swapped[words[i]]) if words[i] in swapped else None


def a_or_an(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


# --- preposition ----------------------------------------------------------------------------------

NEEDS_NO_PREPOSITION = {  # lemmas, as in "discuss about the plan"
    "discuss": "about", "mention": "about", "describe": "about", "consider": "about",
    "explain": "about", "enter": "into", "reach": "to", "approach": "to", "tell": "to",
    "ask": "to", "answer": "to", "obey": "to", "visit": "to", "thank": "to", "call": "to",
    "marry": "with", "meet": "with", "contact": "with", "join": "with", "face": "with",
    "attack": "to", "lack": "of", "leave": "from", "follow": "to", "help": "to",
    "influence": "on", "affect": "on", "enjoy": "with", "resemble": "to", "request": "for",
    "seek": "for", "regret": "for", "serve": "to", "know": "about", "understand": "about",
}  # fmt: skip


def preposition_at(words: Sequence[str], i: int) -> bool:
    if words[i] not in PREPOSITIONS or not at(words, i + 1).isalpha():
        return False
    return words[i] != "to" or ("VB" not in lookup(words[i + 1]).tags and words[i + 1] not in BE)


@rule("preposition", 0.3)
def missing_preposition(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    return drop(i) if i and preposition_at(words, i) else None


@rule("preposition", 0.55)
def other_preposition(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    if not preposition_at(words, i) or not PREPOSITIONS[words[i]]:
        return None
    return replace(i, pick(PREPOSITIONS[words[i]], rng))


@rule("preposition", 0.15)
def superfluous_preposition(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    before, word = at(words, i - 1), words[i]
    if word in ("home", "here", "there", "abroad") and "go" in lookup(before).verb.values():
        return insert(i, "to")
    if not (word in DETERMINERS or word in PRONOUNS) or not (verb := verb_at(words, i - 1)):
        return None
    wrong = NEEDS_NO_PREPOSITION.get(verb.verb["VB"])
    return insert(i, wrong) if wrong and word not in ("that", "what", "which", "who") else None


# --- verb form ------------------------------------------------------------------------------------


@rule("verb_form", 0.6)
def other_form(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    verb = verb_at(words, i)
    if not verb:
        return None
    before, tags = previous(words, i), verb.tags
    wrong: tuple[str, ...]
    if before in BEFORE_BASE_FORM:
        wrong = ("VBD", "VBD", "VBG", "VBG", "VBZ", "VBN")
    elif before in HAVE:
        wrong = ("VB", "VB", "VBD", "VBD", "VBG")
    elif before in BE:
        wrong = ("VB", "VB", "VBN") if "VBG" in tags else ("VB", "VB", "VBD", "VBG")
    elif "VBG" in tags:
        wrong = ("VB", "VB", "VBN")
    elif "VBD" in tags:
        wrong = ("VB", "VB", "VB", "VBZ", "VBN", "VBG")
    else:
        wrong = ("VBD", "VBD", "VBG")
    options = [verb.verb[tag] for tag in wrong if verb.verb.get(tag, words[i]) != words[i]]
    return replace(i, pick(options, rng)) if options else None


@rule("verb_form", 0.15)
def infinitive(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    if words[i] == "to" and (verb := verb_at(words, i + 1)) and "VB" in verb.tags:
        gerund = verb.verb.get("VBG", words[i + 1])
        return pick([drop(i), replace(i, "for"), Error(i, i + 2, (gerund,))], rng)
    verb = lookup(words[i])
    if "VBG" in verb.tags and at(words, i - 1) not in BE and verb_at(words, i - 1):
        return replace(i, "to", verb.verb["VB"])
    if at(words, i - 1) in BEFORE_BASE_FORM - {"to"} and "VB" in verb.tags:
        return insert(i, "to")
    return None


@rule("verb_form", 0.15)
def missing_auxiliary(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    if words[i] not in BE and words[i] not in HAVE:
        return None
    after = lookup(at(words, i + 1))
    needed = "VBG" if words[i] in BE and "VBG" in after.tags else "VBN"
    return drop(i) if needed in after.tags and not after.adjective else None


@rule("verb_form", 0.05)
def superfluous_be(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    subject, verb = at(words, i - 1), verb_at(words, i)
    if subject not in SUBJECTS or not verb:
        return None
    present = {"I": "am", "he": "is", "she": "is", "it": "is"}.get(subject, "are")
    past = {"I": "was", "he": "was", "she": "was", "it": "was"}.get(subject, "were")
    return insert(i, past if "VBD" in verb.tags else present)


@rule("verb_form", 0.05)
def regular_past(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    """As in "teached", "goed"."""
    verb = verb_at(words, i)
    if not verb or not {"VBD", "VBN"} & set(verb.tags) or words[i].endswith("ed"):
        return None
    base = verb.verb["VB"]
    return replace(i, base + ("d" if base.endswith("e") else "ed"))


# --- agreement ------------------------------------------------------------------------------------

OTHER_PERSON = {
    "is": ("are",), "are": ("is",), "am": ("is", "are"), "was": ("were",), "were": ("was",),
    "has": ("have",), "have": ("has",), "does": ("do",), "do": ("does",),
}  # fmt: skip


@rule("agreement", 0.5)
def person_of_auxiliary(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    if words[i] not in OTHER_PERSON or not BEFORE_BASE_FORM.isdisjoint(words[max(i - 3, 0) : i]):
        return None
    return replace(i, pick(OTHER_PERSON[words[i]], rng))


@rule("agreement", 0.5)
def person_of_verb(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    verb = verb_at(words, i)
    if not verb:
        return None
    if "VBZ" in verb.tags:
        return replace(i, verb.verb["VB"])
    before = previous(words, i)
    plural = before in ("they", "we", "you", "I") or lookup(before).number == "NNS"
    return replace(i, verb.verb["VBZ"]) if "VB" in verb.tags and plural else None


# --- noun number ----------------------------------------------------------------------------------


@rule("noun_number", 0.6)
def singular_for_plural(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    noun = noun_at(words, i)
    return replace(i, noun.other_number) if noun and noun.number == "NNS" else None


@rule("noun_number", 0.35)
def plural_for_singular(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    noun = noun_at(words, i)
    if not noun or noun.number != "NN" or at(words, i - 1) == "of":
        return None
    return replace(i, noun.other_number)


@rule("noun_number", 0.05)
def regular_plural(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    """As in "childs", "childrens"."""
    noun = noun_at(words, i)
    if not noun or noun.number != "NNS" or words[i].endswith("s"):
        return None
    return replace(i, pick([noun.other_number, words[i]], rng) + "s")


# --- spelling -------------------------------------------------------------------------------------

KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
NEIGHBOURS = {row[k]: row[max(k - 1, 0) : k] + row[k + 1 : k + 2] for row in KEYBOARD
              for k in range(len(row))}  # fmt: skip
SOUNDS = [  # letters, and how they are spelled by ear
    (re.compile(pattern), wrong)
    for pattern, *wrong in (
        line.split()
        for line in r"""
            (?<=[a-z])ie(?=[a-z]) ei
            (?<=[a-z])ei(?=[a-z]) ie
            ph f
            (?<=[a-z]{3})ance ence
            (?<=[a-z]{3})ence ance
            (?<=[a-z]{3})ant$ ent
            (?<=[a-z]{3})ent$ ant
            able$ ible
            ible$ able
            (?<=[a-z]{3})ous ouse us
            ally$ aly
            ful$ full
            (?<=[a-z])tion sion cion
            (?<=[a-z])ssion sion tion
            (?<=[a-z])([bcdfglmnprst])\1 \1
            (?<=[a-z][aeiou])([cflmnprst])(?=[aeiou]) \1\1
            (?<=[aeiou])([lmnprst])(?=[eiou]) \1\1
            sc(?=[ei]) s c
            (?<=[a-z])xc x
            (?<=[a-z])cq q c
            ^kn n
            ^wh w
            ^wr r
            ^psy sy psi
            mb$ m
            (?<=[aeiou])ght gth th t
            (?<=[a-z])tch ch
            (?<=[a-z])dg g
            (?<=[a-z])ck k c
            (?<=[a-z])ch c
            (?<=[a-z])c(?=[eiy]) s
            (?<=[a-z])s(?=[eiy]) c
            (?<=[a-z])que$ k
            (?<=[a-z])ea e ee ae
            (?<=[a-z])ee ea i
            (?<=[a-z])ou o u
            (?<=[a-z])au a o ou
            (?<=[a-z])ai a ei
            (?<=[a-z])oo o u
            (?<=[a-z]{2})er$ ar or
            (?<=[a-z]{2})or$ er
            (?<=[a-z]{2})ar$ er
            (?<=[a-z]{2})y(?=[a-z]) i
            ies$ ys yes
            (?<=[a-z]{2})ely$ ly
            (?<=[a-z]{3})e$
            (?<=[a-z]{3})eful efull full
            (?<=[a-z]{2})ing$ eing
            (?<=[aeiou][^aeiou])[aeo](?=[^aeiou]) e i a
            (?<=[aeiou][^aeiou])i(?=[^aeiou]) e a
            (?<=[aeiou][^aeiou]{2})[aeio](?=[^aeiou]) a e i
        """.strip().splitlines()
    )
]


def misspellable(words: Sequence[str], i: int, rng: random.Random) -> bool:
    word = words[i]
    if len(word) < 4 or not (word.isascii() and word.isalpha() and word.islower()):
        return False
    return rng.random() < (len(word) - 2) / 8  # long words are spelled wrong more often


@rule("spelling", 0.65)
def by_ear(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    if not misspellable(words, i, rng):
        return None
    word = words[i]
    for _ in range(15):
        pattern, wrong = pick(SOUNDS, rng)
        if found := list(pattern.finditer(word)):
            place = pick(found, rng)
            letters = place.expand(pick(wrong, rng) if wrong else "")
            return replace(i, word[: place.start()] + letters + word[place.end() :])
    return None


@rule("spelling", 0.35)
def slip(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    """A letter dropped, doubled, transposed, or its neighbour on the keyboard."""
    if not misspellable(words, i, rng):
        return None
    word = words[i]
    k = 1 + int(rng.random() * (len(word) - 1))  # the first letter is rarely wrong
    chance = rng.random()
    if chance < 0.4:
        return replace(i, word[:k] + word[k + 1 :])
    if chance < 0.7 and k + 1 < len(word):
        return replace(i, word[:k] + word[k + 1] + word[k] + word[k + 2 :])
    letters = word[k] * 2 if chance < 0.85 else pick(NEIGHBOURS[word[k]], rng)
    return replace(i, word[:k] + letters + word[k + 1 :])


# --- word order -----------------------------------------------------------------------------------

QUESTION_WORDS = listed("what where when why how who which")
OBJECT_STARTS = DETERMINERS | PRONOUNS
FINITE = BE | HAVE | BEFORE_BASE_FORM - {"to"}


def swap(words: Sequence[str], i: int) -> Error:
    return Error(i, i + 2, (words[i + 1], words[i]))


@rule("word_order", 0.4)
def adverb_and_verb(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    """As in "He never is" and "he speaks well it"; what is right in both orders is left alone."""
    first, second = words[i], at(words, i + 1)
    if first in FINITE and movable(second):
        return swap(words, i)
    object_follows = at(words, i + 2) in OBJECT_STARTS
    return swap(words, i) if movable(first) and object_follows and verb_at(words, i + 1) else None


def movable(adverb: str) -> bool:
    if adverb in ADVERBS:
        return adverb not in ("not", "n't", "then", "now", "even", "quite", "almost")
    return adverb.endswith("ly") and lookup(adverb).adverb


@rule("word_order", 0.25)
def adjective_and_noun(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    first = lookup(words[i])
    clear = first.adjective and not (first.tags or first.number or first.adverb)
    return swap(words, i) if clear and noun_at(words, i + 1) else None


@rule("word_order", 0.35)
def question_order(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    """As in "What you are doing ?" and "I know what is it"."""
    first, second = words[i], at(words, i + 1)
    if at(words, i - 1) not in QUESTION_WORDS and not (i < 2 and words[-1] == "?"):
        return None
    question = first in FINITE and second in SUBJECTS
    statement = first in SUBJECTS and second in FINITE and second.isalpha()
    return swap(words, i) if question or statement else None


# --- missing and doubled words --------------------------------------------------------------------

OFTEN_MISSING = listed(
    "it is are was were be that to and have has had will would can there they he she we I you them "
    "him me his their my as if when who which than"
)


@rule("missing_word", 1.0)
def missing_word(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    return drop(i) if words[i] in OFTEN_MISSING and at(words, i + 1).isalpha() else None


@rule("doubled_word", 1.0)
def doubled_word(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    if words[i] in GRAMMAR_WORDS and words[i].isalpha():
        return insert(i + 1, words[i])
    return insert(i + 1, words[i]) if lookup(words[i]) != UNKNOWN and rng.random() < 0.1 else None


# --- punctuation ----------------------------------------------------------------------------------

OTHER_MARK = {",": ".", ";": ",", ":": ",", "?": ".", "!": "."}


@rule("punctuation", 0.45)
def missing_comma(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    return drop(i) if words[i] == "," and i else None


@rule("punctuation", 0.2)
def superfluous_comma(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    """Around a conjunction, or before a verb."""
    before, word = at(words, i - 1), words[i]
    if not before.isalpha() or not word.isalpha():
        return None
    likely = word in CONJUNCTIONS or before in ("that", "because", "but", "and", "so", "although")
    verb = lookup(before).number and (word in FINITE or verb_at(words, i))
    return insert(i, ",") if likely or verb else None


@rule("punctuation", 0.1)
def missing_end(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    return drop(i) if i and i == len(words) - 1 and words[i] in (".", "?", "!") else None


@rule("punctuation", 0.1)
def other_mark(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    return replace(i, OTHER_MARK[words[i]]) if words[i] in OTHER_MARK and i else None


@rule("punctuation", 0.15)
def missing_apostrophe(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    clitic = at(words, i + 1)
    if clitic == "n't" and words[i].isalpha():
        return Error(i, i + 2, (words[i] + "nt",))
    if clitic == "'s" and (lookup(words[i]).number or words[i].istitle()):
        return Error(i, i + 2, (pick([words[i] + "s", words[i]], rng),))
    return None


# --- capitalisation -------------------------------------------------------------------------------


@rule("capitalisation", 0.35)
def small_start(tokens: Sequence[str], i: int, rng: random.Random) -> Error | None:
    start = next((k for k, token in enumerate(tokens) if token[0].isalnum()), -1)
    return replace(i, tokens[i][0].lower() + tokens[i][1:]) if i == start else None


@rule("capitalisation", 0.2)
def small_i(tokens: Sequence[str], i: int, rng: random.Random) -> Error | None:
    return replace(i, "i") if tokens[i] == "I" else None


@rule("capitalisation", 0.25)
def small_name(tokens: Sequence[str], i: int, rng: random.Random) -> Error | None:
    inside = i and tokens[i - 1][-1].isalnum()
    return (
        replace(i, tokens[i].lower())
        if inside and len(tokens[i]) > 1 and tokens[i].istitle()
        else None
    )


@rule("capitalisation", 0.2)
def capital_noun(tokens: Sequence[str], i: int, rng: random.Random) -> Error | None:
    if noun_at(tokens, i) or (i and at(tokens, i - 1) == "," and tokens[i] in CONJUNCTIONS):
        return replace(i, tokens[i].capitalize())
    return None


# --- confusion ------------------------------------------------------------------------------------

# words taken for each other; with > it is the second that is taken for the first
CONFUSED = """
    their / there / they 're;  its / it 's;  your / you 're;  whose / who 's;  then / than;
    too / to;  affect / effect;  affected / effected;  affects / effects;  lose / loose;
    quite / quiet;  who / whom / which;  much / many;  little / few;  fewer / less;
    say / tell;  said / told;  says / tells;  saying / telling;  speak / talk / tell;
    another / other;  others / other;  every / all;  some / any;  make > do;  made > did;
    making > doing;  see / watch / look;  hear / listen / here;  learn / teach;  rise / raise;
    lie / lay;  borrow / lend;  bring / take;  beside / besides;  advice / advise;
    accept / except;  weather / whether;  were / where;  thought / though;  though / through;
    think / thing;  live / life;  believe / belief;  passed / past;  choose / chose;
    price / prize;  peace / piece;  know / now;  knew / new;  no / not;  of / off;
    right / write;  bad / badly;  good / well;  hard / hardly;  late / lately;  most / almost;
    so / such / very;  like / as;  although / despite;  while / during;  also / too;
    economic / economical;  different / difference;  difficult / difficulty;
    important / importance;  success / successful / succeed;  dead / death;  safe / save;
    breath / breathe;  principal / principle;  fell / felt;  win / earn;  job / work;
    sensible / sensitive;  ago / before;  already / yet;  may be / maybe;  special / especially
"""
SELDOM = listed("to of no not so as all were some any")  # they are everywhere


Words = tuple[str, ...]


def confusions() -> dict[str, list[tuple[Words, Words]]]:
    """For the first word of what is right: all of it, and what is taken for it."""
    table: dict[str, list[tuple[Words, Words]]] = {}
    for line in CONFUSED.split(";"):
        group = [tuple(words.split()) for words in re.split(" [/>] ", line)]
        for right in group[:1] if ">" in line else group:
            pairs = [(right, wrong) for wrong in group if wrong != right]
            table[right[0]] = table.get(right[0], []) + pairs
    return table


CONFUSIONS = confusions()


@rule("confusion", 0.75)
def confused(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    if words[i] not in CONFUSIONS or (words[i] in SELDOM and rng.random() < 0.9):
        return None
    options = [
        Error(i, i + len(right), wrong)
        for right, wrong in CONFUSIONS[words[i]]
        if right == tuple(words[i : i + len(right)])
    ]
    return pick(options, rng) if options else None


@rule("confusion", 0.25)
def adjective_for_adverb(words: Sequence[str], i: int, rng: random.Random) -> Error | None:
    word = words[i]
    if not word.endswith("ly") or not lookup(word).adverb:
        return None
    endings = ("ly", ""), ("ily", "y"), ("ly", "le"), ("ally", "")
    adjectives = [word.removesuffix(end) + new for end, new in endings if word.endswith(end)]
    found = [adjective for adjective in adjectives if lookup(adjective).adjective]
    return replace(i, found[-1]) if found else None
