"""The receptive field is where the gradient of an output reaches."""

from functools import partial

import pytest
import torch
from convolution import receptive_field
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_models.networks import ConvStack, LeNet5, ResNet, WhitenedCNN

QUICK = settings(max_examples=40, deadline=None)


def pair(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


def test_layer_of_the_question() -> None:
    """UCSB homework 2, question 2.3: weights, the output of a batch, and that flattened."""
    conv = nn.Conv2d(3, 2, kernel_size=5, stride=2)
    assert conv.weight.shape == (2, 3, 5, 5)
    assert conv.weight.numel() == 150
    output = conv(torch.zeros(100, 3, 64, 64))
    assert output.shape == (100, 2, 30, 30)
    assert output.flatten(1).shape == (100, 1800)


def pixels(network: nn.Module, images: Tensor, position: tuple[int, int]) -> list[list[int]]:
    """The rows, and the columns, of the images by which an output has a gradient."""
    images = images.clone().requires_grad_()
    network(images)[0, :, *position].sum().backward()
    assert images.grad is not None
    _, _, *places = images.grad.nonzero(as_tuple=True)
    return [place.unique().tolist() for place in places]


class Branches(nn.Module):
    """Two paths that leave the same size, and of which one sees more."""

    def __init__(self, stride: tuple[int, int]) -> None:
        super().__init__()
        self.wide = nn.Conv2d(1, 1, 5, stride, padding=2)
        self.narrow = nn.Conv2d(1, 1, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(x) + self.wide(x)


kernel, stride, dilation = pair(1, 4), pair(1, 2), pair(1, 2)
LAYERS = st.one_of(
    st.builds(partial(nn.Conv2d, 1, 1), kernel, stride, dilation=dilation),
    st.builds(nn.AvgPool2d, kernel, stride),
    st.builds(Branches, stride),
)


@QUICK
@given(st.lists(LAYERS, min_size=1, max_size=3))
def test_field_is_where_the_gradient_of_an_output_reaches(layers: list[nn.Module]) -> None:
    network, images = nn.Sequential(*layers).double(), torch.zeros(1, 1, 80, 80).double()
    for weight in network.parameters():
        nn.init.ones_(weight)  # positive ones cannot cancel
    field = receptive_field(network, images)
    row, column = (size // 2 for size in network(images).shape[2:])
    here = pixels(network, images, (row, column))
    there = pixels(network, images, (row + 1, column + 1))
    assert field.size == tuple(seen[-1] - seen[0] + 1 for seen in here)
    assert field.stride == tuple(b[0] - a[0] for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize(
    ("network", "size", "stride"),
    [
        (LeNet5(), 16, 4),  # 5, 6 behind the pooling, 6 + 4 * 2, + 1 * 2
        (LeNet5(pooling="none", stride=2), 13, 4),
        (ConvStack(3, in_channels=3), 4 + 3 * 2 * 4, 4),
        (ConvStack(3, residual=True, in_channels=3), 4 + 3 * 2 * 4, 4),
        (WhitenedCNN(widths=(4, 4, 4)), 2 + (2 + 1 + 4) * (1 + 2 + 4), 8),
        (ResNet(widths=(4, 4, 4)), 3 + 1 + (4 + 4) + (4 + 8) + (8 + 16), 8),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, dilation=2), nn.ReLU()), 7, 3),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else None,
)
def test_field_of_the_networks(network: nn.Module, size: int, stride: int) -> None:
    images = torch.randn(2, 3, 32, 32)
    before = {name: x.clone() for name, x in network.state_dict().items()}
    assert receptive_field(network, images) == ((size, size), (stride, stride))
    assert network.training
    assert images.grad is None
    assert all(torch.equal(before[name], x) for name, x in network.state_dict().items())


class Jump(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, ::2, ::2]


@pytest.mark.parametrize(
    ("network", "shape", "size", "stride"),
    [
        (nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1) for _ in range(400))), (9, 9), 801, 1),
        (nn.Sequential(nn.Conv1d(1, 1, 3, 2), nn.MaxPool1d(3, 2), nn.AvgPool1d(2)), (40,), 11, 8),
        (nn.Sequential(nn.ReLU(inplace=True), nn.Conv3d(1, 1, 2)), (4, 4, 4), 2, 1),
        (nn.Identity(), (4, 4), 1, 1),
    ],
    ids=["deep", "one axis", "in place", "nothing"],
)
def test_field_of_odd_networks(
    network: nn.Module, shape: tuple[int, ...], size: int, stride: int
) -> None:
    with torch.no_grad():
        field = receptive_field(network, torch.randn(1, 1, *shape))
    assert field == ((size,) * len(shape), (stride,) * len(shape))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.ConvTranspose2d(1, 1, 2, 2), "after ConvolutionBackward0 is not known"),
        (nn.Upsample(scale_factor=2), "after UpsampleNearest2DBackward0 is not known"),
        (nn.AdaptiveAvgPool2d(4), "after AdaptiveAvgPool2DBackward0 is not known"),
        (Jump(), "after SliceBackward0 is not known; give what is before it"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_field_of_what_resamples_is_refused(layer: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        receptive_field(nn.Sequential(nn.Conv2d(1, 1, 3), layer), torch.randn(1, 1, 9, 9))


def test_field_of_what_looks_away_is_refused() -> None:
    class Constant(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight

    with pytest.raises(ValueError, match="does not depend on the images"):
        receptive_field(Constant(1, 1, 3), torch.randn(1, 1, 9, 9))
