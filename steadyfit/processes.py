"""The processes of a training, by torch.distributed; one alone if that is not used."""

from collections.abc import Mapping

import torch
from torch import Tensor


def _count() -> int:
    available = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if available else 1


def is_first() -> bool:
    return _count() == 1 or torch.distributed.get_rank() == 0


def average(tensor: Tensor) -> Tensor:
    """The mean of a tensor over the processes, on the device; every process has to ask."""
    if (processes := _count()) == 1:
        return tensor
    tensor = tensor / processes
    torch.distributed.all_reduce(tensor)
    return tensor


def average_all(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same of some one-dimensional tensors, in one collective."""
    if _count() == 1:
        return tensors
    whole = average(torch.cat(list(tensors.values())))
    return dict(zip(tensors, whole.split([len(t) for t in tensors.values()]), strict=True))
