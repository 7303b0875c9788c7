"""GLEU and edits of corrected sentences, against references of a few lines and counts by hand."""

import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from core.errors import UserError
from metrics.correction import score_corrections
from metrics.edits import Edit, EditScore, apply_edits, best_sum, compare, extract_edits
from metrics.gleu import corpus_gleu
from metrics.m2 import M2Sentence, read_m2
from metrics.maxmatch import _best_edits, _shortest_alignments, m2_scores

SOURCE = "he go to the school every days ."
BETTER = "he goes to school every day ."


def gleu_by_definition(
    sources: list[str], hypotheses: list[str], references: list[list[str]]
) -> float:
    """The definition, word by word and without a thought for speed; tokens are letters here."""
    scores = []
    for j in range(500):
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


@pytest.mark.parametrize(("seed", "num_references"), [(0, 1), (0, 3), (1, 3)])
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


def same(*edits: tuple[int, int, str]) -> list[Edit]:
    return [Edit(*edit) for edit in edits]


@pytest.mark.parametrize(
    ("source", "correction", "expected"),
    [
        ("a b c", "a b c", []),
        ("a b c", "a x c", [(1, 2, "x")]),
        ("a b c", "a c", [(1, 2, "")]),
        ("a c", "a b c", [(1, 1, "b")]),
        ("a b c d", "a x y d", [(1, 3, "x y")]),  # what touches is one edit
        ("a b c d", "x b y d", [(0, 1, "x"), (2, 3, "y")]),
        ("go home", "home went", [(0, 1, ""), (2, 2, "went")]),  # rather than two replaced
        ("the cat", "the the cat", [(1, 1, "the")]),  # the first of equal tokens is kept
        ("", "a b", [(0, 0, "a b")]),
        ("a b", "", [(0, 2, "")]),
        ("", "", []),
        (" a  b ", "a b", []),  # blanks are no tokens
        (SOURCE, BETTER, [(1, 2, "goes"), (3, 4, ""), (6, 7, "day")]),
    ],
)
def test_edits_of_a_sentence(
    source: str, correction: str, expected: list[tuple[int, int, str]]
) -> None:
    assert extract_edits(source, correction) == same(*expected)


def fewest_changes(old: list[str], new: list[str]) -> int:
    if not old or not new:
        return len(old) + len(new)
    replaced = fewest_changes(old[1:], new[1:]) + (old[0] != new[0])
    return min(replaced, 1 + fewest_changes(old[1:], new), 1 + fewest_changes(old, new[1:]))


@pytest.mark.parametrize("seed", range(30))
def test_edits_lead_to_the_correction_on_a_shortest_way(seed: int) -> None:
    rng = random.Random(seed)
    old, new = (rng.choices("abc", k=rng.randint(0, 6)) for _ in range(2))
    edits, back = (
        extract_edits(" ".join(old), " ".join(new)),
        extract_edits(*map(" ".join, (new, old))),
    )
    assert apply_edits(" ".join(old), edits) == " ".join(new)
    assert apply_edits(" ".join(new), back) == " ".join(old)
    for found in (edits, back):  # a change of k tokens into m costs the larger number
        cost = sum(max(e.end - e.start, len(e.correction.split())) for e in found)
        assert cost <= fewest_changes(old, new)
    assert all(a.end < b.start for a, b in pairwise(edits))  # a kept token between any two


def test_edits_that_cannot_be_applied() -> None:
    assert apply_edits("a b", same((1, 1, "x"), (1, 2, "y"), (0, 0, "z"))) == "z a x y"
    with pytest.raises(ValueError, match="tokens 1 to 2 overlaps another one"):
        apply_edits("a b", same((0, 2, ""), (1, 2, "x")))
    with pytest.raises(ValueError, match="beyond the 2 tokens"):
        apply_edits("a b", same((2, 3, "")))


def test_precision_recall_and_f() -> None:
    gold = same((0, 1, "x"), (2, 2, "y"), (4, 5, ""))
    score = compare(same((0, 1, "x"), (2, 2, "z")), gold)
    assert score == EditScore(correct=1, proposed=2, gold=3)
    assert (score.precision, score.recall) == (1 / 2, 1 / 3)
    assert score.f() == pytest.approx(1.25 * (1 / 6) / (0.25 / 2 + 1 / 3))
    assert score.f(1) == pytest.approx(2 / 5)
    assert compare(gold, gold) == EditScore(3, 3, 3)


def test_scores_without_edits() -> None:
    assert EditScore().f() == 1
    missed, needless = EditScore(gold=1), EditScore(proposed=1)
    assert (missed.precision, missed.recall, missed.f()) == (1, 0, 0)
    assert (needless.precision, needless.recall, needless.f()) == (0, 1, 0)


