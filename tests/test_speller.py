"""The speller: what it corrects, what it leaves alone, and its use alone and before a network."""

import json
import math
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from fake_data import write_books

import predict
from core.errors import UserError
from datamodules import GrammarDataModule
from datamodules.text.corrections import Line, word_edits
from datamodules.text.speller import UNIT, Index, Speller, Weights, put_right
from pipeline.continuing import differences

SENTENCES = [
    "The old man received a letter from his friend in the morning .",
    "They have a lot of friends , and the friend of Mr. Darcy is one .",
    "It is their house , and their garden is beautiful .",
]


@cache
def speller() -> Speller:
    return Speller.learn(SENTENCES * 3)


def corrected(text: str) -> str:
    line = Line.of_text(text)
    right = speller().correct(line.words, line.beginnings, line.addresses)
    return line.corrected(word_edits(line.words, right))


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("I recieved a leter from my freind .", "I received a letter from my friend ."),
        ("It is thier  house,and teh gardn.", "It is their  house,and the garden."),  # blanks stay
        ("It is beautifull.", "It is beautiful."),
        ("i recieve teh leter", "I receive the letter"),
        ("They have alot of frends.", "They have a lot of friends."),
        ("Teh man is old. teh garden is not.", "The man is old. the garden is not."),
    ],
)
def test_what_is_no_word_becomes_one(text: str, right: str) -> None:
    assert corrected(text) == right


@pytest.mark.parametrize(
    "text",
    [
        "He met Mr. Darsy and Lizzy in Pemberly.",  # names
        "The xkcdqz is old.",  # nothing is near
        "The USB of a b2b e-mail at x@frend.com and frend.com/teh",
        "A blorple is a blorple.",  # a word that comes twice is meant
        "The gardenfriend is gardenless.",  # made of known words
        "Darcy received it.",  # a name that the books know begins a sentence
        "Die anderen haben nicht einmal gelesen, was dort steht \u65e5\u672c \U0001f600.",
        "",
    ],
)
def test_names_and_rare_words_survive(text: str) -> None:
    assert corrected(text) == text


def test_neighbours_decide_between_candidates() -> None:
    books = Speller.learn(["he ate the meat and the bread"] * 9 + ["they meet me at noon"] * 9)
    books.words = frozenset(
        filter(str.isalpha, books.number)
    )  # to index a dictionary takes seconds
    assert books.spell(["he", "ate", "the", "meit", "and"])[3] == "meat"
    assert books.spell(["they", "meit", "me", "at"])[1] == "meet"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("i think i am old", "I think I am old"),
        ('" yes , said a old man', '" Yes , said an old man'),
        ("an university is an hour from an European house",
         "A university is an hour from a European house"),
        ("A honest man had an umbrella and a unit", "An honest man had an umbrella and a unit"),
        ("Vitamin A is a or b ; a MP has an one", "Vitamin A is a or b ; a MP has an one"),
        ("iPod i.e. this", "iPod i.e. this"),
    ],
)  # fmt: skip
def test_three_rules(text: str, right: str) -> None:
    assert " ".join(put_right(text.split())) == right


def distance(a: str, b: str) -> int:
    """Damerau and Levenshtein's (optimal string alignment), as in a textbook."""
    table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            same = table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, same)
            if i > 1 and j > 1 and a[i - 2 : i] == b[j - 2 : j][::-1]:
                table[i, j] = min(table[i, j], table[i - 2, j - 2] + 1)
    return table[len(a), len(b)]


def test_near_words_are_those_of_the_textbook() -> None:
    words = sorted(
        {w for s in SENTENCES for w in s.lower().split() if w.isalpha()} | {"abcdefghij"}
    )
    index = Index(words)
    for word in ("recieved", "teh", "freinds", "a", "gardne", "abcdefgh", "housse"):
        found = {near: cost for near, cost in index.near(word, UNIT)}
        assert found == {w: d for w in words if (d := distance(word, w)) <= 2}


@pytest.mark.parametrize(
    ("wrong", "cost"),
    [("leter", "doubling"), ("lettre", "transposition"), ("latter", "vowel"), ("letler", "edit")],
)
def test_an_edit_costs_what_its_kind_costs(wrong: str, cost: str) -> None:
    weights = Weights(edit=7, transposition=1, doubling=2, vowel=3, first=4)
    assert Index(["letter"]).near(wrong, weights) == [("letter", getattr(weights, cost))]
    assert Index(["letter"]).near("metter", weights) == [("letter", 7 + 4)]


