"""English words: grammar words by their kind, and a dictionary of all others."""

import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from core.errors import needed

_LISTS = {
    name: frozenset(words.split())
    for name, words in tomllib.loads(Path(__file__).with_suffix(".toml").read_text()).items()
}
BE, HAVE = _LISTS["be"], _LISTS["have"]
BEFORE_BASE_FORM = _LISTS["before_base_form"]
SUBJECTS = _LISTS["subjects"]
PRONOUNS = SUBJECTS | _LISTS["objects"]
ARTICLES = _LISTS["articles"]
DETERMINERS = ARTICLES | _LISTS["other_determiners"]
PREPOSITIONS = _LISTS["prepositions"]
CONJUNCTIONS = _LISTS["conjunctions"]
ADVERBS = _LISTS["adverbs"]
QUESTION_WORDS = _LISTS["question_words"]
GRAMMAR_WORDS = frozenset[str]().union(*_LISTS.values())


class Word(NamedTuple):
    """Readings of a word by itself."""

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
    """Import the library that knows the forms of words."""
    return needed("lemminflect", "putting errors into sentences")


@cache
def lookup(word: str) -> Word:
    """Look up the readings of a content word in lower case; grammar words have none."""
    if word in GRAMMAR_WORDS or len(word) < 2 or not (word.isalpha() and word.islower()):
        return UNKNOWN
    lemmas = inflection().getAllLemmas(word)
    number, other = _noun_forms(word, lemmas.get("NOUN", ()))
    verb = _verb_forms(lemmas.get("VERB", ("",))[0])
    tags = tuple(tag for tag, form in verb.items() if form == word)
    adjective, adverb = word in lemmas.get("ADJ", ()), "ADV" in lemmas
    noun = "NOUN" in lemmas
    if "VBG" in tags:  # most -ing forms are in dictionaries as nouns, too
        noun, number, other = False, "", ""
    only_verb = bool(tags) and not (noun or adjective or adverb)
    return Word(number, other, tags, verb, adjective, adverb, only_verb)


def _noun_forms(word: str, lemmas: Sequence[str]) -> tuple[str, str]:
    """Number of a noun, and its form in the other one; empty if the two are the same."""
    for lemma in lemmas:
        forms = inflection().getAllInflections(lemma, upos="NOUN")
        singular, plurals = forms.get("NN", ("",))[0], forms.get("NNS", ())
        if plurals and word == singular and word not in plurals[:1]:
            return "NN", plurals[0]
        if word in plurals and singular and word != singular:
            return "NNS", singular
    return "", ""


def _verb_forms(lemma: str) -> dict[str, str]:
    forms = inflection().getAllInflections(lemma, upos="VERB") if lemma else {}
    if not {"VB", "VBZ", "VBD", "VBG"} <= forms.keys():
        return {}
    participle = forms.get("VBN", forms["VBD"])  # left out where it is like the past
    return {tag: those[0] for tag, those in (forms | {"VBN": participle}).items()}
