"""Training and predicting with loaders of the user's own, without a data module of this project."""

from typing import Any

import torch
from lightning import Trainer
from torch import Tensor


def first_inputs(trainer: Trainer, count: int) -> list[Tensor]:
    """Return the first inputs of a user's own training loader, at least ``count`` of each."""
    batches: list[list[Tensor]] = []
    with torch.random.fork_rng(devices=[]):  # what the loader draws here, it draws again
        for *inputs, target in trainer.fit_loop._data_source.dataloader():
            batches.append(inputs)
            count -= len(target)
            if count <= 0:
                break
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def with_ids(batch: Any) -> list[Any]:
    """Return a batch to predict as ``[*inputs, ids]``; None stands for missing ids."""
    parts = [batch] if isinstance(batch, Tensor) else list(batch)
    return parts if len(parts) > 1 else [*parts, None]
