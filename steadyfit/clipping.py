"""Shortening of the updates that spikes are made of.

Dimensions: A parameters of one optimizer that have a gradient.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import processes
from .probe import Factors, StepProbe, refuse_complex, unwrapped_model

Floor = float | Literal["auto"]
_MEMORY = 0.01  # share of a new loss in the moving averages


class UpdateLimit:
    """By which factors the updates of a step are to be shortened, computed on the device.

    Args:
        max_rms: Largest root mean square of an update, in learning rates; None for no limit. Of an
            embedding it holds for each row: few rows of it take part in a step.
        max_decrease: Largest share of the loss above ``floor`` that a step may promise to remove;
            None for no limit.
        floor: What the loss cannot fall below: 0 for a cross-entropy or a squared error, more with
            label smoothing, less for a loss that may be negative. ``auto`` takes the lowest loss
            seen less its usual scatter, the mean absolute deviation from its mean over the last
            hundred steps or so.

    Attributes:
        loss: The loss () whose gradient the coming step follows; only ``max_decrease`` asks for it.
        seen: Lowest loss, moving mean and mean absolute deviation (3,), for ``auto``; NaN before
            the first loss.
        embeddings: Parameters whose rows are limited one by one.

    Raises:
        ValueError: If an argument is out of range, or there is no limit.
    """

    def __init__(
        self,
        max_rms: float | None = 1.0,
        max_decrease: float | None = None,
        floor: Floor = 0.0,
    ) -> None:
        for name, value in (("max_rms", max_rms), ("max_decrease", max_decrease)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}; use None for no limit.")
        if max_rms is None and max_decrease is None:
            raise ValueError("there is no limit; set max_rms, max_decrease, or both.")
        if floor != "auto" and not (isinstance(floor, (int, float)) and math.isfinite(floor)):
            raise ValueError(f"floor must be a finite number or auto, got {floor!r}.")
        self.max_rms = max_rms
        self.max_decrease = max_decrease
        self.floor = floor
        self.loss: Tensor | None = None
        self.seen = torch.full((3,), math.nan)
        self.embeddings: set[Tensor] = set()

    def attach(self, optimizer: Optimizer, model: nn.Module | None = None) -> None:
        """Check that the optimizer can be limited, and find the embeddings of a model.

        Raises:
            ValueError: A parameter is complex, or the optimizer overwrites the gradients which
                ``max_decrease`` needs.
        """
        refuse_complex("UpdateLimit", StepProbe.of(optimizer).params)
        if self.max_decrease is not None and overwrites_gradients(optimizer):
            raise ValueError(
                "max_decrease needs the gradients after the step, and SGD with nesterov "
                "overwrites them; set foreach to False, or max_decrease to None."
            )
        if self.max_decrease is not None:
            StepProbe.of(optimizer).asks_products = True
        modules = () if model is None else unwrapped_model(model).modules()
        self.embeddings |= {m.weight for m in modules if isinstance(m, nn.Embedding)}

    def __call__(self, probe: StepProbe) -> Factors:
        """The factors (A,) of the step that the probe has seen."""
        squares, products = self._whole(probe)
        if probe.layout.on_host:
            return self._factors_of_numbers(probe, squares.tolist(), products)
        one = squares.new_ones(())
        factors = torch.ones_like(squares)
        if self.max_rms is not None:
            # where nothing moved the quotient is 0 / 0, and a NaN is left for all to see
            factors = torch.fmin(self._largest(probe) / squares, one).sqrt_()
        if products is not None and self.loss is not None and self.max_decrease is not None:
            room = self.loss - self._lower_bound(self.loss)
            room = self.max_decrease * room / (room > 0)  # without room there is no limit
            factors /= torch.fmax(products.to(factors).dot(factors) / room, one)
        return factors

    def _factors_of_numbers(
        self, probe: StepProbe, squares: list[float], products: Tensor | None
    ) -> list[float]:
        """The same where numbers are there without a read."""
        factors = [1.0] * len(squares)
        if self.max_rms is not None:
            rates = [float(probe.optimizer.param_groups[n]["lr"]) for n in probe.layout.group_of]
            caps = [(r * self.max_rms) ** 2 for r in rates]
            triples = zip(caps, probe.layout.elements, squares, strict=True)
            factors = [math.sqrt(cap * n / s) if s > cap * n else 1.0 for cap, n, s in triples]
        if products is not None and self.loss is not None and self.max_decrease is not None:
            room = self.max_decrease * float(self.loss - self._lower_bound(self.loss))
            promised = sum(f * p for f, p in zip(factors, products.tolist(), strict=True))
            if promised > room > 0:
                factors = [f * room / promised for f in factors]
        return factors

    def _whole(self, probe: StepProbe) -> tuple[Tensor, Tensor | None]:
        """Squared norms (A,) of the updates, rows limited, and what each promises of the loss (A,).

        Over all processes, in one collective if there is any.
        """
        squares = probe.update.squares
        assert squares is not None
        if probe.shortened is not None:  # by another limit
            squares = squares * probe.shortened.square()
        parts = [squares]
        if self.max_rms is not None and self.embeddings:
            parts.append(self._limit_rows(probe, squares, self.max_rms))
        if promises := self.max_decrease is not None and self.loss is not None:
            products = probe.update.products
            if products is None or self.embeddings or probe.shortened is not None:
                products = probe.layout.inner(probe.back, probe.gradients_of_step())
            parts.append(products)
        whole = list(probe.reduce(*parts))
        products = whole.pop() if promises else None
        if len(whole) > 1:
            left = (whole[1] / whole[0]).sqrt()
            left = torch.fmin(left, left.new_ones(()))
            probe.shortened = left if probe.shortened is None else probe.shortened * left
        return whole[-1], products

    def _largest(self, probe: StepProbe) -> Tensor:
        """Squared norms (A,) of updates whose root mean square is ``max_rms`` learning rates."""
        layout, groups, rms = probe.layout, probe.optimizer.param_groups, self.max_rms or 0.0
        parts = [
            layout.counts[part] * (groups[number]["lr"] * rms) ** 2
            for number, part in layout.groups.items()
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _limit_rows(self, probe: StepProbe, squares: Tensor, rms: float) -> Tensor:
        """Shorten the rows of embeddings at once, and return what is left of the squares (A,)."""
        layout, tensors, squares = probe.layout, probe.active, squares.clone()
        backs = layout.scatter(probe.back, tensors)
        for place, index in enumerate(layout.active):
            if probe.params[index] not in self.embeddings:
                continue
            rate = probe.optimizer.param_groups[layout.group_of[place]]["lr"]
            rows = torch.linalg.vector_norm(backs[place].float(), dim=1, keepdim=True)  # (V, 1)
            longest = rate * rms * backs[place].shape[1] ** 0.5
            kept = torch.fmin(longest / rows, rows.new_ones(())).to(backs[place].dtype)
            tensors[place].add_(backs[place] * (1 - kept))
            backs[place].mul_(kept)
            left = (rows * kept).square().sum() / rows.square().sum()  # 1 if none is shortened
            squares[place] *= torch.fmin(left, left.new_ones(()))
        return squares

    def _lower_bound(self, loss: Tensor) -> Tensor | float:
        """The loss () that is taken for the lowest possible one."""
        if self.floor != "auto":
            return self.floor
        loss = loss.to(self.seen.dtype)
        lowest, mean, scatter = self.seen.to(loss.device).nan_to_num(nan=0.0).unbind()
        fresh = self.seen[0].isnan().to(loss.device)
        deviation = (loss - mean).abs()
        moved = torch.stack(
            [
                torch.minimum(lowest, loss),
                mean.lerp(loss, _MEMORY),
                scatter.lerp(deviation, _MEMORY),
            ]
        )
        first = torch.stack([loss, loss, torch.zeros_like(loss)])
        seen = torch.where(fresh, first, moved)
        self.seen = torch.where(loss.isfinite(), seen, self.seen.to(loss.device))
        return self.seen[0] - self.seen[2]


def clip_updates(
    optimizer: Optimizer,
    max_rms: float | None = 1.0,
    max_decrease: float | None = None,
    floor: Floor = 0.0,
    model: nn.Module | None = None,
) -> UpdateLimit:
    """Shorten the updates of an optimizer from now on, in any training loop.

    A copy of the optimizer (``copy.deepcopy``, pickle) has no hooks, and so no limit.

    Example::

        limit = clip_updates(optimizer, max_decrease=0.5)
        for x, y in batches:
            limit.loss = loss = loss_function(model(x), y)  # max_rms alone needs no loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    Args:
        optimizer: The one whose steps are to be shortened; a wrapper of Fabric or Accelerate too.
        max_rms: See :class:`UpdateLimit`.
        max_decrease: Likewise.
        floor: Likewise.
        model: Where embeddings are to be found, whose rows ``max_rms`` limits one by one.

    Raises:
        ValueError: If a limit is out of range, or there is none; at a step, if ``max_decrease`` has
            no loss.
    """
    limit = UpdateLimit(max_rms, max_decrease, floor)
    probe, steps = StepProbe.of(optimizer), 0
    limit.attach(probe.optimizer, model)

    def factors(probe: StepProbe) -> Factors:
        if max_decrease is not None:
            if limit.loss is None:
                raise ValueError("max_decrease needs the loss: set limit.loss before each step.")
            # the gradient is that of the mean over all processes
            limit.loss = processes.average(torch.as_tensor(limit.loss).detach())
        found = limit(probe)
        limit.loss = None  # that of the next step is another one
        return found

    def snapshot(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal steps
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # after the optimizer
        if closure is not None and not probe.is_armed:
            raise ValueError(
                "clip_updates needs the gradients before the step: call optimizer.step() without "
                "a closure."
            )
        probe.snapshot(steps, limit)
        steps += 1

    probe.limits.append(factors)
    probe.optimizer.register_step_pre_hook(snapshot)
    return limit


def overwrites_gradients(optimizer: Optimizer) -> bool:
    """Tell if gradients are other ones after a step.

    torch's SGD adds the momentum to them where it takes many at once, as it does by itself
    everywhere but on the CPU.
    """

    def is_at_once(group: dict[str, Any]) -> bool:
        if group["foreach"] is None:
            return not group["fused"] and any(p.device.type != "cpu" for p in group["params"])
        return bool(group["foreach"])

    return isinstance(optimizer, torch.optim.SGD) and any(
        group["nesterov"] and not group["weight_decay"] and is_at_once(group)
        for group in optimizer.param_groups
    )
