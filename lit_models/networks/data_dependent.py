"""Layers that are shown training inputs before training."""

from collections.abc import Iterator
from typing import Any

from torch import nn


def asking_for_data(network: nn.Module) -> Iterator[Any]:
    """The parts that have a method ``init_from_data``; such a part answers for those within it."""
    answered_for: set[nn.Module] = set()
    for part in network.modules():
        if hasattr(part, "init_from_data") and part not in answered_for:
            answered_for.update(part.modules())
            yield part
