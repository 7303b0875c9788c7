"""Scores of corrected sentences, beside those of doing nothing."""

from collections import Counter
from collections.abc import Sequence

from metrics.edits import Edit, apply_edits, best_sum, extract_edits
from metrics.gleu import corpus_gleu
from metrics.m2 import M2Sentence
from metrics.maxmatch import m2_scores


def score_corrections(gold: Sequence[M2Sentence], corrections: Sequence[str]) -> dict[str, float]:
    """Score corrected sentences against the edits of people, or those by which errors were made.

    Args:
        gold: The sentences with the edits of one or more annotators.
        corrections: A line for each of them, tokens between spaces.

    Returns:
        Precision, recall and F0.5 of edits (``precision``, ``recall``, ``f05``) by MaxMatch, of all
        sentences, and ``f05_of_wrong`` of those in which somebody found an error; ``corrected``,
        the share of these that became what an annotator made of them; ``left_alone``, the share of
        the others that stayed as they were; ``gleu`` in percent, and ``gleu_of_source`` of doing
        nothing; and ``recall_KIND`` of each kind of error, if the edits name theirs. What there is
        no sentence for is left out. Doing nothing has an F0.5 of 0 wherever there is an error.
    """
    if not gold:
        return {}
    edit_scores = m2_scores(corrections, gold)
    total = best_sum(edit_scores)
    sources = [sentence.source for sentence in gold]
    references = [[apply_edits(s.source, edits) for edits in s.edits.values()] for s in gold]
    fewest = min(map(len, references))  # GLEU wants as many of every sentence
    shortened = [those[:fewest] for those in references]
    scores = {
        "precision": total.precision,
        "recall": total.recall,
        "f05": total.f(),
        "gleu": corpus_gleu(sources, corrections, shortened),
        "gleu_of_source": corpus_gleu(sources, sources, shortened),
    }
    parts = list(zip(gold, corrections, references, edit_scores, strict=True))
    wrong = [part for part in parts if any(part[0].edits.values())]
    clean = [part for part in parts if not any(part[0].edits.values())]
    if wrong:
        scores["f05_of_wrong"] = best_sum(people for *_, people in wrong).f()
        scores["corrected"] = share([c in those for _, c, those, _ in wrong])
    if clean:
        scores["left_alone"] = share([c == s.source for s, c, _, _ in clean])
    return scores | recall_by_kind(gold, corrections)


def share(facts: Sequence[bool]) -> float:
    return sum(facts) / len(facts)


def recall_by_kind(gold: Sequence[M2Sentence], corrections: Sequence[str]) -> dict[str, float]:
    """Share of the gold edits of each named kind of error that were made, ``recall_KIND``."""
    found, there = Counter[str](), Counter[str]()
    for sentence, correction in zip(gold, corrections, strict=True):
        made = set(extract_edits(sentence.source, correction))
        for edits in sentence.edits.values():
            for edit in edits:
                if edit.kind != Edit.kind:
                    there[edit.kind] += 1
                    found[edit.kind] += edit in made
    return {f"recall_{kind}": found[kind] / number for kind, number in sorted(there.items())}
