"""Callbacks that shorten updates or gradients, all with one interface.

``UpdateClipping`` is the one to start with; docs/spikes.md compares them. The file needs
gradient_spikes.py beside it. Dimensions: P parameters (tensors) of one optimizer.
"""

import math
from typing import Any, Literal, get_args

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from callbacks.gradient_spikes import (
    StepCallback,
    StepProbe,
    mean,
    norms,
    scale_left,
    unscaled_loss,
)

Rule = Literal["zclip", "autoclip"]


class Clipping(StepCallback):
    """Shortens something in every optimizer step, on the device, and logs by how much.

    The smallest factor of each step is logged as ``clip/<name>``; 1 means that it did not act.
    """

    name: str
    clips_gradients = False  # whether gradients are other ones behind this callback

    def __init__(self) -> None:
        self.steps = 0
        self.acted = 0
        self._pending: list[tuple[int, Tensor]] = []  # (optimizer step, factors (P,) or ())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.clips_gradients:
            return
        others = [
            type(c).__name__
            for c in trainer.callbacks  # type: ignore[attr-defined]
            if c is not self and isinstance(c, Clipping) and c.clips_gradients
        ]
        if trainer.gradient_clip_val:
            others.append("gradient_clip_val")
        if others:
            rank_zero_warn(
                f"{type(self).__name__} and {others[0]} both clip the gradients; leave one out."
            )

    def keep(self, trainer: Trainer, factors: Tensor) -> None:
        self._pending.append((trainer.global_step, factors))

    def flush(self, *, alone: bool = False) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return
        smallest = torch.stack([factors.amin() for _, factors in pending]).tolist()
        self.steps += len(smallest)
        self.acted += sum(factor < 1 for factor in smallest)
        if self.trainer.is_global_zero:
            steps = [step for step, _ in pending]
            rows = {s: {f"clip/{self.name}": f} for s, f in zip(steps, smallest, strict=True)}
            self.log_rows(rows)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if trainer.is_global_zero and self.steps:
            print(f"{type(self).__name__} acted in {self.acted / self.steps:.1%} of the steps.")

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"steps": self.steps, "acted": self.acted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.acted = state["steps"], state["acted"]


class UpdateClipping(Clipping):
    """Shortens the updates that spikes are made of; gradients and optimizer stay as they are.

    Two limits, the second applied to what the first leaves:

    - ``max_rms``: of each parameter tensor, ``rms(delta theta) <= max_rms * lr``. An optimizer that
      normalises (RMSprop, Adam) makes updates of about ``lr``, and larger ones only where its
      second moment is out of date. This is the update clipping of Adafactor (Shazeer and Stern,
      arXiv:1804.04235, section 6) and StableAdamW. For SGD it is an absolute limit on the gradient.
    - ``max_decrease``: to first order a step promises to lower the loss by
      ``-<gradient, delta theta>``. A loss that cannot fall below zero cannot keep a promise larger
      than itself; the whole update is shortened until it promises at most ``max_decrease`` times
      the loss. It is the Polyak step size taken as an upper bound, as in SPS_max (Loizou et al.,
      arXiv:2002.10542), with any optimizer's direction in place of the gradient.

    It acts on what the optimizer has done to the parameters, so it is exact for every optimizer;
    decoupled weight decay of torch's optimizers is left whole. Where it does not act, the run is
    the one without, bit for bit. Behind gradient clipping, promises are those of the clipped
    gradient.

    Args:
        max_rms: Largest root mean square of an update, in learning rates; None for no limit.
        max_decrease: Largest share of the loss that a step may promise to remove; None for no
            limit.
    """

    name = "update_factor"

    def __init__(self, max_rms: float | None = 1.0, max_decrease: float | None = None) -> None:
        super().__init__()
        for name, value in (("max_rms", max_rms), ("max_decrease", max_decrease)):
            if value is not None and not value > 0:
                raise MisconfigurationException(
                    f"{name} must be positive, got {value}; use null for no limit."
                )
        if max_rms is None and max_decrease is None:
            raise MisconfigurationException(
                "UpdateClipping has no limit; set max_rms, max_decrease, or both."
            )
        self.max_rms = max_rms
        self.max_decrease = max_decrease
        self._losses: list[Tensor] = []
        self._loss: Tensor | None = None
        self._roots: dict[StepProbe, list[Tensor]] = {}  # of the sizes, for each parameter group

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for optimizer in trainer.optimizers:
            limits = StepProbe.of(optimizer).limits
            if self.factors not in limits:  # else it is the optimizer of an earlier fit
                limits.append(self.factors)
            if self.max_decrease is not None and overwrites_gradients(optimizer):
                raise MisconfigurationException(
                    "max_decrease needs the gradients behind the step, and SGD with nesterov "
                    "overwrites them; set foreach: false, or max_decrease: null."
                )

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        if self.max_decrease is not None:
            self._losses.append(unscaled_loss(trainer, pl_module, loss))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        StepProbe.of(optimizer).arm(trainer.global_step)
        self._loss = mean(self._losses) if self._losses else None
        self._losses = []
        if self._loss is not None and trainer.world_size > 1:
            # the gradient is that of the mean over all processes; strategy.reduce has a barrier
            self._loss = self._loss / trainer.world_size
            torch.distributed.all_reduce(self._loss)

    def factors(self, probe: StepProbe) -> Tensor:
        """By which factor each update of this step has to be shortened (P,)."""
        lengths = probe.update.norms
        assert lengths is not None
        if self.max_rms is None:
            factors = torch.ones_like(lengths)
        else:
            # where nothing moved the quotient may be 0 / 0, and a NaN is left for all to see
            quotients = self._longest(probe, self.max_rms) / lengths
            factors = quotients.nan_to_num_(nan=1.0, posinf=1.0).clamp_(max=1.0)
        if self.max_decrease is not None and self._loss is not None:
            pairs = zip(probe.deltas, probe.gradients(), strict=True)
            promised = -torch.stack([inner(*pair) for pair in pairs]).to(factors).dot(factors)
            allowed = self.max_decrease * self._loss
            excess = (promised / allowed).nan_to_num_(nan=1.0, posinf=1.0).clamp_(min=1.0)
            factors = torch.where(allowed > 0, factors / excess, factors)
        self.keep(self.trainer, factors)
        return factors

    def _longest(self, probe: StepProbe, rms: float) -> Tensor:
        """Norms (P,) of updates whose root mean square is ``rms`` learning rates."""
        roots = self._roots.get(probe, [])
        groups = probe.optimizer.param_groups
        if len(roots) < len(groups):  # at the start, or when a group was added
            assert probe.update.norms is not None
            sizes = [[float(p.numel()) for p in params] for params in probe.groups]
            self._roots[probe] = roots = [probe.update.norms.new_tensor(s).sqrt() for s in sizes]
        longest = [r * (g["lr"] * rms) for r, g in zip(roots, groups, strict=True)]
        return longest[0] if len(longest) == 1 else torch.cat(longest)


