"""Say again what was heard some steps ago. Dimensions: N samples, B batch, T padded length."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import UserError
from datamodules.base import IGNORED, Tensors, require_at_least
from datamodules.loaders.resident import Stage
from datamodules.sequences.synthetic import DrawingLoader, Split, SyntheticDataModule

LETTERS = 26
_NOTHING = 0  # symbol of a step without a letter; a to z are 1 to 26


class EchoDataModule(SyntheticDataModule):
    """Letters at random, to be repeated after a delay; before that, nothing is to be said.

    The echo task of NYU's deep learning course (homework 2, recurrent networks), as classification
    at every step. A batch holds one-hot letters (B, T, 27), lengths (B,) and the letters to say
    (B, T), -100 after the end of a sequence. With ``max_delay``, the delay of each sequence is
    drawn from 0 to ``max_delay``, and the input has its one-hot vector beside the letter at each
    step, (B, T, 27 + max_delay + 1).

    Args:
        delay: Steps between a letter and its echo; the same for all sequences.
        max_delay: If set, largest of the delays that are drawn; ``delay`` means nothing then.
        min_length: Letters in the shortest sequence.
        max_length: Letters in the longest one, T.
        epoch_size: Training sequences in an epoch.
        batch_size: Sequences in a training batch of one process.
        eval_batch_size: Sequences in a batch of validation and test.
        val_size: Sequences for validation; 0 goes without.
        data_dir: Root folder of all data sets; nothing is read from it.
    """

    class_names = ("nothing", *"abcdefghijklmnopqrstuvwxyz")
    test_size = 10_000

    def __init__(
        self,
        delay: int = 4,
        max_delay: int | None = None,
        min_length: int = 15,
        max_length: int = 25,
        epoch_size: int = 25_600,
        batch_size: int = 64,
        eval_batch_size: int = 1000,
        val_size: int = 2000,
        data_dir: str = "data",
    ) -> None:
        super().__init__(epoch_size, batch_size, eval_batch_size, val_size, data_dir)
        require_at_least(0, delay=delay, max_delay=max_delay)
        if not 1 <= min_length <= max_length:
            raise UserError(
                f"min_length must be from 1 to max_length, got {min_length} and {max_length}."
            )
        self.delay = delay
        self.max_delay = max_delay
        self.min_length = min_length
        self.max_length = max_length

    def draw(self, split: Split, epoch: int) -> Tensors:
        """Letters (N, T), delays (N,), lengths (N,) and what is to be said (N, T)."""
        generator = self.generator(split, epoch)
        count = self.samples(split)

        def integers(low: int, high: int, *size: int) -> Tensor:
            return torch.randint(low, high + 1, (count, *size), generator=generator)

        letters = integers(1, LETTERS, self.max_length)
        lengths = integers(self.min_length, self.max_length)
        fixed = self.max_delay is None
        delays = torch.full((count,), self.delay) if fixed else integers(0, self.max_delay or 0)
        return letters, delays, lengths, echo(letters, delays, lengths)

    def make_loader(self, tensors: Tensors, stage: Stage) -> "EchoLoader":
        return EchoLoader(tensors, self.max_delay, **self.loader_arguments(stage))


class EchoLoader(DrawingLoader):
    """Letters and delays that are one-hot from the moment they are in a batch."""

    def __init__(self, tensors: Tensors, max_delay: int | None, **loader: Any) -> None:
        super().__init__(tensors, **loader)
        self.max_delay = max_delay

    def transform(self, index: Tensor, rows: list[Tensor]) -> list[Tensor]:
        letters, delays, lengths, target = rows
        x = F.one_hot(letters, LETTERS + 1)  # (B, T, 27)
        if self.max_delay is not None:
            told = F.one_hot(delays, self.max_delay + 1)[:, None]
            x = torch.cat([x, told.expand(-1, letters.shape[1], -1)], 2)
        return [x.float(), lengths, target]


def echo(letters: Tensor, delays: Tensor, lengths: Tensor) -> Tensor:
    """Targets (N, T): letters (N, T), each row ``delays`` (N,) steps later.

    Nothing comes before the first echo; steps from ``lengths`` (N,) on are IGNORED.
    """
    steps = torch.arange(letters.shape[1])
    source = steps - delays[:, None]  # (N, T)
    said = letters.gather(1, source.clamp(min=0)).masked_fill(source < 0, _NOTHING)
    return said.masked_fill(steps >= lengths[:, None], IGNORED)