def test_probabilities_of_the_words_after_one_add_up() -> None:
    books = speller()
    follow = math.fsum(books.probability(word, "the") for word in books.number if " " not in word)
    assert 0.5 < follow < 1


def test_a_speller_is_known_by_its_text() -> None:
    again = Speller(speller().text)
    assert again.number == speller().number
    assert again.weights == speller().weights
    for damaged in ("", "1 2", speller().text + "\nx"):
        with pytest.raises(UserError, match="the counts of the speller are damaged"):
            Speller(damaged)


# --- predict.py without a run ---------------------------------------------------------------------


@pytest.fixture
def books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_books(tmp_path / "data")
    return tmp_path


def test_corrects_without_a_run(books: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("in.txt").write_text("my  sistr walkd to teh garden.\n\nThe old man.\n")
    predict.main(["--speller", "--text_file=in.txt", "--output=out.txt"])
    assert Path("out.txt").read_text() == "My  sister walked to the garden.\n\nThe old man.\n"
    assert "[-my-]{+My+}  [-sistr-]{+sister+}" in capsys.readouterr().out
    predict.main(["--speller", "--json", "--text", "a old man"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["output"] == "An old man"
    assert printed["edits"] == [{"start": 0, "end": 1, "source": "a", "correction": "An"}]
    assert sorted(path.name for path in books.iterdir()) == ["data", "in.txt", "out.txt"]


def test_what_does_not_fit_without_a_run(books: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, said in (
        ([], "give a RUN, or --speller without one"),
        (["runs/x", "--speller", "--text=a"], "give a RUN, or --speller without one"),
        (["--speller", "--text=a", "--n_best=3"], "leave out --n_best"),
        (["--speller", "--text=a", "--data.val_size=9"], "leave out --data.val_size=9"),
        (["--speller"], "nothing to correct: give --text LINE or --text_file FILE"),
        (["--speller", "--text=a", "--data_dir=no"], "no/gutenberg/austen-emma.txt cannot be read"),
        (["--speller", "--text=a", "--output=data"], "--output data is a folder; name a file"),
    ):
        with pytest.raises(SystemExit):
            predict.main(args)
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


# --- before a network -----------------------------------------------------------------------------


def test_a_network_reads_what_is_spelled(books: Path) -> None:
    source = books / "a.src"
    source.write_text("my sistr go to teh garden .\n")
    (books / "a.trg").write_text("My sister goes to the garden .\n")
    files: dict[str, Any] = {"train": str(source), "test": str(source)}
    data = GrammarDataModule("data", vocab_size=400, val_size=0, speller=True, **files)
    read, *_ = data.draw("train", 0)
    assert data.subwords.decode(read[0].tolist()) == "My sister go to the garden ."
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert data.subwords.decode(batch[0][0].tolist()) == "My sister go to the garden ."
    right = data.subwords.encode(["My sister goes to the garden ."])[0]
    assert data.score({0: right})["f05"] == 1  # against the sentence as it was written


def test_runs_from_before_there_was_a_speller_go_on() -> None:
    """A run is refused to go on with another value than recorded; these have recorded none."""
    default = signature(GrammarDataModule).parameters["speller"].default
    recorded, current = (
        {"data": {"class_path": "GrammarDataModule", "init_args": options}}
        for options in ({}, {"speller": default})
    )
    assert differences(recorded, current) == []


def test_a_checkpoint_knows_the_speller(books: Path, tmp_path: Path) -> None:
    data = GrammarDataModule("data", vocab_size=400, speller=True)
    state = data.state_dict()
    elsewhere = GrammarDataModule("nowhere", text=["teh sistr  of him"], **state)
    source, *_ = elsewhere.read_predict()
    assert elsewhere.subwords.decode(source[0].tolist()) == "The sister of him"
    assert GrammarDataModule("data", vocab_size=400).state_dict().keys() == {"merges"}
    with pytest.raises(UserError, match="not those of the books"):
        data.load_state_dict(state | {"speller": state["speller"] + "\n2 foo"})
