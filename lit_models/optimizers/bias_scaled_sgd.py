"""SGD whose biases learn faster."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lit_models.optimizers.orthogonal import by_dimension


class BiasScaledSGD(torch.optim.SGD):
    """Nesterov's SGD with a larger learning rate for biases and gains.

    After batch normalisation a bias decides which share of its channel is let through, and that
    can change fast without harm: 64 times the learning rate is usual (Page, "How to train your
    ResNet 5"; arXiv:2404.00498, section 3.4). The decay per step is that of the other weights.

    Args:
        params: Parameters to train.
        lr: Learning rate of matrices and filters.
        bias_scale: Learning rate of vectors in units of ``lr``.
        momentum: Share of the old in the sum of gradients.
        weight_decay: Added to the gradient, times the weight.

    Raises:
        ValueError: ``bias_scale`` is not positive.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.1,
        bias_scale: float = 64.0,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ) -> None:
        if not bias_scale > 0:
            raise ValueError(f"bias_scale must be positive, got {bias_scale}; 1 is as the weights.")
        weights, biases = by_dimension(params)
        scaled = {"lr": lr * bias_scale, "weight_decay": weight_decay / bias_scale}
        groups: list[dict[str, Any]] = [
            {"name": "weights", "params": weights},
            {"name": "biases", "params": biases, **scaled},
        ]
        super().__init__(
            [group for group in groups if group["params"]],
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=momentum > 0,
        )
