"""Muon for matrices, AdamW for the rest."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from lit_models.optimizers.orthogonal import evaluate, muon_updates, states

ADAMW_SCALE = 0.15  # learning rate of AdamW, in units of lr


class Muon(Optimizer):
    """MomentUm Orthogonalized by Newton-Schulz (https://kellerjordan.github.io/posts/muon/).

    A matrix moves along its momentum with all singular values set to about one, so that rare
    directions count as much as frequent ones; the filters of a convolution are the rows of one
    matrix. As in arXiv:2502.16982, section 2.2, that is scaled to a root mean square of 0.2, as
    large as an update of AdamW, so learning rate and weight decay are those of AdamW. On matrices
    it is ``torch.optim.Muon(..., adjust_lr_fn="match_rms_adamw")``, which refuses all else.

    Vectors (biases, gains of normalisation) and the last matrix, from which the outputs are read,
    are trained by AdamW, as Muon's author recommends; of a whole Ensemble that is the last member's
    alone, and the other members' output layers move as hidden matrices do.

    Learning rate and weight decay are those of the parameter group, so schedules act on all alike.

    Args:
        params: Parameters to train, from the inputs to the outputs.
        lr: Learning rate of the matrices.
        momentum: Share of the old in the moving average of gradients; Nesterov's look ahead is on.
        weight_decay: Decoupled, that is ``lr * weight_decay`` of every weight is lost.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr must not be negative, got {lr}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}.")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {weight_decay}.")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": True,  # torch's word for it, also for our callbacks
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = evaluate(closure)
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.ndim >= 2]
            hidden = {id(p) for p in matrices[:-1]}
            moved = [p for p in group["params"] if p.grad is not None]
            if group["weight_decay"] and moved:
                torch._foreach_mul_(moved, 1 - group["lr"] * group["weight_decay"])
            self._step_by_muon([p for p in moved if id(p) in hidden], group)
            self._step_by_adamw([p for p in moved if id(p) not in hidden], group)
        return loss

    def _step_by_muon(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if not params:
            return
        gradients = [p.grad for p in params if p.grad is not None]
        averages = states(self, params, "momentum_buffer")
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, averages, group["momentum"])  # Nesterov
        updates = muon_updates(list(ahead))
        torch._foreach_add_(params, updates, alpha=-group["lr"])

    def _step_by_adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if not params:
            return
        for p in params:
            self.state[p].setdefault("step", torch.zeros(()))
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            states(self, params, "exp_avg"),
            states(self, params, "exp_avg_sq"),
            [],
            [self.state[p]["step"] for p in params],
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=ADAMW_SCALE * group["lr"],
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
