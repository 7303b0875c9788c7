"""The temporal order problem: which of X and Y came first, and which second, long before the end.

Dimensions: N sequences, B batch, T padded length, D width of a one-hot vector.
"""

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import UserError
from datamodules.base import Tensors
from datamodules.loaders.resident import Stage
from datamodules.sequences.synthetic import DrawingLoader, Split, SyntheticDataModule

# symbols are one-hot vectors in the order X, Y, a, b, c, d, B, E
DISTRACTORS, BEGIN, END, PAD = 2, 6, 7, 8  # padding is a vector of zeros
_NOTEBOOK_SEED = 8382

Level = Literal["easy", "normal", "moderate", "hard", "nightmare"]
Stream = Literal["clean", "notebook"]


class Ranges(NamedTuple):
    """Lengths and the places of the two symbols that matter; upper bounds are exclusive."""

    length: tuple[int, int]
    first: tuple[int, int]
    second: tuple[int, int]

    @property
    def padded(self) -> int:
        """Padded length T; the exclusive bound, so the first step is always padding."""
        return self.length[1]


LEVELS: dict[Level, Ranges] = {
    "easy": Ranges((7, 9), (1, 3), (4, 6)),
    "normal": Ranges((30, 41), (2, 6), (20, 28)),
    "moderate": Ranges((60, 81), (10, 21), (45, 55)),
    "hard": Ranges((100, 111), (10, 21), (50, 61)),
    "nightmare": Ranges((300, 501), (10, 81), (250, 291)),
}


class TemporalOrderDataModule(SyntheticDataModule):
    """Experiment 6a of Hochreiter and Schmidhuber ("Long short-term memory", 1997, section 5.6).

    A sequence begins with B, ends with E and consists of random a, b, c and d, but for two places,
    where X or Y stands: X X is class Q, X Y is R, Y X is S and Y Y is U. A batch holds one-hot
    vectors (B, T, 8) float32 and classes (B,) int64. Sequences are padded with zeros in front, so
    the last step is always E.

    Training never sees a sequence twice: every epoch draws new ones. In the ``clean`` stream a
    training sequence depends on the run's seed and its number alone, and validation and test are
    the same for all seeds. The ``notebook`` stream repeats the one of NYU's course notebook
    08-seq_classification, whatever the seed: in every epoch new training sequences, then as many
    new ones for validation. With the defaults the batches are the notebook's own, and so is its
    curve. ``validate`` uses the validation sequences of the first epoch, ``test`` and prediction
    those of the clean stream.

    Args:
        level: How long the sequences are, and how far from the end the order is decided.
        stream: Where the sequences come from.
        epoch_size: Training sequences in an epoch.
        batch_size: Sequences in a training batch of one process.
        eval_batch_size: Sequences in a batch of validation, test and prediction. The notebook
            stream validates in batches of ``batch_size``: the notebook plots the loss of the last.
        val_size: Sequences for validation; 0 goes without.
        data_dir: Root folder of all data sets; nothing is read from it.
    """

    class_names = ("Q", "R", "S", "U")

    def __init__(
        self,
        level: Level = "moderate",
        stream: Stream = "clean",
        epoch_size: int = 992,
        batch_size: int = 32,
        eval_batch_size: int = 992,
        val_size: int = 992,
        data_dir: str = "data",
    ) -> None:
        super().__init__(epoch_size, batch_size, eval_batch_size, val_size, data_dir)
        for name, value, allowed in (("level", level, Level), ("stream", stream, Stream)):
            if value not in get_args(allowed):
                raise UserError(
                    f"{name} must be one of {', '.join(get_args(allowed))}, got {value!r}."
                )
        self.ranges = LEVELS[level]
        is_notebook = stream == "notebook"
        self.notebook = NotebookStream(self.ranges, epoch_size, val_size) if is_notebook else None

    def draw(self, split: Split, epoch: int) -> Tensors:
        """The sequences of one epoch: symbols (N, T) int8 and classes (N,)."""
        if self.notebook and split != "test":
            return self.notebook.draw(epoch)[split]
        start, seed = (epoch * self.epoch_size, self.seed) if split == "train" else (0, 0)
        return clean_sequences(self.ranges, split, start, self.samples(split), seed)

    def loader_arguments(self, stage: Stage) -> dict[str, Any]:
        arguments = super().loader_arguments(stage)
        if self.notebook and stage == "evaluate":
            arguments["batch_size"] = self.batch_size
        return arguments

    def make_loader(self, tensors: Tensors, stage: Stage) -> "SequenceLoader":
        return SequenceLoader(tensors, **self.loader_arguments(stage))

    def resident(self, split: str, stage: Stage) -> DrawingLoader:
        loader = super().resident(split, stage)
        if split == "val" and self.notebook:
            loader.redraw = partial(self.draw, "val")
        return loader


