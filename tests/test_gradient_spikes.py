"""A planted spike is found, named and, if asked for, kept out of the weights; whatever happens."""

import copy
import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, end_wandb, read_wandb
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, Callback, ModelCheckpoint
from small_training import (
    FIRST,
    LAST,
    Batches,
    Each,
    Plain,
    Plant,
    column,
    fit,
    rows,
    same,
    scaled,
    snapshot,
    spikes,
    steps,
)
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import train as command
from benchmarks.step_overhead import Meter, RandomImages
from callbacks import GradientSpikeMonitor, UpdateClipping
from datamodules.base import BaseDataModule
from datamodules.images.base import ImageDataModule
from datamodules.sequences.temporal_order import TemporalOrderDataModule
from lit_models import LitClassifier
from lit_models.networks import LSTM, LeNet5, Recurrent, WhitenedCNN
from steadyfit import layout
from steadyfit.layout import FLAT_SIZE, norms
from steadyfit.watching import optimizer_monitor
from steadyfit.watching.history import NormHistory
from steadyfit.watching.ratios import ParameterRatios
from steadyfit.watching.reactions import Reaction, Rollback, free_memory
from steadyfit.watching.records import read_records

ROOT = Path(__file__).parents[1]
SLOW = pytest.mark.slow

# Planted spikes


def lstm(seed: int) -> tuple[LightningModule, BaseDataModule]:
    torch.manual_seed(seed)
    data = TemporalOrderDataModule("normal", epoch_size=640, val_size=992)
    return LitClassifier(Recurrent(LSTM(8, 12), 4), partial(RMSprop, lr=0.001), 4), data


def cnn(seed: int) -> tuple[LightningModule, BaseDataModule]:
    torch.manual_seed(seed)
    data = RandomImages(samples=24 * 17, batch_size=8, val_size=8)
    return LitClassifier(WhitenedCNN(widths=(8, 8, 8)), partial(SGD, lr=0.05, momentum=0.9)), data


def mlp(seed: int) -> tuple[LightningModule, None]:
    return Plain(partial(Adam, lr=0.003), seed), None


Task = tuple[LightningModule, Any]
TASKS: dict[str, Callable[[int], Task]] = {"lstm": lstm, "cnn": cnn, "mlp": mlp}
TWENTY = [("lstm", 7), ("cnn", 6), ("mlp", 7)]
FACTORS = (100.0, math.nan, math.inf)


@pytest.mark.parametrize(
    ("task", "seed", "factor"),
    [
        pytest.param(
            task, seed, factor, marks=[SLOW] if seed or (factor != 100 and task != "mlp") else []
        )
        for task, count in TWENTY
        for seed in range(count)
        for factor in (FACTORS if seed == 0 else FACTORS[seed % 3 :][:1])
    ],
)
def test_planted_spike_is_found_and_named(
    task: str, seed: int, factor: float, tmp_path: Path
) -> None:
    """In each of three tasks, at random steps: the step, the parameter and the batch, 20 of 20.

    Which weight it is, is random too. Recurrent weights hold so little of the gradient norm at
    first that a hundredfold is within the usual range of the whole; the proportion tells.
    """
    model, data = TASKS[task](seed)
    choice = random.Random(f"{task} {seed}")
    step = choice.randrange(24, 50)
    weights = [n for n, p in model.named_parameters() if p.ndim > 1 and p.requires_grad]
    name = choice.choice(weights)
    trainer = fit(tmp_path, model, Plant([step], name, factor), GradientSpikeMonitor(), data=data)
    (record,) = [r for r in spikes(tmp_path) if r.step == step]
    assert {"gradient", "parameter"} & set(record.spiked)
    assert record.top_parameter.name == record.by_z[0].name == name
    epoch, batch = divmod(step, int(trainer.num_training_batches))
    assert (record.epoch, record.batches) == (epoch, [batch])


class Poison(Callback):
    """Ruins a batch now and then: the gradient becomes infinite, NaN, or far too large."""

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        factors = {30: math.nan, 45: math.inf, 52: 1e4}
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factors.get(trainer.global_step, 1.0))


class Colours(ImageDataModule):
    """Noisy images, each class of a colour of its own."""

    class_names = tuple("abcdefgh")

    def read_train(self) -> tuple[Tensor, ...]:
        target = torch.arange(1000) % 8
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(100, (1000, *self.image_size), dtype=torch.uint8, generator=generator)
        channels = target[:, None] // torch.tensor([1, 2, 4]) % 2  # (N, 3)
        return noise + 100 * channels[:, None, None].byte(), target


def learnable(task: str) -> Task:
    torch.manual_seed(1)
    if task == "lstm":
        data = TemporalOrderDataModule("easy", epoch_size=3200, val_size=992)
        return LitClassifier(Recurrent(LSTM(8, 12), 4), partial(Adam, lr=0.02), 4), data
    if task == "cnn":
        network = WhitenedCNN(widths=(8, 16, 16))
        model = LitClassifier(network, partial(SGD, lr=0.1, momentum=0.9))
        return model, Colours(batch_size=32, val_size=200)
    return Plain(partial(Adam, lr=0.02)), None


