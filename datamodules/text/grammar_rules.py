"""Errors between words: missing, superfluous or wrong ones, wrong forms, order and punctuation."""

from collections.abc import Callable

from datamodules.text.english import (
    ADVERBS,
    ARTICLES,
    BE,
    BEFORE_BASE_FORM,
    CONJUNCTIONS,
    DETERMINERS,
    GRAMMAR_WORDS,
    HAVE,
    PREPOSITIONS,
    PRONOUNS,
    QUESTION_WORDS,
    SUBJECTS,
    UNKNOWN,
    lookup,
)
from datamodules.text.places import Error, Place, Rule
from datamodules.text.spelling_rules import TABLES

_FINITE = BE | HAVE | BEFORE_BASE_FORM - {"to"}


def _drop_if(applies: Callable[[Place], object]) -> Rule:
    return lambda place: place.drop() if applies(place) else None


def _swap_if(applies: Callable[[Place], object]) -> Rule:
    return lambda place: place.swap() if applies(place) else None


# --- article --------------------------------------------------------------------------------------

_missing_article = _drop_if(lambda place: place.word in ARTICLES and place.after.isalpha())


def _superfluous_article(place: Place) -> Error | None:
    if not (noun := place.phrase):
        return None
    if place.before and place.before not in PREPOSITIONS and not place.shift(-1).verb:
        return None
    definite = noun.number == "NNS" or place.rng.random() < 0.75
    return place.insert("the" if definite else _a_or_an(place.word))


def _other_article(place: Place) -> Error | None:
    if place.word not in ARTICLES or not place.after.isalpha():
        return None
    if place.word != "the":
        return place.replace("the")
    noun = place.shift(1).phrase
    return place.replace(_a_or_an(place.after)) if noun and noun.number == "NN" else None


def _a_for_an(place: Place) -> Error | None:
    swapped = {"a": "an", "an": "a"}
    return place.replace(swapped[place.word]) if place.word in swapped else None


