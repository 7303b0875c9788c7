"""A loader for data sets that fit on the training device. Dimensions: N samples, B batch."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from core.errors import UserError
from datamodules.loaders.prefetch import prefetch

Stage = Literal["train", "evaluate", "predict"]
SampleId = int | str  # names the same sample whatever split, seed and order are

_SHARE = 0.5  # of a device's free memory that data may take; the network needs some as well
PREFETCHED = 2  # batches that wait for the device


class ResidentLoader:
    """Batches cut from tensors that already live on the training device.

    There are no workers, no collation and no transfer: a batch is an index into resident tensors.
    The order of an epoch depends on (seed, epoch) alone, and the position inside it is saved with
    the checkpoint, so a resumed epoch goes on where it stopped, bit for bit.

    Tensors that would take more than half of the device's free memory stay in host memory, see
    :meth:`to`. A thread then gathers the rows of the next batches as they are kept, images as
    bytes, and what is made of them is made on the device: the batches are the same, bit for bit.

    Several processes share the batches by ``stage``:

    - ``train``: every process takes its rows of each global batch of ``batch_size * world_size``
      samples. Only full batches are made; the few samples left over fall to other epochs. An epoch
      of more samples than there are goes over them pass after pass, each in an order of its own.
    - ``evaluate``: likewise, but every sample comes exactly once and none is repeated.
    - ``predict``: rank r takes the whole batches r, r + world_size, ...; only the last may be
      short. Batches are the same for any number of processes, and so are the results.

    Args:
        tensors: Equally long tensors (N, ...) on one device; the last one is the target or the id.
            Batches are made there, unless the loader is told another device.
        batch_size: Samples in a batch of one process.
        stage: What the batches are for.
        seed: Seed of the order and of all random draws.
        rank: Which process this is.
        world_size: How many processes there are.
        epoch_size: Samples in an epoch of training; by default each one once.

    Attributes:
        identify: If set, gives the ids of the samples at some rows of an epoch.

    Raises:
        UserError: There are fewer samples than processes.
    """

    identify: Callable[[int, list[int]], list[SampleId] | None] | None = None

    # Lightning tells the epoch to `loader.sampler`, never to the loader itself.
    batch_sampler = None

    def __init__(
        self,
        tensors: Sequence[Tensor],
        batch_size: int,
        stage: Stage,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        epoch_size: int | None = None,
    ) -> None:
        self.tensors = list(tensors)
        self.samples = len(self.tensors[-1])
        self.epoch_size = epoch_size or self.samples
        self.repeats = max(1, -(-self.epoch_size // max(1, self.samples)))
        self.stage = stage
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        if stage != "predict" and self.epoch_size < world_size:
            raise UserError(
                f"{self.epoch_size} samples cannot be shared by {world_size} processes; "
                "use fewer with --trainer.devices."
            )
        self.batch_size = batch_size
        if stage == "train":  # few samples make a small batch rather than none
            self.batch_size = min(batch_size, self.epoch_size // world_size)
        self.sampler = self
        self.epoch = 0
        self.always_the_same = False  # every epoch is the first again
        self._position = 0  # batches handed out in this epoch
        self._resume_at = 0
        self.copies_to: torch.device | None = None  # where batches go from tensors on the host
        self._order = torch.arange(0)  # of the epoch of training that was begun, on the CPU

    def to(self, device: torch.device) -> Self:
        """Make batches on ``device``: with the tensors there, or from host memory if too large.

        What other processes hold on the device is not free: each of them asks for itself alone.
        """
        size, free = self.resident_bytes(), free_memory(device)
        fits = size <= _SHARE * free
        if not fits:
            rank_zero_warn(
                f"the data stay in host memory and are copied batch by batch: {size / 1e9:.1f} GB "
                f"are too much for {device} with {free / 1e9:.1f} GB free."
            )
        self.move_to(device, fits=fits)
        return self

    def move_to(self, device: torch.device, *, fits: bool) -> None:
        """Hook: bring to the device what fits there and what batches are made with there."""
        if fits:
            self.tensors = [tensor.to(device) for tensor in self.tensors]
        else:
            self.copies_to = device

    def resident_bytes(self) -> int:
        """Hook: bytes that the data take on the device for as long as there is the loader."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def device(self) -> torch.device:
        """Where the indices are: beside the tensors."""
        return self.tensors[-1].device

    def __len__(self) -> int:
        if self.stage == "train":
            return self.epoch_size // (self.batch_size * self.world_size)
        if self.stage == "evaluate":
            batches = -(-self.samples // (self.batch_size * self.world_size))
            return min(batches, self.samples // self.world_size)  # no process gets an empty one
        return len(range(self.rank, -(-self.samples // self.batch_size), self.world_size))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = 0 if self.always_the_same else epoch

    def state_dict(self) -> dict[str, int]:
        together = self.batch_size * self.world_size
        return {"batches": self._position, "of": len(self), "together": together}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on inside the epoch; one that is finished starts the next one.

        Raises:
            UserError: It was cut into other batches.
        """
        together = self.batch_size * self.world_size
        mine = {"of": len(self), "together": together} | state  # earlier versions saved less
        self._resume_at = state["batches"] % mine["of"]
        if self._resume_at and (mine["of"], mine["together"]) != (len(self), together):
            raise UserError(
                f"the run stopped after {state['batches']} of {mine['of']} batches of "
                f"{mine['together']} samples, and this epoch has {len(self)} of {together}; go on "
                "with the same number of processes and --data.batch_size."
            )

    def __iter__(self) -> Iterator[list[Tensor]]:
        # Lightning stops at len() and never runs code after the last yield: reset here, not there.
        start, self._resume_at = self._resume_at, 0
        indices = self.batch_indices()[start : len(self)]
        if self.copies_to is None:
            gathered: Iterator[list[Tensor]] = map(self.gather, indices)
        else:
            gathered = prefetch(self.gather, indices, PREFETCHED)
        for position, (index, rows) in enumerate(zip(indices, gathered, strict=True), start + 1):
            self._position = position
            yield self.finish(index, rows)

    def batch_indices(self) -> Sequence[Tensor]:
        """Indices (B,) of this process's part of every batch of the epoch, on the device."""
        if self.stage == "predict":
            order = torch.arange(self.samples, device=self.device)
            return order.split(self.batch_size)[self.rank :: self.world_size]
        if self.stage == "evaluate":
            order = torch.arange(self.samples, device=self.device)
            # equal numbers of batches, so that collectives meet, without a padding sample
            return [part[self.rank :: self.world_size] for part in order.tensor_split(len(self))]
        generator = self.generator()
        self._order = self.order(generator)
        order = self._order.to(self.device)
        self.begin_epoch(generator)
        together = self.batch_size * self.world_size
        return [part[self.rank :: self.world_size] for part in order.split(together)]

    def sample_ids(self, epoch: int, batch_idx: int) -> list[SampleId] | None:
        """Ids of the samples of a training batch; None if they have none, or in another epoch.

        They are those of all processes: rank r has every ``world_size``-th one, from the r-th on.
        Every process knows the order of the whole epoch, so none asks another, or the device.
        """
        epoch = 0 if self.always_the_same else epoch
        if self.identify is None or epoch != self.epoch:
            return None
        return self.identify(epoch, self.rows(batch_idx))

    def rows(self, batch_idx: int) -> list[int]:
        """Hook: sample numbers of a training batch of all processes in this epoch."""
        together = self.batch_size * self.world_size
        index = self._order[batch_idx * together : (batch_idx + 1) * together]
        numbers: list[int] = self.sample(index).tolist()
        return numbers

    def generator(self) -> torch.Generator:
        """Random numbers of this epoch; on the CPU, so that every device sees the same ones."""
        key = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0]
        return torch.Generator().manual_seed(int(key))

    def order(self, generator: torch.Generator) -> Tensor:
        """Hook: the order of this epoch, ``pass * N + sample`` for each of its samples."""
        orders = [
            number * self.samples + torch.randperm(self.samples, generator=generator)
            for number in range(self.repeats)
        ]
        return torch.cat(orders)[: self.epoch_size]

    def sample(self, index: Tensor) -> Tensor:
        """Sample numbers of an ``index`` (B,), which may count through several passes."""
        return index if self.repeats == 1 else index % self.samples

    def begin_epoch(self, generator: torch.Generator) -> None:
        """Hook: draw what the epoch needs at random."""

    def batch(self, index: Any) -> list[Tensor]:
        """The samples ``index`` (B,) as ``[*inputs, target]``."""
        return self.finish(index, self.gather(index))

    def finish(self, index: Any, rows: list[Tensor]) -> list[Tensor]:
        return self.transform(index, [self.on_device(row) for row in rows])

    def gather(self, index: Any) -> list[Tensor]:
        """Hook: what a batch is made of, cut from what is kept; a thread may do it."""
        # a blocking copy would wait until the device has done all that it was given
        numbers = self.sample(index).to(self.tensors[-1].device, non_blocking=True)
        return [self.take(tensor, numbers) for tensor in self.tensors]

    def transform(self, index: Any, rows: list[Tensor]) -> list[Tensor]:
        """Hook: the batch ``[*inputs, target]``, made on the device from what was gathered."""
        return rows

    def take(self, tensor: Tensor, numbers: Tensor) -> Tensor:
        """Rows of a tensor; page-locked if they go to a GPU, which copies only those meanwhile."""
        if self.copies_to is None:
            return tensor.index_select(0, numbers)
        shape = (len(numbers), *tensor.shape[1:])
        pinned = self.copies_to.type == "cuda"
        rows = torch.empty(shape, dtype=tensor.dtype, pin_memory=pinned)
        return torch.index_select(tensor, 0, numbers, out=rows)

    def on_device(self, tensor: Tensor) -> Tensor:
        """A tensor from beside the data on the device of the batches, without waiting for it."""
        return tensor if self.copies_to is None else tensor.to(self.copies_to, non_blocking=True)


def free_memory(device: torch.device) -> float:
    """Bytes that may still be taken on a device; without limit on a CPU, where data are anyway."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused  # PyTorch keeps what it once had, and gives it out again
