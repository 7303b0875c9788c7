"""Buffers that forward passes write into: running statistics, counters, caches.

Dimensions: Q buffers are watched.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..layout import norms
from .kept import Kept

_WATCHED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Buffers:
    """The buffers of a model: their norms, and copies of them for a step that is left out.

    Attributes:
        names: Those with floating-point values, which are watched (Q).
        kept: All of them, as they were at the last :meth:`keep`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kept = Kept()
        self.find()

    def find(self) -> None:
        """Look for them; a lazy module has none at first."""
        places = {
            f"{path}.{key}".removeprefix(".").replace("_orig_mod.", ""): (module._buffers, key)
            for path, module in self.model.named_modules()
            for key, b in module._buffers.items()
            if b is not None and b.dtype in _WATCHED and not is_lazy(b)
            if b.layout is torch.strided
        }
        self.names: Sequence[str] = list(places)
        self._places = list(places.values())  # a forward pass may put another tensor there

    def norms(self) -> Tensor | None:
        """L2 norms (Q,) on the device; None without buffers."""
        if any(owner.get(key) is None for owner, key in self._places):
            self.find()  # some are gone
        found = [owner[key] for owner, key in self._places]
        return norms([b.detach() for b in found if b is not None]) if found else None

    def keep(self) -> None:
        """Copy them."""
        self.kept = Kept(owners=[m._buffers for m in self.model.modules() if m._buffers])
