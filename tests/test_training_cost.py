"""The cost of a step is right before it is paid, and asking for it changes nothing."""

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from rich.console import Console
from torch import Tensor, nn

from benchmarks import training_memory
from benchmarks.step_overhead import RandomImages
from benchmarks.training_memory import VOCAB
from callbacks.training.training_cost import TrainingCost, measured_peak, table, training_cost
from core.errors import UserError
from lit_models import LitClassifier
from lit_models.networks import LSTM, LeNet5, Recurrent, Transformer

MIB = 2**20
measure = cache(training_memory.measure)
SGD = partial(torch.optim.SGD, lr=0.1)


def classifier(network: nn.Module, optimizer: Any = SGD, num_classes: int = 10) -> LitClassifier:
    torch.manual_seed(0)
    return LitClassifier(network, optimizer, num_classes)


def images(count: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % 10]


def cost_of(model: Any, batch: list[Tensor]) -> Any:
    return training_cost(model, model.configure_optimizers(), batch)


# Parameters, optimizer, operations


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
    model = classifier(LeNet5(), optimizer)
    cost = cost_of(model, images())
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


def test_operations_of_a_linear_layer() -> None:
    """2 * 6 * 3 of a sample; backward as many for the weights, and none for the input."""
    cost = cost_of(
        classifier(nn.Linear(6, 3), num_classes=3), [torch.randn(5, 6), torch.arange(5) % 3]
    )
    assert (cost.unit, cost.samples) == ("sample", 5)
    assert (cost.forward_flops, cost.backward_flops) == (36, 36)
    assert cost.ways[0].attention == "none"
    assert len(cost.ways) == 1


@pytest.mark.slow
def test_operations_of_a_token() -> None:
    cost, _ = measure(4, 128, 0.0, False)
    d, length = 64, 128
    encoder = 2 * (4 * d * d + 2 * d * 256) + 4 * length * d  # two for each multiplication
    decoder = 2 * (8 * d * d + 2 * d * 256) + 8 * length * d
    assert cost.unit == "token"
    # as many tokens are read as are written
    assert cost.forward_flops == (3 * encoder + 2 * decoder + 2 * d * VOCAB) / 2
    assert cost.backward_flops == pytest.approx(2 * cost.forward_flops)


def test_operations_of_a_fused_lstm_are_counted() -> None:
    batch = [torch.randn(4, 7, 5), torch.arange(4) % 3]
    cost = cost_of(classifier(Recurrent(LSTM(5, 6), 3), num_classes=3), batch)
    assert cost.forward_flops >= 7 * 2 * 4 * 6 * (5 + 6)


# Memory