def accuracy(trainer: Trainer, model: LightningModule) -> float:
    if not isinstance(model, Plain):
        return trainer.callback_metrics["val/accuracy"].item()
    with torch.no_grad():
        hits = [(model.network(x).argmax(1) == y).float().mean() for x, y in Batches()]
    return torch.stack(hits).mean().item()


@pytest.mark.parametrize("task", ["mlp", *(pytest.param(t, marks=SLOW) for t in ("lstm", "cnn"))])
def test_with_skip_bad_batches_leave_no_trace(task: str, tmp_path: Path) -> None:
    """NaN and infinity never reach the weights, and the run learns as well as a clean one."""
    reached = []
    for folder, planted in ((tmp_path / "clean", []), (tmp_path / "bad", [Poison()])):
        model, data = learnable(task)
        callbacks = [*planted, GradientSpikeMonitor("skip")]
        trainer = fit(folder, model, *callbacks, data=data, max_epochs=8)
        assert all(p.isfinite().all() for p in model.parameters())
        reached.append(accuracy(trainer, model))
    assert {30, 45, 52} <= set(steps(tmp_path / "bad"))
    assert reached[0] > 0.9
    assert abs(reached[1] - reached[0]) <= 0.01


def test_without_a_reaction_nan_is_recorded_to_the_end(tmp_path: Path) -> None:
    """NaN in the weights makes every later step a spike; nothing breaks."""
    fit(tmp_path, Plain(), Plant([30], factor=math.nan), GradientSpikeMonitor())
    first, second, *_ = spikes(tmp_path)
    assert (first.step, steps(tmp_path)[-1]) == (30, 31)
    assert spikes(tmp_path)[-1].until == 59  # steps in a row are one record
    assert first.spiked == ["gradient", "update"]
    assert second.signals["loss"].kind == "nonfinite"
    assert first.confirmed
    assert first.max_loss_after == math.inf
    assert first.steps_to_recover is None


def test_what_followed_is_in_the_record(tmp_path: Path) -> None:
    """A step that throws the weights far off is confirmed by the loss, a harmless one is not."""
    fit(tmp_path, Plain(partial(SGD, lr=1.0)), Plant([30]), GradientSpikeMonitor())
    far = spikes(tmp_path)[0]
    assert far.step == 30
    assert far.spiked == ["gradient", "parameter", "update", "promise"]
    assert far.confirmed
    assert (far.steps_to_recover or 0) > 1
    assert (far.max_loss_after or 0.0) > 10 * far.signals["loss"].value
    harmless = tmp_path / "harmless"
    fit(harmless, Plain(partial(SGD, lr=1e-4)), Plant([30]), GradientSpikeMonitor())
    (near,) = spikes(harmless)
    assert not near.confirmed
    assert (near.max_loss_after or math.inf) < 2 * near.signals["loss"].value
    assert near.steps_to_recover == 1


def test_a_quiet_run_has_no_spikes_and_every_step_is_logged(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Plain(), GradientSpikeMonitor())
    assert spikes(tmp_path) == []
    assert sorted(rows(trainer)) == list(range(60))
    names = ("grad_norm/total", "update_norm/total")
    assert all(len(column(trainer, name)) == 60 for name in names)
    assert column(trainer, "spikes/gradient") == [0.0] * 11  # at each log step and epoch's end
    norms = torch.load(tmp_path / "norms.pt", weights_only=True)["0"]
    assert norms["names"] == [name for name, _ in Plain().named_parameters()]
    total = norms["table"][:, 0].double().norm(dim=1)
    assert total.tolist() == pytest.approx(column(trainer, "grad_norm/total"), rel=1e-6)


def test_history_of_norms_keeps_the_largest_of_each_stretch() -> None:
    history = NormHistory(["a", "b"], bins=4)
    values = torch.rand(23, 3, 2)
    for start in range(0, 23, 5):
        part = values[start : start + 5]
        history.add(list(range(start, start + len(part))), part.double().numpy())
    assert history.width == 8
    expected = torch.stack([part.amax(0) for part in values.split(8)])
    assert torch.equal(history.table, expected)


# Reactions


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_step_changes_nothing(fused: bool, tmp_path: Path) -> None:
    """Parameters and optimizer state are the same before and after; learning goes on after it."""
    seen: dict[int, Any] = {}

    def look(trainer: Trainer, model: LightningModule) -> None:
        seen[trainer.global_step] = snapshot(trainer, model)

    plant, monitor = Plant([40]), GradientSpikeMonitor("skip")
    model = Plain(partial(AdamW, lr=0.01, weight_decay=0.5, fused=fused))
    callbacks = [plant, monitor, Each(after_batch=look)]
    trainer = fit(tmp_path, model, *callbacks, plugins=scaled(1024.0))
    assert 40 in steps(tmp_path)
    assert same(seen[40], seen[41])
    assert not same(seen[39], seen[40])
    assert trainer.global_step == 60
    assert column(trainer, "update_norm/total")[40] == 0


def states(model: LightningModule, trainer: Trainer) -> Any:
    return copy.deepcopy([model.state_dict(), snapshot(trainer, model)[1]])


