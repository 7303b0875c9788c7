"""Muon for filters of fixed norm, SGD for the rest."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.sgd import sgd

from lit_models.optimizers.orthogonal import by_dimension, evaluate, orthogonal_updates, states

SGD_MOMENTUM = 0.85  # of biases and output layer
DECAY = 0.004  # share of these that a step at the full learning rate takes away without momentum
STEPS = 3  # iterations of Newton-Schulz


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
        params: Parameters to train, from the inputs to the outputs; the last matrix is the output
            layer.
        lr: Learning rate of the filters: the length of an update relative to the filters.
        momentum: Share of the old in the sum of the filters' gradients; Nesterov's look ahead.
        bias_lr: Learning rate of vectors.
        head_lr: Learning rate of the output layer.

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
    ) -> None:
        for name, rate in (("lr", lr), ("bias_lr", bias_lr), ("head_lr", head_lr)):
            if not rate > 0:
                raise ValueError(f"{name} must be positive, got {rate}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}.")
        matrices, vectors = by_dimension(params)
        filters, head = matrices[:-1], matrices[-1:]
        groups: list[dict[str, Any]] = [
            {"name": "filters", "params": filters, "lr": lr, "momentum": momentum},
            {"name": "biases", "params": vectors, "lr": bias_lr, "momentum": SGD_MOMENTUM},
            {"name": "head", "params": head, "lr": head_lr, "momentum": SGD_MOMENTUM},
        ]
        for group in groups:
            group["weight_decay"] = 0.0 if group["name"] == "filters" else DECAY / group["lr"]
        super().__init__([group for group in groups if group["params"]], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = evaluate(closure)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in params]
            if not params:
                continue
            if group["name"] == "filters":
                _normalize([p for p in params if not self.state[p]])  # at the first step
                sums = states(self, params, "momentum_buffer")
                torch._foreach_mul_(sums, group["momentum"])
                torch._foreach_add_(sums, gradients)
                ahead = torch._foreach_add(gradients, sums, alpha=group["momentum"])
                updates = orthogonal_updates(list(ahead), STEPS)
                torch._foreach_add_(params, updates, alpha=-group["lr"])
                _normalize(params)
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
                nesterov=True,
                maximize=False,
                foreach=True,
            )
        return loss


def _normalize(filters: list[Tensor]) -> None:
    """Scale each layer's filters (R, ...) to a root mean square norm of one, in place."""
    if filters:
        norms = torch._foreach_norm(filters)
        factors = [
            len(p) ** 0.5 / norm.clamp(min=1e-12) for p, norm in zip(filters, norms, strict=True)
        ]
        torch._foreach_mul_(filters, factors)
