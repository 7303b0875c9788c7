"""Count the errors of learners in one half of JFLEG, as rates for made ones.

    python -m benchmarks.learner_errors data/jfleg/dev

The half is chosen by a hash of the sentence (``benchmarks.jfleg`` reports on the other one). Each
person's edits are sorted into the kinds that ``ErrorSynthesis`` can make, by simple rules; what is
none of these, such as a phrase rewritten, is counted beside them. A word that has moved makes two
edits, missing here and too many there: nothing is word order. Printed are counts alone.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from benchmarks.jfleg import in_first_half
from core.errors import exit_on_user_error
from datamodules.text.corpora import read_corpus
from datamodules.text.error_synthesis import (
    ARTICLES,
    CONFUSIONS,
    KINDS,
    OTHER_PERSON,
    PREPOSITIONS,
    SUBJECTS,
    inflection,
)
from metrics.edits import Edit


def kinds_of(sentence: list[str], edit: Edit) -> list[str]:
    """Of ``KINDS``, or what else; where as many words stand for some, of each that differs."""
    old, new = sentence[edit.start : edit.end], edit.correction.split()
    before = sentence[: edit.start][-1:]
    if len(old) != len(new):
        return [kind_of(old, new, before)]
    befores = [before, *([word] for word in old)]
    pairs = zip(old, new, befores, strict=False)
    return [kind_of([a], [b], before) for a, b, before in pairs if a != b]


def kind_of(old: list[str], new: list[str], before: list[str]) -> str:
    removed, added = Counter(old) - Counter(new), Counter(new) - Counter(old)
    different = {word.lower() for word in (removed + added)}
    if not any(word.isalnum() for word in different):
        return "punctuation"
    if [word.lower() for word in old] == [word.lower() for word in new]:
        return "capitalisation"
    if old and not new and before == old:
        return "doubled_word"
    if different <= ARTICLES:
        return "article"
    if different <= PREPOSITIONS.keys():
        return "preposition"
    if len(removed) == len(added) == 1:
        return of_words(*(word.lower() for word in (*removed, *added, *before)))
    return "missing_word" if len(added) == 1 and not removed else "other"


def of_words(wrong: str, right: str, before: str = "") -> str:
    """Kind of an error where one word stands for another."""
    lemmas = inflection().getAllLemmas
    old, new = lemmas(wrong), lemmas(right)
    if not old and wrong not in CONFUSIONS:
        return "spelling"
    for part in ("NOUN", "VERB", "AUX"):
        if part == "NOUN" and before in SUBJECTS:
            continue  # what else may be both is taken for a noun
        if set(old.get(part, ())) & set(new.get(part, ())):
            same_tense = (
                wrong.rstrip("es") == right.rstrip("es") or {wrong, right} <= OTHER_PERSON.keys()
            )
            verb = "agreement" if same_tense else "verb_form"
            return "noun_number" if part == "NOUN" else verb
    taken_for = {" ".join(w) for _, w in CONFUSIONS.get(right, [])}
    return "confusion" if wrong in taken_for else "word choice"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="JFLEG's dev folder")
    options = parser.parse_args(args)
    with exit_on_user_error():
        half = [s for s in read_corpus(options.folder) if in_first_half(s.source)]
        readings = [(s, edits) for s in half for edits in s.edits.values()]
        kinds = Counter(
            kind for s, edits in readings for e in edits for kind in kinds_of(s.source.split(), e)
        )
        tokens = sum(len(sentence.source.split()) for sentence in half) / len(half)
        number = sum(len(edits) for _, edits in readings) / len(readings)
        untouched = sum(not edits for _, edits in readings) / len(readings)
        print(f"{len(half)} sentences of {tokens:.1f} tokens, read {len(readings)} times")
        print(f"{number:.2f} edits a sentence, {untouched:.3f} of the readings without any")
        for kind, count in kinds.most_common():
            print(f"{count:6} {100 * count / sum(kinds.values()):5.1f} %  {kind}")
        print("weights:", json.dumps({kind: kinds[kind] for kind in KINDS if kinds[kind]}))


if __name__ == "__main__":
    main()