class Buffered(Plain):
    """Batch statistics are buffers."""

    def __init__(self) -> None:
        super().__init__(partial(AdamW, lr=0.01))
        self.network.insert(1, nn.BatchNorm1d(16))

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def test_rollback_goes_back_once_and_then_only_skips(tmp_path: Path) -> None:
    """Copies are made before steps 0, 10, 20, 30: a spike goes back to 30, the next are skipped."""
    seen: dict[int, Any] = {}
    rates: list[float] = []

    def look(trainer: Trainer, model: LightningModule) -> None:
        seen[trainer.global_step] = states(model, trainer)
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    callbacks = [
        Plant([34, 36, 38], "network.3.weight", 300.0),
        GradientSpikeMonitor(Rollback(every=10, keep=2)),
        UpdateClipping(max_rms=0.5),
        Each(after_batch=look),
    ]
    model = Buffered()
    trainer = fit(tmp_path, model, *callbacks)
    assert {34, 36, 38} <= set(steps(tmp_path))
    reactions = {r.step: r.reaction for r in spikes(tmp_path)}
    assert [reactions[step] for step in (34, 36, 38)] == ["rollback", "skip", "skip"]
    assert same(seen[35], seen[30])
    assert same(seen[37], seen[36])
    assert same(seen[39], seen[38])
    assert trainer.global_step == 60
    assert rates == pytest.approx([0.01 * 0.99 ** (i + 1) for i in range(60)])


def test_stop_ends_training_and_leaves_the_evidence(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Plain(), Plant([30]), GradientSpikeMonitor("stop"))
    assert trainer.global_step == 31
    assert steps(tmp_path) == [30]
    assert spikes(tmp_path)[0].reaction == "stop"
    assert sorted(rows(trainer)) == list(range(31))


def test_own_reaction(tmp_path: Path) -> None:
    class Halve(Reaction):
        def react(self, trainer: Any, module: nn.Module, optimizer: Optimizer) -> None:
            optimizer.param_groups[0]["lr"] /= 2

    model = Plain()
    trainer = fit(tmp_path, model, Plant([30]), GradientSpikeMonitor(Halve()))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.025
    assert spikes(tmp_path)[0].reaction == "halve"


def test_reaction_to_a_loss_that_spikes(tmp_path: Path) -> None:
    """A batch that is out of the ordinary is left out before its step, too."""

    class Wrong(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch) + (100.0 if self.global_step == 30 else 0.0)

    fit(tmp_path, Wrong(), GradientSpikeMonitor("skip"))
    (record,) = spikes(tmp_path)
    assert (record.step, record.spiked, record.reaction) == (30, ["loss"], "skip")


# What must not matter


def test_accumulated_batches_are_one_observation(tmp_path: Path) -> None:
    """Four batches of 8 are one of 32, and what is left at the end of an epoch is one more."""
    whole = fit(tmp_path / "whole", Plain(), GradientSpikeMonitor())
    quarters = Plain()
    quarters.train_dataloader = partial(Batches, 8, 80)  # type: ignore[method-assign]
    parts = fit(tmp_path / "parts", quarters, GradientSpikeMonitor(), accumulate_grad_batches=4)
    for name in ("grad_norm/total", "update_norm/total"):
        assert column(parts, name) == pytest.approx(column(whole, name), rel=1e-5)
    uneven = Plain()
    uneven.train_dataloader = partial(Batches, 8, 18)  # type: ignore[method-assign]
    monitor = GradientSpikeMonitor()
    plant = Plant([14], factor=1000.0)
    fit(tmp_path, uneven, plant, monitor, accumulate_grad_batches=4, max_epochs=3)
    assert monitor.monitors[0].detectors["gradient"].state_dict()["steps"] == 15
    assert spikes(tmp_path)[-1].batches == [16, 17]


def test_accumulated_loss_is_that_of_the_batches(tmp_path: Path) -> None:
    whole, quarters = (Plain(partial(Adam, lr=0.01)) for _ in range(2))
    quarters.train_dataloader = partial(Batches, 8, 80)  # type: ignore[method-assign]
    fit(tmp_path / "a", whole, Plant([30]), GradientSpikeMonitor())
    fit(tmp_path / "b", quarters, Plant([30]), GradientSpikeMonitor(), accumulate_grad_batches=4)
    (a,), (b,) = spikes(tmp_path / "a"), spikes(tmp_path / "b")
    assert b.batches == [40, 41, 42, 43]
    assert b.signals["loss"].value == pytest.approx(a.signals["loss"].value, rel=1e-5)
    assert b.max_loss_after == pytest.approx(a.max_loss_after, rel=1e-4)


