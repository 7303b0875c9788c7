"""Errors put into clean sentences: they can be taken out again, and are as many as asked for."""

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UserError
from datamodules.text.error_synthesis import KINDS, RULES, ErrorSynthesis
from metrics.edits import Edit, apply_edits

TEXT = [
    line.split()
    for line in (
        "The old house , which had two windows , was sold to an honest man of the village .",
        "I have never seen such beautiful children , and they were playing in their garden .",
        "She wanted to discuss the plan with her sisters because she knew that it was difficult .",
        "What do you think of Mr Darcy 's horses ?",
        "Although he does n't like music , he quickly learned to sing a few songs at school .",
    )
]
LONG = [token for sentence in TEXT for token in sentence]  # 82 tokens: room for 20 errors

vocabulary = sorted({token for sentence in TEXT for token in sentence} | {"It", "'s", "A", "``"})
anything = st.text(min_size=1, max_size=5).filter(lambda token: token.split() == [token])
sentences = st.lists(st.sampled_from(vocabulary) | anything, max_size=30)


def only(kind: str, **options: Any) -> ErrorSynthesis:
    return ErrorSynthesis({k: 0 for k in KINDS if k != kind}, **({"clean": 0} | options))


def check(tokens: list[str], source: list[str], edits: list[Edit]) -> None:
    """The edits restore the clean sentence, and none of them is idle or touches another."""
    assert apply_edits(" ".join(source), edits) == " ".join(tokens)
    assert [token.split() for token in source] == [[token] for token in source]
    assert bool(source) == bool(tokens)
    assert edits == sorted(edits)
    assert len(edits) <= max(1, len(tokens) / 4)
    for edit in edits:
        assert source[edit.start : edit.end] != edit.correction.split()
    for before, after in pairwise(edits):
        assert before.end < after.start


# --- errors and their edits -----------------------------------------------------------------------


@settings(max_examples=50, deadline=None)  # the first look-up loads the dictionary
@given(sentences, st.sampled_from(["all", *KINDS]), st.integers(0, 99))
def test_edits_restore_the_clean_sentence(tokens: list[str], kind: str, index: int) -> None:
    options: dict[str, Any] = {"clean": 0, "mean_errors": 9}
    synthesis = ErrorSynthesis(**options) if kind == "all" else only(kind, **options)
    source, edits = synthesis.corrupt(tokens, epoch=1, index=index)
    check(tokens, source, edits)
    assert kind == "all" or {edit.kind for edit in edits} <= {kind}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_alone(kind: str) -> None:
    """Every sentence with a place for it gets an error of that kind; one that has none is kept."""
    synthesis = only(kind)
    found: Counter[str] = Counter()
    for index in range(100):
        tokens = TEXT[index % len(TEXT)]
        source, edits = synthesis.corrupt(tokens, epoch=0, index=index)
        check(tokens, source, edits)
        found.update(edit.kind for edit in edits)
    assert set(found) == {kind}
    assert synthesis.corrupt(["--"], 0, 0) == (["--"], [])


@pytest.mark.parametrize(
    ("kind", "tokens", "wrong"),
    [
        ("article", "An honest man", "Honest man"),
        ("article", "he saw the horse", "he saw a horse"),
        ("article", "full of money", "full of the money"),
        ("preposition", "he lived in London", "he lived at London"),
        ("preposition", "we discussed the plan", "we discussed about the plan"),
        ("verb_form", "he could go", "he could went"),
        ("verb_form", "he wanted to go", "he wanted go"),
        ("verb_form", "it was taught", "it was teached"),
        ("verb_form", "they are playing", "they playing"),
        ("agreement", "he walks", "he walk"),
        ("agreement", "they were old", "they was old"),
        ("noun_number", "two windows", "two window"),
        ("noun_number", "the children", "the childrens"),
        ("spelling", "because", "becouse"),
        ("spelling", "believe", "beleive"),
        ("spelling", "they sleep", "they slepe"),
        ("word_order", "an honest man", "an man honest"),
        ("word_order", "He is never late", "He never is late"),
        ("word_order", "What is it ?", "What it is ?"),
        ("missing_word", "It was late", "Was late"),
        ("doubled_word", "The horse", "The the horse"),
        ("punctuation", "do n't", "dont"),
        ("punctuation", "I know that he came", "I know , that he came"),
        ("punctuation", "he came .", "he came"),
        ("capitalisation", "then I came", "then i came"),
        ("capitalisation", "see London", "see london"),
        ("capitalisation", "`` The horse", "`` the horse"),
        ("confusion", "Their horse", "They 're horse"),
        ("confusion", "They 're late", "There late"),
        ("confusion", "she sang beautifully", "she sang beautiful"),
    ],
)
def test_typical_errors(kind: str, tokens: str, wrong: str) -> None:
    synthesis = only(kind)
    made = (" ".join(synthesis.corrupt(tokens.split(), 0, index)[0]) for index in range(400))
    assert wrong in made


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("preposition", "to go"),  # no preposition
        ("noun_number", "they watch him"),  # no noun
        ("agreement", "the watch"),  # no verb
        ("spelling", "Mr Bennet"),  # names are as they are
        ("word_order", "he is not late"),
    ],
)
def test_what_is_left_alone(kind: str, tokens: str) -> None:
    synthesis = only(kind)
    assert all(not synthesis.corrupt(tokens.split(), 0, index)[1] for index in range(100))


