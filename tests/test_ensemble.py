"""Members of an ensemble train as if each were alone, and vote."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from test_classification import NUM_CLASSES, Given, Points, model, trainer
from test_networks import smooth_images
from torch import Tensor, nn

import train
from datamodules.base import BaseDataModule
from lit_models.base import LitModel
from lit_models.networks import Ensemble, LeNet5, WhitenedCNN
from pipeline import loading
from pipeline.parser import Parser, link_data_arguments


def ensemble(members: int = 3) -> Ensemble:
    torch.manual_seed(0)
    return Ensemble(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)), members)


def test_members_start_differently() -> None:
    first, second, third = (next(member.parameters()) for member in ensemble().members)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_starts_undecided() -> None:
    torch.manual_seed(0)
    network, targets = Ensemble(LeNet5), torch.arange(200) % 10
    images = smooth_images(200)
    assert network(images).shape == (1000, 10)
    loss = F.cross_entropy(network.eval()(images), targets).item()
    assert loss == pytest.approx(math.log(10), abs=0.05)


def test_the_vote_is_the_mean_probability() -> None:
    network, inputs = ensemble().eval(), torch.randn(7, 8) * 5
    logits = [member(inputs).detach().double().numpy() for member in network.members]
    probabilities = [np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in logits]
    vote = network(inputs).detach()
    np.testing.assert_allclose(vote.exp(), np.mean(probabilities, axis=0), rtol=1e-5)
    torch.testing.assert_close(vote.exp(), vote.softmax(1))  # they are logits, too


def test_in_training_the_members_answer_one_after_the_other() -> None:
    network, inputs = ensemble(), torch.randn(7, 8)
    expected = [member(inputs) for member in network.members]
    torch.testing.assert_close(network(inputs), torch.cat(expected))


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2}, {"l1_penalty": 0.01}], ids=["plain", "smooth", "l1"]
)
def test_a_training_equals_those_of_its_members_alone(
    options: dict[str, Any], tmp_path: Path
) -> None:
    def fit(network: nn.Module) -> dict[str, Tensor]:
        trainer(tmp_path, max_epochs=1).fit(model(network, **options), Points())
        return network.state_dict()

    network = ensemble()
    alone = [fit(copy.deepcopy(member)) for member in network.members]
    fit(network)
    for member, expected in zip(network.members, alone, strict=True):
        for name, weight in member.state_dict().items():
            torch.testing.assert_close(weight, expected[name])


def test_what_is_recorded_is_the_mean_over_the_members() -> None:
    network = ensemble()
    inputs, target = torch.randn(9, 8), torch.arange(9) % NUM_CLASSES
    lit = model(network)
    lit.training_step([inputs, target], 0)
    [(_, record)] = lit.records.pending
    logits = [member(inputs) for member in network.members]
    losses = [F.cross_entropy(x, target).item() for x in logits]
    hits = [(x.argmax(1) == target).float().mean().item() for x in logits]
    assert record["loss"].item() == pytest.approx(np.mean(losses))
    assert record["accuracy"].item() == pytest.approx(np.mean(hits))


def test_overfits_one_batch() -> None:
    network = ensemble()
    inputs, target = torch.randn(20, 8), torch.arange(20) % NUM_CLASSES
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), target.repeat(3)).backward()
        optimizer.step()
    assert torch.equal(network.eval()(inputs).argmax(1), target)


def test_members_that_ask_for_training_inputs_are_given_them(tmp_path: Path) -> None:
    network = Ensemble(partial(WhitenedCNN, widths=(8, 8, 8), num_classes=5), members=2)
    data = Given(smooth_images(50), torch.arange(50) % NUM_CLASSES, val_size=5)
    trainer(tmp_path, max_steps=0).fit(model(network), data)
    weights = network.state_dict()
    filters = weights["members.0.whiten.weight"]
    assert torch.equal(filters[12:], -filters[:12])  # as only whitening makes them
    assert torch.equal(filters, weights["members.1.whiten.weight"])


def test_an_ensemble_of_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match=r"members must be at least 1, got 0\."):
        Ensemble(LeNet5, members=0)


@pytest.fixture
def flags(data_dir: Path, tmp_path: Path) -> list[str]:
    """An ensemble of LeNets on miniature images, from YAML."""
    config = tmp_path / "lenets.yaml"
    member = {
        "class_path": "lit_models.networks.LeNet5",
        "init_args": {"channels": [2, 4], "stride": 2, "pooling": "average"},
    }
    network = {
        "class_path": "lit_models.networks.Ensemble",
        "init_args": {"members": 2, "member": member},
    }
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    settings = {
        "model": {
            "class_path": "LitClassifier",
            "init_args": {"network": network, "optimizer": optimizer},
        },
        "data": {
            "class_path": "CIFAR10DataModule",
            "init_args": {"verify": False, "data_dir": str(data_dir), "val_size": 40},
        },
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "default_root_dir": str(tmp_path)},
    }
    config.write_text(yaml.safe_dump(settings))
    return [f"--config={config}", "--data.batch_size=16", "--trainer.devices=1"]


@pytest.mark.slow
def test_from_yaml_to_a_prediction_and_back(flags: list[str], tmp_path: Path) -> None:
    train.main(["fit", *flags, "--run=two"])
    folder = tmp_path / "lenets" / "two"
    network = loading.LoadedRun.load(str(folder), "best", []).model.network
    assert isinstance(network, Ensemble)
    weights = network.state_dict()
    assert weights["members.0.conv2.weight"].shape == (4, 2, 5, 5)
    assert not torch.equal(weights["members.0.fc3.weight"], weights["members.1.fc3.weight"])
    saved = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[f"network.{name}"], weights[name]) for name in weights)


def test_the_data_tells_each_member_the_number_of_classes(flags: list[str]) -> None:
    parser = Parser()
    parser.add_subclass_arguments(LitModel, "model")
    parser.add_subclass_arguments(BaseDataModule, "data")
    link_data_arguments(parser)
    config = yaml.safe_load(Path(flags[0].removeprefix("--config=")).read_text())
    data = {"class_path": "TemporalOrderDataModule"}
    settings = parser.parse_object({"model": config["model"], "data": data})
    built = parser.instantiate(settings)
    assert built.data.num_classes != 10
    for member in built.model.network.members:
        assert member.fc3.out_features == built.data.num_classes