def test_norms_and_losses_under_a_gradient_scaler_are_unscaled(tmp_path: Path) -> None:
    """Also where the optimizer itself unscales, inside its step."""
    found = []
    for scale, fused in ((1.0, False), (1024.0, False), (1024.0, True)):
        folder = tmp_path / f"{scale} {fused}"
        model = Plain(partial(Adam, lr=0.01, fused=fused))
        plugins = scaled(scale)
        trainer = fit(folder, model, Plant([30]), GradientSpikeMonitor(), plugins=plugins)
        found.append((trainer, spikes(folder)[0]))
    (one, a), *others = found
    for other, b in others:
        for name in ("grad_norm/total", "update_norm/total"):
            assert column(other, name) == pytest.approx(column(one, name), rel=0.01)
        assert a.step == b.step == 30
        assert b.signals["loss"].value == pytest.approx(a.signals["loss"].value, rel=1e-3)


@pytest.mark.parametrize(("reaction", "fused"), [("log", False), ("skip", True)])
def test_overflow_is_recorded_and_not_counted(reaction: Any, fused: bool, tmp_path: Path) -> None:
    """The scaler throws such a step away; no detector learns from it and nobody reacts."""
    monitor = GradientSpikeMonitor(reaction)
    model = Plain(partial(Adam, lr=0.01, fused=fused))
    trainer = fit(tmp_path, model, monitor, plugins=scaled(2.0**30, growth_interval=1000))
    thrown = [r for r in read_records(tmp_path / "spikes.jsonl")]
    count = len(thrown)
    assert count > 5
    assert [r.step for r in thrown] == list(range(count))
    for record in thrown:
        assert record.signals["gradient"].kind == "overflow"
        assert "update" not in record.signals  # the optimizer took no step
        assert record.spiked == []
        assert record.reaction == "log"
    assert monitor.counts["overflow"] == count
    assert monitor.counts["gradient"] == monitor.counts["update"] == monitor.counts["loss"] == 0
    for name in ("gradient", "update"):
        assert monitor.monitors[0].detectors[name].state_dict()["steps"] == 60 - count
    assert len(column(trainer, "update_norm/total")) == 60 - count


class Manual(Plain):
    """Two optimizers that take turns in every batch, each with a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for factor, optimizer in enumerate(self.optimizers(), 1):
            optimizer.zero_grad()
            self.manual_backward(factor * self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        layers = (self.network[0], self.network[2])
        return [SGD(layers[0].parameters(), lr=0.05), Adam(layers[1].parameters(), lr=0.01)]


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    """Each has detectors and norms of its own; steps are counted as Lightning counts them."""
    monitor = GradientSpikeMonitor()
    trainer = fit(tmp_path, Manual(), Plant([61]), monitor)
    assert trainer.global_step == 120
    assert set(monitor.monitors) == {0, 1}
    assert len(column(trainer, "grad_norm/total/0")) == 60
    assert len(column(trainer, "grad_norm/total/1")) == 60
    record = spikes(tmp_path)[0]
    assert (record.step, record.optimizer, record.batches) == (61, 1, [10])
    assert [p.name for p in record.by_share] == [LAST, "network.2.bias"]
    losses = [monitor.monitors[i].detectors["loss"].center for i in (0, 1)]
    assert losses[1] == pytest.approx(2 * losses[0], rel=0.1)


def test_manual_accumulation_names_all_batches(tmp_path: Path) -> None:
    class Third(Plain):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))
            if batch_idx % 3 == 2:
                optimizer = self.optimizers()
                optimizer.step()  # type: ignore[union-attr]
                optimizer.zero_grad()  # type: ignore[union-attr]

    model = Third()
    model.train_dataloader = partial(Batches, 8, 60)  # type: ignore[method-assign]
    fit(tmp_path, model, Plant([30]), GradientSpikeMonitor())
    assert spikes(tmp_path)[0].batches == [30, 31, 32]


@pytest.mark.parametrize(("reaction", "precision"), [("log", "32-true"), ("skip", "fp16")])
@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_training_step_without_a_loss(reaction: Any, precision: str, tmp_path: Path) -> None:
    """Such a batch has no gradient: its step is no spike, and moves nothing."""

    class Gaps(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx % 5 == 4 else self.loss(batch)

    monitor = GradientSpikeMonitor(reaction)
    model = Gaps(partial(AdamW, lr=0.001, weight_decay=0.5))
    plugins = scaled(1024.0) if precision == "fp16" else []
    trainer = fit(tmp_path, model, Plant([33]), monitor, plugins=plugins)
    assert 33 in steps(tmp_path)
    norms = [row.get("update_norm/total", 0.0) for _, row in sorted(rows(trainer).items())]
    assert [step for step, norm in enumerate(norms) if norm == 0 and step != 33] == [
        step for step in range(60) if step % 5 == 4
    ]


def test_norm_before_and_after_lightnings_clipping(tmp_path: Path) -> None:
    whole = fit(tmp_path / "a", Plain(partial(SGD, lr=0.0)), GradientSpikeMonitor())
    model = Plain(partial(SGD, lr=0.0))
    clipped = fit(tmp_path / "b", model, GradientSpikeMonitor(), gradient_clip_val=0.1)
    before = column(clipped, "grad_norm/total")
    assert before == column(whole, "grad_norm/total")
    assert min(before) > 0.1
    assert column(clipped, "grad_norm/clipped") == pytest.approx([0.1] * 60, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_number_formats(dtype: torch.dtype, tmp_path: Path) -> None:
    """Norms of bfloat16 are summed in float32: in bfloat16 a sum of ones stands still at 256."""
    assert norms([torch.ones(4096, dtype=dtype)])[0].item() == 64.0
    precision = {torch.bfloat16: "bf16-true", torch.float64: "64-true"}[dtype]
    model = Plain(partial(AdamW, lr=0.01))
    fit(tmp_path, model, Plant([30], factor=1000.0), GradientSpikeMonitor(), precision=precision)
    assert next(model.parameters()).dtype == dtype
    assert 30 in steps(tmp_path)


def test_parameters_shared_frozen_or_unused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parameter is counted once, and one without gradient as zero."""

    class Odd(Plain):
        def __init__(self, optimizer: Callable[..., Optimizer]) -> None:
            super().__init__(optimizer)
            self.unused = nn.Parameter(torch.ones(3))
            self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
            self.network.again = self.network[2].weight

    monkeypatch.setattr(optimizer_monitor, "TOP_K", 9)
    model = Odd(partial(AdamW, lr=0.01, weight_decay=0.5))
    trainer = fit(tmp_path, model, Plant([30]), GradientSpikeMonitor())
    record = spikes(tmp_path)[0]
    assert record.step == 30
    moved = {p.name: p.update_norm for p in record.by_share}
    assert len(moved) == 6
    assert moved["unused"] == moved["frozen"] == 0
    assert trainer.global_step == 60


