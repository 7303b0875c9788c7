"""What to do about a spike before its step is taken."""

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from .probe import StepProbe

ReactionName = Literal["log", "skip", "rollback", "stop"]


class Reaction(ABC):
    """What to do when the gradient or the loss of a step spikes, before the step is taken.

    ``loop`` has ``optimizers``, ``global_step`` and ``should_stop``, as a Trainer of Lightning has;
    ``model`` is the module that is trained.
    """

    def start(self, loop: Any, model: Any) -> None:  # noqa: B027  optional
        """Hook: training starts."""

    @abstractmethod
    def react(self, loop: Any, model: Any, optimizer: Optimizer) -> None:
        """Act on the spike whose gradients are in place and whose step is not yet taken."""

    def after_step(  # noqa: B027  optional
        self, loop: Any, model: Any, calm: bool
    ) -> None:
        """Hook: a batch is finished; ``calm`` if the last steps had no spike."""

    @staticmethod
    def leave_out(optimizer: Optimizer) -> None:
        """Make the coming step change nothing.

        Gradients of zero would not do: AdamW and SGD with momentum still move, and second moments
        decay.
        """
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


class Skip(Reaction):
    """Leave the step out: parameters and optimizer state stay as they are."""

    def react(self, loop: Any, model: Any, optimizer: Optimizer) -> None:
        self.leave_out(optimizer)


class Stop(Reaction):
    """Leave the step out and end training, with the evidence on disk."""

    def react(self, loop: Any, model: Any, optimizer: Optimizer) -> None:
        self.leave_out(optimizer)
        loop.should_stop = True


class Rollback(Reaction):
    """Go back to an earlier state and on with the next batch: the batches between are left out.

    Copies of parameters, buffers and optimizer states are kept in main memory. A spike takes the
    newest of them; further spikes, until there is a new one, take older ones, and then steps are
    only left out. The count of optimizer steps and the learning-rate schedule go on. The copies are
    not in checkpoints: a resumed run starts with none.

    Args:
        every: Optimizer steps between two copies.
        keep: Number of copies.

    Raises:
        ValueError: The copies do not fit into the free memory.
    """

    def __init__(self, every: int = 50, keep: int = 3) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if value < 1:
                raise ValueError(f"Rollback: {name} must be at least 1, got {value}.")
        self.every = every
        self.keep = keep
        # parameters and buffers, and of each optimizer the state of every parameter
        self.copies: list[tuple[dict[str, Any], list[dict[Tensor, dict[str, Any]]]]] = []
        self.next_copy = 0

    def start(self, loop: Any, model: Any) -> None:
        tensors = model.state_dict().values()
        weights = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
        needed, free = 3 * weights * self.keep, free_memory()  # two moments, as Adam has them
        if needed > free:
            raise ValueError(
                f"rollback needs {needed / 1e9:.1f} GB of main memory for {self.keep} copies and "
                f"{free / 1e9:.1f} GB are free; keep fewer copies or use the reaction skip."
            )
        self.next_copy = loop.global_step

    def after_step(self, loop: Any, model: Any, calm: bool) -> None:
        if not calm or loop.global_step < self.next_copy:
            return
        self.next_copy = loop.global_step + self.every
        state = {k: to_host(v) for k, v in model.state_dict().items()}
        optimizers: list[dict[Tensor, dict[str, Any]]] = [
            {p: {k: to_host(v) for k, v in s.items()} for p, s in o.state.items()}
            for o in loop.optimizers
        ]
        self.copies = [*self.copies, (state, optimizers)][-self.keep :]

    @torch.no_grad()
    def react(self, loop: Any, model: Any, optimizer: Optimizer) -> None:
        self.leave_out(optimizer)
        if not self.copies:
            return
        state, optimizers = self.copies.pop()
        model.load_state_dict(state)
        for own, saved in zip(loop.optimizers, optimizers, strict=True):
            StepProbe.of(own).copy()  # going back is not an update
            for parameter in [p for p in own.state if p not in saved]:
                del own.state[parameter]
            for parameter, values in saved.items():
                own_state = own.state[parameter]
                for key, value in values.items():
                    moved = value.to(own_state[key].device) if isinstance(value, Tensor) else value
                    own_state[key] = moved


def to_host(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def free_memory() -> float:
    """Bytes of main memory that are to be had; infinite where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return math.inf if kilobytes is None else 1024.0 * int(kilobytes)


REACTIONS: dict[str, type[Reaction]] = {"skip": Skip, "rollback": Rollback, "stop": Stop}
