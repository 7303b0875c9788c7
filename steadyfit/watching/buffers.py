"""What forward passes write into a model: running statistics, counters, caches.

Dimensions: Q buffers are watched.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..layout import norms


class Buffers:
    """The buffers of a model: their norms, and copies of them for a step that is left out.

    Attributes:
        names: Those with floating-point values, which are watched (Q).
        copies: All of them, as they were before the last forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: Sequence[str] = ()
        self.copies: list[Tensor] = []
        self._watched: list[Tensor] = []

    def find(self) -> bool:
        """Look for them, and say whether some are new: a lazy module has none at first."""
        found = {n: b.detach() for n, b in self.model.named_buffers() if b.is_floating_point()}
        self.names = [name.replace("_orig_mod.", "") for name in found]
        self._watched = list(found.values())
        return len(self.copies) != len(list(self.model.buffers()))

    def norms(self) -> Tensor | None:
        """L2 norms (Q,) on the device; None without buffers."""
        return norms(self._watched) if self._watched else None

    def keep(self) -> None:
        """Copy them."""
        self.copies = [b.clone() for b in self.model.buffers() if not is_lazy(b)]

    @torch.no_grad()
    def put_back(self) -> None:
        """Bring them back to the copies, in place."""
        for buffer, copy in zip(self.model.buffers(), self.copies, strict=True):
            buffer.copy_(copy)