def overwrites_gradients(optimizer: Optimizer) -> bool:
    """Whether gradients are other ones behind a step: torch's SGD adds the momentum to them."""
    return isinstance(optimizer, torch.optim.SGD) and any(
        group["nesterov"] and not group["weight_decay"] and group["foreach"] is not False
        for group in optimizer.param_groups
    )


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product () of two tensors of one shape; of low precision, summed in float32."""
    if a.dtype in (torch.float16, torch.bfloat16):
        a, b = a.float(), b.float()
    return torch.dot(a.reshape(-1), b.reshape(-1))


class GradientNormClipping(Clipping):
    """Clips the gradient norm at a limit that follows the norms seen so far.

    Rules:

    - ``zclip``: norms more than ``2.5`` standard deviations above their moving mean are brought
      back to ``mean + 2.5 / z * 2.5 * std``, and to ``max_norm`` at most (arXiv:2504.02507).
    - ``autoclip``: the ``percentile`` of the norms seen so far (arXiv:2007.14469), here of the last
      ``history`` of them.

    Unlike the published code of both it works on the device without a read, sums in float32, keeps
    its state in checkpoints, and lets neither NaN nor infinity into its statistics.

    Args:
        rule: Where the limit comes from.
        max_norm: zclip: largest norm in any case; None for no such limit.
        decay: zclip: decay of the moving mean and variance.
        warm_up: zclip: optimizer steps from which mean and variance are first taken.
        percentile: autoclip: in percent.
        history: autoclip: number of norms that are kept.
    """

    name = "gradient_factor"
    clips_gradients = True
    Z = 2.5

    def __init__(
        self,
        rule: Rule = "zclip",
        max_norm: float | None = 1.0,
        decay: float = 0.97,
        warm_up: int = 25,
        percentile: float = 10.0,
        history: int = 1000,
    ) -> None:
        super().__init__()
        if rule not in get_args(Rule):
            raise MisconfigurationException(
                f"rule must be one of {', '.join(get_args(Rule))}, got {rule!r}."
            )
        if max_norm is not None and not max_norm > 0:
            raise MisconfigurationException(
                f"max_norm must be positive, got {max_norm}; use null for no limit."
            )
        for name, value in (("warm_up", warm_up), ("history", history)):
            if value < 1:
                raise MisconfigurationException(f"{name} must be at least 1, got {value}.")
        if not 0 < percentile <= 100:
            raise MisconfigurationException(f"percentile must be in (0, 100], got {percentile}.")
        if not 0 < decay < 1:
            raise MisconfigurationException(f"decay must be in (0, 1), got {decay}.")
        self.rule = rule
        self.max_norm = math.inf if max_norm is None else max_norm
        self.decay = decay
        self.warm_up = warm_up
        self.percentile = percentile
        self.history = history
        self._saved: dict[int, list[float]] = {}
        self._seen: dict[int, Tensor] = {}  # by optimizer; what the rule remembers

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        index = trainer.optimizers.index(optimizer)
        gradients = [p.grad for p in StepProbe.of(optimizer).params if p.grad is not None]
        if not gradients:
            return
        with torch.no_grad():
            norm = norms(gradients).norm()
            if (scale := scale_left(trainer, pl_module, optimizer)) is not None:
                norm = norm / scale
            limit = (
                self._zclip(index, norm) if self.rule == "zclip" else self._autoclip(index, norm)
            )
            # a gradient that is not finite is left to whoever skips such steps
            factor = torch.where(norm.isfinite() & (norm > limit), limit / norm, 1.0)
            torch._foreach_mul_(gradients, factor)
        self.keep(trainer, factor)

    def _zclip(self, index: int, norm: Tensor) -> Tensor:
        """The largest norm (); remembers count, mean and variance (3,)."""
        count, mean, variance = self._memory(index, norm, 3).unbind()
        started = count >= self.warm_up
        std = variance.clamp(min=1e-12).sqrt()
        z = (norm - mean) / std
        shortened = torch.where(z > self.Z, mean + self.Z * std * self.Z / z, norm)
        used = torch.where(started, shortened, norm).clamp(max=self.max_norm)
        # until the moving averages start: Welford's mean and variance
        weight = torch.where(started, 1 - self.decay, 1 / (count + 1))
        change = used - mean
        moved = torch.stack(
            [
                count + 1,
                mean + weight * change,
                (1 - weight) * (variance + weight * change.square()),
            ]
        )
        self._seen[index] = torch.where(norm.isfinite(), moved, self._seen[index])
        return used

    def _autoclip(self, index: int, norm: Tensor) -> Tensor:
        """The largest norm (); remembers the last norms (history,), NaN where there is none yet."""
        kept = self._memory(index, norm, self.history, math.nan)
        shifted = torch.cat([kept[1:], norm[None]])
        self._seen[index] = torch.where(norm.isfinite(), shifted, kept)
        return self._seen[index].nanquantile(self.percentile / 100)

    def _memory(self, index: int, norm: Tensor, size: int, fill: float = 0.0) -> Tensor:
        if index not in self._seen:
            saved = self._saved.pop(index, None)
            self._seen[index] = (
                norm.new_full((size,), fill) if saved is None else norm.new_tensor(saved)
            )
        return self._seen[index]

    def state_dict(self) -> dict[str, Any]:
        seen = {index: tensor.tolist() for index, tensor in self._seen.items()}
        return super().state_dict() | {"seen": self._saved | seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._saved = dict(state["seen"])


class AdaptiveGradientClipping(Clipping):
    """Clips the gradient of each unit to a share of the norm of its weights.

    AGC of NFNets (Brock et al., arXiv:2102.06171, section 4): for each row of a weight,
    ``|gradient| <= clipping * max(|weight|, eps)``. The last linear layer is left out, as there.

    Args:
        clipping: Largest ratio of gradient norm to weight norm.
        eps: Least weight norm, so that weights that start at zero can move.
    """

    name = "agc_factor"
    clips_gradients = True

    def __init__(self, clipping: float = 0.1, eps: float = 1e-3) -> None:
        super().__init__()
        for name, value in (("clipping", clipping), ("eps", eps)):
            if not value > 0:
                raise MisconfigurationException(f"{name} must be positive, got {value}.")
        self.clipping = clipping
        self.eps = eps
        self._last: set[int] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        linear = [m for m in pl_module.modules() if isinstance(m, nn.Linear)]
        self._last = {id(p) for p in linear[-1].parameters()} if linear else set()

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        factors = []
        scale = scale_left(trainer, pl_module, optimizer)
        for parameter in StepProbe.of(optimizer).params:
            if parameter.grad is None or id(parameter) in self._last:
                continue
            allowed = self.clipping * unit_norms(parameter).clamp(min=self.eps)
            found = unit_norms(parameter.grad)
            if scale is not None:
                found = found / scale
            factor = torch.where(found > allowed, allowed / found, 1.0)
            parameter.grad.mul_(factor.to(parameter.grad.dtype))
            factors.append(factor.amin())
        if factors:
            self.keep(trainer, torch.stack(factors))


def unit_norms(tensor: Tensor) -> Tensor:
    """Norm of each row of a weight, or of a whole vector, with the dimensions kept."""
    dims = tuple(range(1, tensor.ndim)) if tensor.ndim > 1 else tuple(range(tensor.ndim))
    return torch.linalg.vector_norm(tensor.float(), dim=dims or None, keepdim=True)
