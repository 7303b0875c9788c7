"""Correctors side by side, without training and trained: on JFLEG and on the own test books.

    python -m benchmarks.jfleg data/jfleg/dev
    python -m benchmarks.jfleg data/jfleg/dev --run runs/grammar/NAME --examples FILE
    python -m benchmarks.jfleg data/jfleg/dev corrected.txt    # a line for each of dev.src

JFLEG is split once, by a hash of the sentence: rates of errors come from the first half
(``configs/grammar_learners.yaml``), results are those of the second; the whole stands beside them
for comparison with the figures of others. A person is scored against the other three, all else
against all four. F0.5, precision and recall are MaxMatch's. In brackets are 95 % intervals of the
difference to doing nothing and to rules + speller, by 1,000 paired resamples of the sentences
(seed 0).
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from time import process_time

import numpy as np

from core.errors import UserError, exit_on_user_error
from core.files import atomic_write
from datamodules import GrammarDataModule
from datamodules.text.corpora import read_corpus, token_lines
from datamodules.text.corrections import Line, marked
from datamodules.text.speller import put_right
from metrics.correction import recall_by_kind, share
from metrics.edits import EditScore, apply_edits, best_sum, extract_edits
from metrics.gleu import corpus_gleu, drawn_references, gleu_of_totals, sentence_counts
from metrics.m2 import M2Sentence
from metrics.maxmatch import m2_scores
from pipeline.loading import LoadedRun

RESAMPLES = 1000
SHOWN = 10  # examples that went right, and as many that went wrong
BASELINE = "rules + speller"
COLUMNS = [
    "", "JFLEG, second half: GLEU", "to nothing", "to rules + speller", "precision", "recall",
    "F0.5", "whole: GLEU", "F0.5", "test books: F0.5", "to rules + speller", "precision", "recall",
    "left alone", "recall of spelling",
]  # fmt: skip
Corrector = Callable[[list[str]], list[str]]  # lines, words between blanks


def in_first_half(sentence: str) -> bool:
    return hashlib.sha256(sentence.encode()).digest()[0] % 2 == 0


def word_by_word(correct: Callable[[list[str]], list[str]]) -> Corrector:
    return lambda lines: [" ".join(correct(line.split())) for line in lines]


def correctors(data: GrammarDataModule, run: str | None) -> dict[str, Corrector]:
    """All that can be compared on any sentences."""
    found = {
        "doing nothing": word_by_word(list),
        "three rules": word_by_word(put_right),
        "speller": word_by_word(data.speller.spell),
        BASELINE: word_by_word(data.speller.correct),
    }
    for name, speller in (("network", "false"), ("network + speller", "true")):
        if run:
            settings = [f"--data.data_dir={data.data_dir}", f"--data.speller={speller}"]
            model = LoadedRun.load(run, "best", settings).model.eval()
            found[name] = lambda lines, model=model: model.predict(lines).labels  # type: ignore[misc]
    return found


@cache
def resamples(size: int) -> np.ndarray:
    """Counts of each sentence in each draw, (1 + RESAMPLES, N); the first draw has each once."""
    drawn = np.random.default_rng(0).multinomial(size, [1 / size] * size, RESAMPLES)
    return np.concatenate([np.ones((1, size), int), drawn])


def gleu_samples(gold: list[M2Sentence], lines: list[str]) -> np.ndarray:
    """GLEU in percent of all sentences, then of each resample."""
    counts = [
        list(sentence_counts(s.source, line, [apply_edits(s.source, e) for e in s.edits.values()]))
        for s, line in zip(gold, lines, strict=True)
    ]
    choices = drawn_references(len(gold), len(gold[0].edits))  # (I, N)
    drawn = np.array(counts)[np.arange(len(gold)), choices]  # (I, N, K)
    totals = np.einsum("rn,ink->rik", resamples(len(gold)), drawn, optimize=True)
    return np.array([100 * gleu_of_totals(those).mean() for those in totals])


def best_scores(of_people: list[list[EditScore]]) -> list[EditScore]:
    """Scores of each sentence, with the annotator who is best for the whole."""
    total, chosen = EditScore(), []
    for people in of_people:
        after = best_sum([[total], people])
        chosen.append(next(score for score in people if total + score == after))
        total = after
    return chosen


def f05_samples(scores: Sequence[EditScore]) -> np.ndarray:
    """F0.5 of all sentences, then of each resample, its annotators as for the whole."""
    counts = np.array([(score.correct, score.proposed, score.gold) for score in scores])
    sums = resamples(len(scores)) @ counts
    return np.array([EditScore(*row).f() for row in sums.tolist()])


def interval(ours: np.ndarray, theirs: np.ndarray, digits: int) -> str:
    low, high = np.percentile((ours - theirs)[1:], [2.5, 97.5])
    return f"{ours[0] - theirs[0]:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="JFLEG's dev or test folder")
    parser.add_argument("files", type=Path, nargs="*", help="corrections, a sentence a line")
    parser.add_argument("--data_dir", default="data", help="root folder of the data sets")
    parser.add_argument("--run", help="a trained run, to be compared")
    parser.add_argument("--examples", type=Path, help="file for test sentences, right and wrong")
    options = parser.parse_args(args)
    with exit_on_user_error():
        gold = read_corpus(options.folder)
        books = GrammarDataModule(options.data_dir)
        found = correctors(books, options.run)
        made = books.corrected_sentences("test")
        sources = [sentence.source for sentence in gold]
        everything = {name: correct(sources) for name, correct in found.items()}
        files = [*options.folder.glob("*.spellchecked.src"), *options.files]
        everything |= {file.name: lines_of(file, len(gold)) for file in files}
        sources = [sentence.source for sentence in made]
        written = {}
        for name, correct in found.items():
            begin = process_time()
            written[name] = correct(sources)
            rate = len(made) / (process_time() - begin)
            print(f"{name}: {rate:,.0f} test sentences a CPU second", file=sys.stderr)
        print("| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS), sep="\n")
        on_jfleg, on_books = rows_of_jfleg(gold, everything), rows_of_books(made, written)
        for name in everything:
            cells = [name, *on_jfleg[name], *on_books.get(name, [])]
            print("| " + " | ".join(cells) + " |")
        for person in gold[0].edits:
            gleu, f05 = against_the_others(gold, person)
            print(f"person {person} against the others, whole: GLEU {gleu:.2f}, F0.5 {f05:.3f}")
        if options.examples:
            name = "network + speller" if options.run else BASELINE
            with atomic_write(options.examples, "w") as file:
                file.write(examples(made, written[name]))


def lines_of(file: Path, number: int) -> list[str]:
    lines = token_lines(file)
    if len(lines) != number:
        raise UserError(
            f"{file} has {len(lines)} lines, but there are {number} sentences; correct all of "
            "them, a line each."
        )
    return lines


def rows_of_jfleg(gold: list[M2Sentence], systems: dict[str, list[str]]) -> dict[str, list[str]]:
    held = [i for i, sentence in enumerate(gold) if not in_first_half(sentence.source)]
    half = [gold[i] for i in held]
    gleu = {name: gleu_samples(half, [lines[i] for i in held]) for name, lines in systems.items()}
    rows = {}
    for name, lines in systems.items():
        of_people = m2_scores(lines, gold)
        total = best_sum(of_people[i] for i in held)
        rows[name] = [
            f"{gleu[name][0]:.2f}", interval(gleu[name], gleu["doing nothing"], 2),
            interval(gleu[name], gleu[BASELINE], 2), f"{total.precision:.3f}",
            f"{total.recall:.3f}", f"{total.f():.3f}", f"{gleu_of(gold, lines):.2f}",
            f"{best_sum(of_people).f():.3f}",
        ]  # fmt: skip
    return rows


def gleu_of(gold: list[M2Sentence], lines: list[str]) -> float:
    references = [[apply_edits(s.source, edits) for edits in s.edits.values()] for s in gold]
    return corpus_gleu([sentence.source for sentence in gold], lines, references)


def rows_of_books(made: list[M2Sentence], systems: dict[str, list[str]]) -> dict[str, list[str]]:
    scores = {name: best_scores(m2_scores(lines, made)) for name, lines in systems.items()}
    samples = {name: f05_samples(those) for name, those in scores.items()}
    rows = {}
    for name, lines in systems.items():
        total = sum(scores[name], EditScore())
        clean = [s.source == c for s, c in zip(made, lines, strict=True) if not s.edits[0]]
        rows[name] = [
            f"{samples[name][0]:.3f}", interval(samples[name], samples[BASELINE], 3),
            f"{total.precision:.3f}", f"{total.recall:.3f}", f"{share(clean):.3f}",
            f"{recall_by_kind(made, lines)['recall_spelling']:.3f}",
        ]  # fmt: skip
    return rows


def against_the_others(gold: list[M2Sentence], person: int) -> tuple[float, float]:
    """GLEU and F0.5 of a person."""
    others = [M2Sentence(s.source, {k: e for k, e in s.edits.items() if k != person}) for s in gold]
    lines = [apply_edits(s.source, s.edits[person]) for s in gold]
    return gleu_of(others, lines), best_sum(m2_scores(lines, others)).f()


def examples(made: list[M2Sentence], lines: list[str]) -> str:
    """The first changed sentences that became right and wrong, with their changes, as Markdown."""
    shown: dict[bool, list[str]] = {True: [], False: []}
    for sentence, written in zip(made, lines, strict=True):
        right = apply_edits(sentence.source, sentence.edits[0])
        changes = extract_edits(sentence.source, written)
        if changes and len(shown[written == right]) < SHOWN:
            text = marked(Line.of_words(sentence.source), changes, styled=False).plain
            expected = "" if written == right else f"\n  right: {right}"
            shown[written == right].append(f"- {text}{expected}")
    return "\n".join(["Right:", "", *shown[True], "", "Wrong:", "", *shown[False], ""])


if __name__ == "__main__":
    main()
