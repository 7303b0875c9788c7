"""A stack of convolutions through which the gradient passes, or does not."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from callbacks.pictures.hidden_gradients import trace
from lit_models.networks import ConvStack


def decades(depth: int, seed: int = 0, **options: Any) -> float:
    """log10 of |dL/dx| below the first layer over that above the last."""
    torch.manual_seed(seed)
    network, images = ConvStack(depth, **options), torch.rand(20, 1, 28, 28)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    (seen,) = trace(
        network, lambda: F.cross_entropy(network(images), torch.arange(20) % 10)
    ).values()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    gradients = seen.of_batch().gradients
    assert len(gradients) == depth + 1
    return math.log10(gradients[0] / gradients[-1])


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({}, -14.5, -12.5),
        ({"residual": True}, -0.2, 0.2),
        ({"init": "kaiming"}, -1.1, -0.4),  # the zeros around 7 x 7 places take 0.73 of it
        ({"batch_norm": True}, 2.0, 3.0),
    ],
    ids=["plain", "residual", "he", "batch norm"],
)
def test_decades_of_gradient_over_32_layers(
    options: dict[str, Any], low: float, high: float
) -> None:
    """He's initialisation keeps the gradient, batch normalisation lets it explode.

    It did not, as it was seen by the running statistics of an untrained network: -13.
    """
    found = [decades(32, seed, **options) for seed in range(4)]
    assert low < sum(found) / 4 < high


def test_residual_layers_without_weights_change_nothing() -> None:
    torch.manual_seed(0)
    network, images = ConvStack(5, residual=True), torch.rand(2, 1, 28, 28)
    for parameter in network.layers.parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(
        network(images), network.output(network.patches(images).relu().mean((2, 3)))
    )


@pytest.mark.parametrize("residual", [False, True])
def test_a_layer_is_its_equation(residual: bool) -> None:
    network, images = ConvStack(1, residual, in_channels=3), torch.rand(2, 3, 28, 28)
    x: Tensor = network.patches(images).relu()
    x = network.layers[0](x).relu() + (x if residual else 0)
    assert x.shape == (2, 16, 7, 7)
    torch.testing.assert_close(network(images), network.output(x.mean((2, 3))))


def test_a_stack_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        ConvStack(0)


def test_an_unknown_init_is_refused() -> None:
    with pytest.raises(ValueError, match="init must be one of torch, kaiming, got 'he'"):
        ConvStack(1, init="he")  # type: ignore[arg-type]