class Thaw(BaseFinetuning):
    """Trains the first layer from the second epoch on."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.network[0])  # type: ignore[index]

    def finetune_function(
        self, pl_module: LightningModule, epoch: int, optimizer: Optimizer
    ) -> None:
        if epoch == 1:
            layer = pl_module.network[0]  # type: ignore[index]
            self.unfreeze_and_add_param_group(layer, optimizer, lr=0.05)


def test_layers_that_are_trained_later(tmp_path: Path) -> None:
    class Last(Plain):
        def configure_optimizers(self) -> Optimizer:
            return SGD(self.network[2].parameters(), lr=0.05)

    callbacks = [Plant([50], FIRST, 1000.0), Thaw(), GradientSpikeMonitor(), UpdateClipping()]
    trainer = fit(tmp_path, Last(), *callbacks)
    assert spikes(tmp_path)[-1].by_share[0].name == FIRST
    norms = torch.load(tmp_path / "norms.pt", weights_only=True)["0"]
    assert norms["names"] == [LAST, "network.2.bias", FIRST, "network.0.bias"]
    assert (norms["table"][:20, 0, 2:] == 0).all()
    assert (norms["table"][20:, 0] > 0).all()
    assert len(column(trainer, "clip/update_factor")) == 60


def test_sparse_gradients(tmp_path: Path) -> None:
    class Embedded(Plain):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            self.embedding = nn.Embedding(4, 16, sparse=sparse)

        def loss(self, batch: Any) -> Tensor:
            bins = batch[0][:, 0].abs().long().clamp(max=3)
            return F.cross_entropy(self.network[2](self.embedding(bins)), batch[1])

    columns = []
    for sparse in (False, True):
        callbacks = [GradientSpikeMonitor(), UpdateClipping(max_decrease=0.01)]
        trainer = fit(tmp_path / str(sparse), Embedded(sparse), *callbacks)
        columns.append(column(trainer, "grad_norm/total"))
    assert columns[0] == pytest.approx(columns[1], rel=1e-5)


def test_flush_in_the_midst_of_a_step_loses_no_batch(tmp_path: Path) -> None:
    """Who saves a checkpoint before the monitor's own hook mixed up the batches of records."""

    def save(trainer: Trainer, model: LightningModule) -> None:
        trainer.save_checkpoint(tmp_path / "any.ckpt")

    callbacks = [Each(after_batch=save), Plant([30]), GradientSpikeMonitor()]
    fit(tmp_path, Plain(), *callbacks, log_every_n_steps=0)
    assert spikes(tmp_path)[0].batches == [10]


# Interrupted runs