class SequenceLoader(DrawingLoader):
    """Resident sequences of symbols (N, T) int8, one-hot from the moment they are in a batch."""

    def __init__(self, tensors: Tensors, **loader: Any) -> None:
        super().__init__(tensors, **loader)
        self.one_hot = torch.eye(PAD + 1, PAD, device=self.device)  # the last row is zero

    def move_to(self, device: torch.device, *, fits: bool) -> None:
        super().move_to(device, fits=fits)
        self.one_hot = self.one_hot.to(device)

    def transform(self, index: Tensor, rows: list[Tensor]) -> list[Tensor]:
        symbols, target = rows
        return [F.embedding(symbols.int(), self.one_hot), target]  # (B, T) -> (B, T, D)


def clean_sequences(
    ranges: Ranges,
    split: Split,
    start: int,
    count: int,
    seed: int = 0,
) -> Tensors:
    """The sequences ``start`` to ``start + count`` of a split, each a function of its number alone.

    Philox is a generator that can be entered anywhere: each sequence owns a stretch of its numbers.

    Returns:
        Symbols (count, T) int8 and classes (count,).
    """
    needed = 2 + -(-ranges.padded // 32)  # 64-bit words: four numbers, T distractors of 2 bits
    words = 4 * -(-needed // 4)  # Philox makes four at a time and counts those
    split_number = ("train", "val", "test").index(split)
    key = np.random.SeedSequence((split_number, seed)).generate_state(2, np.uint64)
    philox = np.random.Philox(key=key, counter=start * words // 4)
    drawn = philox.random_raw(count * words).reshape(count, words)
    halves = np.hstack([drawn[:, :2] >> 32, drawn[:, :2] & 0xFFFFFFFF])  # (count, 4)
    low, high = np.array([*ranges, (0, 4)], dtype=np.uint64).T
    length, first, second, target = (low + (halves * (high - low) >> 32)).astype(np.int64).T
    pairs = drawn[:, 2:, None] >> np.arange(0, 64, 2, dtype=np.uint64) & 3
    distractors = pairs.reshape(count, 32 * (words - 2))[:, : ranges.padded]
    return _assemble(length, first, second, target, distractors.astype(np.int8))


class NotebookStream:
    """The sequences of the notebook, all from one ``RandomState(8382)`` that runs on and on.

    Its training and test generators share numpy's global state: an epoch is drawn by training,
    then by test. Any epoch can be drawn again from the state that was kept at its start.

    Args:
        ranges: Those of the level.
        epoch_size: Training sequences in an epoch.
        val_size: Test sequences in an epoch; validation, in our words.
    """

    def __init__(self, ranges: Ranges, epoch_size: int, val_size: int) -> None:
        self.ranges = ranges
        self.sizes = {"train": epoch_size, "val": val_size}
        self.random = np.random.RandomState(_NOTEBOOK_SEED)
        self.starts = [self.random.get_state()]  # of epoch 0, 1, ...
        self.latest: tuple[int, dict[str, Tensors]] = (-1, {})

    def draw(self, epoch: int) -> dict[str, Tensors]:
        """The sequences of the two splits, each symbols (N, T) int8 and classes (N,)."""
        while epoch != self.latest[0]:
            number = min(epoch, len(self.starts) - 1)  # on the way there, if it is a new one
            self.random.set_state(self.starts[number])
            self.latest = (number, {s: self.sequences(n) for s, n in self.sizes.items()})
            if number + 1 == len(self.starts):
                self.starts.append(self.random.get_state())
        return self.latest[1]

    def sequences(self, count: int) -> Tensors:
        """Draw ``count`` sequences, in the notebook's order of drawing."""
        randint = self.random.randint
        width = self.ranges.padded
        places = np.empty((count, 4), np.int64)  # length, first, second, class
        distractors = np.empty((count, width), np.int8)
        for place, text in zip(places, distractors, strict=True):
            place[:3] = [randint(low, high) for low, high in self.ranges]
            # the notebook's choice() among a to d, then among the classes, but three times as fast
            drawn = randint(0, 4, place[0] + 1)
            text[width - place[0] :], place[3] = drawn[:-1], drawn[-1]
        length, first, second, target = places.T
        return _assemble(length, first, second, target, distractors)


def _assemble(
    length: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    target: np.ndarray,
    distractors: np.ndarray,
) -> Tensors:
    """Put B, E and the two symbols of the class among distractors.

    Args:
        length: Lengths (N,) without padding.
        first: Place (N,) of the first symbol that matters, counted from B.
        second: Place (N,) of the second one.
        target: Classes (N,).
        distractors: Numbers (N, T) from 0 to 3; a sequence takes the last ``length`` of its row.

    Returns:
        Symbols (N, T) int8, padded in front, and classes (N,).
    """
    count, width = distractors.shape
    rows, begin = np.arange(count), width - length
    symbols = DISTRACTORS + distractors
    symbols[np.arange(width) < begin[:, None]] = PAD
    symbols[rows, begin] = BEGIN
    symbols[:, -1] = END
    symbols[rows, begin + first] = target // 2  # X is 0 and Y is 1; Q, R, S, U are in this order
    symbols[rows, begin + second] = target % 2
    return torch.from_numpy(symbols), torch.from_numpy(np.ascontiguousarray(target))