def _a_or_an(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


# --- preposition ----------------------------------------------------------------------------------

_OTHER_PREPOSITIONS = {word: wrong.split() for word, wrong in TABLES["prepositions"].items()}
_NEEDLESS_PREPOSITIONS = {
    verb: preposition
    for preposition, verbs in TABLES["needless_prepositions"].items()
    for verb in verbs.split()
}


def _is_preposition(place: Place) -> bool:
    if place.word not in PREPOSITIONS or not place.after.isalpha():
        return False
    return place.word != "to" or ("VB" not in lookup(place.after).tags and place.after not in BE)


_missing_preposition = _drop_if(lambda place: place.i and _is_preposition(place))


def _other_preposition(place: Place) -> Error | None:
    if not _is_preposition(place):
        return None
    return place.replace(place.pick(_OTHER_PREPOSITIONS[place.word]))


def _superfluous_preposition(place: Place) -> Error | None:
    word, verb = place.word, place.shift(-1).verb
    goes = "go" in lookup(place.before).verb.values()
    if word in ("home", "here", "there", "abroad") and goes:
        return place.insert("to")
    if not (word in DETERMINERS or word in PRONOUNS) or not verb:
        return None
    wrong = _NEEDLESS_PREPOSITIONS.get(verb.verb["VB"])
    return place.insert(wrong) if wrong and word not in ("that", "what", "which", "who") else None


# --- verb form ------------------------------------------------------------------------------------


def _other_form(place: Place) -> Error | None:
    if not (verb := place.verb):
        return None
    before, tags = place.previous, verb.tags
    if before in BEFORE_BASE_FORM:
        wrong = "VBD VBD VBG VBG VBZ VBN"
    elif before in HAVE:
        wrong = "VB VB VBD VBD VBG"
    elif before in BE:
        wrong = "VB VB VBN" if "VBG" in tags else "VB VB VBD VBG"
    elif "VBG" in tags:
        wrong = "VB VB VBN"
    elif "VBD" in tags:
        wrong = "VB VB VB VBZ VBN VBG"
    else:
        wrong = "VBD VBD VBG"
    forms = [verb.verb[tag] for tag in wrong.split()]
    options = [form for form in forms if form != place.word]
    return place.replace(place.pick(options)) if options else None


def _infinitive(place: Place) -> Error | None:
    following = place.shift(1).verb
    if place.word == "to" and following and "VB" in following.tags:
        gerund = place.replace(following.verb["VBG"], count=2)
        return place.pick([place.drop(), place.replace("for"), gerund])
    verb = lookup(place.word)
    if "VBG" in verb.tags and place.before not in BE and place.shift(-1).verb:
        return place.replace("to", verb.verb["VB"])
    if place.before in BEFORE_BASE_FORM - {"to"} and "VB" in verb.tags:
        return place.insert("to")
    return None


def _missing_auxiliary(place: Place) -> Error | None:
    if place.word not in BE and place.word not in HAVE:
        return None
    after = lookup(place.after)
    form = "VBG" if place.word in BE and "VBG" in after.tags else "VBN"
    return place.drop() if form in after.tags and not after.adjective else None


def _superfluous_be(place: Place) -> Error | None:
    subject, verb = place.before, place.verb
    if subject not in SUBJECTS or not verb:
        return None
    present = {"I": "am", "he": "is", "she": "is", "it": "is"}.get(subject, "are")
    past = "was" if subject in ("I", "he", "she", "it") else "were"
    return place.insert(past if "VBD" in verb.tags else present)


def _regular_past(place: Place) -> Error | None:
    """As in "teached", "goed"."""
    verb = place.verb
    if not verb or not {"VBD", "VBN"} & set(verb.tags) or place.word.endswith("ed"):
        return None
    base = verb.verb["VB"]
    return place.replace(base + ("d" if base.endswith("e") else "ed"))


# --- agreement, number ----------------------------------------------------------------------------

_OTHER_PERSON = {word: wrong.split() for word, wrong in TABLES["other_person"].items()}


def _person_of_auxiliary(place: Place) -> Error | None:
    near = place.words[max(place.i - 3, 0) : place.i]
    if place.word not in _OTHER_PERSON or not BEFORE_BASE_FORM.isdisjoint(near):
        return None
    return place.replace(place.pick(_OTHER_PERSON[place.word]))


def _person_of_verb(place: Place) -> Error | None:
    if not (verb := place.verb):
        return None
    if "VBZ" in verb.tags:
        return place.replace(verb.verb["VB"])
    before = place.previous
    plural = before in ("they", "we", "you", "I") or lookup(before).number == "NNS"
    return place.replace(verb.verb["VBZ"]) if "VB" in verb.tags and plural else None


def _singular_for_plural(place: Place) -> Error | None:
    noun = place.noun
    return place.replace(noun.other_number) if noun and noun.number == "NNS" else None


def _plural_for_singular(place: Place) -> Error | None:
    noun = place.noun
    if not noun or noun.number != "NN" or place.before == "of":
        return None
    return place.replace(noun.other_number)


def _regular_plural(place: Place) -> Error | None:
    """As in "childs", "childrens"."""
    noun = place.noun
    if not noun or noun.number != "NNS" or place.word.endswith("s"):
        return None
    return place.replace(place.pick([noun.other_number, place.word]) + "s")


# --- word order, missing and doubled words --------------------------------------------------------


@_swap_if
def _adverb_and_verb(place: Place) -> object:
    """As in "He never is" and "he speaks well it"; what is right in both orders is left alone."""
    if place.word in _FINITE and _is_movable(place.after):
        return True
    object_follows = place.shift(2).word in DETERMINERS | PRONOUNS
    return _is_movable(place.word) and object_follows and place.shift(1).verb


def _is_movable(adverb: str) -> bool:
    if adverb in ADVERBS:
        return adverb not in ("not", "n't", "then", "now", "even", "quite", "almost")
    return adverb.endswith("ly") and lookup(adverb).adverb


@_swap_if
def _adjective_and_noun(place: Place) -> object:
    first = lookup(place.word)
    clear = first.adjective and not (first.tags or first.number or first.adverb)
    return clear and place.shift(1).noun


@_swap_if
def _question_order(place: Place) -> bool:
    """As in "What you are doing ?" and "I know what is it"."""
    first, second = place.word, place.after
    if place.before not in QUESTION_WORDS and not (place.i < 2 and place.words[-1] == "?"):
        return False
    question = first in _FINITE and second in SUBJECTS
    statement = first in SUBJECTS and second in _FINITE and second.isalpha()
    return question or statement


_OFTEN_MISSING = frozenset(TABLES["often_missing"].split())
_missing_word = _drop_if(lambda place: place.word in _OFTEN_MISSING and place.after.isalpha())


def _doubled_word(place: Place) -> Error | None:
    word = place.word
    is_grammar_word = word in GRAMMAR_WORDS and word.isalpha()
    if is_grammar_word or (lookup(word) != UNKNOWN and place.rng.random() < 0.1):
        return place.shift(1).insert(word)
    return None


# --- punctuation ----------------------------------------------------------------------------------

_OTHER_MARK = {",": ".", ";": ",", ":": ",", "?": ".", "!": "."}

_missing_comma = _drop_if(lambda place: place.word == "," and place.i)


def _superfluous_comma(place: Place) -> Error | None:
    """Around a conjunction, or before a verb."""
    before, word = place.before, place.word
    if not before.isalpha() or not word.isalpha():
        return None
    likely = word in CONJUNCTIONS or before in ("that", "because", "but", "and", "so", "although")
    verb = lookup(before).number and (word in _FINITE or place.verb)
    return place.insert(",") if likely or verb else None


@_drop_if
def _missing_end(place: Place) -> bool:
    return 0 < place.i == len(place.words) - 1 and place.word in (".", "?", "!")


def _other_mark(place: Place) -> Error | None:
    is_mark = place.i and place.word in _OTHER_MARK
    return place.replace(_OTHER_MARK[place.word]) if is_mark else None


def _missing_apostrophe(place: Place) -> Error | None:
    word = place.word
    if place.after == "n't" and word.isalpha():
        return place.replace(word + "nt", count=2)
    if place.after == "'s" and (lookup(word).number or word.istitle()):
        return place.replace(place.pick([word + "s", word]), count=2)
    return None


# For each kind its rules, and how often each is meant to be the one.
RULES: dict[str, dict[Rule, float]] = {
    "article": {
        _missing_article: 0.5, _superfluous_article: 0.25, _other_article: 0.2, _a_for_an: 0.05,
    },
    "preposition": {
        _missing_preposition: 0.3, _other_preposition: 0.55, _superfluous_preposition: 0.15,
    },
    "verb_form": {
        _other_form: 0.6, _infinitive: 0.15, _missing_auxiliary: 0.15, _superfluous_be: 0.05,
        _regular_past: 0.05,
    },
    "agreement": {_person_of_auxiliary: 0.5, _person_of_verb: 0.5},
    "noun_number": {_singular_for_plural: 0.6, _plural_for_singular: 0.35, _regular_plural: 0.05},
    "word_order": {_adverb_and_verb: 0.4, _adjective_and_noun: 0.25, _question_order: 0.35},
    "missing_word": {_missing_word: 1.0},
    "doubled_word": {_doubled_word: 1.0},
    "punctuation": {
        _missing_comma: 0.45, _superfluous_comma: 0.2, _missing_end: 0.1, _other_mark: 0.1,
        _missing_apostrophe: 0.15,
    },
}  # fmt: skip
