"""Remedies of others against spikes, written anew from their papers to be compared with ours.

``AdaGC``, ``ZClip``, ``AutoClip`` and ``AGC`` change the gradients before a step, as callbacks of
Lightning or, by ``clip``, in any loop. ``SPAM`` and ``StableAdamW`` are optimizers: with a first
beta of 0 they are RMSprop with their remedy. docs/spikes.md compares them.
"""

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT


class GradientClipping(Callback):
    """Clip the gradients of a step. They are taken as they are: not for a GradScaler."""

    @abstractmethod
    def clip(self, params: Sequence[Tensor]) -> None:
        """Shorten the gradients in place."""

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self.clip([p for group in optimizer.param_groups for p in group["params"]])


class AdaGC(GradientClipping):
    """Bound the gradient norm of each tensor by the running average of its own (arXiv:2502.11034).

    For ``warm_up`` steps the norm over all tensors is at most ``lambda_abs``, and the average of a
    tensor is the smallest norm so far; then its norm is at most ``lambda_rel`` times its average,
    which goes on with the clipped norms.

    Args:
        lambda_rel: Largest norm of a tensor, in units of its average.
        lambda_abs: Largest norm over all tensors in the warm-up.
        decay: Share of the old in the average.
        warm_up: Optimizer steps.
    """

    def __init__(
        self,
        lambda_rel: float = 1.05,
        lambda_abs: float = 1.0,
        decay: float = 0.98,
        warm_up: int = 100,
    ) -> None:
        self.lambda_rel = lambda_rel
        self.lambda_abs = lambda_abs
        self.decay = decay
        self.warm_up = warm_up
        self.step = 0
        self.averages: Tensor | None = None  # (P,) of the tensors that have a gradient

    @torch.no_grad()
    def clip(self, params: Sequence[Tensor]) -> None:
        gradients = [p.grad for p in params if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        if self.averages is None:
            self.averages = torch.full_like(norms, math.inf)
        if self.step < self.warm_up:
            factors = (self.lambda_abs / norms.norm()).clamp(max=1.0).expand_as(norms)
            self.averages = torch.minimum(self.averages, norms * factors)
        else:
            factors = (self.lambda_rel * self.averages / norms).nan_to_num(1.0).clamp(max=1.0)
            self.averages = self.averages.lerp(norms * factors, 1 - self.decay)
        self.step += 1
        torch._foreach_mul_(gradients, list(factors.unbind()))


class ZClip(GradientClipping):
    """Bound the gradient norm by its moving mean and deviation (arXiv:2504.02507).

    Args:
        max_norm: Largest norm in any case.
        z: Deviations above the mean from which on a norm is a spike.
        decay: Share of the old in mean and variance.
        warm_up: Optimizer steps from which mean and variance are first taken.
    """

    def __init__(
        self, max_norm: float = 1.0, z: float = 2.5, decay: float = 0.97, warm_up: int = 25
    ) -> None:
        self.max_norm = max_norm
        self.z = z
        self.decay = decay
        self.warm_up = warm_up
        self.first: list[float] = []
        self.mean = self.variance = 0.0

    def clip(self, params: Sequence[Tensor]) -> None:
        norm = total_norm(params)
        if not math.isfinite(norm):  # neither clipped nor remembered
            return
        limit = norm
        if len(self.first) == self.warm_up:
            deviation = math.sqrt(max(self.variance, 1e-12))
            z = (norm - self.mean) / deviation
            limit = self.mean + self.z**2 / z * deviation if z > self.z else norm
        limit = min(limit, self.max_norm)
        nn.utils.clip_grads_with_norm_(params, limit, torch.tensor(norm))
        if len(self.first) < self.warm_up:
            self.first.append(limit)
            self.mean = sum(self.first) / len(self.first)
            self.variance = sum((x - self.mean) ** 2 for x in self.first) / len(self.first)
        else:
            change = limit - self.mean
            self.mean += (1 - self.decay) * change
            self.variance = self.decay * (self.variance + (1 - self.decay) * change**2)


class AutoClip(GradientClipping):
    """Bound the gradient norm by a percentile of the last norms (arXiv:2007.14469).

    Args:
        percentile: In percent.
        history: Number of norms that are kept; the paper keeps all.
    """

    def __init__(self, percentile: float = 10.0, history: int = 1000) -> None:
        self.percentile = percentile
        self.norms: deque[float] = deque(maxlen=history)

    def clip(self, params: Sequence[Tensor]) -> None:
        norm = total_norm(params)
        if not math.isfinite(norm):  # neither clipped nor remembered
            return
        self.norms.append(norm)
        limit = min(norm, float(np.percentile(self.norms, self.percentile)))
        nn.utils.clip_grads_with_norm_(params, limit, torch.tensor(norm))


class AGC(GradientClipping):
    """Bound the gradient of each unit by a share of the norm of its weights.

    For each row of a weight ``|gradient| <= clipping * max(|weight|, eps)`` (Brock et al.,
    arXiv:2102.06171, section 4). The last linear layer is left out, as there.

    Args:
        clipping: Largest ratio of gradient norm to weight norm.
        eps: Least weight norm, so that weights that start at zero can move.
    """

    def __init__(self, clipping: float = 0.1, eps: float = 1e-3) -> None:
        self.clipping = clipping
        self.eps = eps
        self.left_out: set[Tensor] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        linear = [module for module in pl_module.modules() if isinstance(module, nn.Linear)]
        self.left_out = set(linear[-1].parameters()) if linear else set()

    @torch.no_grad()
    def clip(self, params: Sequence[Tensor]) -> None:
        for parameter in params:
            if parameter.grad is not None and parameter not in self.left_out:
                allowed = self.clipping * unit_norms(parameter).clamp(min=self.eps)
                found = unit_norms(parameter.grad)
                parameter.grad.mul_(torch.where(found > allowed, allowed / found, 1.0))


def total_norm(params: Sequence[Tensor]) -> float:
    return float(nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]))