@pytest.mark.slow
@pytest.mark.parametrize(("dropout", "plain"), [(0.0, False), (0.0, True), (0.1, False)])
def test_estimate_is_what_a_transformer_takes(dropout: float, plain: bool) -> None:
    cost, peak = measure(4, 128, dropout, plain)
    assert cost.ways[0].peak == pytest.approx(peak, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(("dropout", "plain"), [(0.0, False), (0.0, True), (0.1, False)])
def test_estimate_at_the_size_of_the_homework(dropout: float, plain: bool) -> None:
    cost, peak = measure(16, 512, dropout, plain)
    assert cost.ways[0].peak == pytest.approx(peak, rel=0.15)
    kept = {(0.0, False): 0.27, (0.0, True): 1.14}.get((dropout, plain), 2.92)  # GiB
    assert cost.ways[0].activations / 1024 == pytest.approx(kept, abs=0.01)


@pytest.mark.parametrize("optimizer", [SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
def test_estimate_is_what_other_networks_take(optimizer: Any) -> None:
    model, batch = classifier(LeNet5(batch_norm=True, dropout=0.1), optimizer), images(32)
    steps = model.configure_optimizers()
    peak = measured_peak(model, steps, batch)
    assert training_cost(model, steps, batch).ways[0].peak == pytest.approx(peak, rel=0.15)


@pytest.mark.slow
def test_dropout_of_attention_keeps_a_mask_and_the_dropped_weights() -> None:
    """On a CPU fused attention has no dropout: it is the plain one that runs."""
    cost, _ = measure(4, 128, 0.1, False)
    fused, plain, fused_without, plain_without = cost.ways
    assert [way.kernel for way in cost.ways] == [
        "plain",
        "plain",
        "flash_attention_for_cpu",
        "plain",
    ]
    assert [way.attention_dropout for way in cost.ways] == [0.1, 0.1, 0.0, 0.0]
    assert (fused.activations, fused.peak) == (plain.activations, plain.peak)
    one = 4 * 8 * 128 * 128 * 4 / MIB  # B heads T T numbers, of each of 7 blocks
    more = plain.activations - plain_without.activations
    assert more == pytest.approx(7 * 2 * one)
    output_and_rows = 4 * 8 * 128 * 4 / MIB
    less = plain_without.activations - fused_without.activations
    assert less == pytest.approx(7 * one, abs=7 * 10 * output_and_rows)


@pytest.mark.slow
def test_lengths_can_be_read_though_no_value_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("callbacks.training.training_cost.NEEDS_VALUES", ())
    model = classifier(Transformer(50, 16, 2, 1, 1, 16), num_classes=50)
    source, target_in, target = torch.randint(50, (3, 8, 40))
    batch = [source, target_in, torch.tensor([40, 7, 7, 3, 40, 1, 2, 9]), target]
    steps = model.configure_optimizers()
    peak = measured_peak(model, steps, batch)
    assert training_cost(model, steps, batch).ways[0].peak == pytest.approx(peak, rel=0.15)


class Undecided(nn.Linear):
    """Goes on as its activations say."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.exp() if y.sum() > 1e6 else y.tanh()


def test_network_that_reads_its_activations_is_followed_in_a_real_step() -> None:
    model = classifier(Undecided(600, 300), num_classes=300)
    batch = [torch.randn(100, 600), torch.arange(100)]
    steps = model.configure_optimizers()
    cost = training_cost(model, steps, batch)
    assert cost.forward_flops == 2 * 600 * 300
    assert cost.ways[0].peak == pytest.approx(measured_peak(model, steps, batch), rel=0.15)
    assert all(p.grad is None for p in model.parameters())


# In a run


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_asking_changes_nothing(dropout: float) -> None:
    model, batch = classifier(LeNet5(dropout=dropout), torch.optim.AdamW), images()
    optimizer = model.configure_optimizers()
    before = [p.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    training_cost(model, optimizer, batch)
    measured_peak(model, optimizer, batch)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert not optimizer.state
    assert not model.records.pending


class UnseededDropout(LitClassifier):
    """Draws on where the callbacks left the random numbers."""

    def on_train_batch_start(self, batch: list[Tensor], batch_idx: int) -> None:
        pass


def trained(folder: Path, *callbacks: TrainingCost) -> UnseededDropout:
    torch.manual_seed(0)
    model = UnseededDropout(LeNet5(dropout=0.2), partial(SGD, momentum=0.9))
    trainer = Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, RandomImages(samples=64, batch_size=16, val_size=16))
    return model


def test_run_has_the_same_weights_and_leaves_its_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without, model = trained(tmp_path), trained(tmp_path, TrainingCost())
    for a, b in zip(without.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    written = json.loads((tmp_path / "training_cost.json").read_text())
    assert written["parameters"] == 62_006
    assert written["samples"] == 16
    assert written["optimizer_state"] == written["weights"]
    (way,) = written["ways"]
    assert written["measured_peak"] == pytest.approx(way["peak"], rel=0.15)
    printed = capsys.readouterr().out
    assert "FLOPs per sample, forward" in printed
    assert "optimizer state" in printed
    assert f"Memory of a training step: {written['measured_peak']:.1f} MiB" in printed


@pytest.mark.slow
def test_table_names_each_way_to_compute_attention(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=100).print(table(measure(4, 128, 0.1, False)[0]))
    printed = capsys.readouterr().out
    assert "peak, fused attention (plain), dropout 0.1" in printed
    assert "peak, fused attention (flash_attention_for_cpu), dropout 0" in printed
    assert "activations, plain attention, dropout 0" in printed


def test_data_without_a_first_batch_are_refused(tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(UserError, match="TrainingCost needs a datamodule that has training_batch"):
        TrainingCost().on_fit_start(trainer, classifier(LeNet5()))
