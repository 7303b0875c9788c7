"""Orthogonal updates, as Muon has them. Dimensions: N matrices of one shape, R rows, C columns."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_QUINTIC = (3.4445, -4.7750, 2.0315)  # steepest at zero, and near one in [0.7, 1.2]


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """The loss of a closure, which computes the gradients."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def by_dimension(params: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices (filters among them), then vectors (biases, gains), each in the order given."""
    given = list(params)
    return [p for p in given if p.ndim >= 2], [p for p in given if p.ndim < 2]


def states(optimizer: Optimizer, params: list[Tensor], name: str) -> list[Tensor]:
    """A tensor of each parameter's state, zero at first."""
    for p in params:
        if name not in optimizer.state[p]:
            optimizer.state[p][name] = torch.zeros_like(p)
    return [optimizer.state[p][name] for p in params]


def muon_updates(momenta: list[Tensor]) -> list[Tensor]:
    """Orthogonalised momenta, each (R, ...) as a matrix (R, C), with a root mean square of 0.2."""
    updates = orthogonal_updates(momenta)
    for momentum, update in zip(momenta, updates, strict=True):
        update.mul_(0.2 * max(momentum.flatten(1).shape) ** 0.5)
    return updates


def orthogonal_updates(momenta: list[Tensor], steps: int = 5) -> list[Tensor]:
    """Momenta, each (R, ...) as a matrix (R, C), with singular values of about one."""
    by_shape: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, momentum in enumerate(momenta):
        by_shape[(momentum.device, momentum.dtype, *momentum.flatten(1).shape)].append(i)
    updates = list(momenta)
    for indices in by_shape.values():
        batch = torch.stack([momenta[i].flatten(1) for i in indices])  # (N, R, C)
        orthogonal = orthogonalize(batch, steps).to(batch.dtype)
        for i, update in zip(indices, orthogonal.unbind(), strict=True):
            updates[i] = update.view_as(momenta[i])
    return updates


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Set the singular values of matrices (N, R, C) to about one, by a quintic Newton-Schulz.

    For X = U S V' an iteration gives U p(S) V' with p(s) = a s + b s^3 + c s^5: multiplications
    alone, in bfloat16 on a GPU that multiplies it natively and in float32 elsewhere.
    """
    a, b, c = _QUINTIC
    native = matrices.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    x = matrices.to(torch.bfloat16 if native else torch.float32)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT  # the smaller Gram matrix
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values of one at most
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
