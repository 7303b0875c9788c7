"""The table of correctors, on a folder in JFLEG's form."""

from pathlib import Path

import numpy as np
import pytest
from fake_data import write_books

from benchmarks import jfleg
from core.errors import UserError
from datamodules import GrammarDataModule
from datamodules.text.corpora import read_corpus
from metrics.edits import EditScore, best_sum
from metrics.gleu import corpus_gleu
from metrics.maxmatch import m2_scores

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
    jfleg.resamples.cache_clear()
    gold = read_corpus(folder)
    lines = [*RIGHT[:15], *SOURCES[15:30], *OTHERS[30:]]
    gleu = jfleg.gleu_samples(gold, lines)
    references = [[right, other] for right, other in zip(RIGHT, OTHERS, strict=True)]
    assert gleu[0] == pytest.approx(corpus_gleu(SOURCES, lines, references))
    scores = jfleg.best_scores(m2_scores(lines, gold))
    assert sum(scores, EditScore()) == best_sum(m2_scores(lines, gold))
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
    monkeypatch.setattr(jfleg, "RESAMPLES", 50)
    jfleg.resamples.cache_clear()
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
    with pytest.raises(UserError, match=r"short\.txt has 1 lines, but there are 40 sentences"):
        jfleg.lines_of(tmp_path / "short.txt", 40)
