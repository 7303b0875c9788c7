"""Recurrent networks: their size, what their output depends on, and that they learn."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_models.networks import LSTM, RNN

NETWORKS = pytest.mark.parametrize("make_network", [LSTM, RNN])


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        (LSTM(), 1_108),  # the course notebook's, of 12 units
        (LSTM(hidden_size=4), 244),
        (LSTM(num_layers=2), 2_356),
        (RNN(hidden_size=4), 76),
        (RNN(input_size=3, hidden_size=5, num_classes=7), 92),
    ],
)
def test_size(network: nn.Module, parameters: int) -> None:
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_weights_begin_as_those_of_the_parts_alone() -> None:
    torch.manual_seed(1)
    network = LSTM()
    torch.manual_seed(1)
    parts = [*nn.LSTM(8, 12, batch_first=True).parameters(), *nn.Linear(12, 4).parameters()]
    for ours, other in zip(network.parameters(), parts, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
def test_rnn_is_the_formula(nonlinearity: str) -> None:
    network = RNN(input_size=3, hidden_size=5, nonlinearity=nonlinearity)  # type: ignore[arg-type]
    weight_x, weight_h, bias_x, bias_h = network.core.parameters()
    x = torch.randn(2, 6, 3)
    h = torch.zeros(2, 5)
    for t in range(6):
        h = getattr(torch, nonlinearity)(x[:, t] @ weight_x.T + bias_x + h @ weight_h.T + bias_h)
    torch.testing.assert_close(network(x), network.head(h))


@NETWORKS
def test_every_step_counts(make_network: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 9, 8, requires_grad=True)
    make_network()(x)[0].sum().backward()
    assert x.grad is not None
    assert (x.grad[0].abs().sum(1) > 0).all()
    assert (x.grad[1:] == 0).all()  # sequences of a batch do not mix


@NETWORKS
def test_starts_undecided(make_network: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    x = F.one_hot(torch.randint(8, (200, 81)), 8).float()
    loss = F.cross_entropy(make_network()(x), torch.arange(200) % 4).item()
    assert loss == pytest.approx(math.log(4), abs=0.05)


@NETWORKS
def test_overfits_one_batch(make_network: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    network = make_network(hidden_size=32)
    x, target = F.one_hot(torch.randint(8, (16, 8)), 8).float(), torch.arange(16) % 4
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), target)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert torch.equal(network(x).argmax(1), target)
