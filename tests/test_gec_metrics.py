"""GLEU and edits of corrected sentences, against references of a few lines and counts by hand."""

import math
import random
from collections import Counter

import pytest

from errors import UserError
from metrics.gleu import ITERATIONS, corpus_gleu

SOURCE = "he go to the school every days ."
BETTER = "he goes to school every day ."


def gleu_by_definition(
    sources: list[str], hypotheses: list[str], references: list[list[str]]
) -> float:
    """The definition, word by word and without a thought for speed; tokens are letters here."""
    scores = []
    for j in range(ITERATIONS):
        random.seed(j * 101)
        chosen = [those[random.randint(0, len(those) - 1)] for those in references]
        lengths = [sum(len(line.split()) for line in lines) for lines in (hypotheses, chosen)]
        logs = []
        for n in (1, 2, 3, 4):
            good = all_of_them = 0
            for lines in zip(sources, hypotheses, chosen, strict=True):
                s, h, r = (
                    Counter(
                        " ".join(tokens[k : k + n])
                        for tokens in [line.split()]
                        for k in range(len(tokens) - n + 1)
                    )
                    for line in lines
                )
                dropped = Counter({ngram: c for ngram, c in s.items() if ngram not in r})
                good += max(0, (h & r).total() - (h & dropped).total())
                all_of_them += h.total()
            logs.append(math.log(good / all_of_them) if good else -math.inf)
        brevity = min(0, 1 - lengths[1] / lengths[0])
        scores.append(math.exp(brevity + sum(logs) / 4))
    return 100 * sum(scores) / len(scores)


def random_corpus(seed: int, num_references: int) -> tuple[list[str], list[str], list[list[str]]]:
    rng = random.Random(seed)

    def changed(line: str) -> str:
        return " ".join(rng.choice("abcd") if rng.random() < 0.2 else t for t in line.split())

    sources = [" ".join(rng.choices("abcd", k=rng.randint(1, 12))) for _ in range(8)]
    references = [[changed(line) for _ in range(num_references)] for line in sources]
    return sources, [changed(line) for line in sources], references


@pytest.mark.parametrize("num_references", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_gleu_is_what_its_definition_says(seed: int, num_references: int) -> None:
    corpus = random_corpus(seed, num_references)
    expected = gleu_by_definition(*corpus)
    assert expected > 10
    assert corpus_gleu(*corpus) == pytest.approx(expected, rel=1e-12)


def test_the_reference_scores_100() -> None:
    assert corpus_gleu([SOURCE, SOURCE], [BETTER] * 2, [[BETTER]] * 2) == 100
    assert corpus_gleu([SOURCE], [BETTER], [[BETTER] * 4]) == pytest.approx(100)
    assert corpus_gleu([BETTER], [BETTER], [[BETTER]]) == 100  # nothing was wrong


def test_gleu_by_hand() -> None:
    """One kept error costs its n-grams twice: they match nothing, and the source has them."""
    source, hypothesis, reference = "a b c d e x", "a b c d e x", "a b c d e f"
    precisions = [(5 - 1) / 6, (4 - 1) / 5, (3 - 1) / 4, (2 - 1) / 3]
    expected = 100 * math.prod(precisions) ** 0.25
    assert corpus_gleu([source], [hypothesis], [[reference]]) == pytest.approx(expected)
    milder = corpus_gleu([source], ["a b c d e y"], [[reference]])  # wrong too, but not kept
    assert milder == pytest.approx(100 * math.prod([5 / 6, 4 / 5, 3 / 4, 2 / 3]) ** 0.25)
    shorter = corpus_gleu([source], ["a b c d e"], [[reference]])
    assert shorter == pytest.approx(100 * math.exp(1 - 6 / 5))


def test_order_of_sentences_and_of_one_reference_each_does_not_matter() -> None:
    sources, hypotheses, references = random_corpus(0, 1)
    backwards = corpus_gleu(sources[::-1], hypotheses[::-1], references[::-1])
    assert backwards == pytest.approx(corpus_gleu(sources, hypotheses, references))


def test_gleu_of_empty_lines() -> None:
    assert corpus_gleu([SOURCE], [""], [[BETTER]]) == 0
    assert corpus_gleu([""], [""], [[""]]) == 0  # no n-gram at all: the authors call it 0
    assert corpus_gleu([SOURCE], ["he goes ."], [["he goes ."]]) == 0  # too short for four tokens
    assert corpus_gleu(["", SOURCE], ["", BETTER], [[""], [BETTER]]) == 100


def test_lines_that_do_not_belong_together() -> None:
    with pytest.raises(UserError, match="got 1 sources, 2 hypotheses and references for 1 sent"):
        corpus_gleu([SOURCE], [BETTER, BETTER], [[BETTER]])
    with pytest.raises(UserError, match="got 1 sources, 1 hypotheses and references for 2 sent"):
        corpus_gleu([SOURCE], [BETTER], [[BETTER]] * 2)
    with pytest.raises(UserError, match="sentence 1 has 2, sentence 2 has 1"):
        corpus_gleu([SOURCE] * 2, [BETTER] * 2, [[BETTER, BETTER], [BETTER]])
    with pytest.raises(UserError, match="sentence 1 has 0"):
        corpus_gleu([SOURCE], [BETTER], [[]])
    with pytest.raises(UserError, match="at least one sentence, got none"):
        corpus_gleu([], [], [])
    with pytest.raises(TypeError, match="a list of lines for each sentence"):
        corpus_gleu([SOURCE], [BETTER], [BETTER])