def test_the_most_favourable_annotator_counts() -> None:
    right, wrong, half = EditScore(1, 1, 1), EditScore(0, 1, 1), EditScore(1, 1, 2)
    assert best_sum([[wrong, right]]) == right
    assert best_sum([[wrong, half]]) == half
    assert best_sum([[wrong, EditScore(0, 1, 0)]]) == EditScore(0, 1, 0)  # fewer missed
    many_missed, two_wrong = EditScore(0, 1, 8), EditScore(0, 2, 0)  # a missed one counts a quarter
    assert best_sum([[many_missed, two_wrong]]) == two_wrong
    assert best_sum([[EditScore(0, 1, 2), two_wrong]]) == EditScore(0, 1, 2)


def test_one_of_several_corrections_is_enough() -> None:
    gold = [Edit(4, 4, "the", others=("a", "his"), kind="ArtOrDet")]
    for words, correct in [("the", 1), ("his", 1), ("her", 0)]:
        assert compare(same((4, 4, words)), gold).correct == correct


M2 = """\
S The cat sat at mat .
A 3 4|||Prep|||on|||REQUIRED|||-NONE-|||0
A 4 4|||ArtOrDet|||the||a|||REQUIRED|||-NONE-|||0

S The dog .
A 1 2|||NN|||dogs|||REQUIRED|||-NONE-|||0
A -1 -1|||noop|||-NONE-|||REQUIRED|||-NONE-|||1

S Giant otters is an apex predator .
A 3 4|||ArtOrDet|||-NONE-|||REQUIRED|||-NONE-|||0

"""


def test_m2_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.m2").write_text(M2)
    cat, dog, otters = read_m2(tmp_path / "a.m2")
    assert cat == M2Sentence("The cat sat at mat .", {0: same((3, 4, "on"), (4, 4, "the"))})
    assert [(edit.kind, edit.others) for edit in cat.edits[0]] == [
        ("Prep", ()),
        ("ArtOrDet", ("a",)),
    ]
    assert dog.edits == {0: same((1, 2, "dogs")), 1: []}
    assert apply_edits(otters.source, otters.edits[0]) == "Giant otters is apex predator ."


