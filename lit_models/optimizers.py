"""Optimizers that torch does not have. Dimensions: N matrices of one shape, R rows, C columns."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from errors import UserError

QUINTIC = (3.4445, -4.7750, 2.0315)  # steepest at zero, and near one in [0.7, 1.2]


class BiasScaledSGD(torch.optim.SGD):
    """Nesterov's SGD with a larger learning rate for biases and gains.

    Behind batch normalisation a bias decides which share of its channel is let through, and that
    can change fast without harm: 64 times the learning rate is usual (Page, "How to train your
    ResNet 5"; arXiv:2404.00498, section 3.4). The decay per step is that of the other weights.

    Args:
        params: What is trained.
        lr: Learning rate of matrices and filters.
        bias_scale: Learning rate of vectors in units of ``lr``.
        momentum: Share of the old in the sum of gradients.
        weight_decay: Added to the gradient, times the weight.

    Raises:
        UserError: ``bias_scale`` is not positive.
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
            raise UserError(f"bias_scale must be positive, got {bias_scale}; 1 is as the weights.")
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
        params: What is trained, from the inputs to the outputs.
        lr: Learning rate of the matrices.
        momentum: Share of the old in the moving average of gradients; Nesterov's look ahead is on.
        weight_decay: Decoupled, that is ``lr * weight_decay`` of every weight is lost.
        adamw_scale: Learning rate of AdamW, in units of ``lr``.
        adamw_betas: Shares of the old in AdamW's two averages.
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
        adamw_scale: float = 0.15,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        steps: int = 5,
    ) -> None:
        if not lr >= 0:
            raise UserError(f"lr must not be negative, got {lr}.")
        for share in (momentum, *adamw_betas):
            if not 0 <= share < 1:
                raise UserError(f"momentum and adamw_betas must be in [0, 1), got {share}.")
        for name, value in (("weight_decay", weight_decay), ("adamw_scale", adamw_scale)):
            if not value >= 0:
                raise UserError(f"{name} must not be negative, got {value}; 0 turns it off.")
        if steps < 1:
            raise UserError(f"steps must be at least 1, got {steps}; 5 are usual.")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "adamw_scale": adamw_scale,
            "adamw_betas": adamw_betas,
            "steps": steps,
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
        updates = muon_updates(list(ahead), group["steps"])
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
            beta1=group["adamw_betas"][0],
            beta2=group["adamw_betas"][1],
            lr=group["adamw_scale"] * group["lr"],
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )


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
        UserError: If an argument is out of range.
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
                raise UserError(f"{name} must be positive, got {rate}.")
        for name, share in (
            ("momentum", momentum),
            ("sgd_momentum", sgd_momentum),
            ("decay", decay),
        ):
            if not 0 <= share < 1:
                raise UserError(f"{name} must be in [0, 1), got {share}.")
        if steps < 1:
            raise UserError(f"steps must be at least 1, got {steps}; 3 to 5 are usual.")
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


def normalize_filters(filters: list[Tensor]) -> None:
    """Scale each layer's filters (R, ...) to a root mean square norm of one, in place."""
    if filters:
        norms = torch._foreach_norm(filters)
        factors = [
            len(p) ** 0.5 / norm.clamp(min=1e-12) for p, norm in zip(filters, norms, strict=True)
        ]
        torch._foreach_mul_(filters, factors)


def muon_updates(momenta: list[Tensor], steps: int = 5) -> list[Tensor]:
    """Orthogonalised momenta, each (R, ...) as a matrix (R, C), with a root mean square of 0.2."""
    updates = orthogonal_updates(momenta, steps)
    for momentum, update in zip(momenta, updates, strict=True):
        update.mul_(0.2 * max(momentum.flatten(1).shape) ** 0.5)
    return updates


def orthogonal_updates(momenta: list[Tensor], steps: int = 5) -> list[Tensor]:
    """Momenta, each (R, ...) as a matrix (R, C), with singular values of about one.

    Those of one shape are worked on together.
    """
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


def orthogonalize(matrices: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Set the singular values of matrices (N, R, C) to about one, by a quintic Newton-Schulz.

    For X = U S V' an iteration gives U p(S) V' with p(s) = a s + b s^3 + c s^5: multiplications
    alone, in bfloat16 on a GPU that multiplies it natively and in float32 elsewhere.
    """
    a, b, c = QUINTIC
    native = matrices.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    x = matrices.to(torch.bfloat16 if native else torch.float32)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT  # the smaller Gram matrix
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)  # singular values of one at most
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
