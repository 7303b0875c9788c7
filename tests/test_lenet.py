"""LeNet5 is the known network by default, and every knob does what it says."""

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_networks import smooth_images
from torch import Tensor, nn

import train
from lit_models.networks import LeNet5

KNOBS = pytest.mark.parametrize(
    "options",
    [
        {"channels": (8, 12)},
        {"kernel_size": 3},
        {"stride": 2},
        {"pooling": "average"},
        {"pooling": "none", "stride": 2},
        {"dropout": 0.2},
        {"batch_norm": True},
        {"init": "kaiming"},
    ],
    ids=str,
)


def fc1_inputs(**options: Any) -> int:
    return LeNet5(**options).fc1.in_features


@KNOBS
def test_starts_undecided(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logits = LeNet5(**options)(smooth_images(200))
    loss = F.cross_entropy(logits, torch.arange(200) % 10).item()
    larger = options.get("init") == "kaiming"  # its logits, where pooling takes the largest pixels
    assert loss == pytest.approx(math.log(10), abs=0.6 if larger else 0.3)


def test_overfits_one_batch_with_every_knob_turned() -> None:
    torch.manual_seed(0)
    network = LeNet5(10, 3, 0, (8, 12), 3, 2, "average", 0.1, batch_norm=True, init="kaiming")
    images, targets = smooth_images(20), torch.arange(20) % 10
    optimizer = torch.optim.Adam(network.parameters(), lr=0.005)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(network(images), targets).backward()
        optimizer.step()
    assert torch.equal(network.eval()(images).argmax(1), targets)


def test_default_weights_are_those_of_five_plain_layers() -> None:
    """The same draws in the same order under the same names, whatever knobs there are."""
    torch.manual_seed(0)
    layers = {
        "conv1": nn.Conv2d(3, 6, 5),
        "conv2": nn.Conv2d(6, 16, 5),
        "fc1": nn.Linear(400, 120),
        "fc2": nn.Linear(120, 84),
        "fc3": nn.Linear(84, 10),
    }
    torch.manual_seed(0)
    network = LeNet5()
    expected = nn.ModuleDict(layers).state_dict()
    assert list(network.state_dict()) == list(expected)
    assert all(map(torch.equal, network.state_dict().values(), expected.values()))


def reference(network: LeNet5, images: Tensor, pool: Any, stride: int) -> Tensor:
    """The network in evaluation, from its weights alone."""
    weights = network.state_dict()

    def layer(operation: Any, x: Tensor, name: str, norm: str, **options: Any) -> Tensor:
        x = operation(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, scale, shift = (
            weights[f"{norm}.{key}"].reshape(1, -1, *[1] * (x.ndim - 2)) for key in keys
        )
        return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)

    x = pool(layer(F.conv2d, images, "conv1", "norm1", stride=stride))
    x = pool(layer(F.conv2d, x, "conv2", "norm2", stride=stride))
    x = layer(F.linear, x.flatten(1), "fc1", "norm3")
    x = layer(F.linear, x, "fc2", "norm4")
    return x @ weights["fc3.weight"].T + weights["fc3.bias"]


@pytest.mark.parametrize(
    ("pooling", "pool"),
    [
        ("max", lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))),
        ("average", lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))),
        ("none", lambda x: x),
    ],
)
def test_it_equals_its_formula(pooling: Any, pool: Any) -> None:
    network = LeNet5(pooling=pooling, stride=2, batch_norm=True, dropout=0.5)
    network(smooth_images(50))  # statistics other than those of the start
    images = smooth_images(4, seed=1)
    expected = reference(network, images, pool, stride=2)
    torch.testing.assert_close(network.eval()(images), expected)


def test_the_first_linear_layer_takes_the_pixels_that_are_left() -> None:
    assert fc1_inputs(kernel_size=3) == 16 * 6 * 6  # 32 -> 30 -> 15 -> 13 -> 6
    assert fc1_inputs(stride=2) == 16  # 32 -> 14 -> 7 -> 2 -> 1
    assert fc1_inputs(stride=2, pooling="none") == fc1_inputs()
    assert fc1_inputs(channels=(4, 8)) == 8 * 5 * 5


def test_dropout_acts_on_the_hidden_linear_layers_in_training_alone() -> None:
    network, images = LeNet5(dropout=0.5), smooth_images(50)
    seen: list[Tensor] = []
    for layer in (network.conv2, network.fc1, network.fc2, network.fc3):
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))

    def share_of_zeros() -> list[float]:
        seen.clear()
        network(images)
        return [(x == 0).float().mean().item() for x in seen]

    torch.manual_seed(0)
    dropped, whole = share_of_zeros(), (network.eval(), share_of_zeros())[1]
    assert dropped[:2] == whole[:2]
    for with_dropout, without in zip(dropped[2:], whole[2:], strict=True):
        assert with_dropout == pytest.approx(1 - 0.5 * (1 - without), abs=0.03)


def test_kaiming_keeps_the_size_of_the_signal_through_the_layers() -> None:
    torch.manual_seed(0)
    network = LeNet5(init="kaiming", channels=(200, 200), stride=3, pooling="none")
    for layer, gain in ((network.conv2, 2), (network.fc1, 2), (network.fc3, 1)):
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx(math.sqrt(gain / fan_in), rel=0.05)
    biases = [p for name, p in network.named_parameters() if name.endswith("bias")]
    assert len(biases) == 5
    assert not any(bias.any() for bias in biases)
    signal = network.conv2(torch.randn(100, 200, 5, 5)).relu()
    assert signal.square().mean().item() == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 0}, "kernel_size must be at least 1, got 0."),
        ({"stride": 0}, "stride must be at least 1, got 0."),
        ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0."),
        ({"pooling": "min"}, "pooling must be one of max, average, none, got 'min'."),
        ({"init": "zeros"}, "init must be one of torch, kaiming, got 'zeros'."),
        (
            {"stride": 3},
            "no pixel of 32 x 32 is left after the convolutions with kernel_size 5, stride 3 and "
            "pooling max; lower kernel_size or stride.",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LeNet5(**options)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="images of 32 x 32 pixels, got 28 x 28; choose padding"):
        LeNet5(in_channels=1)(torch.zeros(2, 1, 28, 28))
    assert LeNet5(in_channels=1, padding=2)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_train_tells_it_in_one_sentence(
    small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    network = ["--model.network=lit_models.networks.LeNet5", "--model.network.stride=3"]
    flags = [flag for flag in small if "widths" not in flag]
    with pytest.raises(SystemExit):
        train.main(["fit", *flags, *network, "--trainer.fast_dev_run=1"])
    [line] = capsys.readouterr().err.splitlines()
    assert "no pixel of 32 x 32 is left" in line
