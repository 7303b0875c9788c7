"""The cost of a step is right, and asking for it changes nothing."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn

from benchmarks.step_overhead import RandomImages
from benchmarks.training_memory import VOCAB, measure
from callbacks import TrainingCost
from callbacks.training.training_cost import training_cost
from core.errors import UserError
from lit_models import LitClassifier
from lit_models.networks import LSTM, LeNet5, Recurrent

MIB = 2**20
SGD = partial(torch.optim.SGD, lr=0.1)


def classifier(network: nn.Module, optimizer: Any = SGD, num_classes: int = 10) -> LitClassifier:
    torch.manual_seed(0)
    return LitClassifier(network, optimizer, num_classes)


def images(count: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % 10]


def cost_of(model: Any, batch: list[Tensor]) -> Any:
    return training_cost(model, model.configure_optimizers(), batch)


@pytest.mark.parametrize(
    ("optimizer", "copies"),
    [
        (SGD, 0),
        (partial(SGD, momentum=0.9), 1),
        (torch.optim.AdamW, 2),
        (torch.optim.RMSprop, 1),
    ],
    ids=["sgd", "momentum", "adamw", "rmsprop"],
)
def test_weights_gradients_and_what_the_optimizer_keeps(optimizer: Any, copies: int) -> None:
    cost = cost_of(classifier(LeNet5(), optimizer), images())
    assert cost.parameters == 62_006
    assert cost.weights == cost.gradients == 62_006 * 4 / MIB
    # Adam counts its steps for each of the ten tensors
    assert cost.optimizer_state == pytest.approx(copies * cost.weights, abs=50 / MIB)


def test_frozen_weights_have_no_gradients() -> None:
    model = classifier(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), torch.optim.AdamW, 3)
    model.network[0].requires_grad_(False)  # type: ignore[index]
    cost = cost_of(model, [torch.randn(5, 6), torch.arange(5) % 3])
    assert cost.weights == (6 * 4 + 4 + 4 * 3 + 3) * 4 / MIB
    assert cost.gradients == (4 * 3 + 3) * 4 / MIB


def test_a_linear_layer_is_counted_by_hand() -> None:
    """2 * 600 * 300 operations of a sample; backward as many for the weights, none for the input.

    The forward pass keeps the log-softmax; while it is made, the logits are there besides, and the
    gradients of the step before.
    """
    batch = [torch.randn(500, 600), torch.arange(500) % 300]
    cost = cost_of(classifier(nn.Linear(600, 300), num_classes=300), batch)
    assert (cost.unit, cost.samples) == ("sample", 500)
    assert cost.forward_flops == cost.backward_flops == 2 * 600 * 300
    logits, small = 500 * 300 * 4 / MIB, 0.05
    assert cost.activations == pytest.approx(logits, abs=small)
    held = (batch[0].nbytes + batch[1].nbytes) / MIB + cost.weights + cost.gradients
    assert cost.peak == pytest.approx(held + 2 * logits, abs=small)


def test_operations_of_a_fused_lstm_are_counted() -> None:
    batch = [torch.randn(4, 7, 5), torch.arange(4) % 3]
    cost = cost_of(classifier(Recurrent(LSTM(5, 6), 3), num_classes=3), batch)
    assert cost.forward_flops >= 7 * 2 * 4 * 6 * (5 + 6)


@pytest.mark.slow
def test_operations_of_a_token_and_what_attention_keeps() -> None:
    """Of 4 sentences. On a CPU fused attention has no dropout: it is the plain one that runs."""
    fused, plain, dropped = (
        measure(4, 128, dropout, plain) for dropout, plain in [(0, False), (0, True), (0.1, False)]
    )
    d, length = 64, 128
    encoder = 2 * (4 * d * d + 2 * d * 256) + 4 * length * d  # two for each multiplication
    decoder = 2 * (8 * d * d + 2 * d * 256) + 8 * length * d
    assert fused.unit == "token"
    # as many tokens are read as are written
    assert fused.forward_flops == (3 * encoder + 2 * decoder + 2 * d * VOCAB) / 2
    assert fused.backward_flops == pytest.approx(2 * fused.forward_flops)
    softmax = 4 * 8 * length * length * 4 / MIB  # B heads T T numbers, of each of 7 blocks
    assert plain.activations - fused.activations == pytest.approx(7 * softmax, rel=0.05)
    # a mask of floats and the dropped weights; dropout elsewhere keeps little
    assert dropped.activations - plain.activations == pytest.approx(2 * 7 * softmax, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dropout", "plain", "gib"), [(0.0, False, 0.27), (0.0, True, 1.14), (0.1, False, 2.92)]
)
def test_memory_at_the_size_of_the_homework(dropout: float, plain: bool, gib: float) -> None:
    assert measure(16, 512, dropout, plain).activations / 1024 == pytest.approx(gib, abs=0.01)


def test_asking_changes_nothing() -> None:
    model, batch = classifier(LeNet5(dropout=0.5), torch.optim.AdamW), images()
    optimizer = model.configure_optimizers()
    before = [p.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    training_cost(model, optimizer, batch)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert not optimizer.state
    assert not model.records.pending


def quiet_trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        **options,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_a_run_leaves_its_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = classifier(LeNet5(), partial(SGD, momentum=0.9))
    data = RandomImages(samples=64, batch_size=16, val_size=16)
    quiet_trainer(tmp_path, max_steps=1, callbacks=[TrainingCost()]).fit(model, data)
    written = json.loads((tmp_path / "training_cost.json").read_text())
    assert written["parameters"] == 62_006
    assert written["samples"] == 16
    assert written["optimizer_state"] == written["weights"]
    printed = capsys.readouterr().out
    assert "FLOPs per sample, forward" in printed
    assert f"{written['peak']:.1f} MiB" in printed


def test_data_without_a_first_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="datamodule that has training_batch"):
        TrainingCost().on_fit_start(quiet_trainer(tmp_path), classifier(LeNet5()))
