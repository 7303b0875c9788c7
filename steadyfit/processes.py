"""The processes of a training, by torch.distributed; one alone if that is not used."""

import torch
from torch import Tensor


def count() -> int:
    available = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if available else 1


def is_first() -> bool:
    return count() == 1 or torch.distributed.get_rank() == 0


def average(tensor: Tensor) -> Tensor:
    """The mean of a tensor over the processes, on the device; every process has to ask."""
    if (processes := count()) == 1:
        return tensor
    tensor = tensor / processes
    torch.distributed.all_reduce(tensor)
    return tensor
