"""Fit the weights of the speller to made misspellings in the validation books.

    python -m benchmarks.speller_weights --data_dir data

One weight after the other goes up and down by a quarter, and stays where F0.5 of the words is best;
when none moves any more, or after three rounds, the weights are printed, to be written into
``datamodules/text/speller.py``. Neither the test books nor learners' sentences are looked at.
"""

import argparse

from core.errors import exit_on_user_error
from datamodules import GrammarDataModule
from datamodules.text.error_synthesis import KINDS, ErrorSynthesis
from datamodules.text.speller import Speller, Weights
from metrics.edits import EditScore

SENTENCES = 500
ROUNDS = 3
START = Weights(4, 3, 2, 3, 3, 4, context=1, keep=20, capital=14)  # set by hand
SPELLING = ErrorSynthesis(weights={kind: 0.0 for kind in KINDS} | {"spelling": 1.0}, seed=1)


def score(speller: Speller, weights: Weights, pairs: list[tuple[list[str], list[str]]]) -> float:
    """F0.5 of the changed words; only spelling is wrong, so that words match one by one."""
    speller.weights = weights
    speller.candidates.cache_clear()
    correct = proposed = wrong = 0
    for clean, written in pairs:
        for right, old, new in zip(clean, written, speller.spell(written), strict=True):
            correct += old != new == right
            proposed += old != new
            wrong += old != right
    return EditScore(correct, proposed, wrong).f()


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="data", help="root folder of the data sets")
    options = parser.parse_args(args)
    with exit_on_user_error():
        books = GrammarDataModule(options.data_dir)
        speller = Speller.learn(books.all_sentences("train"))
        clean = [sentence.split() for sentence in books.all_sentences("val")[:SENTENCES]]
        written = [SPELLING.corrupt(sentence, 0, i)[0] for i, sentence in enumerate(clean)]
        pairs = list(zip(clean, written, strict=True))
        weights, best = START, score(speller, START, pairs)
        print(f"{best:.4f} before", flush=True)
        for _ in range(ROUNDS):
            before = weights
            for name in Weights._fields:
                for factor in (0.75, 1.25):
                    value = round(getattr(weights, name) * factor, 2)
                    other = weights._replace(**{name: value})
                    if (f05 := score(speller, other, pairs)) > best:
                        weights, best = other, f05
            print(f"{best:.4f} {weights}", flush=True)
            if weights == before:
                break


if __name__ == "__main__":
    main()
