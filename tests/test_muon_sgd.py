"""Filters of fixed norm by Muon, the rest by Nesterov's SGD; and SGD with fast biases."""

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from test_classification import NUM_CLASSES, Points, trainer, weights
from test_optimizers import randn
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from lit_models import LitClassifier
from lit_models.optimizers import BiasScaledSGD, MuonSGD
from lit_models.optimizers.orthogonal import orthogonalize
from lit_models.schedules import Triangle


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)),
        nn.Conv2d(2, 6, 2, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6, NUM_CLASSES, bias=False),
    )


def reference_step(network: nn.Sequential, sums: dict[str, Tensor]) -> None:
    """The update of airbench94_muon with lr 0.1, momentum 0.5, written down for one layer."""
    named = dict(network.named_parameters())
    gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
    for name, lr in (("2.weight", 2.0), ("2.bias", 2.0), ("5.weight", 3.0)):
        p = named[name]
        gradient = gradients[name] + 0.004 / lr * p.data  # 0.4 % of the weight is lost in a step
        sums[name] = 0.85 * sums[name] + gradient if name in sums else gradient.clone()
        p.data -= lr * (gradient + 0.85 * sums[name])
    filters = named["1.weight"]
    gradient = gradients["1.weight"]
    if "1.weight" not in sums:
        filters.data *= 6**0.5 / filters.data.norm()
    sums["1.weight"] = 0.5 * sums.get("1.weight", torch.zeros(())) + gradient
    ahead = (gradient + 0.5 * sums["1.weight"]).flatten(1)
    filters.data -= 0.1 * orthogonalize(ahead[None], 3)[0].view_as(filters)
    filters.data *= 6**0.5 / filters.data.norm()


def test_steps_are_those_of_the_formulas() -> None:
    ours, theirs = small_network(), small_network()
    optimizer = MuonSGD(ours.parameters(), lr=0.1, momentum=0.5, bias_lr=2.0, head_lr=3.0)
    inputs, target = randn(40, 8), torch.arange(40) % NUM_CLASSES
    sums: dict[str, Tensor] = {}
    for _ in range(4):
        for network in (ours, theirs):
            network.zero_grad()
            F.cross_entropy(network(inputs), target).backward()
        optimizer.step()
        reference_step(theirs, sums)
        torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()))


def test_the_scale_of_filters_means_nothing() -> None:
    """After batch normalisation; this is why their norm may be fixed."""
    ours = small_network()
    larger = copy.deepcopy(ours)
    next(larger.parameters()).data.mul_(10)
    inputs, target = randn(40, 8), torch.arange(40) % NUM_CLASSES
    for network in (ours, larger):
        F.cross_entropy(network(inputs), target).backward()
        MuonSGD(network.parameters()).step()
    filters, scaled = (next(network.parameters()) for network in (ours, larger))
    torch.testing.assert_close(filters, scaled, atol=1e-3, rtol=1e-3)


def test_a_parameter_without_gradient_stays() -> None:
    network = small_network()
    params = list(network.parameters())  # filters, gains, biases, output layer
    before = [p.detach().clone() for p in params]
    network(randn(4, 8)).sum().backward()
    params[0].grad = None
    MuonSGD(params).step()
    same = [torch.equal(p, old) for p, old in zip(params, before, strict=True)]
    assert same[0]
    assert not same[-1]


def test_a_closure_is_called_with_gradients() -> None:
    parameter = nn.Parameter(torch.ones(2))

    def closure() -> Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    optimizer = MuonSGD([parameter], bias_lr=0.1)
    assert optimizer.step(closure).item() == 2
    step = 0.1 * (2 + 0.004 / 0.1) * 1.85  # gradient and decay, once more ahead by the momentum
    torch.testing.assert_close(parameter.detach(), torch.full((2,), 1 - step))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
@pytest.mark.parametrize("make", [partial(MuonSGD, bias_lr=0.5, head_lr=0.1), BiasScaledSGD])
def test_a_resumed_run_ends_with_the_same_bits(make: Any, tmp_path: Path) -> None:
    def fit(ckpt_path: Path | None = None) -> list[Tensor]:
        lit = LitClassifier(small_network(), make, NUM_CLASSES, Triangle)
        checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
        settings = {"enable_checkpointing": True, "callbacks": [checkpoint]}
        run = trainer(tmp_path, max_epochs=2, **settings)
        run.fit(lit, Points(), ckpt_path=ckpt_path, weights_only=True)
        return weights(lit)

    whole = fit()
    assert all(map(torch.equal, whole, fit(tmp_path / "step=15.ckpt")))


def test_biases_move_faster_and_decay_as_much() -> None:
    ours, theirs = small_network(), small_network()
    named = dict(theirs.named_parameters())
    fast = [named["2.weight"], named["2.bias"]]
    slow = [named["1.weight"], named["5.weight"]]
    known = torch.optim.SGD(
        [
            {"params": slow, "lr": 0.01, "weight_decay": 0.1},
            {"params": fast, "lr": 0.08, "weight_decay": 0.1 / 8},
        ],
        momentum=0.9,
        nesterov=True,
    )
    optimizer = BiasScaledSGD(ours.parameters(), lr=0.01, bias_scale=8, weight_decay=0.1)
    inputs, target = randn(40, 8), torch.arange(40) % NUM_CLASSES
    for _ in range(3):
        for network, each in ((ours, optimizer), (theirs, known)):
            network.zero_grad()
            F.cross_entropy(network(inputs), target).backward()
            each.step()
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be positive, got 0.0."),
        ({"bias_lr": -1.0}, "bias_lr must be positive, got -1.0."),
        ({"head_lr": 0.0}, "head_lr must be positive, got 0.0."),
        ({"momentum": 1.0}, "momentum must be in [0, 1), got 1.0."),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MuonSGD([nn.Parameter(torch.zeros(2))], **options)


def test_a_schedule_that_knows_one_rate_alone_is_refused(tmp_path: Path) -> None:
    """OneCycleLR would give biases the learning rate of the filters, and say nothing."""
    one_cycle = partial(OneCycleLR, max_lr=0.1)
    lit = LitClassifier(small_network(), BiasScaledSGD, NUM_CLASSES, one_cycle)
    with pytest.raises(ValueError, match="OneCycleLR gives every parameter the same learning rate"):
        trainer(tmp_path, max_epochs=1).fit(lit, Points())


def test_filters_of_zeros_stay_finite() -> None:
    network = small_network()
    network(randn(4, 8)).sum().backward()
    params = list(network.parameters())
    params[0].data.zero_()
    MuonSGD(params).step()
    assert params[0].isfinite().all()


def test_gradients_are_left_as_they_were() -> None:
    """Others look at them after the step; torch's own would add Nesterov's momentum to them."""
    network = small_network()
    network(randn(4, 8)).sum().backward()
    before = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    MuonSGD(network.parameters()).step()
    after = [p.grad for p in network.parameters() if p.grad is not None]
    assert all(map(torch.equal, before, after))


def test_a_bias_scale_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="bias_scale must be positive, got 0; 1 is as"):
        BiasScaledSGD([nn.Parameter(torch.zeros(2))], bias_scale=0)
