"""The parameters of one optimizer, compared before and after its step.

Dimensions: P parameters of one optimizer, A of them with a gradient in this step, N elements of
those.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import processes
from .layout import Layout, dense, local

_DECOUPLED = tuple(
    getattr(torch.optim, name)
    for name in ("AdamW", "Adafactor", "Muon")
    if hasattr(torch.optim, name)
)

_LAYOUTS = 64  # sets of active parameters whose layout is remembered

Factors = Tensor | list[float]  # (A,), a list where `Layout.on_host`


@dataclass
class Update:
    """The effect of a step, on the device; None until the step is taken."""

    squares: Tensor | None = None  # squared norms (A,) of the proposed update
    gradient: Tensor | None = None  # squared norms (A,) as the step used it; None if nobody clips
    products: Tensor | None = None  # (A,) of the gradient and the way back; None if nobody asks
    factors: Tensor | None = None  # (A,) by which the update was shortened; None if nobody would


class StepProbe:
    """Compare the parameters of one optimizer before and after its step, once for all who ask.

    ``snapshot`` copies them on the device before the step; a hook of the optimizer compares after
    it and drops the copy, so the memory is taken while that of the activations is free. A gradient
    scaler that leaves out a step leaves the hook uncalled: that needs no device read.

    Who wants to shorten updates adds a function to ``limits``: it is given the probe, when ``back``
    and ``update.squares`` are known, and returns a factor for each parameter (A,). A step with all
    factors at 1 is left as it is, bit for bit.

    Only parameters with a gradient are looked at, whatever was frozen, thawed or added before. An
    optimizer that overwrites its gradients (SGD with nesterov and foreach) shows others in
    ``update.gradient``. Of sharded parameters (DTensor) this process looks at its own part, and
    ``reduce`` puts the parts together.

    Attributes:
        is_stepping: True while the optimizer is at it: its closure evaluates loss and gradients.
        params: All parameters of the optimizer (P).
        layout: Those with a gradient (A), since they were last looked for.
        back: The way from the new parameters to the old ones, weight decay left out, as ``layout``
            gathers it; there while ``limits`` are asked.
        shortened: Factors (A,) by which a limit has shortened the update itself already.
        asks_products: Set by who wants to know what a step promises, to first order, to take off
            the loss: the sum of ``update.products``.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.limits: list[Callable[[StepProbe], Factors]] = []
        self.after_step: list[Callable[[], None]] = []
        self.gradients_are_clipped = False
        self.asks_products = False
        self.update = Update()
        self.back: list[Tensor] = []
        self.shortened: Tensor | None = None
        self._before: list[Tensor] = []
        self._before_layout = Layout([], [], [])
        self._versions: list[int] = []  # of the parameters in it
        self._asked: dict[object, int] = {}  # who watches the coming step, and its number
        self._collect()
        self.is_stepping = False
        optimizer.register_step_pre_hook(self._begin)
        optimizer.register_step_post_hook(self._compare)

    @classmethod
    def of(cls, optimizer: Optimizer) -> "StepProbe":
        """The probe of this optimizer, or of the one it wraps (Fabric, Accelerate, Lightning)."""
        optimizer = unwrapped(optimizer)
        probe: StepProbe | None = getattr(optimizer, "step_probe", None)
        if probe is None:
            probe = optimizer.step_probe = cls(optimizer)  # type: ignore[attr-defined]
        return probe

    def _collect(self) -> None:
        groups = self.optimizer.param_groups
        self.params: list[Tensor] = [p for group in groups for p in group["params"]]
        self._sizes = [len(group["params"]) for group in groups]
        self._all = list(range(len(self.params)))
        self._groups = [g for g, group in enumerate(groups) for _ in group["params"]]
        self._layouts: dict[tuple[int, ...], Layout] = {}  # by the indices of the active
        copies = [_shards(p) for p in self.params]
        self.is_sharded = any(count > 1 for count in copies)
        self._shards = torch.tensor(copies, dtype=torch.float32)  # (P,)
        self.layout = Layout([], [], [])

    def find_active(self) -> list[Tensor]:
        """Note in ``layout`` which parameters have a gradient, and return these gradients."""
        now = [group["params"] for group in self.optimizer.param_groups]
        same = list(map(len, now)) == self._sizes
        if not same or not all(map(is_, chain.from_iterable(now), self.params)):  # fine-tuning
            self._collect()
        found = [p.grad for p in self.params]
        gradients = [g for g in found if g is not None]
        if len(gradients) == len(found):
            active = self._all
        else:
            active = [i for i, g in enumerate(found) if g is not None]
        if active != self.layout.active:
            key = tuple(active)
            if key not in self._layouts:
                if len(self._layouts) == _LAYOUTS:
                    self._layouts.clear()
                owners = [self._groups[i] for i in key]
                self._layouts[key] = Layout(active, owners, [self.params[i] for i in key])
            self.layout = self._layouts[key]
        return gradients

    @property
    def active(self) -> list[Tensor]:
        """The parts of the parameters with a gradient (A) that this process holds."""
        params = self.params
        if self.is_sharded:
            return [local(params[i]).detach() for i in self.layout.active]
        return [params[i] for i in self.layout.active]

    def gradient_squares(self) -> Tensor:
        """Squared L2 norms (A,) of the gradients, of this process's part, on the device."""
        gradients = [dense(local(g)) for g in self.find_active()]
        return self.layout.squares(self.layout.gather(gradients), exact=True)

    def gradients_of_step(self) -> list[Tensor]:
        """The gradients that the step was taken with, gathered; zeros where there is none now."""
        params = [self.params[i] for i in self.layout.active]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        return self.layout.gather([dense(local(g)) for g in gradients])

    def reduce(self, *parts: Tensor) -> Sequence[Tensor]:
        """Sum squares or products (A,) over the processes that hold parts of the parameters.

        Of several there is one collective for all.
        """
        if not self.is_sharded:
            return parts
        # a parameter that is not sharded comes from every process, one that is from each replica
        table = torch.stack(parts)
        return processes.average(table * self.shard_counts(table)).unbind()

    def shard_counts(self, like: Tensor) -> Tensor:
        """Into how many parts each parameter is cut (A,)."""
        return self._shards[self.layout.active].to(like)

    def snapshot(self, step: int, watcher: object) -> Update:
        """Copy the parameters and return what the coming optimizer step will fill in.

        Call it when the gradients are there. A second watcher takes part in what the first has
        asked for, whatever it counts; one that comes again with another step says that the one
        before was never taken, and so do parameters that others have written into.

        Args:
            step: Its number, as the watcher counts.
            watcher: Who asks.
        """
        joins = bool(self._asked) and self._asked.get(watcher, step) == step
        if not joins or self._versions != [p._version for p in self.params]:
            self._asked = {watcher: step}
            self.update = Update()
            self.find_active()
            self.copy()
        self._asked[watcher] = step
        return self.update

    @property
    def is_armed(self) -> bool:
        """True if the coming step is going to be compared."""
        return bool(self._asked)

    @torch.no_grad()
    def copy(self) -> None:
        """Take the parameters as they are for those before the step."""
        if self._asked:
            self._before, self._before_layout = self.layout.copy(self.active), self.layout
            self._versions = [p._version for p in self.params]

    @torch.no_grad()
    def weight_squares(self) -> Tensor:
        """Squared L2 norms (A,) of the parameters before the step, of this process's part."""
        return self.layout.squares(self._before)

    def _begin(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.is_stepping = True

    @torch.no_grad()
    def _compare(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.is_stepping = False
        if not self._asked:
            return
        self._asked.clear()
        self.layout = self._before_layout  # whoever has looked for gradients since
        layout, active = self.layout, self.active
        before, self._before = self._before, []
        if active:
            self._take_decay_off(before)
            now = layout.gather(active)
            if self.limits:  # which need both ends
                self.back = list(torch._foreach_sub(before, now))
            else:
                torch._foreach_sub_(before, now)
                self.back = before
            self.update.squares = layout.squares(self.back)
            if self.gradients_are_clipped or self.asks_products:
                self._compare_gradients(self.gradients_of_step())
            if self.limits:
                self._shorten(before, active)
        self.back = []
        for function in self.after_step:
            function()

    def _compare_gradients(self, gradients: list[Tensor]) -> None:
        if self.gradients_are_clipped:
            self.update.gradient = self.layout.squares(gradients)
        if self.asks_products:
            self.update.products = self.layout.inner(self.back, gradients)

    def _shorten(self, before: list[Tensor], active: list[Tensor]) -> None:
        """Ask the limits, and go back as far as the strictest wants."""
        self.shortened = None
        found = [limit(self) for limit in self.limits]
        unchanged = False
        if self.layout.on_host:
            lists = [f.tolist() if isinstance(f, Tensor) else f for f in found]
            numbers: list[float] = [min(each) for each in zip(*lists, strict=True)]
            unchanged = min(numbers) == 1.0
            factors = self.back[0].new_tensor(numbers)
        else:
            factors = torch.stack([torch.as_tensor(f) for f in found]).amin(0)
        self.update.factors = factors if self.shortened is None else factors * self.shortened
        if unchanged:
            return
        # where the factor is 1 these end at the parameters, bit for bit
        self.layout.lerp_(before, self.layout.gather(active), factors)
        torch._foreach_copy_(active, self.layout.scatter(before, active))

    def _take_decay_off(self, before: list[Tensor]) -> None:
        """Decoupled weight decay is not a part of the update."""
        decoupled = isinstance(self.optimizer, _DECOUPLED)
        for number, group in enumerate(self.optimizer.param_groups):
            decays = group.get("decoupled_weight_decay", decoupled) and group.get("weight_decay")
            if decays and (tensors := self.layout.of_group(before, number)):
                torch._foreach_mul_(tensors, 1 - group["lr"] * group["weight_decay"])


def refuse_complex(name: str, params: Iterable[Tensor]) -> None:
    """Refuse parameters whose squares are no norms.

    Raises:
        ValueError: One of them is complex.
    """
    if any(p.is_complex() for p in params):
        raise ValueError(
            f"{name} does not take complex parameters; train them as pairs of real ones with "
            "torch.view_as_real."
        )


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer, of a wrapper of Fabric, Accelerate or Lightning the one in it."""
    inside: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inside


def index_of(optimizer: Optimizer | None, watched: Sequence[Optimizer]) -> int:
    """Find an optimizer among the watched ones; None stands for the only one.

    Raises:
        ValueError: It is none of them, or there are several.
    """
    if optimizer is None and len(watched) == 1:
        return 0
    if optimizer is None or unwrapped(optimizer) not in watched:
        kind = "None" if optimizer is None else type(optimizer).__name__
        raise ValueError(f"tell which of the {len(watched)} watched optimizers steps, got {kind}.")
    return watched.index(unwrapped(optimizer))


def names_of(params: Iterable[Tensor], model: nn.Module) -> list[str]:
    """Names of parameters in a model, without what ``torch.compile`` puts into them."""
    known: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    names = [known.get(p, f"parameter {i}") for i, p in enumerate(params)]
    return [name.replace("_orig_mod.", "") for name in names]


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of data parallelism and of Fabric, whose names are its own.

    Raises:
        ValueError: It is cut into parts that are no tensors of torch.
    """
    for module in model.modules():
        if (name := type(module).__name__) in ("FullyShardedDataParallel", "DeepSpeedEngine"):
            raise ValueError(
                f"{name} keeps parts that say nothing of a parameter; use torch's fully_shard, or "
                "DistributedDataParallel."
            )
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_forward_module" in dict(model.named_children()):  # of Fabric
            model = model.get_submodule("_forward_module")
        else:
            return model


def _shards(parameter: Tensor) -> int:
    """Into how many parts a parameter is cut over the processes; 1 if it is whole in each."""
    count = 1
    for dimension, placement in enumerate(getattr(parameter, "placements", ())):
        if placement.is_shard():
            count *= parameter.device_mesh.size(dimension)  # type: ignore[attr-defined]
    return count