def interrupted(folder: Path, **options: Any) -> GradientSpikeMonitor:
    """Train the LSTM, 20 steps an epoch, with planted spikes and a checkpoint every 5 steps."""
    torch.manual_seed(1)
    data = TemporalOrderDataModule("easy", epoch_size=640, val_size=64)
    model = LitClassifier(Recurrent(LSTM(8, 12), 4), partial(RMSprop, lr=0.01), 4)
    name = "network.output.weight"
    monitor = GradientSpikeMonitor("skip")
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)
    callbacks = [Plant([30, 33, 44], name, 3000.0), Plant([47], name, math.nan), monitor, save]
    fit(folder, model, *callbacks, data=data, max_epochs=4, **options)
    return monitor


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An uninterrupted run and the state of its monitor."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, interrupted(folder).state_dict()


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, ended beyond the checkpoints that it is continued from."""
    folder = tmp_path_factory.mktemp("killed")
    interrupted(folder, max_steps=48)
    return folder


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("step", [35, 40, 45], ids=["mid-epoch", "epoch end", "between spikes"])
def test_resumed_run_is_the_uninterrupted_one(
    step: int, whole: tuple[Path, Any], killed: Path, tmp_path: Path
) -> None:
    """Flags, records, norms and weights, bit for bit."""
    folder, state = whole
    assert set(steps(folder)) >= {30, 33, 44, 47}
    again = tmp_path / "again"
    shutil.copytree(killed, again)
    resumed = interrupted(again, ckpt_path=again / f"step={step}.ckpt")
    assert same(resumed.state_dict(), state)
    assert (again / "spikes.jsonl").read_text() == (folder / "spikes.jsonl").read_text()
    for name, parts in (("step=80.ckpt", ["state_dict", "optimizer_states"]), ("norms.pt", ["0"])):
        ours, theirs = (torch.load(f / name, weights_only=True) for f in (again, folder))
        assert all(same(ours[part], theirs[part]) for part in parts)


@SLOW
def test_resumed_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``fit --run NAME`` twice leaves the spikes, rows and W&B rows of one run."""
    monkeypatch.chdir(tmp_path)
    for name, lengths in (("whole", [5]), ("parts", [3, 5])):
        for epochs in lengths:
            command.main([*arguments(), f"--run={name}", f"--trainer.max_epochs={epochs}"])
            end_wandb()
    runs = [tmp_path / "runs" / "temporal_order_lstm" / name for name in ("whole", "parts")]
    assert {22, 37} <= set(steps(runs[0]))
    for name in ("spikes.jsonl", "metrics.csv"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()
    states = []
    for run in runs:
        checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        states.append(checkpoint["callbacks"]["GradientSpikeMonitor"])
    assert same(*states)


def arguments() -> list[str]:
    """The command that trains the notebook's LSTM on a small set, 10 steps an epoch, spikes in."""
    return [
        "fit",
        f"--config={CONFIGS / 'temporal_order_lstm.yaml'}",
        "--data.epoch_size=320",
        "--data.val_size=64",
        "--data.level=easy",
        "--trainer.log_every_n_steps=7",
        "--trainer.accelerator=cpu",
        "--trainer.callbacks+=small_training.EarlyPlant",
        "--trainer.callbacks.init_args.steps=[22,37]",
        "--trainer.callbacks.init_args.name=network.output.weight",
    ]


def die_at_45(folder: Path, end: str) -> None:
    """Train 60 steps with spikes at 20, 30, 40 and 44, log every 7, and come to a bad end."""

    def die(trainer: Trainer, model: LightningModule) -> None:
        if trainer.global_step == 45:
            if end == "exception":
                raise RuntimeError("a bad end")
            os.kill(os.getpid(), getattr(signal, end))

    callbacks = [Plant([20, 30, 40, 44]), GradientSpikeMonitor(), Each(None, die)]
    fit(folder, Plain(partial(Adam, lr=0.001)), *callbacks)


@SLOW
@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("SIGKILL", [20, 30, 40]),  # complete up to the last log step, which is 42
        ("SIGTERM", [20, 30, 40, 44]),
        ("exception", [20, 30, 40, 44]),
    ],
)
def test_evidence_survives_the_process(end: str, expected: list[int], tmp_path: Path) -> None:
    status = processes.wait(processes.start(die_at_45, tmp_path, end))
    assert (status == -signal.SIGKILL) == (end == "SIGKILL")
    assert steps(tmp_path) == expected
    assert (tmp_path / "norms.pt").exists() == (end != "SIGKILL")


def test_exception_leaves_all_that_was_pending(tmp_path: Path) -> None:
    def fail(trainer: Trainer, model: LightningModule) -> None:
        if trainer.global_step == 45:
            raise RuntimeError("a bad end")

    model = Plain(partial(Adam, lr=0.001))
    with pytest.raises(RuntimeError, match="a bad end"):
        fit(tmp_path, model, Plant([20, 44]), GradientSpikeMonitor(), Each(after_batch=fail))
    assert steps(tmp_path) == [20, 44]
    assert sorted(rows(model.trainer)) == list(range(45))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_records_of_steps_that_are_trained_again_are_dropped(tmp_path: Path) -> None:
    """A spike behind the checkpoint that does not come again, since the fix is in, is no spike."""
    model = Plain(partial(Adam, lr=0.001))
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=20, save_top_k=-1)
    fit(tmp_path, model, Plant([30]), GradientSpikeMonitor(), save, max_epochs=2)
    assert steps(tmp_path) == [30]
    model = Plain(partial(Adam, lr=0.001))
    fit(tmp_path, model, GradientSpikeMonitor(), save, ckpt_path=tmp_path / "step=20.ckpt")
    assert steps(tmp_path) == []


def test_state_is_what_was_learned_and_nothing_else(tmp_path: Path) -> None:
    """It is read without pickle, and a resumed run obeys its new arguments."""
    monitor = GradientSpikeMonitor()
    fit(tmp_path, Plain(), Plant([30]), monitor, max_epochs=2)
    state = monitor.state_dict()
    torch.save(state, tmp_path / "state.pt")
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    assert same(read, state)
    given = ("reaction", "window", "alert")
    assert not state.keys() & set(given)
    other = GradientSpikeMonitor("skip", window=32, threshold=6.0)
    other.load_state_dict(read)
    assert (other.window, other.threshold) == (32, 6.0)
    assert all(d.window == 32 for w in other.monitors.values() for d in w.detectors.values())
    assert same(other.counts, monitor.counts)


