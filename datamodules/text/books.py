"""Sentences of public-domain books as subwords. Dimensions: N sentences, T tokens."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import compress
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from datamodules.base import IGNORED, Tensors
from datamodules.exclusion import are_left_in, say_left_out
from datamodules.loaders.bucketed import BucketedLoader
from datamodules.loaders.resident import SampleId, Stage
from datamodules.sequences.synthetic import DrawingLoader, Split, SyntheticDataModule
from datamodules.text.corpora import read_books
from datamodules.text.subwords import MIN_VOCAB_SIZE, Subwords

Id = TypeVar("Id", int, str)
T = TypeVar("T")


class BookDataModule(SyntheticDataModule):
    """Sentences of the prose in NLTK's Gutenberg selection, ``data_dir/gutenberg/NAME.txt``.

    Training, validation and test have books of their own. The subwords are learned from those of
    training and kept in every checkpoint, so that a run can read any text without the books.

    Args:
        data_dir: Root folder of all data sets.
        batch_size: Sentences in a training batch of one process.
        eval_batch_size: Sentences in a batch of validation, test and prediction.
        epoch_size: Training sentences in an epoch; the next one goes on where it ended.
        val_size: Sentences for validation, the same for all seeds; 0 goes without.
        vocab_size: Number of subwords, 256 bytes and a few signs among them.
        merges: The subwords, as a checkpoint knows them; null learns them from the books.
        exclude: Text file of sentences that are not trained on, an id a line, as ``spikes.jsonl``
            has it: ``carroll-alice.txt:12:3`` begins at the third word of line 12.
    """

    class_names = ()
    test_size = 2000
    max_tokens = 80  # the most subwords of a sentence that are read at once
    books: Mapping[Split, Sequence[str]] = {
        "train": (
            "austen-emma",
            "austen-sense",
            "bryant-stories",
            "chesterton-ball",
            "chesterton-brown",
            "edgeworth-parents",
            "melville-moby_dick",
        ),
        "val": ("burgess-busterbrown", "carroll-alice"),
        "test": ("austen-persuasion", "chesterton-thursday"),
    }

    def __init__(
        self,
        data_dir: str = "data",
        batch_size: int = 64,
        eval_batch_size: int = 200,
        epoch_size: int = 32_000,
        val_size: int = 1000,
        vocab_size: int = 4000,
        merges: str | None = None,
        exclude: str | None = None,
    ) -> None:
        super().__init__(epoch_size, batch_size, eval_batch_size, val_size, data_dir)
        self.exclude = exclude
        if vocab_size < MIN_VOCAB_SIZE:
            raise UserError(
                f"vocab_size must be at least {MIN_VOCAB_SIZE}, the bytes and the signs between "
                f"sentences, got {vocab_size}."
            )
        self.folder = self.data_dir / "gutenberg"
        self.vocab_size = vocab_size
        self._sentences: dict[Split, list[tuple[str, str]]] = {}
        self._subwords = Subwords(merges) if merges is not None else None

    def state_dict(self) -> dict[str, Any]:
        return {"merges": self.subwords.merges}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state != self.state_dict():
            raise UserError(
                f"the run's subwords are not those of the books in {self.folder}; restore the "
                "books and vocab_size, or train a new run."
            )

    @property
    def subwords(self) -> Subwords:
        if self._subwords is None:
            self._subwords = Subwords.train(self.all_sentences("train"), self.vocab_size)
        return self._subwords

    def all_sentences(self, split: Split) -> list[str]:
        """Sentences in the books of a split, words between blanks."""
        return [sentence for _, sentence in self.placed_sentences(split)]

    def placed_sentences(self, split: Split) -> list[tuple[str, str]]:
        """Sentences in the books of a split, each after the place where it begins."""
        if split not in self._sentences:
            self._sentences[split] = read_books(self.folder, self.books[split])
        return self._sentences[split]

    def sample_sentences(self, split: Split) -> list[str]:
        """Sentences that samples are made of: in training without those to exclude."""
        return self.training_sentences if split == "train" else self.all_sentences(split)

    @cached_property
    def training_sentences(self) -> list[str]:
        found = self.without_excluded(self.placed_sentences("train"))
        self.train_ids = [place for place, _ in found]
        return [sentence for _, sentence in found]

    def without_excluded(self, found: list[tuple[Id, T]]) -> list[tuple[Id, T]]:
        """Leave out of samples with their ids those that are not trained on."""
        if self.exclude is None:
            return found
        left_in = are_left_in(self.exclude, [sample for sample, _ in found])
        say_left_out(self.exclude, left_in.count(False), sum(left_in))
        return list(compress(found, left_in))

    def identify(self, epoch: int, rows: list[int]) -> list[SampleId] | None:
        drawn = self.drawn_sentences("train", epoch)
        return [self.train_ids[drawn[row][1]] for row in rows]

    def drawn_sentences(self, split: Split, epoch: int) -> list[tuple[int, int, str]]:
        """Sentences of an epoch, each with the number of its pass over the books and its own.

        A pass brings every sentence once, in an order of its own.
        """
        if not self.samples(split):
            return []
        everything = self.sample_sentences(split)
        seed = self.seed if split == "train" else 0
        begin = epoch * self.samples(split)
        passes: dict[int, list[int]] = {}
        drawn = []
        for position in range(begin, begin + self.samples(split)):
            number, place = divmod(position, len(everything))
            if number not in passes:
                key = np.random.SeedSequence((seed, number)).generate_state(1)[0]
                generator = torch.Generator().manual_seed(int(key))
                passes[number] = torch.randperm(len(everything), generator=generator).tolist()
            index = passes[number][place]
            drawn.append((number, index, everything[index]))
        return drawn

    def make_loader(self, tensors: Tensors, stage: Stage) -> "TextLoader":
        return TextLoader(tensors, **self.loader_arguments(stage))


class TextLoader(BucketedLoader, DrawingLoader):
    """Resident sentences, put together by length and drawn anew for every epoch."""

    def replace(self, tensors: Tensors) -> None:
        super().replace(tensors)
        self.measure()

    def sizes(self) -> Tensor:
        lengths, target = self.tensors[1], self.tensors[-1]
        if self.stage == "predict":
            return lengths
        return torch.maximum(lengths, (target != IGNORED).sum(1))
