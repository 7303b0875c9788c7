"""The mean of all numbers so far. Dimensions: N samples, T steps."""

import torch
from torch import Tensor

from datamodules.base import Tensors, require_at_least
from datamodules.sequences.synthetic import Split, SyntheticDataModule


class RunningMeanDataModule(SyntheticDataModule):
    """Numbers x[t] from N(0, 1), and at each step the mean of x[1] to x[t].

    The regression of Berkeley CS182, homework 6, "Implementing RNNs". A batch holds x (B, T, 1)
    and the means (B, T); the network chooses whether it is read at every step or at the last one.

    Args:
        length: Steps T of a sequence.
        epoch_size: Training sequences in an epoch.
        batch_size: Sequences in a training batch of one process.
        eval_batch_size: Sequences in a batch of validation and test.
        val_size: Sequences for validation; 0 goes without.
        data_dir: Root folder of all data sets; nothing is read from it.
    """

    num_classes = 1  # output of the network
    class_names = ()

    def __init__(
        self,
        length: int = 10,
        epoch_size: int = 16_000,
        batch_size: int = 32,
        eval_batch_size: int = 2000,
        val_size: int = 2000,
        data_dir: str = "data",
    ) -> None:
        super().__init__(epoch_size, batch_size, eval_batch_size, val_size, data_dir)
        require_at_least(1, length=length)
        self.length = length

    def draw(self, split: Split, epoch: int) -> Tensors:
        """Numbers (N, T, 1) and their running means (N, T)."""
        generator = self.generator(split, epoch)
        x = torch.randn(self.samples(split), self.length, 1, generator=generator)
        return x, running_mean(x[:, :, 0])


def running_mean(x: Tensor) -> Tensor:
    """Mean of x[1] to x[t] for each step t, (N, T) -> (N, T)."""
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)