# Several processes


class Witness(Callback):
    """Writes down what the monitor of each process decided."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (monitor,) = [c for c in trainer.callbacks if isinstance(c, GradientSpikeMonitor)]  # type: ignore[attr-defined]
        facts = [[r.step, r.spiked, r.reaction] for r in monitor.records]
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(facts))


@SLOW
@pytest.mark.parametrize("reaction", ["log", "skip"])
def test_two_processes_decide_as_one(reaction: Any, tmp_path: Path) -> None:
    """The same flags on both ranks and on a single process; only the first rank writes."""
    pairs = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        callbacks = [
            Plant([20, 50]),
            Plant([33], factor=math.nan if reaction == "skip" else 200.0),
            GradientSpikeMonitor(reaction),
            UpdateClipping(0.5, max_decrease=0.01),
            Witness(folder),
        ]
        strategy = "ddp_spawn" if count > 1 else "auto"
        model = Plain(partial(Adam, lr=0.003))
        fit(folder, model, *callbacks, devices=count, strategy=strategy, max_epochs=10)
        with (folder / "metrics.csv").open(newline="") as file:
            table = list(csv.DictReader(file))
        pairs.append((table, (folder / "rank0.json").read_text()))
    (one, flags), (two, flags_of_two) = pairs
    assert len(one) == len(two) == 200
    norms = [[float(row["grad_norm/total"]) for row in table] for table in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5, nan_ok=True)
    assert flags == flags_of_two == (tmp_path / "2" / "rank1.json").read_text()
    assert {20, 33, 50} <= set(steps(tmp_path / "2"))
    assert steps(tmp_path / "1") == steps(tmp_path / "2")


# Cost


def counted(tmp_path: Path, *callbacks: Callback) -> Meter:
    """101 steps of LeNet with a log step every 50."""
    meter = Meter()
    torch.manual_seed(0)
    model = LitClassifier(meter.watch(LeNet5()), partial(SGD, lr=0.001, momentum=0.9))
    data = RandomImages(samples=102 * 4, batch_size=4, val_size=4)
    with meter.counting():
        fit(tmp_path, model, *callbacks, data=data, max_epochs=1, log_every_n_steps=50)
    return meter


@pytest.mark.slow
@pytest.mark.parametrize(("size", "operators_of"), [(FLAT_SIZE, (65, 60)), (0, (50, 60))])
def test_log_reads_nothing_between_log_steps_and_adds_few_operators(
    size: int, operators_of: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: arithmetic on the device, in one flat tensor or in one for each parameter."""
    monkeypatch.setattr(layout, "FLAT_SIZE", size)
    monkeypatch.setattr(layout.Layout, "on_host", False)
    callbacks = [GradientSpikeMonitor(), UpdateClipping(max_decrease=0.5)]
    plain = counted(tmp_path / "plain")
    watched, both = (counted(tmp_path / str(n), *callbacks[:n]) for n in (1, 2))
    for meter, reads in ((plain, 1), (watched, 2), (both, 3)):
        assert meter.per_step(5, 45).reads == 0
        assert meter.per_step(52, 95).reads == 0
        assert meter.marks[95].reads - meter.marks[45].reads == reads  # at the log step
    operators = [meter.per_step(55, 95).operators for meter in (plain, watched, both)]
    assert operators[1] - operators[0] <= operators_of[0]
    assert operators[2] - operators[1] <= operators_of[1]


@SLOW
@pytest.mark.parametrize(("reaction", "reads"), [("skip", 0), ("rollback", 1)])
def test_reads_of_reactions(reaction: Any, reads: int, tmp_path: Path) -> None:
    meter = counted(tmp_path, GradientSpikeMonitor(reaction))
    assert meter.per_step(5, 45).reads == reads


# Loggers


def test_values_share_the_rows_of_the_model(tmp_path: Path) -> None:
    model, data = lstm(0)
    trainer = fit(tmp_path, model, GradientSpikeMonitor(), UpdateClipping(), data=data)
    table = rows(trainer)
    assert sorted(table) == list(range(60))
    ours = {"grad_norm/total", "update_norm/total", "update_norm/clipped", "clip/update_factor"}
    assert all(row.keys() >= ours | {"train/loss", "epoch"} for row in table.values())
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(60))


