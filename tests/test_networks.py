"""Every network starts as it should and can learn."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_models.networks import LeNet5, ResNet, WhitenedCNN
from lit_models.networks.whitened_cnn import batch_norm, identity_conv


def smooth_images(count: int, seed: int = 0) -> Tensor:
    """Images (count, 3, 32, 32) whose neighbouring pixels and channels are alike, as in photos."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, 34, 34, generator=generator)
    colours = noise + noise.mean(1, keepdim=True)
    return F.avg_pool2d(colours, 3, stride=1)


def whitened(images: Tensor) -> WhitenedCNN:
    network = WhitenedCNN(widths=(16, 16, 16))
    network.whiten.init_from_data(images)
    return network


NETWORKS = pytest.mark.parametrize(
    "make_network", [LeNet5, lambda: whitened(smooth_images(64))], ids=["lenet5", "whitened_cnn"]
)


@pytest.mark.parametrize(
    ("options", "image", "parameters"),
    [
        pytest.param({}, (3, 32, 32), 62_006, id="cifar10"),
        pytest.param({"in_channels": 1, "padding": 2}, (1, 28, 28), 61_706, id="mnist"),
    ],
)
def test_lenet_is_the_known_network(
    options: dict[str, Any], image: tuple[int, int, int], parameters: int
) -> None:
    network = LeNet5(**options)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network(torch.zeros(2, *image)).shape == (2, 10)


@NETWORKS
def test_starts_undecided(make_network: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = make_network()
    targets = torch.arange(200) % 10
    loss = F.cross_entropy(network(smooth_images(200, seed=1)), targets).item()
    assert loss == pytest.approx(math.log(10), abs=0.05)


@pytest.mark.parametrize(
    ("make_network", "rate"),
    [
        pytest.param(LeNet5, 0.005, id="lenet5"),
        pytest.param(lambda: ResNet(10, widths=(16, 32)), 0.01, id="resnet"),
        # its logits start small
        pytest.param(lambda: whitened(smooth_images(64)), 0.05, id="whitened_cnn"),
    ],
)
def test_overfits_one_batch(make_network: Callable[[], nn.Module], rate: float) -> None:
    torch.manual_seed(0)
    network = make_network()
    images, targets = smooth_images(20, seed=1), torch.arange(20) % 10
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=rate)
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), targets)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert torch.equal(network.eval()(images).argmax(1), targets)


def test_whitening_decorrelates_its_images() -> None:
    images = smooth_images(100)
    first_layer = whitened(images).whiten
    with torch.no_grad():
        outputs = first_layer(images)[:, :12].permute(0, 2, 3, 1).reshape(-1, 12).double().numpy()

    windows = np.lib.stride_tricks.sliding_window_view(images.double().numpy(), (2, 2), (2, 3))
    patches = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    strengths = np.linalg.eigvalsh(patches.T @ patches / len(patches))[::-1]  # strongest first
    assert strengths[0] / strengths[-1] > 50  # there was something to whiten
    expected = np.diag(strengths / (strengths + 5e-4))
    np.testing.assert_allclose(outputs.T @ outputs / len(outputs), expected, atol=1e-4)


def test_whitening_does_not_blow_up_a_flat_direction() -> None:
    """Grey images: eight of the twelve directions carry nothing, and their filters stay bounded."""
    grey = smooth_images(50).mean(1, keepdim=True).expand(-1, 3, -1, -1)
    network = whitened(grey)
    bound = 1 / math.sqrt(5e-4)
    assert network.whiten.weight.flatten(1).norm(dim=1).max() <= bound * 1.001
    assert network(grey).isfinite().all()


def test_whitening_filters_come_with_their_negatives_and_a_fixed_sign() -> None:
    weight = whitened(smooth_images(50)).whiten.weight.flatten(1)
    assert weight.shape == (24, 12)
    assert torch.equal(weight[12:], -weight[:12])
    assert weight[:12].gather(1, weight[:12].abs().argmax(1, keepdim=True)).gt(0).all()


def test_whitening_is_decided_by_the_images_alone() -> None:
    torch.manual_seed(0)
    one = whitened(smooth_images(50)).whiten.weight
    torch.manual_seed(1)
    assert torch.equal(one, whitened(smooth_images(50)).whiten.weight)
    assert not torch.allclose(one, whitened(smooth_images(50, seed=1)).whiten.weight)


def test_only_the_bias_of_the_whitening_layer_is_trained() -> None:
    network = whitened(smooth_images(50))
    filters, bias = network.whiten.weight.clone(), network.whiten.bias
    optimizer = torch.optim.SGD(
        [p for p in network.parameters() if p.requires_grad], lr=1, weight_decay=0.1
    )
    F.cross_entropy(network(smooth_images(8)), torch.arange(8)).backward()
    optimizer.step()
    assert torch.equal(network.whiten.weight, filters)
    assert bias is not None
    assert bias.abs().max() > 0


def test_an_identity_convolution_hands_its_inputs_through() -> None:
    inputs = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(identity_conv(4, 6)(inputs)[:, :4], inputs)


def test_batch_norm_takes_out_the_scale_and_shift_of_what_comes_before() -> None:
    """In training every channel is standardised; in a test by averages of training."""
    torch.manual_seed(0)
    images = torch.randn(16, 3, 8, 8)
    conv, norm = identity_conv(3, 4), batch_norm(4)
    before = norm(conv(images))
    torch.testing.assert_close(before.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    spread = before.var((0, 2, 3), correction=0)
    torch.testing.assert_close(spread, torch.ones(4), atol=1e-2, rtol=0)
    conv.weight.data.mul_(100)
    for _ in range(40):  # until the averages are those of these images
        after = norm(conv(images) + 7)
    torch.testing.assert_close(after, before, atol=1e-2, rtol=0)
    norm.eval()
    torch.testing.assert_close(norm(conv(images[:1]) + 7), before[:1], atol=2e-2, rtol=0)
