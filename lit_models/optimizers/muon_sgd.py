"""Muon for filters of fixed norm, SGD for the rest."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.sgd import sgd

from lit_models.optimizers.orthogonal import by_dimension, evaluate, orthogonal_updates, states


class MuonSGD(Optimizer):
    """Muon on filters of fixed norm, Nesterov's SGD on biases and output layer.

    The optimizer of airbench94_muon (github.com/KellerJordan/cifar10-airbench), for networks whose
    filters are all followed by batch normalisation. Their scale means nothing then: the filters of
    each layer keep a root mean square norm of one, and a step turns them by the same angle in all
    directions. It is not for an Ensemble, of which it would take only the last output layer for
    one.

    There are three parameter groups (filters, biases, head), whose learning rates a schedule must
    multiply, as :class:`Triangle` does.

    Args:
        params: What is trained, from the inputs to the outputs; the last matrix is the output
            layer.
        lr: Learning rate of the filters: the length of an update relative to the filters.
        momentum: Share of the old in the sum of the filters' gradients; Nesterov's look ahead.
        bias_lr: Learning rate of vectors.
        head_lr: Learning rate of the output layer.
        sgd_momentum: Momentum of these two.
        decay: Share of them that is added to the gradient, times the inverse of the learning rate:
            what a step at the full rate would take away without momentum.
        steps: Iterations of Newton-Schulz.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.24,
        momentum: float = 0.6,
        bias_lr: float = 106.0,
        head_lr: float = 1.75,
        sgd_momentum: float = 0.85,
        decay: float = 0.004,
        steps: int = 3,
    ) -> None:
        for name, rate in (("lr", lr), ("bias_lr", bias_lr), ("head_lr", head_lr)):
            if not rate > 0:
                raise ValueError(f"{name} must be positive, got {rate}.")
        for name, share in (
            ("momentum", momentum),
            ("sgd_momentum", sgd_momentum),
            ("decay", decay),
        ):
            if not 0 <= share < 1:
                raise ValueError(f"{name} must be in [0, 1), got {share}.")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}; 3 to 5 are usual.")
        matrices, vectors = by_dimension(params)
        filters, head = matrices[:-1], matrices[-1:]
        by_sgd = {"momentum": sgd_momentum, "steps": 0}
        groups: list[dict[str, Any]] = [
            {"name": "filters", "params": filters, "lr": lr, "momentum": momentum},
            {"name": "biases", "params": vectors, "lr": bias_lr, **by_sgd},
            {"name": "head", "params": head, "lr": head_lr, **by_sgd},
        ]
        for group in groups:
            group["weight_decay"] = 0.0 if group["name"] == "filters" else decay / group["lr"]
        super().__init__([group for group in groups if group["params"]], {"steps": steps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = evaluate(closure)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in params]
            if not params:
                continue
            if group["steps"]:
                normalize_filters([p for p in params if not self.state[p]])  # at the first step
                sums = states(self, params, "momentum_buffer")
                torch._foreach_mul_(sums, group["momentum"])
                torch._foreach_add_(sums, gradients)
                ahead = torch._foreach_add(gradients, sums, alpha=group["momentum"])
                updates = orthogonal_updates(list(ahead), group["steps"])
                torch._foreach_add_(params, updates, alpha=-group["lr"])
                normalize_filters(params)
                continue
            sgd(
                params,
                # new ones, because Nesterov's momentum would be added to the gradients themselves
                list(torch._foreach_add(gradients, params, alpha=group["weight_decay"])),
                list(states(self, params, "momentum_buffer")),
                weight_decay=0.0,
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=group["momentum"] > 0,
                maximize=False,
                foreach=True,
            )
        return loss


def normalize_filters(filters: list[Tensor]) -> None:
    """Scale each layer's filters (R, ...) to a root mean square norm of one, in place."""
    if filters:
        norms = torch._foreach_norm(filters)
        factors = [
            len(p) ** 0.5 / norm.clamp(min=1e-12) for p, norm in zip(filters, norms, strict=True)
        ]
        torch._foreach_mul_(filters, factors)
