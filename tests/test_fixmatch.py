"""FixMatch learns from what the network itself is sure of."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_classification import NUM_CLASSES, Memory, Points, model, trainer, weights
from torch import Tensor, nn

import train
from benchmarks.step_overhead import Meter
from core.errors import UserError
from datamodules.loaders.resident import ResidentLoader, Stage
from lit_models import LitFixMatch
from lit_models.networks import Ensemble


def fixmatch(network: nn.Module, **options: Any) -> LitFixMatch:
    return LitFixMatch(network, partial(torch.optim.SGD, lr=0.1), num_classes=5, **options)


def batch(labelled: int = 6, unlabelled: int = 20) -> list[Tensor]:
    """Images, weak and strong versions of others, target; the logits themselves, for Identity."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    weak = 3 * draw(unlabelled, NUM_CLASSES)
    target = torch.arange(labelled) % NUM_CLASSES
    return [draw(labelled, NUM_CLASSES), weak, weak + draw(unlabelled, NUM_CLASSES), target]


def reference(logits: list[Tensor], target: Tensor, threshold: float) -> tuple[float, float, int]:
    """Both parts of the loss and the number of pseudo-labels, an image at a time."""
    images, weak, strong = logits
    supervised = sum(-x.log_softmax(0)[t] for x, t in zip(images, target, strict=True))
    total, confident = 0.0, 0
    for w, s in zip(weak, strong, strict=True):
        probabilities = w.exp() / w.exp().sum()
        if probabilities.max() >= threshold:
            confident += 1
            total -= s.log_softmax(0)[probabilities.argmax()].item()
    return float(supervised) / len(target), total / len(weak), confident


@pytest.mark.parametrize("threshold", [0.0, 0.8, 1.0])
def test_the_loss_is_that_of_the_paper(threshold: float) -> None:
    parts = batch()
    supervised, consistency, confident = reference(parts[:3], parts[3], threshold)
    assert (confident, threshold) in ((20, 0.0), (confident, 0.8), (0, 1.0))
    lit = fixmatch(nn.Identity(), threshold=threshold, unlabelled_weight=0.5)
    loss = lit.training_step(parts, 0)
    assert loss.item() == pytest.approx(supervised + 0.5 * consistency)
    [(_, record)] = lit.records.pending
    assert {name: value.item() for name, value in record.items()} == pytest.approx(
        {
            "loss": supervised,
            "accuracy": (parts[0].argmax(1) == parts[3]).float().mean().item(),
            "consistency": consistency,
            "confident": confident / 20,
        }
    )


def test_no_gradient_flows_through_an_opinion() -> None:
    images, weak, strong, target = batch()
    for part in (images, weak, strong):
        part.requires_grad_()
    fixmatch(nn.Identity(), threshold=0.8).training_step(
        [images, weak, strong, target], 0
    ).backward()
    assert weak.grad is not None
    assert not weak.grad.any()
    confident = weak.softmax(1).amax(1) >= 0.8
    assert strong.grad is not None
    assert torch.equal(strong.grad.any(1), confident)


def test_all_images_pass_the_network_together() -> None:
    sizes: list[int] = []
    network = nn.BatchNorm1d(NUM_CLASSES)
    network.register_forward_hook(lambda layer, inputs, output: sizes.append(len(output)))
    fixmatch(network).training_step(batch(), 0)
    assert sizes == [6 + 2 * 20]


def test_label_smoothing_and_penalty_are_those_of_the_classifier() -> None:
    inputs, target = torch.randn(6, 8), torch.arange(6) % NUM_CLASSES
    options: dict[str, Any] = {"label_smoothing": 0.2, "l1_penalty": 0.01}
    layer = nn.Linear(8, NUM_CLASSES)
    expected = model(layer, **options).training_step([inputs, target], 0)
    lit = fixmatch(layer, threshold=1.0, **options)
    loss = lit.training_step([inputs, torch.randn(9, 8), torch.randn(9, 8), target], 0)
    torch.testing.assert_close(loss, expected)