def test_rules_of_a_kind_share_its_weight() -> None:
    for kind in KINDS:
        assert math.isclose(sum(RULES[kind].values()), 1), kind
    assert RULES.keys() == KINDS.keys()


# --- how many, and which --------------------------------------------------------------------------


@pytest.mark.parametrize(("clean", "mean_errors"), [(0.2, 2.0), (0.5, 4.0), (0.0, 1.0)])
def test_share_of_clean_sentences_and_mean_number_of_errors(
    clean: float, mean_errors: float
) -> None:
    synthesis = ErrorSynthesis(clean=clean, mean_errors=mean_errors)
    numbers = [len(synthesis.corrupt(LONG, 0, index)[1]) for index in range(600)]
    wrong = [number for number in numbers if number]
    assert len(wrong) / len(numbers) == pytest.approx(1 - clean, abs=0.05)
    assert sum(wrong) / len(wrong) == pytest.approx(mean_errors, rel=0.1)


def test_clean_alone() -> None:
    synthesis = ErrorSynthesis(clean=1)
    assert all(synthesis.corrupt(LONG, 0, index) == (LONG, []) for index in range(50))


def test_kinds_are_as_frequent_as_their_weights() -> None:
    weights = {kind: 0.0 for kind in KINDS} | {"article": 3, "spelling": 1}
    synthesis = ErrorSynthesis(weights, clean=0, mean_errors=1)
    kinds = Counter(synthesis.corrupt(LONG, 0, index)[1][0].kind for index in range(400))
    assert kinds["article"] == pytest.approx(300, abs=30)
    assert kinds.total() == kinds["article"] + kinds["spelling"]


def test_weight_0_switches_a_kind_off() -> None:
    synthesis = ErrorSynthesis({"spelling": 0}, clean=0, mean_errors=9)
    kinds = {e.kind for index in range(40) for e in synthesis.corrupt(LONG, 0, index)[1]}
    assert "spelling" not in kinds
    assert len(kinds) > 6


# --- the same everywhere, and new in each epoch ---------------------------------------------------


@pytest.mark.parametrize(
    ("key", "source"),
    [
        ((0, 0, 0), "The old house , which had two windows , sold an man honest of the vilage ."),
        (
            (0, 1, 0),
            "the old house , which had two windows , was sold to an honest man of the village .",
        ),
        (
            (7, 0, 4),
            "Allthough he doesnt like music , he qiuckly learned to sing few songs at school .",
        ),
    ],
)
def test_errors_are_the_same_on_every_machine(key: tuple[int, int, int], source: str) -> None:
    seed, epoch, index = key
    synthesis = ErrorSynthesis(clean=0, mean_errors=4, seed=seed)
    assert " ".join(synthesis.corrupt(TEXT[index], epoch, index)[0]) == source


def test_seed_epoch_and_index_give_other_errors() -> None:
    def made(seed: int, epoch: int, index: int) -> tuple[str, ...]:
        return tuple(
            ErrorSynthesis(clean=0, mean_errors=9, seed=seed).corrupt(LONG, epoch, index)[0]
        )

    keys = [(a, b, c) for a in range(3) for b in range(3) for c in range(3)]
    assert len({made(*key) for key in keys}) == len(keys)
    assert made(1, 2, 0) == made(1, 2, 0)


# --- mistakes of the user -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"typos": 1}}, "unknown kind of error 'typos'; there are spelling, article,"),
        ({"weights": {"article": -1}}, "weight of article must be a number from 0 up, got -1"),
        ({"weights": {"article": math.inf}}, "from 0 up, got inf; 0 switches the kind off"),
        ({"weights": dict.fromkeys(KINDS, 0)}, "All weights are 0; give a kind of error some"),
        ({"clean": 1.5}, "clean must be a fraction from 0 to 1, got 1.5"),
        ({"clean": math.nan}, "clean must be a fraction from 0 to 1, got nan"),
        ({"mean_errors": 0.5}, "mean_errors must be at least 1, got 0.5; a larger clean leaves"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ErrorSynthesis(**options)
