"""Errors within words: misspelled, taken for a similar one, with a wrong capital."""

import re
import tomllib
from pathlib import Path

from datamodules.text.english import CONJUNCTIONS, lookup
from datamodules.text.places import Error, Place, Rule

TABLES = tomllib.loads(Path(__file__).with_name("learner_errors.toml").read_text())

_SOUNDS = [(re.compile(sound), wrong.split()) for sound, wrong in TABLES["sounds"].items()]
_NEIGHBOURS = {  # on the keyboard
    row[k]: row[max(k - 1, 0) : k] + row[k + 1 : k + 2]
    for row in ("qwertyuiop", "asdfghjkl", "zxcvbnm")
    for k in range(len(row))
}


def _is_misspelled(place: Place) -> bool:
    word = place.word
    if len(word) < 4 or not (word.isascii() and word.isalpha() and word.islower()):
        return False
    return place.rng.random() < (len(word) - 2) / 8  # long words are spelled wrong more often


def _by_ear(place: Place) -> Error | None:
    if not _is_misspelled(place):
        return None
    word = place.word
    for _ in range(15):
        pattern, wrong = place.pick(_SOUNDS)
        if found := list(pattern.finditer(word)):
            match = place.pick(found)
            letters = match.expand(place.pick(wrong) if wrong else "")
            return place.replace(word[: match.start()] + letters + word[match.end() :])
    return None


def _slip(place: Place) -> Error | None:
    """A letter dropped, doubled, transposed, or its neighbour on the keyboard."""
    if not _is_misspelled(place):
        return None
    word, rng = place.word, place.rng
    k = 1 + int(rng.random() * (len(word) - 1))  # the first letter is rarely wrong
    chance = rng.random()
    if chance < 0.4:
        return place.replace(word[:k] + word[k + 1 :])
    if chance < 0.7 and k + 1 < len(word):
        return place.replace(word[:k] + word[k + 1] + word[k] + word[k + 2 :])
    letters = word[k] * 2 if chance < 0.85 else place.pick(_NEIGHBOURS[word[k]])
    return place.replace(word[:k] + letters + word[k + 1 :])


_SELDOM = frozenset(TABLES["confused"]["seldom"].split())


def _confusions(groups: str) -> dict[str, list[tuple[list[str], list[str]]]]:
    """For the first word of what is right: all of it, and what is taken for it."""
    table: dict[str, list[tuple[list[str], list[str]]]] = {}
    for line in groups.split(";"):
        group = [words.split() for words in re.split(" [/>] ", line)]
        for right in group[:1] if ">" in line else group:
            pairs = [(right, wrong) for wrong in group if wrong != right]
            table[right[0]] = table.get(right[0], []) + pairs
    return table


_CONFUSIONS = _confusions(TABLES["confused"]["groups"])


def _confused(place: Place) -> Error | None:
    word, i = place.word, place.i
    if word not in _CONFUSIONS or (word in _SELDOM and place.rng.random() < 0.9):
        return None
    options = [
        place.replace(*wrong, count=len(right))
        for right, wrong in _CONFUSIONS[word]
        if right == list(place.words[i : i + len(right)])
    ]
    return place.pick(options) if options else None


def _adjective_for_adverb(place: Place) -> Error | None:
    word = place.word
    if not word.endswith("ly") or not lookup(word).adverb:
        return None
    endings = ("ly", ""), ("ily", "y"), ("ly", "le"), ("ally", "")
    adjectives = [word.removesuffix(end) + new for end, new in endings if word.endswith(end)]
    found = [adjective for adjective in adjectives if lookup(adjective).adjective]
    return place.replace(found[-1]) if found else None


def _small_start(place: Place) -> Error | None:
    start = next((k for k, word in enumerate(place.words) if word[0].isalnum()), -1)
    return place.replace(place.word[0].lower() + place.word[1:]) if place.i == start else None


def _small_i(place: Place) -> Error | None:
    return place.replace("i") if place.word == "I" else None


def _small_name(place: Place) -> Error | None:
    is_inside = place.before and place.before[-1].isalnum()
    is_name = len(place.word) > 1 and place.word.istitle()
    return place.replace(place.word.lower()) if is_inside and is_name else None


def _capital_noun(place: Place) -> Error | None:
    starts_clause = place.before == "," and place.word in CONJUNCTIONS
    return place.replace(place.word.capitalize()) if place.noun or starts_clause else None


# For each kind its rules, and how often each is meant to be the one.
RULES: dict[str, dict[Rule, float]] = {
    "spelling": {_by_ear: 0.65, _slip: 0.35},
    "confusion": {_confused: 0.75, _adjective_for_adverb: 0.25},
    "capitalisation": {_small_start: 0.35, _small_i: 0.2, _small_name: 0.25, _capital_noun: 0.2},
}
