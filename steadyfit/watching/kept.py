"""Copies of everything that a step may change, and the way back."""

from collections import deque
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..layout import local

_Owner = MutableMapping[Any, Any]  # holds tensors, numbers and containers of them under names
_Entries = dict[Any, tuple[Any, Any]]  # by key or index: a value, and its copy or entries


class Kept:
    """Tensors and the containers that hold them, as they are now.

    An optimizer or a forward pass writes into tensors or puts others in their place, counts in
    numbers and fills lists. What is lazy has no value yet and is left alone.

    Args:
        params: Tensors that are written into.
        optimizers: What these remember of ``params`` is kept, and what they remember of none;
            what they add is dropped.
        owners: Further dictionaries, as the buffers of a module.
        groups: Keep what stands in the parameter groups of the optimizers as well.
        on_host: Keep the copies in main memory.
    """

    def __init__(
        self,
        params: Iterable[Tensor] = (),
        optimizers: Sequence[Optimizer] = (),
        owners: Iterable[_Owner] = (),
        *,
        groups: bool = False,
        on_host: bool = False,
    ) -> None:
        self._on_host = on_host
        self._params = [(p, self._copy(p)) for p in params if not is_lazy(p)]
        self._states = [(optimizer, self._states_of(optimizer)) for optimizer in optimizers]
        self._owners = [(owner, self._entries(owner)) for owner in owners]
        for group in [group for o in optimizers for group in o.param_groups if groups]:
            entries = self._entries({k: v for k, v in group.items() if k != "params"})
            self._owners.append((group, entries | {"params": (group["params"], None)}))

    def _states_of(self, optimizer: Optimizer) -> dict[Any, _Entries]:
        known = {p for p, _ in self._params}
        known.update(optimizer.param_groups[0]["params"][:1])  # L-BFGS has all of it there
        return {
            key: self._entries(state)
            for key, state in optimizer.state.items()
            if key in known or not isinstance(key, Tensor)
        }

    def _entries(self, owner: Any) -> _Entries:
        items = owner.items() if isinstance(owner, dict) else enumerate(owner)
        return {key: (value, self._copy(value)) for key, value in items}

    def _copy(self, value: Any) -> Any:
        if isinstance(value, (dict, list, tuple, deque)):
            return self._entries(value)
        if not isinstance(value, Tensor) or is_lazy(value):
            return None
        tensor = local(value.detach())
        return tensor.to("cpu", copy=True) if self._on_host else tensor.clone()

    def to_host(self) -> Self:
        """The copies of ``owners`` go to main memory."""
        self._owners = [(owner, _to_host(entries)) for owner, entries in self._owners]
        return self

    @torch.no_grad()
    def restore(self, choice: "Choice | None" = None) -> None:
        """Go back to what was kept, or to where a choice leads."""
        choice = choice or Choice()
        for param, copy in self._params:
            choice.write(param, copy)
        for owner, entries in self._owners:
            restore(owner, entries, choice)
        for optimizer, states in self._states:
            state = optimizer.state  # another one, if it was loaded
            lost = states.keys() - state.keys()
            added = [p for p, _ in self._params if p in state and p not in states]
            if (lost or added) and choice.is_back:
                state.update({key: {} for key in lost})
                for p in added:
                    del state[p]
            for key in states.keys() & state.keys():
                restore(state[key], states[key], choice)


class Choice:
    """Between the old and the new, by a flag () on a device; the old without one.

    The flag is read once where something has become other than a tensor of the same kind.
    """

    def __init__(self, flag: Tensor | None = None) -> None:
        self._flags = {} if flag is None else {flag.device: flag}
        self._is_back: bool | None = True if flag is None else None

    @property
    def is_back(self) -> bool:
        """True if it is the old, where tensors cannot decide."""
        if self._is_back is None:
            self._is_back = bool(next(iter(self._flags.values())))
        return self._is_back

    def of(self, old: Tensor, new: Tensor) -> Tensor:
        if not self._flags:
            return old.to(new.device)
        if new.device not in self._flags:
            self._flags[new.device] = next(iter(self._flags.values())).to(new.device)
        return torch.where(self._flags[new.device], old, new)

    def write(self, tensor: Tensor, old: Tensor) -> None:
        tensor = local(tensor).data  # a graph that is used again may hold it: no new version
        tensor.copy_(self.of(old, tensor))


def restore(owner: Any, entries: _Entries, choice: Choice) -> None:
    """Bring a container back to its entries, and what they hold to its copies."""
    keys = owner.keys() if isinstance(owner, dict) else set(range(len(owner)))
    if keys != entries.keys():
        if not choice.is_back:
            return
        if isinstance(owner, dict):
            for key in keys - entries.keys():
                del owner[key]
            owner.update({key: value for key, (value, _) in entries.items()})
        else:
            owner.clear()
            owner.extend(value for value, _ in entries.values())
    for key, (value, copy) in entries.items():
        now = owner[key]
        if isinstance(copy, Tensor):
            if _fits(now, copy):
                choice.write(now, copy)
            elif isinstance(owner, tuple):
                continue
            elif _is_like(now, copy):
                owner[key] = choice.of(copy, now)
            elif choice.is_back:
                owner[key] = value if _fits(value, copy) else copy.to(value.device)
                if owner[key] is value:
                    choice.write(value, copy)
            continue
        if now is not value and choice.is_back:
            owner[key] = value
        if copy is not None and owner[key] is value:
            restore(value, copy, choice)


def _to_host(copy: Any) -> Any:
    if isinstance(copy, dict):
        return {key: (value, _to_host(own)) for key, (value, own) in copy.items()}
    return copy.cpu() if isinstance(copy, Tensor) else copy


def _is_like(value: Any, copy: Tensor) -> bool:
    """Tell if a value can stand for a copy, element by element."""
    if not isinstance(value, Tensor):
        return False
    part = local(value)
    dense = part.layout is torch.strided and not part.is_quantized and part.dtype not in _NARROW
    return dense and (part.shape, part.dtype) == (copy.shape, copy.dtype)


def _fits(value: Any, copy: Tensor) -> bool:
    """Tell if a value takes a copy in place.

    None does in which places share memory (an expanded one), nor one of inference mode.
    """
    if not _is_like(value, copy):
        return False
    part = local(value)
    return 0 not in part.stride() and not part.is_inference()


_NARROW = {getattr(torch, n) for n in dir(torch) if n.startswith(("float8", "float4"))}
