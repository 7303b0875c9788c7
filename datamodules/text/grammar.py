"""Sentences to correct. Dimensions: N sentences, B batch, S source tokens, T target tokens."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from core.errors import UserError
from core.files import read_lines
from datamodules.base import IGNORED, Tensors, texts_of
from datamodules.loaders.resident import SampleId
from datamodules.sequences.synthetic import Split
from datamodules.text.books import TEST_BOOKS, TRAIN_BOOKS, VAL_BOOKS, BookDataModule
from datamodules.text.corpora import read_corpus
from datamodules.text.corrections import CorrectedText, Line, Piece, edits_of
from datamodules.text.error_synthesis import ErrorSynthesis
from datamodules.text.speller import Speller
from datamodules.text.subwords import BEGIN, END, padded
from metrics.correction import score_corrections
from metrics.edits import apply_edits
from metrics.m2 import M2Sentence

Pair = tuple[list[int], list[int]]  # tokens of a source and of its target

HELD_OUT_SEED = 0  # of the errors in validation and test, the same for all seeds of a run


class GrammarDataModule(BookDataModule):
    """Sentences with the errors of learners, and their corrections.

    By default the sentences are those of books, and the errors are made: new ones in every epoch,
    the same on every machine. ``train``, ``val`` and ``test`` name files of real ones instead: an
    M2 file, ``NAME.src`` with its corrections ``NAME.trg`` or ``NAME.ref0``, ... beside it, or a
    folder with one such file, as JFLEG has.

    A training batch is source (B, S) with its end, lengths (B,), target_in (B, T) with its
    beginning and the target (B, T) with its end, IGNORED behind it. In evaluation the ids (B,)
    stand before the target, in prediction they take its place. They count through pieces of lines:
    what is too long to be read at once is cut between words, and has no target then.

    Args:
        data_dir: Root folder of all data sets.
        batch_size: Sentences in a training batch of one process.
        eval_batch_size: Sentences in a batch of validation, test and prediction.
        epoch_size: Training sentences of books in an epoch; the next one goes on where it ended.
            Of a file, an epoch is all.
        val_size: Sentences of books for validation, the same for all seeds, or all of a file; 0
            goes without.
        vocab_size: Number of subwords, 256 bytes and a few signs among them.
        books: Names of the books for training.
        val_books: Names of those for validation.
        test_books: Names of those for test.
        merges: The subwords, as a checkpoint knows them; null learns them from the books.
        errors: Which errors are made, and how many.
        train: File or folder of sentences with corrections to train on instead.
        val: Likewise for validation.
        test: Likewise for test.
        text: Lines to correct.
        text_file: A text file of lines to correct; ``-`` reads standard input.
        exclude: Text file of sentences that are not trained on, an id a line, as ``spikes.jsonl``
            names them: in books by where they begin, of a file by their number from 1 on.
        as_json: Print predictions as JSON, an object a line, instead of marking the changes.
        max_tokens: The most subwords that are read at once.
        speller: Let :class:`~datamodules.text.speller.Speller` correct what is read, in training as
            in prediction; the network learns what is left. In a checkpoint, what it knows; null or
            false goes without, as runs do that record nothing of it.
    """

    def __init__(
        self,
        data_dir: str = "data",
        batch_size: int = 64,
        eval_batch_size: int = 200,
        epoch_size: int = 32_000,
        val_size: int = 1000,
        vocab_size: int = 4000,
        books: list[str] = TRAIN_BOOKS,
        val_books: list[str] = VAL_BOOKS,
        test_books: list[str] = TEST_BOOKS,
        merges: str | None = None,
        errors: ErrorSynthesis = ErrorSynthesis(),  # noqa: B008  frozen
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        text: list[str] | None = None,
        text_file: str | None = None,
        as_json: bool = False,
        max_tokens: int = 80,
        exclude: str | None = None,
        speller: bool | str | None = None,
    ) -> None:
        super().__init__(
            data_dir, batch_size, eval_batch_size, epoch_size, val_size, vocab_size, books,
            val_books, test_books, merges, exclude,
        )  # fmt: skip
        if max_tokens < 8:
            raise UserError(f"max_tokens must be at least 8, got {max_tokens}.")
        self.errors = errors
        self.files = {"train": train, "val": val, "test": test}
        self.text = text
        self.text_file = text_file
        self.as_json = as_json
        self.max_tokens = max_tokens
        self._speller = speller
        self.examples: list[M2Sentence] = []  # what was read for evaluation, with its gold edits
        self.corrected: list[str | None] = []  # what became of these sentences, if evaluated
        self.lines: list[Line] = []  # what was read for evaluation or prediction
        self.pieces: list[Piece] = []  # parts of these lines; the ids count through them

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | ({"speller": self.speller.text} if self._speller else {})

    @cached_property
    def speller(self) -> Speller:
        if isinstance(self._speller, str):
            return Speller(self._speller)
        return Speller.learn(self.all_sentences("train"))

    def spelled(self, line: Line) -> list[str]:
        """The words of a line as the speller has them."""
        return self.speller.correct(line.words, line.beginnings, line.addresses)

    def as_read(self, line: Line) -> list[str]:
        """The words of a line as the network reads them."""
        return self.spelled(line) if self._speller else line.words

    # Sentences and their corrections

    def corrected_sentences(self, split: Split, epoch: int = 0) -> list[M2Sentence]:
        if path := self.files[split]:
            if split != "train":
                return read_corpus(Path(path))
            examples = self.training_examples
            return [examples[index] for index in self.order_of(epoch)]
        synthesis = self.errors if split == "train" else replace(self.errors, seed=HELD_OUT_SEED)
        examples = []
        for number, index, sentence in self.drawn_sentences(split, epoch):
            wrong, edits = synthesis.corrupt(sentence.split(), number, index)
            examples.append(M2Sentence(" ".join(wrong), {0: edits}))
        return examples

    @cached_property
    def training_examples(self) -> list[M2Sentence]:
        """Those of the file, read once."""
        examples = read_corpus(Path(self.files["train"] or ""))
        found = self.without_excluded(list(enumerate(examples, start=1)))
        self.train_ids = [number for number, _ in found]
        return [example for _, example in found]

    def order_of(self, epoch: int) -> list[int]:
        """In which an epoch takes the examples of a file."""
        generator = self.generator("train", epoch)
        order: list[int] = torch.randperm(len(self.train_ids), generator=generator).tolist()
        return order

    def identify(self, epoch: int, rows: list[int]) -> list[SampleId] | None:
        if not self.files["train"]:
            return super().identify(epoch, rows)
        order = self.order_of(epoch)
        return [self.train_ids[order[row]] for row in rows]

    def draw(self, split: Split, epoch: int) -> Tensors:
        examples = self.corrected_sentences(split, epoch)
        # where several people corrected a sentence, an epoch learns from one of them
        people = [sorted(example.edits) for example in examples]
        chosen = [those[epoch % len(those)] for those in people]
        targets = [
            apply_edits(example.source, example.edits[person])
            for example, person in zip(examples, chosen, strict=True)
        ]
        read = [" ".join(self.as_read(Line.of_words(example.source))) for example in examples]
        pairs = list(zip(*map(self.subwords.encode, (read, targets)), strict=True))
        if split == "train":  # what is too long counts for nothing
            fits = [max(len(s), len(t)) <= self.max_tokens for s, t in pairs]
            kept: list[Pair] = [
                pair if fit else ([], []) for pair, fit in zip(pairs, fits, strict=True)
            ]
            source, lengths, target_in, target = training_tensors(kept)
            target[~torch.tensor(fits, dtype=torch.bool)] = IGNORED
            return source, lengths, target_in, target
        self.examples = examples
        self.take([Line.of_words(example.source) for example in examples])
        source, lengths, ids = self.piece_tensors()
        whole = [
            p.end - p.start == len(self.lines[p.line].spans)
            and len(pairs[p.line][1]) <= self.max_tokens
            for p in self.pieces
        ]
        written = [pairs[p.line][1] if w else [] for p, w in zip(self.pieces, whole, strict=True)]
        _, _, target_in, target = training_tensors([([], tokens) for tokens in written])
        target[~torch.tensor(whole, dtype=torch.bool)] = IGNORED
        return source, lengths, target_in, ids, target

    def read_predict(self) -> Tensors:
        return self.read_given(self.lines_to_correct())

    def lines_to_correct(self) -> list[str]:
        """Those of ``text`` and ``text_file``."""
        if self.text is None and self.text_file is None:
            raise UserError("nothing to correct: give --text LINE or --text_file FILE.")
        lines = [line for text in self.text or [] for line in text.split("\n")]
        try:
            "".join(lines).encode()
        except UnicodeEncodeError:  # bytes of another encoding come from the command line as such
            raise UserError("the text is not UTF-8; convert it first.") from None
        if self.text_file:
            if self.text_file == "-" and self.trainer and self.trainer.world_size > 1:
                raise UserError(
                    "standard input can be read by one process only; use --devices 1, or a file."
                )
            lines += read_lines(self.text_file)
        if not lines:
            raise UserError(f"nothing to correct: {self.text_file} is empty.")
        return lines

    def read_given(self, given: Sequence[str]) -> Tensors:
        """Lines of text."""
        lines = texts_of(given)
        self.digest = hashlib.sha256(repr(lines).encode()).hexdigest()
        self.take([Line.of_text(line) for line in lines])
        return self.piece_tensors()

    # Lines and the pieces of them that are read at once

    def take(self, lines: list[Line]) -> None:
        self.lines = lines
        self.pieces = [
            piece for number, line in enumerate(lines) for piece in self.cut(number, line)
        ]

    def cut(self, number: int, line: Line) -> list[Piece]:
        """The sentences of a line, and where one is too long, as many words as can be read."""
        costs = [len(tokens) for tokens in self.subwords.encode(line.words)]
        cuts, cost = [0], 0
        for place, more in enumerate(costs):
            if place and (place in line.beginnings or cost + more > self.max_tokens):
                cuts.append(place)
                cost = 0
            cost += more
        return [
            Piece(number, start, end, readable=0 < sum(costs[start:end]) <= self.max_tokens)
            for start, end in pairwise([*cuts, len(costs)])
        ]

    def piece_tensors(self) -> Tensors:
        """Source (N, S), lengths (N,) and ids (N,) of the pieces."""
        read = [self.as_read(line) for line in self.lines]
        texts = [
            " ".join(read[piece.line][piece.start : piece.end]) if piece.readable else ""
            for piece in self.pieces
        ]
        pairs: list[Pair] = [(tokens, []) for tokens in self.subwords.encode(texts)]
        source, lengths, _, _ = training_tensors(pairs)
        return source, lengths, torch.arange(len(texts))

    def score(self, written: Mapping[int, Sequence[int]]) -> dict[str, float]:
        """How good the corrections of the evaluated sentences are, by the tokens of each piece.

        Sentences that were not evaluated, because the batches were limited, do not count.
        """
        decoded = {number: self.subwords.decode(tokens) for number, tokens in written.items()}
        edits = edits_of(self.lines, self.pieces, decoded)
        left_out = {piece.line for i, piece in enumerate(self.pieces) if i not in written}
        self.corrected = [
            None if number in left_out else apply_edits(line.text, those)
            for number, (line, those) in enumerate(zip(self.lines, edits, strict=True))
        ]
        seen = [
            (example, corrected)
            for example, corrected in zip(self.examples, self.corrected, strict=True)
            if corrected is not None
        ]
        return score_corrections([e for e, _ in seen], [c for _, c in seen])

    def submission(self) -> CorrectedText:
        return CorrectedText(
            subwords=self.subwords,
            lines=tuple(self.lines),
            pieces=tuple(self.pieces),
            as_json=self.as_json,
        )


def training_tensors(pairs: Sequence[Pair]) -> Tensors:
    """Source (N, S), lengths (N,), target_in (N, T) and target (N, T) of pairs of tokens."""
    sources = [[*source, END] for source, _ in pairs]
    return (
        padded(sources),
        torch.tensor([len(source) for source in sources], dtype=torch.long),
        padded([[BEGIN, *target] for _, target in pairs]),
        padded([[*target, END] for _, target in pairs], IGNORED),
    )
