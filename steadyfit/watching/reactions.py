"""Reactions to a spike."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..layout import local
from ..probe import StepProbe
from .kept import Kept

ReactionName = Literal["log", "skip", "rollback", "stop"]


class Reaction(ABC):
    """Act when a step spikes, before it is taken, or when the update before it did.

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
        self, loop: Any, model: nn.Module, buffers: Kept
    ) -> None:
        """Hook: a step is about to be taken, and neither it nor those just before it spike.

        ``buffers`` are those of the model, before the forward pass of the step.
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
        self.copies: list[tuple[Any, list[Kept]]] = []  # what was usual, and what was there
        self.next_copy = 0
        self.next_return = 0

    def start(self, loop: Any, model: nn.Module) -> None:
        tensors = [t for t in (*model.parameters(), *model.buffers()) if not is_lazy(t)]
        weights = sum(local(t).numel() * t.element_size() for t in tensors)
        needed, free = 3 * weights * self.keep, free_memory()  # two moments, as Adam has them
        if needed > free:
            raise ValueError(
                f"rollback needs {needed / 1e9:.1f} GB of main memory for {self.keep} copies and "
                f"{free / 1e9:.1f} GB are free; keep fewer copies or use the reaction skip."
            )
        self.next_copy = self.next_return = loop.global_step

    def on_calm_step(self, loop: Any, model: nn.Module, buffers: Kept) -> None:
        if loop.global_step < self.next_copy:
            return
        self.next_copy = loop.global_step + self.every
        learned = self.learned[0]() if self.learned else None
        probes = [StepProbe.of(optimizer) for optimizer in loop.optimizers]
        params = dict.fromkeys(
            [*model.parameters(), *(p for probe in probes for p in probe.params)]
        )
        kept = [Kept(params, [p.optimizer for p in probes], on_host=True), buffers.to_host()]
        self.copies = [*self.copies, (learned, kept)][-self.keep :]

    def react(self, loop: Any, model: nn.Module, optimizer: Optimizer) -> str | None:
        self.skip_step(optimizer)
        if not self.copies or loop.global_step < self.next_return:
            return "skip"
        learned, copies = self.copies.pop()
        for kept in copies:
            kept.restore()
        for each in loop.optimizers:
            StepProbe.of(each).copy()  # going back is not an update
        if self.learned:
            self.learned[1](learned)
        self.next_copy = self.next_return = loop.global_step + self.every
        return None


def act(reaction: Reaction, loop: Any, model: nn.Module, optimizer: Optimizer) -> str:
    """React to a spike, and return what was done.

    Raises:
        TypeError: A reaction of somebody's own does not say it in words.
    """
    name = type(reaction).__name__
    done = reaction.react(loop, model, optimizer)
    if not isinstance(done, str | None):
        raise TypeError(f"{name}.react must return a string or None, got {done!r}.")
    return done or name.lower()


def free_memory() -> float:
    """Available host memory in bytes, or inf if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return math.inf if kilobytes is None else 1024.0 * int(kilobytes)


def reaction_of(given: ReactionName | Reaction) -> Reaction | None:
    """The reaction of this name; None for those on the device.

    Raises:
        ValueError: There is no such reaction.
    """
    if isinstance(given, Reaction):
        return given
    if given not in (names := get_args(ReactionName)):
        raise ValueError(
            f"reaction must be one of {', '.join(names)}, or a Reaction, got {given!r}."
        )
    made: dict[str, type[Reaction]] = {"rollback": Rollback, "stop": Stop}
    return made[given]() if given in made else None
