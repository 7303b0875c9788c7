"""Sentences to correct. Dimensions: N sentences, B batch, S source tokens, T target tokens."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import UserError
from core.files import read_lines
from datamodules.base import IGNORED, Tensors, texts_of
from datamodules.loaders.resident import SampleId
from datamodules.sequences.synthetic import Split
from datamodules.text.books import BookDataModule
from datamodules.text.corpora import read_corpus
from datamodules.text.corrections import CorrectedText, Line, Piece, edits_of
from datamodules.text.error_synthesis import ErrorSynthesis
from datamodules.text.speller import Speller
from datamodules.text.subwords import BEGIN, END, padded
from metrics.correction import score_corrections
from metrics.edits import apply_edits
from metrics.m2 import M2Sentence

_HELD_OUT_SEED = 0  # of the errors in validation and test, the same for all seeds of a run


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
        errors: Kinds and number of the errors that are made.
        train: File or folder of sentences with corrections to train on instead; an epoch is all of
            them, and ``exclude`` names them by their number from 1 on.
        val: Likewise for validation, all of them unless ``val_size`` is 0.
        test: Likewise for test.
        text: Lines to correct.
        text_file: A text file of lines to correct; ``-`` reads standard input.
        as_json: Print predictions as JSON, an object a line, instead of marking the changes.
        speller: Let :class:`~datamodules.text.speller.Speller` correct what is read, in training as
            in prediction; the network learns what is left. In a checkpoint, what it knows; null or
            false goes without, as runs do that record nothing of it.
        **options: As of :class:`~datamodules.text.books.BookDataModule`.
    """

    def __init__(
        self,
        data_dir: str = "data",
        *,
        errors: ErrorSynthesis = ErrorSynthesis(),  # noqa: B008  frozen
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        text: list[str] | None = None,
        text_file: str | None = None,
        as_json: bool = False,
        speller: bool | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(data_dir, **options)
        self.errors = errors
        self.files: dict[Split, str | None] = {"train": train, "val": val, "test": test}
        self.text = text
        self.text_file = text_file
        self.as_json = as_json
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
        """Words of a line, corrected by the speller."""
        return self.speller.correct(line.words, line.beginnings, line.addresses)

    def as_read(self, line: Line) -> list[str]:
        """Words of a line as the network reads them."""
        return self.spelled(line) if self._speller else line.words

    # Sentences and their corrections

    def corrected_sentences(self, split: Split, epoch: int = 0) -> list[M2Sentence]:
        if path := self.files[split]:
            if split != "train":
                return read_corpus(Path(path))
            examples = self.training_examples
            return [examples[index] for index in self.order_of(epoch)]
        synthesis = self.errors if split == "train" else replace(self.errors, seed=_HELD_OUT_SEED)
        examples = []
        for number, index, sentence in self.drawn_sentences(split, epoch):
            wrong, edits = synthesis.corrupt(sentence.split(), number, index)
            examples.append(M2Sentence(" ".join(wrong), {0: edits}))
        return examples

    @cached_property
    def training_examples(self) -> list[M2Sentence]:
        """Sentences of the file to train on, read once."""
        examples = read_corpus(Path(self.files["train"] or ""))
        found = self.without_excluded(list(enumerate(examples, start=1)))
        self.train_ids = [number for number, _ in found]
        return [example for _, example in found]

    def order_of(self, epoch: int) -> list[int]:
        """Indices of a file's examples, in the order in which an epoch takes them."""
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
        lines = [Line.of_words(example.source) for example in examples]
        encoded = self.subwords.encode(targets)
        if split == "train":  # what is too long counts for nothing
            sources = self.subwords.encode([" ".join(self.as_read(line)) for line in lines])
            fits = [
                max(len(source), len(target)) <= self.max_tokens
                for source, target in zip(sources, encoded, strict=True)
            ]
            return (
                *_source_tensors([s if fit else [] for s, fit in zip(sources, fits, strict=True)]),
                *_target_tensors(
                    [t if fit else None for t, fit in zip(encoded, fits, strict=True)]
                ),
            )
        self.examples = examples
        self.take(lines)
        source, lengths, ids = self.piece_tensors()
        whole = [
            piece.end - piece.start == len(lines[piece.line].spans)
            and len(encoded[piece.line]) <= self.max_tokens
            for piece in self.pieces
        ]
        target_in, target = _target_tensors(
            [encoded[p.line] if fit else None for p, fit in zip(self.pieces, whole, strict=True)]
        )
        return source, lengths, target_in, ids, target

    def read_predict(self) -> Tensors:
        return self.read_given(self.lines_to_correct())

    def lines_to_correct(self) -> list[str]:
        """Lines of ``text`` and ``text_file``."""
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
        """Cut a line into its sentences, and where one is too long, into what can be read."""
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
        return *_source_tensors(self.subwords.encode(texts)), torch.arange(len(texts))

    def score(self, written: Mapping[int, Sequence[int]]) -> dict[str, float]:
        """Score the corrections of the evaluated sentences, by the tokens of each piece.

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


def _source_tensors(sources: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Tokens with their end (N, S), and lengths (N,)."""
    ended = [[*source, END] for source in sources]
    return padded(ended), torch.tensor([len(source) for source in ended], dtype=torch.long)


def _target_tensors(targets: Sequence[Sequence[int] | None]) -> tuple[Tensor, Tensor]:
    """Tokens with their beginning (N, T) and with their end (N, T); none are IGNORED."""
    return (
        padded([[BEGIN, *(target or ())] for target in targets]),
        padded([[IGNORED] if target is None else [*target, END] for target in targets], IGNORED),
    )
