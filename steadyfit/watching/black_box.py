"""States of a training before its worst spikes, kept while it goes on."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .records import FOLLOW, SpikeRecord

LEAD = 10  # optimizer steps by which a state has to be older than the spike
_OPERATORS = 3  # a step has at least so many for each tensor that is trained
_COPIES = 3  # of the state in memory at most


class BlackBox:
    """Copies of a training's state, of which those before the worst spikes become files.

    A copy stays on its device until the spikes are known that it is the last one before, which
    takes until ``FOLLOW`` steps after the next copy. Then it is dropped or written. A file takes
    its name when it is whole, and only then the one before the mildest spike goes, so that there
    are never more than ``keep`` files and one that is being written.

    Args:
        keep: Files at most, each as large as a checkpoint.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.folder: Path | None = None  # of the first process alone
        self.due = 0  # the optimizer step of the next copy
        self._copies: list[tuple[int, Any]] = []  # oldest first
        self._kept: dict[int, float] = {}  # severity of the spikes after each file's step

    def open(self, folder: Path, step: int, records: Sequence[SpikeRecord]) -> None:
        """Begin at a step, with the files of a training that goes on there."""
        self.folder = folder
        self._copies, self._kept = [], {}
        for path in folder.glob(".*.ckpt"):  # a training was killed while it was written
            path.unlink()
        steps = sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("*.ckpt"))
        for own, following in zip(steps, [*steps[1:], step], strict=False):
            if own > step:  # it comes again
                self._path(own).unlink()
            else:
                self._kept[own] = _worst(records, own, following)

    @torch.no_grad()
    def take(self, step: int, state: Any, trained: int, multiple: int) -> None:
        """Copy the state of a training after a step, and say when the next copy is due.

        Args:
            step: Optimizer steps so far.
            state: All that a checkpoint holds.
            trained: Tensors that are trained.
            multiple: Of so many steps is the interval to the next copy.
        """
        # below 1 % of the operators of the steps in between
        least = 100 * len(list(_tensors_of(state))) / (_OPERATORS * max(1, trained))
        self.due = step + multiple * math.ceil(least / multiple)
        if self.folder and len(self._copies) < _COPIES:
            self._copies.append((step, _copy_of(state)))

    def judge(self, step: float, records: Sequence[SpikeRecord]) -> None:
        """Drop or write the copies whose spikes are known by a step; all of them by infinity."""
        while self._copies:
            following = self._copies[1][0] if len(self._copies) > 1 else math.inf
            if math.isfinite(step) and step < following + FOLLOW:
                return
            own, state = self._copies.pop(0)
            severity = _worst(records, own, following)
            mildest = min(self._kept.values()) if len(self._kept) >= self.keep else 0.0
            if severity > mildest:
                self._write(own, state, severity)

    def _path(self, step: int) -> Path:
        assert self.folder
        return self.folder / f"step_{step}.ckpt"

    def _write(self, step: int, state: Any, severity: float) -> None:
        """Write a state whole or not at all; a training does not end for it."""
        path = self._path(step)
        temporary = path.with_name(f".{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch's own of a full disk
            with suppress(OSError):
                temporary.unlink()
            print(f"The state before a spike, {path}, could not be written: {error}")
            return
        self._kept[step] = severity
        if len(self._kept) > self.keep:
            mildest = min(self._kept, key=lambda own: self._kept[own])
            del self._kept[mildest]
            with suppress(OSError):  # as where somebody reads it, on Windows
                self._path(mildest).unlink()


def _copy_of(state: Any) -> Any:
    """Copy a state on its devices; tensors that share memory, as tied weights do, but once."""
    clones: dict[Any, Tensor] = {}
    memo: dict[int, Any] = {}
    for tensor in _tensors_of(state):
        key = (tensor.data_ptr() or id(tensor), tensor.dtype, tensor.shape, tensor.stride())
        if key not in clones:
            clones[key] = tensor.detach().clone()
        memo[id(tensor)] = clones[key]
    return deepcopy(state, memo)


def _tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors_of(part)


def _worst(records: Sequence[SpikeRecord], step: int, following: float) -> float:
    """Severity of the worst spike that a state is the last one before; 0 without any."""
    first, end = step + LEAD, following + LEAD
    return max((_severity(r) for r in records if r.spiked and first <= r.step < end), default=0)


def _severity(record: SpikeRecord) -> float:
    """Highest loss of a spike over the usual one; at least a little, in whatever it is seen."""
    loss = record.signals.get("loss")
    height = max(loss.value if loss else 0.0, record.max_loss_after or 0.0)
    if not math.isfinite(height):
        return math.inf
    return max(1e-9, height / loss.center) if loss and loss.center > 0 else 1e-9
