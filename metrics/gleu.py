"""GLEU of corrected sentences. Dimensions: N sentences, R references of each, I iterations.

Napoles, Sakaguchi, Post and Tetreault, "Ground Truth for Grammatical Error Correction Metrics" (ACL
2015), with the sampling of references of "GLEU Without Tuning" (2016, arXiv 1605.02592).
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np

_ORDER = 4  # n-grams of one to four tokens
_ITERATIONS = 500
_SEED_STEP = 101  # iteration j draws with the seed 101 j, as the authors' program does

_Ngrams = Counter[tuple[str, ...]]  # of one order


def corpus_gleu(
    sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> float:
    """GLEU of a corpus, in percent.

    A hypothesis earns the n-grams that it shares with a reference, as in BLEU, and pays for those
    it kept from the source though the reference has dropped them. The score is the mean of 500
    iterations, each of which draws one reference for every sentence with a seed of its own, so it
    is the same number every time. It is that of the authors' program under Python 3, whose draws
    differ from those of Python 2 by a few hundredths of a percent.

    Args:
        sources: N lines as they were written, tokens between spaces.
        hypotheses: N corrected lines.
        references: For each of the N sentences its R corrections by people.
    """
    parts = zip(sources, hypotheses, references, strict=True)
    counts = np.array([list(sentence_counts(*part)) for part in parts])  # (N, R, 2 + 2 * _ORDER)
    choices = drawn_references(*counts.shape[:2])  # (I, N)
    sentences = np.arange(len(counts))
    totals = np.stack([counts[sentences, choice].sum(axis=0) for choice in choices])
    return 100 * float(gleu_of_totals(totals).mean())


def sentence_counts(
    source: str, hypothesis: str, references: Sequence[str]
) -> Iterator[tuple[int, ...]]:
    """Count for each reference: length of hypothesis and reference, then matches and n-grams."""
    source_ngrams, hypothesis_ngrams = _ngrams(source), _ngrams(hypothesis)
    length = len(hypothesis.split())
    possible = [max(length + 1 - n, 0) for n in range(1, _ORDER + 1)]
    for reference in references:
        lists = zip(source_ngrams, hypothesis_ngrams, _ngrams(reference), strict=True)
        yield length, len(reference.split()), *(_matches(*those) for those in lists), *possible


def _ngrams(line: str) -> list[_Ngrams]:
    tokens = line.split()
    starts = [[tokens[k:] for k in range(n)] for n in range(1, _ORDER + 1)]
    return [Counter(zip(*those, strict=False)) for those in starts]  # the shortest ends the zip


def _matches(source: _Ngrams, hypothesis: _Ngrams, reference: _Ngrams) -> int:
    """Count what is shared with the reference, less what is shared with the source alone, or 0."""
    total = 0
    for ngram, count in hypothesis.items():
        if ngram in reference:  # the source does not count then, however often it has it
            total += min(count, reference[ngram])
        else:
            total -= min(count, source[ngram])
    return max(total, 0)


@cache
def drawn_references(num_sentences: int, num_references: int) -> np.ndarray:
    """Reference of every sentence in every iteration, (I, N); (1, N) if there is no choice."""
    if num_references == 1:
        return np.zeros((1, num_sentences), dtype=int)
    generators = (random.Random(_SEED_STEP * j) for j in range(_ITERATIONS))
    last = num_references - 1
    return np.array([[g.randint(0, last) for _ in range(num_sentences)] for g in generators])


def gleu_of_totals(totals: np.ndarray) -> np.ndarray:
    """Scores (I,) of sums over the corpus (I, 2 + 2 * _ORDER), 0 where any sum is 0."""
    positive = (totals > 0).all(axis=1)
    whole = totals[positive]
    length, reference_length = whole[:, 0], whole[:, 1]
    precisions = whole[:, 2 : 2 + _ORDER] / whole[:, 2 + _ORDER :]
    brevity = np.minimum(0, 1 - reference_length / length)
    scores = np.zeros(len(totals))
    scores[positive] = np.exp(brevity + np.log(precisions).mean(axis=1))
    return scores
