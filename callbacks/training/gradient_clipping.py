"""Clipping of gradients instead of updates; docs/spikes.md compares them.

Dimensions: P parameters (tensors) of one optimizer.
"""

import math
from typing import Any, Literal, get_args

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from core.errors import UserError
from steadyfit._hooks import scale_left
from steadyfit.layout import norms
from steadyfit.lightning import Clipping
from steadyfit.probe import StepProbe

Rule = Literal["zclip", "autoclip"]


class GradientClipping(Clipping):
    """Clips gradients in place, and warns where another one does as well."""

    clips_gradients = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        others = [
            type(c).__name__
            for c in trainer.callbacks  # type: ignore[attr-defined]
            if c is not self and isinstance(c, GradientClipping)
        ]
        if trainer.gradient_clip_val:
            others.append("gradient_clip_val")
        if others:
            rank_zero_warn(
                f"{type(self).__name__} and {others[0]} both clip the gradients; leave one out."
            )


class GradientNormClipping(GradientClipping):
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
            raise UserError(f"rule must be one of {', '.join(get_args(Rule))}, got {rule!r}.")
        if max_norm is not None and not max_norm > 0:
            raise UserError(f"max_norm must be positive, got {max_norm}; use null for no limit.")
        for name, value in (("warm_up", warm_up), ("history", history)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}.")
        if not 0 < percentile <= 100:
            raise UserError(f"percentile must be in (0, 100], got {percentile}.")
        if not 0 < decay < 1:
            raise UserError(f"decay must be in (0, 1), got {decay}.")
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


class AdaptiveGradientClipping(GradientClipping):
    """Clips the gradient of each unit to a share of the norm of its weights.

    AGC of NFNets (Brock et al., arXiv:2102.06171, section 4): for each row of a weight,
    ``|gradient| <= clipping * max(|weight|, eps)``. The last linear layer is left out, as there.

    Args:
        clipping: Largest ratio of gradient norm to weight norm.
        eps: Least weight norm, so that weights that start at zero can move.
    """

    name = "agc_factor"

    def __init__(self, clipping: float = 0.1, eps: float = 1e-3) -> None:
        super().__init__()
        for name, value in (("clipping", clipping), ("eps", eps)):
            if not value > 0:
                raise UserError(f"{name} must be positive, got {value}.")
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