def test_each_member_of_an_ensemble_learns_as_if_alone() -> None:
    torch.manual_seed(0)
    network = Ensemble(partial(nn.Linear, NUM_CLASSES, NUM_CLASSES), members=3)
    parts = batch()
    loss = fixmatch(network, threshold=0.6).training_step(parts, 0)
    loss.backward()
    together = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    alone = [fixmatch(m, threshold=0.6).training_step(parts, 0) for m in network.members]
    torch.testing.assert_close(loss, torch.stack(alone).sum())
    torch.stack(alone).sum().backward()
    torch.testing.assert_close(together, [p.grad for p in network.parameters()])


def test_starts_undecided_and_overfits_one_batch() -> None:
    torch.manual_seed(0)
    lit = fixmatch(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, NUM_CLASSES)))
    images, target = torch.randn(20, 8), torch.arange(20) % NUM_CLASSES
    others = torch.randn(40, 8)
    parts = [images, others, others + 0.1 * torch.randn(40, 8), target]
    optimizer = torch.optim.Adam(lit.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        lit.training_step(parts, 0).backward()
        optimizer.step()
    records = [record for _, record in lit.records.pending]
    assert records[0]["loss"].item() == pytest.approx(math.log(NUM_CLASSES), abs=0.1)
    assert records[0]["confident"] == 0
    assert records[-1]["loss"] < 0.1
    assert records[-1]["confident"] > 0.5
    assert records[-1]["consistency"] < 0.5


class Twins(Points):
    """Points with few labels; other points come without, as they are and with noise added."""

    def make_loader(self, tensors: tuple[Tensor, ...], stage: Stage) -> ResidentLoader:
        arguments = self.loader_arguments(stage)
        return (TwinLoader if stage == "train" else ResidentLoader)(tensors, **arguments)


class TwinLoader(ResidentLoader):
    def transform(self, index: Tensor, rows: list[Tensor]) -> list[Tensor]:
        inputs, target = rows
        return [inputs[:2], inputs, inputs + 0.1, target[:2]]


def test_it_trains_and_validates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    memory = Memory()
    lit = fixmatch(nn.Linear(8, NUM_CLASSES), threshold=0.8)
    run = trainer(tmp_path, max_epochs=5, logger=memory)
    run.fit(lit, Twins(val_size=30))
    assert run.callback_metrics["val/accuracy"] > 0.8
    confident = [value for _, value in memory.values("train/confident")]
    assert len(confident) == 50
    assert confident[0] < confident[-1]
    assert {"train/loss", "train/accuracy", "train/consistency"} <= set(memory.rows[0][1])
    assert all(w.isfinite().all() for w in weights(lit))


def test_a_step_reads_nothing_from_the_device() -> None:
    lit, meter, parts = fixmatch(nn.Linear(5, 5), threshold=0.6), Meter(), batch()
    with meter.counting():
        lit.training_step(parts, 0).backward()
    assert meter.reads == 0


def test_a_batch_without_unlabelled_images_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set --data\.unlabelled=N"):
        trainer(tmp_path, max_epochs=1).fit(fixmatch(nn.Linear(8, NUM_CLASSES)), Points())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold must be in [0, 1], got 1.5."),
        ({"unlabelled_weight": -1.0}, "unlabelled_weight must not be negative, got -1.0."),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        fixmatch(nn.Identity(), **options)
    assert str(error.value) == message


def test_its_options_are_known_to_the_command_line(
    small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model=LitFixMatch", "--model.threshold=0.9", "--model.l1_penalty=0.1"]
    with pytest.raises(SystemExit):
        train.main(["fit", *small, *model, "--print_config"])
    settings = yaml.safe_load(capsys.readouterr().out)["model"]
    assert settings["class_path"].endswith("LitFixMatch")
    expected = {"threshold": 0.9, "l1_penalty": 0.1, "tta": "mirror_translate"}
    assert expected.items() <= settings["init_args"].items()
