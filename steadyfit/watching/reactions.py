"""What to do about a spike."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..layout import local
from ..probe import StepProbe

ReactionName = Literal["log", "skip", "rollback", "stop"]


class Reaction(ABC):
    """What to do when a step spikes, before it is taken, or when the update before it did.

    The monitor reads once a step for it. ``loop`` has ``optimizers``, ``global_step`` and
    ``should_stop``, as a Trainer of Lightning has; ``model`` is what is trained.

    Attributes:
        on_skip: Puts the buffers of the model (running statistics) back to what they were before
            the forward pass of the step; set by the monitor.
    """

    on_skip: Callable[[], None] | None = None

    def start(self, loop: Any, model: nn.Module) -> None:  # noqa: B027  optional
        """Hook: training starts."""

    @abstractmethod
    def react(self, loop: Any, model: nn.Module, optimizer: Optimizer) -> str | None:
        """Act on the spike whose gradients are in place and whose step is not yet taken.

        Returns:
            What was done, for the record; None for the name of the class.
        """

    def on_calm_step(  # noqa: B027  optional
        self, loop: Any, model: nn.Module, buffers: list[Tensor]
    ) -> None:
        """Hook: a step is about to be taken, and neither it nor those just before it spike.

        ``buffers`` are copies of those of the model, before the forward pass of the step.
        """

    def skip_step(self, optimizer: Optimizer) -> None:
        """Make the coming step change nothing.

        Gradients of zero would not do: AdamW and SGD with momentum still move, and second moments
        decay.
        """
        if self.on_skip:
            self.on_skip()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


class Stop(Reaction):
    """Leave the step out and end training, with the evidence on disk."""

    def react(self, loop: Any, model: nn.Module, optimizer: Optimizer) -> None:
        self.skip_step(optimizer)
        loop.should_stop = True


class Copy:
    """Parameters, buffers and optimizer states in main memory."""

    def __init__(
        self, loop: Any, model: nn.Module, buffers: list[Tensor], learned: Any = None
    ) -> None:
        self.parameters = [to_host(p) for p in model.parameters()]
        self.buffers = [to_host(b) for b in buffers]
        self.states: list[dict[Tensor, dict[str, Any]]] = [
            {p: {k: to_host(v) for k, v in s.items()} for p, s in o.state.items()}
            for o in loop.optimizers
        ]
        self.learned = learned

    @torch.no_grad()
    def restore(self, loop: Any, model: nn.Module) -> None:
        """Bring everything back to where it was, in place."""
        own = [*model.parameters(), *model.buffers()]
        for tensor, saved in zip(own, [*self.parameters, *self.buffers], strict=True):
            local(tensor).copy_(saved)
        for optimizer, states in zip(loop.optimizers, self.states, strict=True):
            probe = StepProbe.of(optimizer)
            probe.copy()  # going back is not an update
            state = probe.optimizer.state
            for parameter in [p for p in state if p not in states]:
                del state[parameter]
            for parameter, values in states.items():
                for key, value in values.items():
                    if isinstance(value, Tensor):
                        local(state[parameter][key]).copy_(value)
                    else:
                        state[parameter][key] = deepcopy(value)


class Rollback(Reaction):
    """Go back to an earlier state and on with the next batch: the batches between are left out.

    Copies of parameters, buffers and optimizer states are kept in main memory. A spike takes the
    newest of them; after that, steps that spike are only left out until
    ``every`` steps have passed, so that there are at most one in ``every``. What is usual is judged
    as it was at the time of the copy: older weights have a higher loss. The count of optimizer
    steps and the learning-rate schedule go on. The copies are not in checkpoints: a resumed run
    starts with none.

    Args:
        every: Optimizer steps between two copies, and between two times of going back.
        keep: Number of copies.

    Attributes:
        learned: Says what is usual at the time of a copy, and takes it back; set by the monitor.

    Raises:
        ValueError: The copies do not fit into the free memory.
    """

    def __init__(self, every: int = 50, keep: int = 3) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if value < 1:
                raise ValueError(f"Rollback: {name} must be at least 1, got {value}.")
        self.every = every
        self.keep = keep
        self.learned: tuple[Callable[[], Any], Callable[[Any], None]] | None = None
        self.copies: list[Copy] = []
        self.next_copy = 0
        self.next_return = 0

    def start(self, loop: Any, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        weights = sum(local(t).numel() * t.element_size() for t in tensors)
        needed, free = 3 * weights * self.keep, free_memory()  # two moments, as Adam has them
        if needed > free:
            raise ValueError(
                f"rollback needs {needed / 1e9:.1f} GB of main memory for {self.keep} copies and "
                f"{free / 1e9:.1f} GB are free; keep fewer copies or use the reaction skip."
            )
        self.next_copy = self.next_return = loop.global_step

    def on_calm_step(self, loop: Any, model: nn.Module, buffers: list[Tensor]) -> None:
        if loop.global_step < self.next_copy:
            return
        self.next_copy = loop.global_step + self.every
        learned = self.learned[0]() if self.learned else None
        self.copies = [*self.copies, Copy(loop, model, buffers, learned)][-self.keep :]

    def react(self, loop: Any, model: nn.Module, optimizer: Optimizer) -> str | None:
        self.skip_step(optimizer)
        if not self.copies or loop.global_step < self.next_return:
            return "skip"
        copy = self.copies.pop()
        copy.restore(loop, model)
        if self.learned:
            self.learned[1](copy.learned)
        self.next_copy = self.next_return = loop.global_step + self.every
        return None


def to_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return local(value.detach()).to("cpu", copy=True)
    return deepcopy(value)


def free_memory() -> float:
    """Available host memory in bytes, or inf if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return math.inf if kilobytes is None else 1024.0 * int(kilobytes)


REACTIONS: dict[str, type[Reaction]] = {"rollback": Rollback, "stop": Stop}
