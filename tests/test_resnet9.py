"""Page's network: each of its switches does what it says, and they go together."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_networks import smooth_images
from torch import Tensor, nn

from lit_models.networks import ResNet9
from lit_models.networks.resnet9 import GhostBatchNorm
from lit_models.networks.whitening import Whitening

ALL: dict[str, Any] = {
    "pool_first": True,
    "activation": "celu",
    "ghost": 8,
    "train_scales": False,
    "whiten": True,
}


def shown(network: ResNet9) -> ResNet9:
    for layer in network.modules():
        if isinstance(layer, Whitening):
            layer.init_from_data(smooth_images(64))
    return network


def test_it_is_the_network_of_part_4() -> None:
    # 64, 128 and its pair, 256, 512 and its pair, linear; each convolution has scales and biases
    convolutions = [(3, 64), (64, 128), (128, 128), (128, 128), (128, 256), (256, 512)]
    convolutions += [(512, 512), (512, 512)]
    expected = sum(9 * i * o + 2 * o for i, o in convolutions) + 512 * 10
    assert sum(p.numel() for p in ResNet9().parameters()) == expected == 6_573_120


def test_starts_undecided_and_overfits_a_batch() -> None:
    torch.manual_seed(0)
    network = shown(ResNet9(width=4, **ALL))
    images, target = smooth_images(20, seed=1), torch.arange(20) % 10
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(10), abs=0.3)
    assert losses[-1] < 0.2


@pytest.mark.parametrize("name", ALL)
def test_each_switch_gives_logits(name: str) -> None:
    network = shown(ResNet9(7, width=4, in_channels=3, **{name: ALL[name]}))
    assert network(smooth_images(4)).shape == (4, 7)


def test_frozen_scales_are_not_trained_and_biases_are() -> None:
    norms = [m for m in ResNet9(width=4, **ALL).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 8
    assert not any(norm.weight.requires_grad for norm in norms)
    assert all(norm.bias.requires_grad for norm in norms)


def test_pooling_first_gives_the_same_where_the_order_cannot_matter() -> None:
    """Normalisation and ReLU keep order, so in evaluation they change places with the maximum."""
    torch.manual_seed(0)
    first = ResNet9(width=4, pool_first=True).eval()
    torch.manual_seed(0)
    after = ResNet9(width=4).eval()
    images = smooth_images(3)
    torch.testing.assert_close(first(images), after(images))


# Ghost batch normalisation


def by_hand(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt()


def test_each_group_is_normalised_by_itself() -> None:
    x = torch.randn(10, 3, 2, 2) * torch.arange(1, 11).view(-1, 1, 1, 1)
    expected = torch.cat([by_hand(x[:4]), by_hand(x[4:8]), by_hand(x[8:])])
    torch.testing.assert_close(GhostBatchNorm(3, 4)(x), expected)


def test_a_group_as_large_as_the_batch_is_batch_normalisation() -> None:
    ghost, plain = GhostBatchNorm(3, 8), nn.BatchNorm2d(3)
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(8, 3, 4, 4) + 1
        torch.testing.assert_close(ghost(x), plain(x))
    torch.testing.assert_close(ghost.state_dict(), plain.state_dict())
    torch.testing.assert_close(ghost.eval()(x), plain.eval()(x))


def test_running_averages_weigh_all_groups_alike() -> None:
    x = torch.tensor([0.0, 0.0, 8.0, 8.0]).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    ghost = GhostBatchNorm(1, 2)
    for _ in range(400):
        ghost(x)
    assert ghost.running_mean is not None
    assert ghost.running_mean.item() == pytest.approx(4, abs=0.2)


def test_a_group_of_negative_size() -> None:
    with pytest.raises(ValueError, match="ghost must not be negative, got -1"):
        ResNet9(ghost=-1)
