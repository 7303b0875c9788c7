"""Fixed filters answer where they should, are never trained, and stand before any network."""

import re
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import CONFIGS, fit_quietly
from test_networks import smooth_images
from torch import Tensor, nn

import train
from benchmarks.step_overhead import RandomImages
from lit_models import LitClassifier
from lit_models.networks import Ensemble, Filtered, FixedFilters, LeNet5, ResNet, WhitenedCNN
from lit_models.networks.fixed_filters import FILTERS, Filter
from pipeline import loading

NAMES: tuple[Filter, ...] = get_args(Filter)
EDGES: tuple[Filter, ...] = ("sobel_x", "sobel_y", "laplacian")


def test_a_constant_image_has_no_edges() -> None:
    images = torch.full((2, 3, 5, 6), 0.7)
    answers = FixedFilters(NAMES)(images).unflatten(1, (3, 5))  # channel, filter
    for name, answer in zip(NAMES, answers.unbind(2), strict=True):
        expected = torch.zeros_like(images) if name in EDGES else images
        torch.testing.assert_close(answer, expected)


def test_a_step_answers_at_the_edge_with_its_sign() -> None:
    step = torch.zeros(1, 1, 4, 6)
    step[..., 3:] = 1.0  # brighter to the right
    right, down, around = FixedFilters(EDGES, in_channels=1)(step)[0]
    assert torch.equal(right, torch.tensor([0.0, 0, 4, 4, 0, 0]).expand(4, 6))
    assert torch.equal(around, torch.tensor([0.0, 0, -3, 3, 0, 0]).expand(4, 6))
    assert not down.any()
    turned = FixedFilters(EDGES, in_channels=1)(step.transpose(2, 3))[0]
    assert torch.equal(turned[1], right.T)
    assert torch.equal(FixedFilters(["sobel_x"], 1)(step.flip(3))[0, 0], -right.flip(1))


def test_answers_are_those_of_the_formula_for_each_channel() -> None:
    images = smooth_images(2).double()
    answers = FixedFilters(NAMES).double()(images)
    assert answers.shape == (2, 3 * len(NAMES), 32, 32)
    for c in range(3):
        for f, name in enumerate(NAMES):
            inner = sum(
                FILTERS[name][1 + i][1 + j] * images[:, c, 1 + i : 31 + i, 1 + j : 31 + j]
                for i in (-1, 0, 1)
                for j in (-1, 0, 1)
            )
            torch.testing.assert_close(answers[:, c * len(NAMES) + f, 1:-1, 1:-1], inner)


def gradient_by_formula(gradient: Tensor, kernel: Tensor) -> Tensor:
    """dL/dI[x, y] = sum dL/dO[x - i, y - j] K[i, j], zero beyond the border: the kernel turned."""
    return F.conv2d(gradient, kernel.rot90(2)[None, None], padding=1)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_by_the_image_is_that_of_the_midterm(name: Filter) -> None:
    image = torch.randn(1, 1, 7, 8, requires_grad=True)
    answer = FixedFilters([name], 1)(image)
    gradient = torch.randn_like(answer)
    gradient[..., [0, -1], :] = gradient[..., [0, -1]] = 0.0  # where the border is repeated
    answer.backward(gradient)
    torch.testing.assert_close(
        image.grad, gradient_by_formula(gradient, torch.tensor(FILTERS[name]).float())
    )


@pytest.mark.parametrize(
    "make", [partial(LeNet5, channels=(2, 4)), ResNet, WhitenedCNN], ids=["lenet", "resnet", "cnn"]
)
def test_any_network_sees_the_filters_and_the_classes(make: Any) -> None:
    filtered = Filtered(make, EDGES, num_classes=7)
    assert filtered(smooth_images(2)).shape == (2, 7)


def lit(network: nn.Module) -> LitClassifier:
    return LitClassifier(network, partial(torch.optim.SGD, lr=0.1, weight_decay=0.1))


def test_nothing_of_the_filters_is_trained() -> None:
    torch.manual_seed(0)
    network = Filtered(LeNet5)
    model = lit(network)
    trained = [p for group in model.configure_optimizers().param_groups for p in group["params"]]
    assert len(trained) == len(list(network.network.parameters()))
    fit_quietly(model, RandomImages(samples=64, batch_size=16, val_size=16), max_steps=2)
    weight = network.filters.weight
    assert torch.equal(weight, FixedFilters(("identity", "sobel_x", "sobel_y")).weight)
    assert not weight.requires_grad
    assert not list(network.filters.parameters())
    assert torch.equal(model.state_dict()["network.filters.weight"], weight)


def test_whitening_behind_the_filters_is_shown_what_comes_out_of_them() -> None:
    torch.manual_seed(0)
    member = partial(Filtered, partial(WhitenedCNN, widths=(4, 4, 4)), ["sobel_x", "sharpen"])
    for network in (member(), Ensemble(member, members=2)):
        model, data = lit(network), RandomImages(samples=96, batch_size=16, val_size=16)
        fit_quietly(model, data, max_steps=1)
        for part in network.modules():
            if isinstance(part, Filtered):
                expected = WhitenedCNN(in_channels=6).whiten
                expected.init_from_data(part.filters(data.training_inputs(5000)[0]))
                assert torch.equal(part.network.get_parameter("whiten.weight"), expected.weight)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ([], "filters must name at least one of identity, sobel_x, sobel_y, laplacian, sharpen."),
        (
            ["emboss"],
            "filters must be among identity, sobel_x, sobel_y, laplacian, sharpen, got 'emboss'.",
        ),
    ],
    ids=str,
)
def test_filters_that_are_not_there_are_refused(filters: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        FixedFilters(filters)


# From the command line


FLAGS = [
    f"--config={CONFIGS / 'demo.yaml'}",
    "--model.network=lit_models.networks.Filtered",
    "--model.network.network=lit_models.networks.LeNet5",
    "--model.network.network.stride=2",
    "--model.network.filters=[sobel_x,laplacian]",
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
]


def test_print_config_shows_the_filters(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["fit", *FLAGS, "--print_config"])
    network = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["network"]
    assert network["init_args"]["filters"] == ["sobel_x", "laplacian"]
    inner = network["init_args"]["network"]
    assert inner["class_path"] == "lit_models.networks.LeNet5"
    assert inner["init_args"]["stride"] == 2


@pytest.mark.slow
def test_checkpoint_keeps_the_filters(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--data=CIFAR10DataModule", f"--data.data_dir={data_dir}", "--data.verify=false"]
    small = ["--data.val_size=40", "--data.batch_size=64", "--trainer.max_epochs=1"]
    train.main(["fit", *FLAGS, *data, *small, "--run=edges"])
    folder = tmp_path / "runs" / "demo" / "edges"
    saved = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    expected = FixedFilters(["sobel_x", "laplacian"]).weight
    assert torch.equal(saved["network.filters.weight"], expected)
    network = loading.LoadedRun.load(str(folder), "best", []).model.network
    assert isinstance(network, Filtered)
    assert isinstance(network.network, LeNet5)
    assert network.network.conv1.in_channels == 6
    assert torch.equal(network.network.conv1.weight, saved["network.network.conv1.weight"])


def test_images_with_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="made for 3 channels, the images have 1; set --model"):
        FixedFilters()(torch.zeros(2, 1, 8, 8))