def test_m2_of_other_programs(tmp_path: Path) -> None:
    """Windows line ends, a byte order mark, unchanged sentences without a line, empty ones."""
    text = "\ufeffS a b\r\nA 0 1|||Del||||||REQUIRED|||-NONE-|||2\r\n\r\nS c\r\n\r\n\r\nS \r\nS"
    (tmp_path / "a.m2").write_text(text, encoding="utf-8", newline="")
    first, *others = read_m2(tmp_path / "a.m2")
    assert first == M2Sentence("a b", {2: same((0, 1, ""))})
    assert others == [M2Sentence(source, {0: []}) for source in ("c", "", "")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("A 1 2|||NN|||dogs|||REQUIRED|||0", "six fields with ||| between them, got 5"),
        ("A one 2|||NN|||dogs|||REQUIRED|||-NONE-|||0", "two integers"),
        ("A 1 2|||NN|||dogs|||REQUIRED|||-NONE-|||x", "the annotator's number, got '1 2' and 'x'"),
        ("A 1|||NN|||dogs|||REQUIRED|||-NONE-|||0", "two integers"),
        ("A 2 4|||NN|||dogs|||REQUIRED|||-NONE-|||0", "tokens 2 to 4, but the sentence has 3"),
        ("A 2 1|||NN|||dogs|||REQUIRED|||-NONE-|||0", "tokens 2 to 1, but"),
        ("T The dogs .", "a line begins with 'S ' or 'A ', got 'T The dogs .'"),
        ("\nA 1 2|||NN|||dogs|||REQUIRED|||-NONE-|||0", "before the S line of its sentence"),
    ],
)
def test_broken_m2_is_refused_with_its_line(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.m2"
    path.write_text(f"S The cat .\n\nS The dog .\n{line}\n")
    number = 4 + line.count("\n")
    with pytest.raises(UserError, match=re.escape(f"a.m2, line {number}: ")) as caught:
        read_m2(path)
    assert message in str(caught.value)


def test_m2_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.m2 cannot be read: No such file"):
        read_m2(tmp_path / "none.m2")
    (tmp_path / "a.m2").write_bytes(b"S a\n\nS caf\xe9\n")
    with pytest.raises(UserError, match="line 3: not UTF-8"):
        read_m2(tmp_path / "a.m2")


def test_m2_score_of_its_authors_example(tmp_path: Path) -> None:
    """The README of the M2 scorer (release 3.2) says 0.8, 0.8 and 0.8."""
    more = "A 2 3|||SVA|||are|||REQUIRED|||-NONE-|||0\n"
    more += "A 5 6|||NN|||predators|||REQUIRED|||-NONE-|||0\n"
    more += "A 1 2|||NN|||otter|||REQUIRED|||-NONE-|||1\n"
    (tmp_path / "a.m2").write_text(M2.removesuffix("\n") + more)
    gold = read_m2(tmp_path / "a.m2")
    lines = ["A cat sat on the mat .", "The dog .", "Giant otters are apex predator ."]
    score = best_sum(m2_scores(lines, gold))
    assert score == EditScore(correct=4, proposed=5, gold=5)
    assert (score.precision, score.recall, score.f()) == pytest.approx((0.8, 0.8, 0.8))
    nothing = m2_scores([s.source for s in gold[1:]], gold[1:])
    assert best_sum(nothing) == EditScore(0, 0, 1)


def maxmatch(source: str, correction: str, gold: list[Edit]) -> EditScore:
    ((score,),) = m2_scores([correction], [M2Sentence(source, {0: gold})])
    return score


def best_edits(source: str, correction: str, gold: list[Edit]) -> list[Edit]:
    old, new = source.split(), correction.split()
    return _best_edits(new, _shortest_alignments(old, new), gold)


@pytest.mark.parametrize(
    ("source", "correction", "gold"),
    [
        ("a b", "x y", [(0, 1, "x"), (1, 2, "y")]),
        ("a b", "x y", [(0, 2, "x y")]),
        ("go to school", "go to the school", [(2, 3, "the school")]),  # an unchanged word inside
        ("a b c d", "x b c y", [(0, 4, "x b c y")]),  # two of them
        ("the cat", "the the cat", [(0, 0, "the")]),  # extraction keeps the first of them
        ("at mat", "on the mat", [(0, 1, "on"), (1, 1, "the")]),
        ("a b", "b a", [(0, 0, "b"), (1, 2, "")]),
        ("a b", "b a", [(0, 1, "b"), (1, 2, "a")]),
    ],
)
def test_an_edit_is_right_however_it_is_cut(
    source: str, correction: str, gold: list[tuple[int, int, str]]
) -> None:
    assert best_edits(source, correction, same(*gold)) == same(*gold)
    assert maxmatch(source, correction, same(*gold)) == EditScore(*[len(gold)] * 3)


def test_an_edit_with_three_unchanged_words_is_not_found() -> None:
    gold = same((0, 5, "x b c d y"))
    assert best_edits("a b c d e", "x b c d y", gold) == same((0, 1, "x"), (4, 5, "y"))


@pytest.mark.parametrize(
    ("source", "correction", "gold", "found"),
    [
        ("c", "x a", [(1, 1, "x")], [(0, 1, ""), (1, 1, "x"), (1, 1, "a")]),  # most gold edits
        ("c c b", "a x a", [(1, 1, "a")], [(0, 1, ""), (1, 1, "a"), (1, 3, "x a")]),  # fewest steps
        ("c", "x b", [], [(0, 1, "x b")]),  # fewest edits
        ("c b b", "b", [], [(0, 2, "")]),  # fewest unchanged words inside
    ],
)
def test_best_of_the_shortest_alignments(
    source: str,
    correction: str,
    gold: list[tuple[int, int, str]],
    found: list[tuple[int, int, str]],
) -> None:
    assert best_edits(source, correction, same(*gold)) == same(*found)


def test_a_gold_edit_is_right_once() -> None:
    score = maxmatch("a b", "a x x b", same((1, 1, "x")))
    assert score == EditScore(correct=1, proposed=2, gold=1)


def alignments(old: list[str], new: list[str]) -> Iterator[tuple[Edit, ...]]:
    """All cuts of all alignments in which every edit is one step: enough for small sentences."""
    fewest = fewest_changes(old, new)

    def walk(i: int, j: int, changes: int) -> Iterator[tuple[Edit, ...]]:
        if changes > fewest:
            return
        if (i, j) == (len(old), len(new)):
            yield ()
        for a, b in ((1, 1), (1, 0), (0, 1)):
            if i + a <= len(old) and j + b <= len(new):
                step = Edit(i, i + a, " ".join(new[j : j + b]))
                kept = a == b and old[i] == new[j]
                for rest in walk(i + a, j + b, changes + (not kept)):
                    yield rest if kept else (step, *rest)

    return walk(0, 0, 0)


@pytest.mark.parametrize("seed", range(30))
def test_no_alignment_agrees_better(seed: int) -> None:
    rng = random.Random(seed)
    old, new = (rng.choices("abc", k=rng.randint(0, 5)) for _ in range(2))
    source, correction = " ".join(old), " ".join(new)
    found = list(alignments(old, new))
    for edits in rng.sample(found, min(len(found), 5)):
        score = maxmatch(source, correction, list(edits))
        assert score.correct == score.gold == len(edits)
    edits = rng.choice(found)
    gold = list(edits[::2])  # an annotator who overlooks every other edit
    assert apply_edits(source, best_edits(source, correction, gold)) == correction
    score = maxmatch(source, correction, gold)
    assert score.correct == len(gold)
    assert score.proposed <= len(edits)


def test_nothing_to_score_has_no_scores() -> None:
    assert score_corrections([], []) == {}
