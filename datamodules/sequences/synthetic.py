"""Data that is made by a rule instead of read. Dimensions: N samples, B batch."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from datamodules.base import BaseDataModule, Tensors, digest, require_at_least
from datamodules.loaders.resident import ResidentLoader, Stage

Split = Literal["train", "val", "test"]


class SyntheticDataModule(BaseDataModule):
    """Every epoch of training draws new samples, so none is seen twice.

    Those of training depend on the run's seed and on the epoch; those of validation and test are
    the same for all seeds. A subclass writes :meth:`draw`.

    Args:
        epoch_size: Training samples in an epoch.
        batch_size: Samples in a training batch of one process.
        eval_batch_size: Samples in a batch of validation, test and prediction.
        val_size: Samples for validation; 0 goes without.
        data_dir: Root folder of all data sets; nothing is read from it.
    """

    test_size = 2560

    def __init__(
        self,
        epoch_size: int,
        batch_size: int,
        eval_batch_size: int,
        val_size: int,
        data_dir: str = "data",
    ) -> None:
        super().__init__(data_dir, batch_size, eval_batch_size, val_size)
        require_at_least(1, epoch_size=epoch_size)
        self.epoch_size = epoch_size

    @abstractmethod
    def draw(self, split: Split, epoch: int) -> Tensors:
        """The samples of a split, (*inputs, target); of the training split those of one epoch."""

    def samples(self, split: Split) -> int:
        """Number of samples that ``draw`` makes."""
        return {"train": self.epoch_size, "val": self.val_size, "test": self.test_size}[split]

    def generator(self, split: Split, epoch: int) -> torch.Generator:
        """Random numbers of an epoch, no two alike."""
        number = ("train", "val", "test").index(split)
        key = (number, self.seed if split == "train" else 0, epoch)
        return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

    def setup(self, stage: str) -> None:
        if stage in ("fit", "validate"):
            self.splits["train"] = self.draw("train", 0)
            self.splits["val"] = self.draw("val", 0)
            self._train_loader = None
            self.digest = digest(self.splits["train"][0], self.splits["val"][0])
        else:
            super().setup(stage)

    def read_test(self) -> Tensors:
        tensors = self.draw("test", 0)
        self.digest = digest(tensors[0])
        return tensors

    def read_predict(self) -> Tensors:
        *inputs, target = self.read_test()
        return *inputs, torch.arange(1, len(target) + 1)

    def make_loader(self, tensors: Tensors, stage: Stage) -> "DrawingLoader":
        return DrawingLoader(tensors, **self.loader_arguments(stage))

    def resident(self, split: str, stage: Stage) -> "DrawingLoader":
        loader = cast(DrawingLoader, super().resident(split, stage))
        if split == "train":
            loader.redraw = partial(self.draw, "train")
        return loader


class DrawingLoader(ResidentLoader):
    """Resident samples that may be drawn anew for every epoch.

    Attributes:
        redraw: If set, gives new samples for every epoch. They come in the order they are drawn.
    """

    redraw: Callable[[int], Tensors] | None = None

    def batch_indices(self) -> Sequence[Tensor]:
        if self.redraw:
            self.replace(self.redraw(self.epoch))
        return super().batch_indices()

    def replace(self, tensors: Tensors) -> None:
        """Hook: go on with other samples, as many as before."""
        self.tensors = [tensor.to(self.tensors[-1].device) for tensor in tensors]

    def order(self, generator: torch.Generator) -> Tensor:
        return torch.arange(self.epoch_size)  # an epoch that is filled up begins again