@SLOW
@pytest.mark.usefixtures("wandb_offline")
def test_wandb_holds_scalars_table_and_alert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row for each optimizer step, as without the monitor."""
    monkeypatch.chdir(tmp_path)
    command.main([*arguments(), "--run=x", "--trainer.max_epochs=5"])
    end_wandb()
    (folder,) = (tmp_path / "runs" / "temporal_order_lstm" / "x" / "wandb").glob("offline-run-*")
    records = read_wandb(folder)
    history = [r["history"]["item"] for r in records if r["type"] == "history"]
    watched = [row["trainer/global_step"] for row in history if "grad_norm/total" in row]
    assert watched == list(range(50))
    assert all("train/loss" in row for row in history if "grad_norm/total" in row)
    alerts = [r["alert"] for r in records if r["type"] == "alert"]
    [alert] = [a for a in alerts if a["title"] == "gradient spikes"]  # of both: within ten minutes
    assert alert["level"] == "WARN"
    assert "network.output.weight holds" in alert["text"]
    assert any(key.startswith("spikes._type") or key == "spikes" for row in history for key in row)
    (path,) = folder.rglob("spikes*.table.json")
    table = json.loads(path.read_text())
    assert table["columns"][:2] == ["step", "epoch"]
    assert {22, 37} <= {row[0] for row in table["data"]}


# By itself, in somebody else's project
STANDALONE = """
import sys, torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset
from steadyfit import GradientSpikeMonitor

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 2)
    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
        return loss * (1000 if self.global_step == 40 else 1)
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)

x = torch.randn(640, 4)
data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=32)
logger = CSVLogger(".", "logs")
trainer = Trainer(max_epochs=3, accelerator="cpu", logger=logger, log_every_n_steps=5,
                  callbacks=[GradientSpikeMonitor("skip")])
trainer.fit(Model(), data)
assert not {"callbacks", "core", "datamodules", "lit_models"} & set(sys.modules)
"""


@SLOW
def test_the_library_is_enough(tmp_path: Path) -> None:
    """steadyfit alone works in a project that has only torch and lightning."""
    shutil.copytree(ROOT / "steadyfit", tmp_path / "steadyfit")
    (tmp_path / "project.py").write_text(STANDALONE)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "project.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    folder = tmp_path / "logs" / "version_0"
    assert 40 in steps(folder)
    assert "holds" in process.stdout
    with (folder / "metrics.csv").open(newline="") as file:
        norms = {int(r["step"]): r["grad_norm/total"] for r in csv.DictReader(file)}
    assert sorted(norms) == list(range(60))
    assert float(norms[40]) > 50 * float(norms[39])


# What is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"window": 0}, "window must be at least 16 steps, got 0."),
        ({"threshold": 0.0}, "threshold must be positive and finite, got 0.0."),
        (
            {"reaction": "ignore"},
            "reaction must be one of log, skip, rollback, stop, or a Reaction, got 'ignore'",
        ),
    ],
)
def test_wrong_argument(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        GradientSpikeMonitor(**arguments)


@pytest.mark.parametrize("name", ["every", "keep"])
def test_wrong_argument_of_rollback(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0."):
        Rollback(**{name: 0})


def refusal(folder: Path, model: LightningModule, *callbacks: Callback) -> str:
    """What is said before the first step; one sentence."""
    with pytest.raises(ValueError, match=r"\.$") as raised:
        fit(folder, model, *callbacks)
    assert model.trainer.global_step == 0
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(".")
    return str(raised.value)


def test_rollback_without_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steadyfit.watching.reactions.free_memory", lambda: 5000.0)
    said = refusal(tmp_path, Plain(), GradientSpikeMonitor("rollback"))
    assert "rollback needs 0.0 GB of main memory for 3 copies and 0.0 GB are free" in said
    fit(tmp_path, Plain(), GradientSpikeMonitor(Rollback(keep=1)))  # 2136 bytes
    assert 1e6 < free_memory() <= math.inf


def test_nothing_to_watch(tmp_path: Path) -> None:
    class Empty(Plain):
        def configure_optimizers(self) -> Optimizer:
            return SGD([torch.ones(1)], lr=0.1)

    frozen = Plain().requires_grad_(False)
    assert "nothing to watch: every parameter of Plain is frozen" in refusal(
        tmp_path, frozen, GradientSpikeMonitor()
    )
    assert "nothing to watch: an optimizer of Empty has no parameter to train" in refusal(
        tmp_path, Empty(), UpdateClipping()
    )


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
@pytest.mark.parametrize("callback", [GradientSpikeMonitor, UpdateClipping])
def test_sharded_gradients(name: str, callback: Callable[[], Callback]) -> None:
    from types import SimpleNamespace

    from lightning.pytorch import strategies

    kind = getattr(strategies, name)
    trainer: Any = SimpleNamespace(strategy=object.__new__(kind), log_dir=None, loggers=[])
    with pytest.raises(ValueError, match=f"whole gradients, and {name} shards them"):
        callback().setup(trainer, Plain(), "fit")


@pytest.mark.parametrize("steps", [15, 16, 31, 47])
def test_ratios_of_added_parameters_are_taken_from_as_many_steps_as_others(steps: int) -> None:
    """After 31 steps the usual ratios were those of the first step with the new parameter."""
    draw = random.Random(0)
    spikes = 0
    for _ in range(10):
        ratios = ParameterRatios(window=64, limit=6)
        ratios.grow(3)
        for step in range(steps + 40):
            if step == steps:
                ratios.grow(4)
            gradient = [draw.lognormvariate(0, 0.3) for _ in range(3 if step < steps else 4)]
            spikes += ratios.update(np.array([gradient]))[1].sum()
    assert spikes <= 1
