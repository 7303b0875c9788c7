"""The norms of each parameter over a whole training."""

import math
from typing import Any

import numpy as np
import torch
from torch import nn


class NormHistory:
    """The largest norms of each parameter in at most ``bins`` equal stretches of training.

    Args:
        names: The parameters (P).
        bins: When so many stretches are full, each two become one.
    """

    KINDS = ("gradient", "update", "weight")

    def __init__(self, names: list[str], bins: int = 512) -> None:
        self.names = names
        self.bins = bins
        self.width = 1  # optimizer steps in a stretch
        self.table = torch.zeros(0, len(self.KINDS), len(names))

    def grow(self, names: list[str]) -> None:
        """Take in more parameters, named after the ones there are."""
        self.table = nn.functional.pad(self.table, (0, len(names) - len(self.names)))
        self.names = names

    def add(self, steps: list[int], norms: np.ndarray) -> None:
        """Take in the norms of some steps (K, 3, P), in the order of ``KINDS``."""
        while steps[-1] // self.width >= self.bins:
            self._extend(len(self.table) + len(self.table) % 2)
            self.table = self.table.unflatten(0, (-1, 2)).amax(1)
            self.width *= 2
        self._extend(steps[-1] // self.width + 1)
        stretches = torch.tensor(steps) // self.width
        rows = torch.from_numpy(norms).to(self.table).nan_to_num(nan=math.inf, posinf=math.inf)
        self.table.scatter_reduce_(0, stretches[:, None, None].expand_as(rows), rows, "amax")

    def _extend(self, length: int) -> None:
        missing = self.table.new_zeros(max(0, length - len(self.table)), *self.table.shape[1:])
        self.table = torch.cat([self.table, missing])

    def state_dict(self) -> dict[str, Any]:
        return {"names": self.names, "width": self.width, "table": self.table}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.names, self.width, self.table = state["names"], state["width"], state["table"]
