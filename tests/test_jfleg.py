"""The table of correctors, and the counts of learners' errors, on a folder in JFLEG's form."""

from pathlib import Path

import numpy as np
import pytest
from fake_data import write_books

from benchmarks import jfleg, learner_errors
from datamodules import GrammarDataModule
from datamodules.text.corpora import read_corpus
from metrics.edits import EditScore, extract_edits
from metrics.gleu import corpus_gleu
from metrics.maxmatch import m2_score, m2_scores

SOURCES = [f"the old man number {i} walkd to teh house with an friend ." for i in range(40)]
RIGHT = [f"The old man number {i} walked to the house with a friend ." for i in range(40)]
OTHERS = [f"Old man {i} has walked to the house with a friend ." for i in range(40)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_books(tmp_path / "data")
    folder = tmp_path / "jfleg"
    folder.mkdir()
    for name, lines in (("src", SOURCES), ("ref0", RIGHT), ("ref1", OTHERS)):
        (folder / f"dev.{name}").write_text("\n".join(lines) + "\n")
    (folder / "dev.spellchecked.src").write_text("\n".join(RIGHT) + "\n")
    return folder


def test_first_resample_is_the_score(folder: Path) -> None:
    gold = read_corpus(folder)
    lines = [*RIGHT[:15], *SOURCES[15:30], *OTHERS[30:]]
    gleu = jfleg.gleu_samples(gold, lines)
    references = [[right, other] for right, other in zip(RIGHT, OTHERS, strict=True)]
    assert gleu[0] == pytest.approx(corpus_gleu(SOURCES, lines, references))
    scores = jfleg.best_scores(m2_scores(lines, gold))
    assert sum(scores, EditScore()) == m2_score(lines, gold)
    f05 = jfleg.f05_samples(scores)
    assert len(gleu) == len(f05) == 1 + jfleg.RESAMPLES
    assert np.percentile(f05, 2.5) < f05[0] < np.percentile(f05, 97.5)
    assert 0 < gleu[1:].std() < 10


def test_interval_is_paired() -> None:
    ours = np.array([3.0, *np.linspace(0, 100, 1000)])
    assert jfleg.interval(ours, ours - 1, 2) == "+1.00 [+1.00, +1.00]"


def test_table_and_examples(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(GrammarDataModule, "test_size", 40)
    examples = tmp_path / "examples.md"
    data_dir = f"--data_dir={tmp_path / 'data'}"
    jfleg.main([str(folder), data_dir, f"--examples={examples}"])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines[2:]}
    assert rows["doing nothing"][2].startswith("+0.00 [+0.00, +0.00]")
    assert rows["rules + speller"][6] == "1.000"  # F0.5: all is found and right
    assert rows["dev.spellchecked.src"][6] == "1.000 |".rstrip(" |")
    assert 0 < float(rows["three rules"][6]) < 1
    assert float(rows["rules + speller"][9]) > float(rows["three rules"][9])
    assert any(line.startswith("person 0 against the others") for line in lines)
    right, _, wrong = examples.read_text().partition("Wrong:")
    assert right.count("{+") >= 5
    assert "right: " in wrong
    (tmp_path / "short.txt").write_text("x\n")
    with pytest.raises(SystemExit):
        jfleg.main([str(folder), str(tmp_path / "short.txt"), data_dir])
    assert "short.txt has 1 lines, but there are 40 sentences" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "right", "kind"),
    [
        ("I recieve it", "I receive it", ["spelling"]),
        ("a apple", "an apple", ["article"]),
        ("he go home", "he goes home", ["agreement"]),
        ("they is", "they are", ["agreement"]),
        ("he go home", "he went home", ["verb_form"]),
        ("two student", "two students", ["noun_number"]),
        ("on home", "at home", ["preposition"]),
        ("there house", "their house", ["confusion"]),
        ("a big house", "a large house", ["word choice"]),
        ("the the house", "the house", ["doubled_word"]),
        ("he like home", "he likes home", ["agreement"]),
        ("to go", "to go .", ["punctuation"]),
        ("england", "England", ["capitalisation"]),
        ("he tired", "he is tired", ["missing_word"]),
        ("i recieve", "I receive", ["capitalisation", "spelling"]),
        ("make a decision of it", "decide it", ["other"]),
    ],
)
def test_kinds_of_errors(wrong: str, right: str, kind: list[str]) -> None:
    (edit, *_) = extract_edits(wrong, right)
    assert learner_errors.kinds_of(wrong.split(), edit) == kind


def test_rates_of_one_half(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = sum(map(jfleg.in_first_half, SOURCES))
    assert 8 < half < 32
    learner_errors.main([str(folder)])
    out = capsys.readouterr().out
    assert f"{half} sentences of 13.0 tokens, read {2 * half} times" in out
    assert f'"article": {half}' not in out  # "an friend" in both readings
    assert f'"article": {2 * half}' in out
