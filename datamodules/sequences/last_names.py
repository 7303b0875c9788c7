"""Last names in 18 languages. Dimensions: N names, B batch, T characters."""

import csv
import hashlib
import random
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from core.errors import UserError
from core.files import atomic_write, read_lines
from core.submission import Submission
from datamodules.base import BaseDataModule, Tensors, texts_of
from datamodules.loaders.bucketed import BucketedLoader
from datamodules.loaders.resident import Stage

SYMBOLS = string.ascii_letters + " .,;'"
PAD = len(SYMBOLS)  # 57, so an embedding has 58 rows
_SPLIT_SEED = 227  # the course's
_ADDRESS = "https://download.pytorch.org/tutorial/data.zip"


class LastNamesDataModule(BaseDataModule):
    """Last names and the language each comes from (homework 6 of Berkeley's CS 182, ``q_rnn``).

    The data are those of PyTorch's tutorial on character-level networks: ``data_dir/names`` holds a
    text file for each language, a name a line. The names of the files, in alphabetical order, are
    the classes, so other languages work as well. A batch is tokens (B, T) int64, lengths (B,) and
    classes (B,). It is as long as its longest name, and in training its names are of similar
    length: padding is work for nothing.

    The split is the course's and the same for all seeds: four fifths of the names for training,
    the rest, its "evaluation part", for ``test``. Some names occur several times, so the two parts
    share some. Predicting runs over the names that are given, or over the evaluation part.

    Args:
        data_dir: Root folder of all data sets.
        batch_size: Names in a training batch of one process. The last batch of an epoch is filled
            up with names that the next pass begins with.
        val_size: Training names kept for validation by one fixed split; 0 trains on all of them.
        balanced: Draw the names for training with replacement, each with its language's number of
            names to the power of minus this: true is 1 and draws all languages equally often, 0.5
            goes halfway. 47 % of the names are Russian.
        names: Names to predict.
        names_file: A text file of names to predict, one a line.
        class_names: The languages; null takes those that have a file. A checkpoint knows them, so
            that predicting needs no training names.
        options: What else :class:`BaseDataModule` takes; in ``exclude``, ``Greek.txt:17`` is the
            name in that line of that file.
    """

    finds_classes = True

    def __init__(
        self,
        data_dir: str = "data",
        batch_size: int = 256,
        val_size: int = 1604,
        balanced: bool | float = False,
        names: list[str] | None = None,
        names_file: str | None = None,
        class_names: list[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(data_dir, batch_size, val_size=val_size, **options)
        if not 0 <= balanced <= 1:
            raise UserError(f"balanced must be in [0, 1], got {balanced}; 0 draws as they come.")
        self.folder = self.data_dir / "names"
        self.balanced = balanced
        self.names = names
        self.names_file = Path(names_file) if names_file else None
        self.class_names = tuple(class_names or _languages(self.folder))
        self.predicted: list[str] = []  # the names through which the ids of predictions count

    def read_train(self) -> Tensors:
        return self.read("train")

    def read_test(self) -> Tensors:
        return self.read("test")

    def read(self, part: str) -> Tensors:
        """Tokens (N, T), lengths (N,) and classes (N,) of ``train`` or ``test``."""
        listed = [
            (name, number, f"{language}.txt:{line}")
            for number, language in enumerate(self.class_names)
            for line, name in _read_names(self.folder / f"{language}.txt").items()
        ]
        pairs = [(name, number) for name, number, _ in listed]
        self.digest = hashlib.sha256(repr(pairs).encode()).hexdigest()
        random.Random(_SPLIT_SEED).shuffle(listed)
        pairs = [(name, number) for name, number, _ in listed]
        self.ids = [place for _, _, place in listed]  # those of the evaluation part come last
        cut = int(0.8 * len(pairs))
        names, classes = zip(*(pairs[:cut] if part == "train" else pairs[cut:]), strict=True)
        self.predicted = list(names)
        return *encode(names), torch.tensor(classes)

    def read_predict(self) -> Tensors:
        if self.names is None and self.names_file is None:
            tokens, lengths, _ = self.read_test()
            return tokens, lengths, torch.arange(len(tokens))
        listed = _read_names(self.names_file) if self.names_file else {}
        return self.read_given([*(self.names or []), *listed.values()])

    def read_given(self, given: Sequence[str]) -> Tensors:
        """Names."""
        self.predicted = texts_of(given)
        self.digest = hashlib.sha256(repr(self.predicted).encode()).hexdigest()
        return *encode(self.predicted), torch.arange(len(self.predicted))

    def submission(self) -> "NameTable":
        return NameTable(self.class_names, names=tuple(self.predicted))

    def make_loader(self, tensors: Tensors, stage: Stage) -> "NameLoader":
        arguments = self.loader_arguments(stage)
        return NameLoader(tensors, self.balanced if stage == "train" else 0, **arguments)


class NameLoader(BucketedLoader):
    """Resident names, put together by length.

    Args:
        tensors: Tokens (N, T), lengths (N,) and classes or ids (N,).
        balanced: Power of the size of its class by which the weight of a name is divided, where it
            is drawn with replacement; 1 draws all classes equally often.
        loader: What :class:`ResidentLoader` takes.
    """

    def __init__(self, tensors: Sequence[Tensor], balanced: float = 0, **loader: Any) -> None:
        super().__init__(tensors, **loader)
        classes = self.tensors[-1].cpu()
        self.weights = classes.bincount()[classes] ** -float(balanced) if balanced else None

    def drawn(self, generator: torch.Generator) -> Tensor:
        if self.weights is None:
            return super().drawn(generator)
        return self.weights.multinomial(self.epoch_size, replacement=True, generator=generator)


@dataclass(frozen=True)
class NameTable(Submission):
    """The three most probable languages of each name, as a table for people.

    Args:
        names: The names through which the ids count: 0, 1, ...
    """

    filename: ClassVar[str] = "predictions.csv"
    sendable: ClassVar[bool] = False
    shown: ClassVar[int] = 20  # names on the terminal; the file has all

    names: tuple[str, ...] = ()

    def write_predictions(self, path: Path, ids: np.ndarray, probabilities: np.ndarray) -> None:
        """Write the three languages of each name, and print those of the first names."""
        best = (-probabilities).argsort(1, kind="stable")[:, :3]
        with atomic_write(path, "w", newline="", encoding="utf-8") as out:
            table = csv.writer(out, lineterminator="\n")
            ranks = range(2, best.shape[1] + 1)
            more = [f"{column}{rank}" for rank in ranks for column in ("language", "probability")]
            table.writerow(["name", "language", "probability", *more])
            for i, row, classes in zip(ids.tolist(), probabilities, best, strict=True):
                pairs = [(self.labels[k], f"{row[k]:.4f}") for k in classes]
                table.writerow([self.names[i], *(value for pair in pairs for value in pair)])
        screen = Table("name", *["language"] * best.shape[1])
        for i, row, classes in zip(ids[: self.shown].tolist(), probabilities, best, strict=False):
            screen.add_row(
                escape(self.names[i]), *(f"{self.labels[k]} {row[k]:.1%}" for k in classes)
            )
        Console().print(screen)


def normalize(name: str) -> str:
    """The symbols of a name, as the course spells it: without accents, and nothing unknown."""
    plain = unicodedata.normalize("NFD", name)
    return "".join(c for c in plain if c in SYMBOLS)


def encode(names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens (N, T) int64, padded after the end, and lengths (N,) of names.

    Raises:
        UserError: A name has no symbol that is known.
    """
    texts = [normalize(name) for name in names]
    for name, text in zip(names, texts, strict=True):
        if not text.strip():
            raise UserError(f"{name!r} has none of the letters a to z; spell it with these.")
    lengths = torch.tensor([len(text) for text in texts])
    tokens = torch.full((len(texts), int(lengths.max())), PAD)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor([SYMBOLS.index(c) for c in text])
    return tokens, lengths


def _languages(folder: Path) -> list[str]:
    """The languages that have a file in a folder, in alphabetical order on every file system.

    Raises:
        UserError: There is no such folder, or fewer than two languages.
    """
    found = sorted(p.stem for p in folder.glob("*.txt") if not p.name.startswith("."))
    if len(found) < 2:
        state = f"holds {len(found)} of the files LANGUAGE.txt" if folder.is_dir() else "is missing"
        raise UserError(
            f"{folder} {state}, and at least two are needed; unzip {_ADDRESS} so that "
            f"{folder / 'Arabic.txt'} exists."
        )
    return found


def _read_names(path: Path) -> dict[int, str]:
    """The names in a text file by line, from 1 on; the blanks after some are the course's slips.

    Raises:
        UserError: The file is missing, empty or not UTF-8.
    """
    names = {line: text.strip() for line, text in enumerate(read_lines(str(path)), 1)}
    if not any(names.values()):
        raise UserError(f"{path} holds no names; write one a line, or remove it.")
    return {line: name for line, name in names.items() if name}
