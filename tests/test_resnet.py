"""The residual network starts as it should, can learn, and takes images of any size."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_networks import smooth_images

from lit_models.networks import ResNet
from lit_models.networks.resnet import ResidualBlock


def test_parameters_are_as_stated() -> None:
    assert sum(p.numel() for p in ResNet(num_classes=2).parameters()) == 307_618


@pytest.mark.parametrize("num_classes", [2, 10])
def test_starts_undecided(num_classes: int) -> None:
    torch.manual_seed(0)
    network = ResNet(num_classes)
    targets = torch.arange(200) % num_classes
    loss = F.cross_entropy(network(smooth_images(200, seed=1)), targets).item()
    assert loss == pytest.approx(math.log(num_classes), abs=0.05)


@pytest.mark.parametrize("size", [(8, 8), (33, 20), (64, 64)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_any_size_of_image(size: tuple[int, int], blocks: int) -> None:
    network = ResNet(3, widths=(4, 8, 8), blocks=blocks, in_channels=1)
    assert network(torch.zeros(2, 1, *size)).shape == (2, 3)


def test_a_block_starts_by_adding_nothing_to_its_input() -> None:
    inputs = torch.rand(2, 8, 6, 6)  # not negative, so the last ReLU leaves them
    assert torch.equal(ResidualBlock(8, 8)(inputs), inputs)
