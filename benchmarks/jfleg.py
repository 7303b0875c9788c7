"""GLEU and F0.5 on JFLEG: of doing nothing, of each person, and of corrected files.

    python -m benchmarks.jfleg data/jfleg/dev
    python predict.py runs/grammar/NAME --text_file data/jfleg/dev/dev.src --output mine.txt
    python -m benchmarks.jfleg data/jfleg/dev mine.txt

A person is scored against the other three, all else against all four. F0.5 is that of MaxMatch on
the edits by which each person's correction differs from the source.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from core.errors import UserError
from core.telling import told_in_one_sentence
from datamodules.text.corpora import read_corpus, token_lines
from metrics.edits import apply_edits
from metrics.gleu import corpus_gleu
from metrics.m2 import M2Sentence
from metrics.maxmatch import m2_score


def row(name: str, gold: list[M2Sentence], lines: list[str]) -> list[str]:
    """Name, GLEU in percent, precision, recall and F0.5."""
    references = [[apply_edits(s.source, edits) for edits in s.edits.values()] for s in gold]
    gleu = corpus_gleu([sentence.source for sentence in gold], lines, references)
    score = m2_score(lines, gold)
    parts = (score.precision, score.recall, score.f())
    return [name, f"{gleu:.2f}", *(f"{part:.3f}" for part in parts)]


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="JFLEG's dev or test folder")
    parser.add_argument("files", type=Path, nargs="*", help="corrections, a sentence a line")
    options = parser.parse_args(args)
    with told_in_one_sentence():
        gold = read_corpus(options.folder)
        table = Table("", "GLEU", "precision", "recall", "F0.5")
        table.add_row(*row("doing nothing", gold, [sentence.source for sentence in gold]))
        for person in gold[0].edits:
            others = [
                M2Sentence(s.source, {k: e for k, e in s.edits.items() if k != person})
                for s in gold
            ]
            lines = [apply_edits(s.source, s.edits[person]) for s in gold]
            table.add_row(*row(f"person {person} against the others", others, lines))
        for file in options.files:
            lines = token_lines(file)
            if len(lines) != len(gold):
                raise UserError(
                    f"{file} has {len(lines)} lines, but there are {len(gold)} sentences; correct "
                    "all of them, a line each."
                )
            table.add_row(*row(str(file), gold, lines))
        Console().print(table)


if __name__ == "__main__":
    main()
