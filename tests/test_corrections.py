"""Corrected lines: what stays as it was, what changes, and how it is shown, stored and scored."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import WandbLogger

from callbacks import CorrectionTable
from callbacks.run.correction_table import corrections
from datamodules import GrammarDataModule
from datamodules.text.corrections import CorrectedText, Line, Piece, as_object, edits_of, marked
from datamodules.text.subwords import MIN_VOCAB_SIZE, Subwords, padded
from metrics.correction import score_corrections
from metrics.edits import Edit, apply_edits, extract_edits
from metrics.m2 import M2Sentence


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("She go to school.", "She goes to school .", "She goes to school."),
        ("She go to school .", "She goes to school .", "She goes to school ."),
        ("She go  to\tschool", "She went to school .", "She went  to\tschool."),
        ("She go to school", "She goes to the school", "She goes to the school"),
        ("I have a an idea, yes", "I have an idea , yes", "I have an idea, yes"),
        ("the the end", "the end", "the end"),
        ("He dont know.", "He does n't know .", "He doesn't know."),
        ("is late.", "It is late .", "It is late."),
        ("However it is.", "However , it is .", "However, it is."),
        ("However it is .", "However , it is .", "However , it is ."),
        ("  went  he .", "he went .", "  he went ."),
        ('Say "book is red."', 'Say " The book is red . "', 'Say "The book is red."'),
        ("and/or", "and / not or", "and/not or"),
        ("Hello,world it", "Hello world it", "Hello world it"),
        ("She said 'hello' to me", "She said ' hello ' to me .", "She said 'hello' to me."),
        ("", "", ""),
        ("   ", "", "   "),
    ],
)
def test_only_what_changes_is_written_anew(text: str, words: str, expected: str) -> None:
    line = Line.of_text(text)
    assert line.corrected(extract_edits(" ".join(line.words), words)) == expected


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60))
def test_a_line_that_is_right_stays_byte_for_byte(text: str) -> None:
    assert Line.of_text(text).corrected([]) == text


def test_marks() -> None:
    line = Line.of_text("She go to to school")
    edits = [Edit(1, 2, "goes"), Edit(3, 4, ""), Edit(5, 5, ".")]
    assert marked(line, edits, styled=False).plain == "She [-go-]{+goes+} to [-to-] school{+.+}"
    styled = marked(line, edits, styled=True)
    assert {styled.plain[s.start : s.end]: s.style for s in styled.spans} == {
        "go": "red strike", "goes": "bold green", "to": "red strike", ".": "bold green",
    }  # fmt: skip


def test_object_of_a_line() -> None:
    found = [([Edit(1, 2, "goes")], -0.5), ([Edit(1, 2, "went")], -1.25)]
    assert as_object(Line.of_text("She go."), found) == {
        "input": "She go.",
        "output": "She goes.",
        "edits": [{"start": 1, "end": 2, "source": "go", "correction": "goes"}],
        "hypotheses": [
            {"output": "She goes.", "score": -0.5},
            {"output": "She went.", "score": -1.25},
        ],
    }


def test_pieces_become_lines_again() -> None:
    lines = [Line.of_text("One. Two"), Line.of_text(""), Line.of_text("Three")]
    pieces = [Piece(0, 0, 2), Piece(0, 2, 3), Piece(1, 0, 0, False), Piece(2, 0, 1, False)]
    written = {0: "1 .", 1: "", 2: "never", 3: "never"}
    assert edits_of(lines, pieces, written) == [[Edit(0, 1, "1")], [], []]
    assert edits_of(lines, pieces, {1: "2 ."}) == [[Edit(2, 3, "2 .")], [], []]


def test_a_long_line_is_put_together_from_its_pieces() -> None:
    text = " ".join(f"w{i}" for i in range(3000))
    pieces = [Piece(0, i, i + 10) for i in range(0, 3000, 10)]
    written = {
        k: " ".join(f"w{i}" for i in range(10 * k, 10 * k + 10) if i % 7) for k in range(300)
    }
    (edits,) = edits_of([Line.of_words(text)], pieces, written)
    assert apply_edits(text, edits) == " ".join(f"w{i}" for i in range(3000) if i % 7)


@pytest.mark.parametrize("as_json", [False, True])
def test_every_line_comes_back_in_its_place(
    as_json: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subwords = Subwords.train(["She goes home ."], MIN_VOCAB_SIZE)
    lines = tuple(Line.of_text(text) for text in ("She go.", "", "home"))
    pieces = (Piece(0, 0, 3), Piece(1, 0, 0, False), Piece(2, 0, 1))
    written = padded(subwords.encode(["She goes .", "x", "home", "She went .", "y", "Home"]))
    tokens = written.reshape(2, 3, -1).transpose(0, 1).numpy()
    scores = np.array([[-1.0, -2.0], [-3.0, -3.0], [-0.25, -np.inf]])
    path = tmp_path / "out.txt"
    table = CorrectedText(subwords=subwords, lines=lines, pieces=pieces, as_json=as_json)
    table.write_predictions(path, np.arange(3), tokens, scores)
    assert path.read_text() == "She goes.\n\nhome\n"
    printed = capsys.readouterr().out.splitlines()
    if as_json:
        objects = [json.loads(line) for line in printed]
        assert [o["input"] for o in objects] == ["She go.", "", "home"]
        assert [len(o["hypotheses"]) for o in objects] == [2, 1, 1]
    else:
        assert [line.split(maxsplit=1)[-1] for line in printed if line.split()] == [
            "She [-go-]{+goes+}.", "She [-go-]{+went+}.", "0.000", "home",
        ]  # fmt: skip


# Scores


GOLD = [
    M2Sentence("She go home .", {0: [Edit(1, 2, "goes", kind="verb")]}),
    M2Sentence(
        "I has a idea .", {0: [Edit(1, 2, "have", kind="verb"), Edit(2, 3, "an", kind="article")]}
    ),
    M2Sentence("All is well .", {0: []}),
    M2Sentence("So it is .", {0: []}),
]  # fmt: skip


def test_scores() -> None:
    corrected = ["She goes home .", "I have a ideas .", "All is well .", "So it was ."]
    scores = score_corrections(GOLD, corrected)
    assert scores["precision"] == pytest.approx(2 / 4)
    assert scores["recall"] == pytest.approx(2 / 3)
    assert scores["f05"] == pytest.approx(1.25 * 2 / (4 + 0.25 * 3))
    assert scores["f05_of_wrong"] == pytest.approx(1.25 * 2 / (3 + 0.25 * 3))
    assert (scores["corrected"], scores["left_alone"]) == (0.5, 0.5)
    assert (scores["recall_verb"], scores["recall_article"]) == (1.0, 0.0)
    assert scores["gleu_of_source"] < scores["gleu"] < 100


def test_scores_of_doing_nothing_and_of_all_done() -> None:
    nothing = score_corrections(GOLD, [sentence.source for sentence in GOLD])
    assert (nothing["f05"], nothing["corrected"], nothing["left_alone"]) == (0, 0, 1)
    assert nothing["gleu"] == nothing["gleu_of_source"]
    right = ["She goes home .", "I have an idea .", "All is well .", "So it is ."]
    everything = score_corrections(GOLD, right)
    assert (everything["f05"], everything["corrected"], everything["gleu"]) == (1, 1, 100)


def test_what_there_is_no_sentence_for_is_left_out() -> None:
    assert not {"left_alone"} & score_corrections(GOLD[:2], ["a b c d", "e f g h"]).keys()
    assert not {"corrected", "f05_of_wrong"} & score_corrections(GOLD[2:], ["a", "b"]).keys()


def test_table_of_one_and_of_several_people() -> None:
    table = corrections(GOLD[:1], ["She go home ."])
    assert table.to_dict("records") == [
        {"source": "She go home .", "output": "She go home .", "reference": "She goes home ."}
    ]
    two = M2Sentence("She go .", {0: [Edit(1, 2, "goes")], 2: []})
    assert list(corrections([two], ["x"])) == ["source", "output", "reference0", "reference2"]


class Tables(WandbLogger):
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        self.tables: dict[str, Any] = {}

    def log_table(self, key: str, *_: Any, dataframe: Any = None, **__: Any) -> None:
        self.tables[key] = dataframe


def test_the_first_rows_of_the_table_are_on_wandb(tmp_path: Path) -> None:
    data, logger = GrammarDataModule(), Tables()
    data.examples = [GOLD[0]] * 120
    data.corrected = ["She goes home ."] * 120
    trainer: Any = SimpleNamespace(
        datamodule=data,
        log_dir=tmp_path,
        loggers=[logger],
        sanity_checking=False,
        is_global_zero=True,
    )
    CorrectionTable().on_test_end(trainer, None)  # type: ignore[arg-type]
    assert len((tmp_path / "corrections_test.csv").read_text().splitlines()) == 1 + 120
    assert len(logger.tables["tables/corrections_test"]) == 100
