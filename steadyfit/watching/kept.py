"""What a step may change, kept as it is, and the way back."""

from collections.abc import Iterable, MutableMapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..layout import local

Owner = MutableMapping[str, Any]  # holds tensors, numbers and containers of them under names
Entries = dict[Any, tuple[Any, Any]]  # by key or index: a value, and its copy or entries


class Kept:
    """Tensors and the containers that hold them, as they are now.

    An optimizer or a forward pass writes into tensors or puts others in their place, counts in
    numbers and fills lists. What is lazy has no value yet and is left alone.

    Args:
        params: Tensors that are written into.
        states: Of optimizers: what they remember of ``params`` is kept, what they add is dropped.
        owners: Further dictionaries: the buffers of a module, a parameter group without its
            parameters.
        on_host: Keep the copies in main memory.
    """

    def __init__(
        self,
        params: Iterable[Tensor] = (),
        states: Iterable[MutableMapping[Tensor, Owner]] = (),
        owners: Iterable[Owner] = (),
        *,
        on_host: bool = False,
    ) -> None:
        self._on_host = on_host
        self._params = [(p, self._copy(p)) for p in params if not is_lazy(p)]
        self._states = [(state, {p for p, _ in self._params if p in state}) for state in states]
        owned = [state[p] for state, known in self._states for p in known]
        self._owners = [(owner, self._entries(owner)) for owner in (*owned, *owners)]

    def _entries(self, owner: Owner | list[Any]) -> Entries:
        items = enumerate(owner) if isinstance(owner, list) else owner.items()
        return {key: (value, self._copy(value)) for key, value in items if key != "params"}

    def _copy(self, value: Any) -> Any:
        if isinstance(value, (list, dict)):
            return self._entries(value)
        if not isinstance(value, Tensor) or is_lazy(value):
            return None
        tensor = local(value.detach())
        return tensor.to("cpu", copy=True) if self._on_host else tensor.clone()

    def to_host(self) -> Self:
        """The copies of ``owners`` go to main memory."""
        self._owners = [(owner, to_host(entries)) for owner, entries in self._owners]
        return self

    @torch.no_grad()
    def restore(self, flag: Tensor | None = None) -> None:
        """Go back to what was kept, or only if a flag () on the device says so.

        The flag is read once where something has become other than a tensor of the same kind.
        """
        choice = Choice(flag)
        for param, copy in self._params:
            choice.write(param, copy)
        for owner, entries in self._owners:
            restore(owner, entries, choice)
        for state, known in self._states:
            added = [p for p, _ in self._params if p in state and p not in known]
            if added and choice.is_back:
                for p in added:
                    del state[p]


class Choice:
    """Between the old and the new, by a flag () on a device; the old without one."""

    def __init__(self, flag: Tensor | None) -> None:
        self._flag = flag
        self._flags: dict[torch.device, Tensor] = {}

    @property
    def is_back(self) -> bool:
        """Whether it is the old, read once, where tensors cannot decide."""
        if self._flag is not None:
            self._flag = self._flag.cpu()
        return self._flag is None or bool(self._flag)

    def of(self, old: Tensor, new: Tensor) -> Tensor:
        if self._flag is None:
            return old.to(new.device)
        if new.device not in self._flags:
            self._flags[new.device] = self._flag.to(new.device)
        return torch.where(self._flags[new.device], old, new)

    def write(self, tensor: Tensor, old: Tensor) -> None:
        tensor = local(tensor)
        tensor.copy_(self.of(old, tensor))


def restore(owner: Any, entries: Entries, choice: Choice) -> None:
    """Bring a dictionary or a list back to its entries, and what they hold to its copies."""
    keys = set(range(len(owner)) if isinstance(owner, list) else owner) - {"params"}
    if keys != entries.keys():
        if not choice.is_back:
            return
        if isinstance(owner, list):
            owner[:] = [value for value, _ in entries.values()]
        else:
            owner.update({key: value for key, (value, _) in entries.items()})
            for key in keys - entries.keys():
                del owner[key]
    for key, (value, copy) in entries.items():
        now = owner[key]
        if isinstance(copy, Tensor):
            if now is value and fits(now, copy):
                choice.write(now, copy)
            elif is_plain(now) and (now.shape, now.dtype) == (copy.shape, copy.dtype):
                owner[key] = choice.of(copy, now)
            elif choice.is_back:
                owner[key] = value if fits(value, copy) else copy.to(value.device)
                choice.write(owner[key], copy)
            continue
        if now is not value and choice.is_back:
            owner[key] = value
        if copy is not None and owner[key] is value:
            restore(value, copy, choice)


def to_host(copy: Any) -> Any:
    if isinstance(copy, dict):
        return {key: (value, to_host(own)) for key, (value, own) in copy.items()}
    return copy.cpu() if isinstance(copy, Tensor) else copy


def fits(tensor: Tensor, copy: Tensor) -> bool:
    """Whether a tensor takes a copy in place.

    None does in which places share memory (an expanded one), nor one of inference mode.
    """
    tensor = local(tensor)
    same = (tensor.shape, tensor.dtype) == (copy.shape, copy.dtype)
    return same and 0 not in tensor.stride() and not tensor.is_inference()


def is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value is local(value)
