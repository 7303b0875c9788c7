"""A stack of convolutions through which the gradient passes, or does not."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from callbacks.pictures.hidden_gradients import trace
from lit_models.networks import ConvStack


def first_to_last(depth: int, residual: bool) -> float:
    """|dL/dx| below the first layer over that above the last."""
    torch.manual_seed(0)
    network, images, target = (
        ConvStack(depth, residual),
        torch.rand(20, 1, 28, 28),
        torch.arange(20),
    )
    (seen,) = trace(network, lambda: F.cross_entropy(network(images), target % 10)).values()
    gradients = seen.of_batch().gradients
    assert len(gradients) == depth + 1
    return float(gradients[0] / gradients[-1])


def test_the_gradient_vanishes_but_for_residual_layers() -> None:
    plain, residual = first_to_last(16, residual=False), first_to_last(16, residual=True)
    assert plain < 1e-5
    assert 0.5 < residual < 2


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
