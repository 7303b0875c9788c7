"""Muon is torch's on matrices and AdamW on the rest; it can be scheduled, resumed and clipped."""

import copy
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from test_classification import NUM_CLASSES, Points, model, trainer, weights
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, StepLR

from callbacks import UpdateClipping
from lit_models import LitClassifier
from lit_models.optimizers import Muon, muon
from lit_models.optimizers.orthogonal import muon_updates, orthogonalize


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_network() -> nn.Sequential:
    """Filters, matrices of two shapes, biases and gains."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 6, 2), nn.Flatten()]
    return nn.Sequential(
        *layers, nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)
    )


def descend(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    inputs, target = randn(40, 8), torch.arange(40) % NUM_CLASSES
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(inputs), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# The update


@pytest.mark.parametrize("shape", [(6, 6), (6, 20), (20, 6)], ids=str)
def test_singular_values_become_about_one(shape: tuple[int, int]) -> None:
    matrices = randn(3, *shape) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    result = orthogonalize(matrices)
    assert torch.linalg.svdvals(result).sub(1).abs().max() < 0.35
    # and the directions stay: U S V' becomes U S' V' with a diagonal S'
    u, _, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    inner = u.mT @ result.double() @ v.mT
    off_diagonal = inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))
    assert off_diagonal.abs().max() < 1e-4


def test_an_iteration_is_a_polynomial_of_the_singular_values() -> None:
    matrix = randn(4, 7)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonalize(matrix[None], steps=3)[0], u @ s.diag() @ v)


def test_matrices_of_one_shape_are_worked_on_together_and_alike() -> None:
    momenta = [
        randn(5, 12),
        randn(4, 3, 2, 2),
        randn(5, 3, 2, 2, seed=1),
        randn(12, 5),
        randn(7, 1),
    ]
    together = muon_updates(momenta)
    for momentum, update in zip(momenta, together, strict=True):
        assert update.shape == momentum.shape
        torch.testing.assert_close(update, muon_updates([momentum])[0])
        largest = max(momentum.flatten(1).shape)
        # 0.2 where all singular values are one: there are min(R, C) of them in R * C entries
        assert update.square().mean().sqrt().item() == pytest.approx(0.2, abs=0.07)
        expected = orthogonalize(momentum.flatten(1)[None])[0] * 0.2 * math.sqrt(largest)
        torch.testing.assert_close(update.flatten(1), expected)


def test_a_gradient_of_zero_moves_nothing() -> None:
    assert not muon_updates([torch.zeros(3, 4)])[0].any()


# Equal to what is known


def test_on_hidden_matrices_it_is_the_one_of_torch_and_adamw_on_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.float)  # torch rounds to it on every device
    torch.manual_seed(0)
    ours = nn.Sequential(*(nn.Linear(*s) for s in ((8, 12), (12, 12), (12, 5))))
    theirs = copy.deepcopy(ours)
    options: dict[str, Any] = {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.1}
    descend(ours, Muon(ours.parameters(), **options), 10)
    named = dict(theirs.named_parameters())
    hidden = [named.pop("0.weight"), named.pop("1.weight")]
    rest = list(named.values())
    known = [
        torch.optim.Muon(hidden, **options, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.15 * 0.03, weight_decay=0.1 / 0.15),
    ]
    for _ in range(10):
        theirs.zero_grad()
        F.cross_entropy(theirs(randn(40, 8)), torch.arange(40) % NUM_CLASSES).backward()
        for optimizer in known:
            optimizer.step()
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()))


def test_vectors_alone_are_trained_too() -> None:
    norm = nn.BatchNorm1d(8)
    descend(norm, Muon(norm.parameters(), lr=0.1), 10)
    assert norm.weight.sub(1).abs().max() > 0.01


def test_filters_move_as_the_matrix_they_are() -> None:
    """Whatever the layout in memory: a LitModel keeps its filters in channels_last."""
    gradient = randn(6, 3, 2, 2)
    filters = [
        nn.Parameter(torch.zeros(6, 3, 2, 2)),
        nn.Parameter(torch.zeros(6, 3, 2, 2).to(memory_format=torch.channels_last)),
    ]
    matrix = nn.Parameter(torch.zeros(6, 12))
    for p in (*filters, matrix):
        p.grad = gradient.clone().reshape(p.shape)
        Muon([p, nn.Parameter(torch.zeros(1, 1))]).step()  # the last matrix is AdamW's
    for p in filters:
        torch.testing.assert_close(p.flatten(1), matrix)


def test_weight_decay_shrinks_every_parameter_by_its_share_of_the_learning_rate() -> None:
    params = [nn.Parameter(randn(3, 4)), nn.Parameter(randn(3)), nn.Parameter(randn(2, 3))]
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    Muon(params, lr=0.1, weight_decay=0.5).step()
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), 0.95 * old)


def test_a_parameter_without_gradient_stays() -> None:
    params = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))]
    params[0].grad = torch.eye(2)
    Muon(params, weight_decay=0.1).step()
    assert torch.equal(params[1], torch.ones(2, 2))
    assert not torch.equal(params[0], torch.ones(2, 2))


def test_it_learns_what_a_network_of_all_kinds_of_layers_can_learn() -> None:
    network = small_network()
    losses = descend(network, Muon(network.parameters(), lr=0.05), 200)
    assert losses[0] == pytest.approx(math.log(NUM_CLASSES), abs=0.3)
    assert losses[-1] < 0.1


def test_a_closure_is_called_with_gradients() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = Muon([parameter], lr=0.1)

    def closure() -> Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2
    torch.testing.assert_close(
        parameter.detach(), torch.full((2,), 1 - 0.15 * 0.1)
    )  # Adam's first step


# With everything else


@pytest.mark.parametrize(
    "schedule",
    [partial(OneCycleLR, max_lr=0.1, total_steps=9), partial(StepLR, step_size=2)],
    ids=["one_cycle", "step"],
)
def test_a_schedule_acts_on_matrices_and_vectors_alike(
    schedule: Callable[[Muon], LRScheduler],
) -> None:
    vector, matrix = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4, 4))
    head = nn.Parameter(torch.zeros(2, 4))
    optimizer = Muon([vector, matrix, head], lr=0.1)
    scheduler = schedule(optimizer)
    for _ in range(5):
        vector.grad, matrix.grad = torch.ones(4), torch.eye(4)
        before = vector.detach().clone(), matrix.detach().clone()
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
        # of a gradient that never changes, both averages are what it is
        torch.testing.assert_close(before[0] - vector.detach(), torch.full((4,), 0.15 * lr))
        update = muon_updates([torch.eye(4)])[0]  # of any multiple of it
        torch.testing.assert_close(before[1] - matrix.detach(), lr * update)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    schedule = partial(OneCycleLR, max_lr=0.1)

    def fit(ckpt_path: Path | None = None) -> list[Tensor]:
        lit = LitClassifier(small_network(), partial(Muon, lr=0.1), NUM_CLASSES, schedule)
        checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
        settings = {"enable_checkpointing": True, "callbacks": [checkpoint]}
        run = trainer(tmp_path, max_epochs=2, **settings)
        run.fit(lit, Points(), ckpt_path=ckpt_path, weights_only=True)
        return weights(lit)

    whole = fit()
    assert all(map(torch.equal, whole, fit(tmp_path / "step=15.ckpt")))


def test_update_clipping_limits_vectors_and_leaves_matrices_and_decay_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix moves by about 0.2 lr, so ``max_rms=1`` acts on what AdamW moves alone."""
    monkeypatch.setattr(muon, "ADAMW_SCALE", 1e4)

    def fit(**options: Any) -> tuple[list[Tensor], list[Tensor]]:
        lit = model()
        lit.network = nn.Sequential(nn.Linear(8, 8), lit.network)
        lit.optimizer = partial(Muon, lr=0.1, weight_decay=0.5)
        before = weights(lit)
        trainer(tmp_path, max_steps=1, **options).fit(lit, Points())
        return before, weights(lit)

    (before, free), (_, clipped) = fit(), fit(callbacks=[UpdateClipping(max_rms=1.0)])
    assert torch.equal(free[0], clipped[0])
    update = clipped[1] - 0.95 * before[1]
    assert update.square().mean().sqrt().item() == pytest.approx(0.1)
    assert (free[1] - before[1]).norm() > 10 * update.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must not be negative, got -1.0."),
        ({"momentum": 1.0}, "momentum must be in [0, 1), got 1.0."),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1."),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Muon([nn.Parameter(torch.zeros(2))], **options)