def unit_norms(tensor: Tensor) -> Tensor:
    """Norm of each row of a weight, or of a whole vector, with the dimensions kept."""
    dims = tuple(range(1, tensor.ndim)) if tensor.ndim > 1 else None
    return torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)


class _Adam(Optimizer):
    """Decoupled weight decay and the two moments, for the optimizers below.

    Args:
        params: What is trained.
        lr: Learning rate.
        betas: Shares of the old in the first and in the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, that is ``lr * weight_decay`` of every weight is lost.
        settings: Those of a subclass, the same for all parameter groups.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        **settings: float,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | settings | {"decoupled_weight_decay": True})

    def prepare(self, p: Tensor, group: dict[str, Any]) -> float:
        """Hook: change gradient or state before the moments move; return a factor of the rate."""
        return 1.0

    def finish(self, gradient: Tensor, second: Tensor, group: dict[str, Any]) -> float | Tensor:
        """Hook: a factor of the rate, from the corrected second moment that has just moved."""
        return 1.0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "total": 0}
                    state |= {name: torch.zeros_like(p) for name in ("first", "second")}
                factor = self.prepare(p, group)
                state["step"] += 1
                state["total"] += 1
                self._move(p, p.grad, state, group, factor)
        return loss

    def _move(
        self, p: Tensor, gradient: Tensor, state: Any, group: dict[str, Any], factor: float
    ) -> None:
        beta1, beta2 = group["betas"]
        state["first"].lerp_(gradient, 1 - beta1)
        state["second"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        second = state["second"] / (1 - beta2 ** state["step"])
        rate = group["lr"] * factor * self.finish(gradient, second, group)
        p.mul_(1 - rate * group["weight_decay"])
        update = state["first"] / (second.sqrt() + group["eps"])
        p.sub_(update * (rate / (1 - beta1 ** state["step"])))


class SPAM(_Adam):
    """Adam that cuts single elements of the gradient and forgets now and then (arXiv:2501.06842).

    An element whose square is above ``theta`` times its second moment is cut to the root of that.
    Every ``reset`` steps both moments begin anew, and the learning rate rises from a hundredth by a
    cosine in ``warm_up`` steps. As in the published code nothing is cut in the first 20 steps. The
    correction of the moments counts from the last reset. Momentum is dense.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        theta: float = 5000.0,
        reset: int = 500,
        warm_up: int = 150,
    ) -> None:
        own = {"theta": theta, "reset": reset, "warm_up": warm_up}
        super().__init__(params, lr, betas, eps, weight_decay, **own)

    def prepare(self, p: Tensor, group: dict[str, Any]) -> float:
        assert p.grad is not None
        state = self.state[p]
        if state["total"] and state["total"] % group["reset"] == 0:
            state["step"] = 0
            state["first"].zero_()
            state["second"].zero_()
        if state["step"] >= 20:
            limit = (group["theta"] * state["second"]).sqrt()
            torch.clamp(p.grad, -limit, limit, out=p.grad)
        if state["total"] < group["reset"]:  # the start has the warm-up of the training
            return 1.0
        progress = min(state["step"] / group["warm_up"], 1.0)
        return 1 - 0.99 * (1 + math.cos(math.pi * progress)) / 2


class StableAdamW(_Adam):
    """AdamW with the update clipping of Adafactor (arXiv:2304.13013, algorithm 2).

    The learning rate of a tensor is divided by ``rms(gradient / sqrt(second moment))`` where that
    is above 1; the momentum has no part in it.
    """

    def finish(self, gradient: Tensor, second: Tensor, group: dict[str, Any]) -> Tensor:
        ratio = gradient.square() / second.clamp(min=group["eps"] ** 2)
        return 1 / ratio.mean().sqrt().clamp(min=1.0)
