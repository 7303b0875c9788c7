"""Optimizers that torch does not have. Dimensions: N matrices of one shape, R rows, C columns."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from errors import UserError

QUINTIC = (3.4445, -4.7750, 2.0315)  # steepest at zero, and near one in [0.7, 1.2]


class Muon(Optimizer):
    """MomentUm Orthogonalized by Newton-Schulz (https://kellerjordan.github.io/posts/muon/).

    A matrix moves along its momentum with all singular values set to about one, so that rare
    directions count as much as frequent ones; the filters of a convolution are the rows of one
    matrix. As in arXiv:2502.16982, section 2.2, that is scaled to a root mean square of 0.2, as
    large as an update of AdamW, so learning rate and weight decay are those of AdamW. On matrices
    it is ``torch.optim.Muon(..., adjust_lr_fn="match_rms_adamw")``, which refuses all else.

    Vectors (biases, gains of normalisation) take steps of SGD with the same momentum. Every
    parameter of two or more dimensions is a matrix here, the first and the last layer included.

    Learning rate, momentum and weight decay are those of the parameter group, so schedules act on
    matrices and vectors alike.

    Args:
        params: What is trained.
        lr: Learning rate of the matrices.
        momentum: Share of the old in the moving average of gradients; Nesterov's look ahead is on.
        weight_decay: Decoupled, that is ``lr * weight_decay`` of each matrix and vector is lost.
        vector_scale: Learning rate of the vectors, in units of ``lr``. The average of gradients is
            not the sum that ``torch.optim.SGD`` keeps, so ``lr * vector_scale`` is its
            ``lr / (1 - momentum)``.
        steps: Iterations of Newton-Schulz.

    Raises:
        UserError: If an argument is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        vector_scale: float = 10.0,
        steps: int = 5,
    ) -> None:
        if not lr >= 0:
            raise UserError(f"lr must not be negative, got {lr}.")
        if not 0 <= momentum < 1:
            raise UserError(f"momentum must be in [0, 1), got {momentum}.")
        for name, value in (("weight_decay", weight_decay), ("vector_scale", vector_scale)):
            if not value >= 0:
                raise UserError(f"{name} must not be negative, got {value}; 0 turns it off.")
        if steps < 1:
            raise UserError(f"steps must be at least 1, got {steps}; 5 are usual.")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "vector_scale": vector_scale,
            "steps": steps,
            "decoupled_weight_decay": True,  # torch's word for it, also for our callbacks
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if params := [p for p in group["params"] if p.grad is not None]:
                self._step(params, group)
        return loss

    def _step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in params if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        averages = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, averages, group["momentum"])  # Nesterov

        matrices = iter(muon_updates([m for m in ahead if m.ndim >= 2], group["steps"]))
        scale = group["vector_scale"]
        updates = [next(matrices) if m.ndim >= 2 else m.mul_(scale) for m in ahead]
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-group["lr"])


def muon_updates(momenta: list[Tensor], steps: int = 5) -> list[Tensor]:
    """Orthogonalised momenta, each (R, ...) as a matrix (R, C), with a root mean square of 0.2.

    Those of one shape are worked on together.
    """
    by_shape: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, momentum in enumerate(momenta):
        by_shape[(momentum.device, momentum.dtype, *momentum.flatten(1).shape)].append(i)
    updates = list(momenta)
    for (*_, rows, columns), indices in by_shape.items():
        batch = torch.stack([momenta[i].flatten(1) for i in indices])  # (N, R, C)
        scaled = orthogonalize(batch, steps).mul_(0.2 * max(rows, columns) ** 0.5)
        for i, update in zip(indices, scaled.to(batch.dtype).unbind(), strict=True):
            updates[i] = update.view_as(momenta[i])
    return updates


def orthogonalize(matrices: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Set the singular values of matrices (N, R, C) to about one, by a quintic Newton-Schulz.

    For X = U S V' an iteration gives U p(S) V' with p(s) = a s + b s^3 + c s^5: multiplications
    alone, in bfloat16 on a GPU and in float32 elsewhere.
    """
    a, b, c = QUINTIC
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT  # the smaller Gram matrix
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)  # singular values of one at most
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
