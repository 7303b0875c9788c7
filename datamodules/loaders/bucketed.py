"""A resident loader whose batches hold sequences of similar length.

Dimensions: N samples, B batch, T steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from datamodules.loaders.resident import ResidentLoader


class BucketedLoader(ResidentLoader):
    """Resident sequences, put together by length; a batch is as long as its longest.

    In training, the order of an epoch is cut into chunks, the samples of a chunk are sorted by
    length and cut into batches, and the batches are shuffled. All processes see the same order. The
    last batch of an epoch is filled up with samples that the next pass begins with.

    Args:
        tensors: Steps (N, T) padded after their ends, lengths (N,) in second place, then what
            else there is; the last one is the target or the id.
        loader: What :class:`ResidentLoader` takes.
    """

    chunk = 16  # batches; names padded in them grow by 10 %, and by 96 % where nobody sorts

    def __init__(self, tensors: Sequence[Tensor], **loader: Any) -> None:
        if loader["stage"] == "evaluate":
            by_length = tensors[1].argsort(stable=True)
            tensors = [t[by_length] for t in tensors]
        elif loader["stage"] == "train":
            samples, processes = len(tensors[1]), loader.get("world_size", 1)
            loader["batch_size"] = min(loader["batch_size"], max(1, samples // processes))
            together = processes * loader["batch_size"]
            loader["epoch_size"] = -(-samples // together) * together
        super().__init__(tensors, **loader)
        self.measure()

    def measure(self) -> None:
        """Note what a batch must know of its samples without asking the device."""
        self.lengths = self.sizes().cpu()

    def sizes(self) -> Tensor:
        """Hook: the steps of each sample (N,), those of its longest sequence."""
        return self.tensors[1]

    @property
    def device(self) -> torch.device:
        """Where the indices are: beside the lengths."""
        return self.lengths.device

    def order(self, generator: torch.Generator) -> Tensor:
        drawn = self.drawn(generator)
        together = self.batch_size * self.world_size
        chunks = drawn.split(self.chunk * together)
        ordered = [c[self.lengths[self.sample(c)].argsort(stable=True)] for c in chunks]
        batches = torch.cat(ordered).split(together)
        shuffled = torch.randperm(len(batches), generator=generator)
        return torch.cat([batches[number] for number in shuffled])

    def drawn(self, generator: torch.Generator) -> Tensor:
        """Hook: the samples of this epoch, in any order."""
        return super().order(generator)

    def transform(self, index: Tensor, rows: list[Tensor]) -> list[Tensor]:
        longest = int(self.lengths[self.sample(index)].max())
        return [t[:, :longest] if t.ndim == 2 else t for t in rows]
