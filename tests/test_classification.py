"""LitClassifier, and through it what LitModel gives every learning problem."""

import copy
import csv
import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
)
from lightning.pytorch.cli import LightningArgumentParser, ReduceLROnPlateau
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from callbacks import MetricsCSV, RunRecord
from core.errors import UserError
from datamodules.base import BaseDataModule
from lit_models import LitClassifier
from lit_models.base import SEEDS, LitModel, _step_seeds
from lit_models.classification import TTA, views
from lit_models.schedules import make_schedule, wants_total_steps

NUM_CLASSES = 5


class Points(BaseDataModule):
    """Noisy points (N, 8), each near the centre of its class; ten training batches of eight."""

    class_names = ("a", "b", "c", "d", "e")

    def __init__(self, val_size: int = 10, **options: Any) -> None:
        super().__init__(batch_size=8, val_size=val_size, **options)
        self.samples = 80 + val_size

    def read_train(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        centres = torch.randn(NUM_CLASSES, 8, generator=generator)
        targets = torch.arange(self.samples) % NUM_CLASSES
        return centres[targets] + torch.randn(self.samples, 8, generator=generator) / 3, targets

    def read_test(self) -> tuple[Tensor, Tensor]:
        return self.read_train()


class Given(BaseDataModule):
    """The same inputs and targets, or ids, for every stage."""

    class_names = Points.class_names

    def __init__(self, inputs: Tensor, targets: Tensor, **options: Any) -> None:
        super().__init__(**options)
        self.tensors = (inputs, targets)

    def read_train(self) -> tuple[Tensor, Tensor]:
        return self.tensors

    read_test = read_predict = read_train


class Memory(Logger):
    """Keeps what reaches a logger: ``(step, metrics)``."""

    name = version = ""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def values(self, name: str) -> list[tuple[int, float]]:
        """All values of one metric with their steps, in the order in which they were written."""
        return [(step, row[name]) for step, row in self.rows if name in row]


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "enable_checkpointing": False, "log_every_n_steps": 10}
    return Trainer(default_root_dir=folder, **{**settings, **quiet, **options})


def model(network: nn.Module | None = None, lr: float = 0.1, **options: Any) -> LitClassifier:
    """A linear classifier of points that always starts with the same weights."""
    torch.manual_seed(0)
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=0.9)
    return LitClassifier(network or nn.Linear(8, NUM_CLASSES), optimizer, NUM_CLASSES, **options)


def weights(lit: LightningModule) -> list[Tensor]:
    return [p.detach().clone() for p in lit.parameters()]


class Extra(Callback):
    """A value of every step, known before its first batch."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.add_to_rows({trainer.global_step: {"extra": 1.0}})


class BatchLosses(Callback):
    """The loss of every training batch, as ``training_step`` returned it."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any
    ) -> None:
        # Lightning has divided it by the number of accumulated batches
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)


class Crash(Callback):
    """An error in the batch after ``steps`` optimizer steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.steps:
            raise RuntimeError("planted")


# Metrics


def reference_metrics(logits: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """The metrics of a classifier in a few lines."""
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    ranking = np.argsort(-logits, axis=1)
    predicted, confidence = ranking[:, 0], probabilities.max(1)
    hits = predicted == target
    f1 = [
        2 * (hits & (target == k)).sum() / ((predicted == k).sum() + (target == k).sum())
        for k in range(logits.shape[1])
    ]
    bins = np.ceil(confidence * 15)
    gaps = [abs((hits[bins == b] - confidence[bins == b]).sum()) for b in range(1, 16)]
    return {
        "accuracy": hits.mean(),
        "top3": (ranking[:, :3] == target[:, None]).any(1).mean(),
        "macro_f1": np.mean(f1),
        "calibration_error": sum(gaps) / len(target),
        "loss": -np.log(probabilities[range(len(target)), target]).mean(),
    }


@pytest.mark.parametrize("split", ["val", "test"])
def test_metrics_equal_a_reference_over_unequal_batches(split: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, NUM_CLASSES, (83,), generator=generator)
    noise = torch.randn(83, NUM_CLASSES, generator=generator)
    logits = 1.5 * (1.5 * F.one_hot(target, NUM_CLASSES) + noise)  # neither timid nor too sure
    data = Given(logits, target, eval_batch_size=20, val_size=82)  # batches of 17 and 16
    lit = model(nn.Identity())  # the inputs are the logits
    run = trainer(tmp_path)
    (run.validate if split == "val" else run.test)(lit, data, verbose=False)
    result = {name: value.item() for name, value in run.callback_metrics.items()}
    seen = data.splits[split]
    expected = reference_metrics(seen[0].double().numpy(), seen[1].numpy())
    assert result == pytest.approx({f"{split}/{k}": v for k, v in expected.items()}, rel=1e-5)


def test_metrics_that_agree_on_the_first_batch_stay_apart(tmp_path: Path) -> None:
    """A first batch without a mistake made top 3 a copy of accuracy for the rest of the run."""
    target = torch.tensor([0, 1, 2, 3, 0, 1])
    logits = F.one_hot(target, NUM_CLASSES).float() * 4
    logits[4:] = torch.tensor([[1.0, 3, 0, 0, 0], [3.0, 1, 0, 0, 0]])  # second best is right
    lit, data = model(nn.Identity()), Given(logits, target, eval_batch_size=4)
    trainer(tmp_path).test(lit, data, verbose=False)
    found = lit.trainer.callback_metrics
    assert found["test/accuracy"].item() == pytest.approx(4 / 6)
    assert found["test/top3"].item() == 1


def test_metrics_start_afresh_each_epoch(tmp_path: Path) -> None:
    """The value of the last epoch equals that of a validation of the final weights alone."""
    lit, data = model(), Points(val_size=30, eval_batch_size=7)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(lit, data)
    during_fit = {k: v.item() for k, v in run.callback_metrics.items()}
    [alone] = trainer(tmp_path).validate(lit, data, verbose=False)
    assert during_fit == pytest.approx(alone)


def test_a_test_is_logged_at_the_step_of_its_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=2)
    run.fit(model(), Points())
    run.save_checkpoint(tmp_path / "end.ckpt")
    memory = Memory()
    tested = trainer(tmp_path, logger=memory)
    tested.test(model(), Points(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    [(step, accuracy)] = memory.values("test/accuracy")
    assert step == 19  # the last of 20 steps
    assert accuracy == pytest.approx(tested.callback_metrics["test/accuracy"].item())


def test_label_smoothing_spreads_the_target_over_all_classes() -> None:
    logits = torch.randn(6, NUM_CLASSES, generator=torch.Generator().manual_seed(0))
    target = torch.arange(6) % NUM_CLASSES
    log_p = logits.log_softmax(1)
    hard = -log_p[range(6), target].mean()
    spread = -log_p.mean()
    lit = model(nn.Identity(), label_smoothing=0.2)
    loss = lit.training_step([logits, target], 0)
    torch.testing.assert_close(loss, 0.8 * hard + 0.2 * spread)
    # it is a matter of training: an evaluation gives the plain cross-entropy
    lit.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    torch.testing.assert_close(lit.evaluation_step([logits, target])["loss"], hard)


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_label_smoothing_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(UserError, match=rf"label_smoothing must be in \[0, 1\), got {value}"):
        model(label_smoothing=value)


# Penalty


def test_the_penalty_is_added_to_the_objective_and_kept_out_of_the_record() -> None:
    layers = [nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, NUM_CLASSES)]
    lit = model(nn.Sequential(*layers))
    frozen, first, last = (layer.weight for layer in layers)
    frozen.requires_grad_(False)
    batch = [torch.randn(6, 8), torch.arange(6) % NUM_CLASSES]
    plain = lit.training_step(batch, 0)
    lit.l1_penalty = 0.1
    penalised = lit.training_step(batch, 0)
    torch.testing.assert_close(penalised, plain + 0.1 * (first.abs().sum() + last.abs().sum()))
    [(_, alone), (_, record)] = lit.records.pending
    assert record == alone

    (penalised - plain).backward()
    torch.testing.assert_close(first.grad, 0.1 * first.sign())


def test_the_penalty_drives_weights_to_zero() -> None:
    """Only one of the eight inputs says anything about the class."""
    target = torch.arange(200) % 2
    inputs = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    inputs[:, 0] += 4 * target

    def useless(l1_penalty: float) -> float:
        layer = nn.Linear(8, NUM_CLASSES)
        lit = model(layer, l1_penalty=l1_penalty)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            lit.training_step([inputs, target], 0).backward()
            optimizer.step()
        return (layer.weight[:, 1:].abs().mean() / layer.weight.abs().mean()).item()

    assert useless(0.05) < 0.1 < useless(0.0)


def test_a_negative_penalty_is_refused() -> None:
    with pytest.raises(UserError, match=r"l1_penalty must not be negative, got -1\.0; 0 turns it"):
        model(l1_penalty=-1.0)


# Test-time augmentation


def test_views_are_mirrors_and_one_pixel_shifts() -> None:
    images = torch.rand(2, 3, 5, 6)
    reflected = np.pad(images.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    down_right = torch.from_numpy(reflected[:, :, :5, :6])
    up_left = torch.from_numpy(reflected[:, :, 2:, 2:])
    assert torch.equal(down_right[:, :, 1:, 1:], images[:, :, :-1, :-1])  # really a shift by one
    expected = [(0.25, images), (0.125, down_right), (0.125, up_left)]
    for part in (views(images, "mirror"), views(images, "mirror_translate")):
        assert sum(weight for weight, _ in part) == pytest.approx(1)
        plain, mirrored = part[::2], part[1::2]
        for (weight, view), (mirror_weight, mirror) in zip(plain, mirrored, strict=True):
            assert weight == mirror_weight
            assert torch.equal(mirror, view.flip(3))
    for (weight, view), (wanted_weight, wanted) in zip(part[::2], expected, strict=True):
        assert weight == wanted_weight
        assert torch.equal(view, wanted)
    [(weight, view), _] = views(images, "mirror")
    assert weight == 0.5
    assert torch.equal(view, images)


def test_translate_is_the_shifts_without_mirroring() -> None:
    images = torch.rand(2, 3, 5, 6)
    alone, both = views(images, "translate"), views(images, "mirror_translate")[::2]
    assert [weight for weight, _ in alone] == [0.5, 0.25, 0.25]
    for (_, view), (_, wanted) in zip(alone, both, strict=True):
        assert torch.equal(view, wanted)


def test_tta_averages_logits_except_inside_fit(tmp_path: Path) -> None:
    tta: TTA = "mirror_translate"
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 2, 4, 4, generator=generator)
    targets = torch.arange(40) % NUM_CLASSES
    network = nn.Sequential(nn.Flatten(), nn.Linear(32, NUM_CLASSES), nn.Softplus())
    lit = model(network, lr=0.0, tta=tta)
    data = Given(images, targets, val_size=20, batch_size=20)

    def losses(split: str) -> tuple[float, float]:
        """The loss without and with augmentation."""
        inputs, target = data.splits[split]
        averaged = sum(weight * network(view) for weight, view in views(inputs, tta))
        both = F.cross_entropy(network(inputs), target), F.cross_entropy(averaged, target)
        return both[0].item(), both[1].item()

    run = trainer(tmp_path, max_epochs=1)
    run.fit(lit, data)
    plain, augmented = losses("val")
    assert plain != pytest.approx(augmented, rel=1e-4)
    assert run.callback_metrics["val/loss"].item() == pytest.approx(plain)
    [validated] = run.validate(lit, data, verbose=False)
    assert validated["val/loss"] == pytest.approx(augmented)
    run.test(lit, data, verbose=False)
    assert run.callback_metrics["test/loss"].item() == pytest.approx(losses("test")[1])
    [(ids, probabilities)] = run.predict(lit, data) or []
    assert torch.equal(ids, targets)  # a prediction batch carries ids in the target's place
    averaged = sum(weight * network(view) for weight, view in views(images, tta))
    torch.testing.assert_close(probabilities, averaged.softmax(1))


def test_views_of_what_is_no_image_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="augmentation needs images"):
        trainer(tmp_path).validate(model(tta="mirror"), Points(), verbose=False)


def test_an_unknown_tta_is_refused() -> None:
    known = "none, mirror, translate, mirror_translate"
    with pytest.raises(UserError, match=f"tta must be one of {known}, got 'x'"):
        model(tta="x")


# Schedules


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        pytest.param({"max_epochs": 3}, 30, id="epochs"),
        pytest.param({"max_epochs": 3, "max_steps": 14}, 14, id="max_steps_first"),
        pytest.param({"max_epochs": -1, "max_steps": 14}, 14, id="max_steps_alone"),
        pytest.param({"max_epochs": 2, "accumulate_grad_batches": 4}, 6, id="accumulation"),
        pytest.param({"fast_dev_run": 7}, 7, id="fast_dev_run"),
        pytest.param({"max_epochs": 2, "limit_train_batches": 4}, 8, id="limited_batches"),
        pytest.param({"max_epochs": 2, "limit_train_batches": 0.5}, 10, id="limited_share"),
        pytest.param(
            {"max_epochs": 3, "callbacks": [GradientAccumulationScheduler({0: 4, 2: 1})]},
            3 + 3 + 10,
            id="changing_accumulation",
        ),
    ],
)
def test_steps_of_a_training(options: dict[str, Any], steps: int, tmp_path: Path) -> None:
    lit, data, run = model(), Points(), trainer(tmp_path, **options)
    data.setup("fit")
    lit.trainer, run.datamodule = run, data  # type: ignore[attr-defined]
    assert lit.total_steps == steps


def test_a_schedule_ends_with_the_training(tmp_path: Path) -> None:
    lit, steps = model(lr_scheduler=partial(OneCycleLR, max_lr=0.1)), 3 + 3 + 10
    accumulation = GradientAccumulationScheduler({0: 4, 2: 1})
    run = trainer(tmp_path, max_epochs=3, callbacks=[accumulation])
    run.fit(lit, Points())
    schedule = lit.lr_schedulers()
    assert isinstance(schedule, OneCycleLR)
    assert run.global_step == steps
    assert schedule.total_steps == steps
    assert schedule.last_epoch == steps  # one step of the schedule with each of the optimizer


@pytest.mark.parametrize(
    ("lr_scheduler", "wanted"),
    [
        pytest.param(partial(OneCycleLR, max_lr=0.1), True, id="open"),
        pytest.param(partial(OneCycleLR, max_lr=0.1, total_steps=99), False, id="given"),
        pytest.param(partial(StepLR, step_size=3), False, id="no_such_argument"),
        pytest.param(lambda optimizer: StepLR(optimizer, 3), False, id="function"),
        pytest.param(
            partial(OneCycleLR, max_lr=0.1, total_steps=None, epochs=3, steps_per_epoch=33),
            False,
            id="given_as_epochs",
        ),
    ],
)
def test_only_an_open_total_steps_is_filled_in(lr_scheduler: partial[Any], wanted: bool) -> None:
    assert wants_total_steps(lr_scheduler) == wanted
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1, momentum=0.9)
    schedule = make_schedule(lr_scheduler, optimizer, 9)
    bound = getattr(lr_scheduler, "keywords", {})
    given = 99 if "epochs" in bound else bound.get("total_steps")
    expected = {True: 9, False: given}[wanted]
    assert getattr(schedule, "total_steps", None) == expected


@pytest.mark.parametrize(
    ("schedule", "options", "wanted"),
    [
        ("OneCycleLR", {"max_lr": 0.1}, True),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 7}, False),
        ("StepLR", {"step_size": 3}, False),
    ],
)
def test_schedules_from_the_command_line(
    schedule: str, options: dict[str, Any], wanted: bool
) -> None:
    """jsonargparse binds every argument of the class, the open ones as None."""
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(LitClassifier, "model")
    path = f"torch.optim.lr_scheduler.{schedule}"
    settings = {
        "network": {"class_path": "torch.nn.Identity"},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        "lr_scheduler": {"class_path": path, "init_args": options},
    }
    lit = parser.instantiate(parser.parse_object({"model": settings})).model
    assert wants_total_steps(lit.lr_scheduler) == wanted


@pytest.mark.parametrize(
    "plateau",
    [
        partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode="max"),
        partial(ReduceLROnPlateau, monitor="val/accuracy", mode="max"),
    ],
    ids=["torch", "lightning"],
)
def test_a_plateau_of_the_models_own_measure_lowers_the_rate(
    plateau: partial[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lit = model(lr_scheduler=partial(plateau, patience=0, threshold=2.0, factor=0.5))
    trainer(tmp_path, max_epochs=4).fit(lit, Points(val_size=40))
    optimizer = lit.optimizers()
    assert isinstance(optimizer, LightningOptimizer)
    # the first validation is the best, and none is better by a factor of three
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)
    assert "watches val/accuracy of each validation, maximum is best." in capsys.readouterr().out


def test_a_plateau_that_would_punish_progress(tmp_path: Path) -> None:
    lit = model(lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(UserError, match=r"set --model\.lr_scheduler\.mode=max"):
        trainer(tmp_path, max_epochs=1).fit(lit, Points(val_size=40))


def test_a_schedule_without_length_says_how_often_it_acts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"max_epochs": 1, "accumulate_grad_batches": 2}
    trainer(tmp_path, **options).fit(model(lr_scheduler=partial(StepLR, step_size=2)), Points())
    assert "StepLR acts with every optimizer step, 5 in an epoch." in capsys.readouterr().out


# Records


@pytest.mark.parametrize(
    ("options", "accumulated"), [({"max_epochs": 2}, 3), ({"max_steps": 7}, 1)], ids=str
)
def test_every_step_reaches_the_logger_once(
    options: dict[str, int], accumulated: int, tmp_path: Path
) -> None:
    """In order, with its own step, as the mean of its batches, the last partial window included."""
    memory, batches = Memory(), BatchLosses()
    run = trainer(
        tmp_path,
        logger=memory,
        callbacks=[batches, Extra()],
        accumulate_grad_batches=accumulated,
        log_every_n_steps=4,
        **options,
    )
    run.fit(model(), Points())
    epochs = [batches.losses[i : i + 10] for i in range(0, len(batches.losses), 10)]
    windows = [e[i : i + accumulated] for e in epochs for i in range(0, len(e), accumulated)]
    assert len(windows) == run.global_step
    expected = [(step, pytest.approx(np.mean(w))) for step, w in enumerate(windows)]
    assert memory.values("train/loss") == expected
    assert memory.values("extra") == [(step, 1.0) for step in range(len(windows))]


def test_values_wait_for_the_log_step(tmp_path: Path) -> None:
    written: list[int] = []

    class Written(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            written.append(len(memory.rows))

    memory = Memory()
    options = {"logger": memory, "callbacks": [Written()], "log_every_n_steps": 4}
    trainer(tmp_path, max_epochs=1, **options).fit(model(), Points())
    assert written == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]


def test_accuracy_of_a_step_is_the_share_of_hits() -> None:
    lit = model(nn.Identity())
    logits = F.one_hot(torch.tensor([0, 1, 2, 3]), NUM_CLASSES).float()
    lit.training_step([logits, torch.tensor([0, 1, 2, 4])], 0)
    [(_, values)] = lit.records.pending
    assert values["accuracy"].item() == 0.75


def test_what_waits_is_written_when_training_breaks(tmp_path: Path) -> None:
    logger = MetricsCSV(str(tmp_path))
    record = RunRecord("seed_everything: 0\n")
    run = trainer(tmp_path, logger=logger, callbacks=[record, Crash(6)], max_epochs=1)
    with pytest.raises(RuntimeError, match="planted"):
        run.fit(model(), Points())
    with logger.path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == list("012345")
    assert all(float(row["train/loss"]) > 0 for row in rows)


# Checkpoints


def best(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "best", monitor="val/accuracy", mode="max")


def test_a_checkpoint_carries_its_metrics(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[best(tmp_path)])
    run.fit(model(), Points(val_size=40))
    checkpoint = torch.load(tmp_path / "best.ckpt", weights_only=True)
    lit = model()
    lit.load_state_dict(checkpoint["state_dict"])
    [validated] = trainer(tmp_path).validate(lit, Points(val_size=40), verbose=False)
    assert checkpoint["metrics"] == pytest.approx(validated)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
def test_a_run_resumed_in_mid_epoch_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Order, dropout, momentum, schedule and records go on as if nothing had happened."""

    def fit(ckpt_path: Path | None = None) -> tuple[list[Tensor], Memory]:
        network = nn.Sequential(nn.Linear(8, 16), nn.Dropout(), nn.Linear(16, NUM_CLASSES))
        lit, memory = model(network, lr_scheduler=partial(OneCycleLR, max_lr=0.1)), Memory()
        checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
        settings = {"enable_checkpointing": True, "callbacks": [checkpoint]}
        run = trainer(tmp_path, max_epochs=2, logger=memory, log_every_n_steps=4, **settings)
        run.fit(lit, Points(), ckpt_path=ckpt_path, weights_only=True)
        return weights(lit), memory

    whole, whole_log = fit()
    torch.rand(100)  # another process, another state of the generator
    resumed, resumed_log = fit(ckpt_path=tmp_path / "step=15.ckpt")
    assert all(map(torch.equal, whole, resumed))
    assert resumed_log.values("train/loss") == whole_log.values("train/loss")[15:]


def test_a_schedule_too_long_for_its_training_is_told_in_one_sentence(tmp_path: Path) -> None:
    """Five steps, of which OneCycleLR would rise for the first: it divides by zero."""
    lit = model(lr_scheduler=partial(OneCycleLR, max_lr=0.1, pct_start=0.2))
    with pytest.raises(UserError, match="cannot be laid over 5 optimizer steps; train longer"):
        trainer(tmp_path, max_steps=5).fit(lit, Points())


def test_signature_of_a_step_is_known_and_lightnings_own_is_left_alone() -> None:
    class WithoutStep(LitModel):
        pass

    class WithStep(LitModel):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None: ...

    assert not hasattr(WithoutStep.training_step, "__signature__")
    told = vars(WithStep.training_step)["__signature__"]
    assert [*told.parameters] == ["self", "batch", "batch_idx"]


def test_seeds_of_steps_differ_and_come_back() -> None:
    own = [
        _step_seeds(0, epoch, rank, block)
        for epoch in (0, 1)
        for rank in (0, 1)
        for block in (0, 1)
    ]
    assert len({seed for block in own for seed in block}) >= 8 * SEEDS - 1  # of 2**32
    assert _step_seeds(0, 0, 0, 0) == own[0]
    lit, drawn = model(), []
    for step in (SEEDS - 1, SEEDS, 3, SEEDS):
        lit.on_train_batch_start([], step)
        drawn.append(torch.initial_seed())
    assert drawn == [own[0][-1], own[1][0], own[0][3], own[1][0]]


def test_dropout_depends_on_seed_epoch_and_step(tmp_path: Path) -> None:
    def masks(seed: int) -> list[tuple[bool, ...]]:
        drawn: list[tuple[bool, ...]] = []
        network = nn.Sequential(nn.Dropout(), nn.Linear(8, NUM_CLASSES))

        def keep(dropout: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            if dropout.training:
                drawn.append(tuple((output == 0).flatten().tolist()))

        network[0].register_forward_hook(keep)
        lit = model(network)
        lit.seed = seed
        trainer(tmp_path, max_epochs=2).fit(lit, Points())
        return drawn

    first, again, other = masks(0), masks(0), masks(1)
    assert first == again
    assert len({*first, *other}) == len(first) + len(other) == 40  # no mask came twice


def test_ema_weights_are_what_is_validated_and_saved(tmp_path: Path) -> None:
    class Reference(Callback):
        """The average in one line."""

        averaged: list[Tensor] | None = None

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, *args: Any
        ) -> None:
            new = weights(pl_module)
            old = self.averaged or new
            self.averaged = [0.9 * a + 0.1 * w for a, w in zip(old, new, strict=True)]

    reference = Reference()
    callbacks = [reference, EMAWeightAveraging(decay=0.9), best(tmp_path)]
    run = trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=callbacks)
    network = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, NUM_CLASSES))
    lit = model(network)
    run.fit(lit, Points(val_size=30))
    torch.testing.assert_close(weights(lit), reference.averaged)

    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    fresh = model(copy.deepcopy(network))
    fresh.load_state_dict(saved["state_dict"])
    [validated] = trainer(tmp_path).validate(fresh, Points(val_size=30), verbose=False)
    assert validated == pytest.approx(saved["metrics"])


# Precision


def fp16(scaler: GradScaler) -> MixedPrecision:
    """fp16 with a real gradient scaler, which Lightning by itself has on GPUs only."""
    return MixedPrecision("16-mixed", "cpu", scaler)


@pytest.fixture
def losses(tmp_path: Path) -> Iterator[Memory]:
    memory = Memory()
    yield memory
    values = [loss for _, loss in memory.values("train/loss")]
    assert all(map(math.isfinite, values))
    assert np.mean(values[-5:]) < 0.5 * np.mean(values[:5])


def test_trains_in_bf16(losses: Memory, tmp_path: Path) -> None:
    trainer(tmp_path, max_epochs=3, logger=losses, precision="bf16-mixed").fit(model(), Points())


def test_an_overflow_in_fp16_skips_the_step_and_recovers(losses: Memory, tmp_path: Path) -> None:
    class Watch(Callback):
        """Whether each step changed the weights, and the scale it left."""

        def __init__(self) -> None:
            self.seen: list[tuple[bool, float]] = []

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.before = weights(pl_module)

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, *args: Any
        ) -> None:
            after = weights(pl_module)
            changed = not all(map(torch.equal, self.before, after))
            self.seen.append((changed, scaler.get_scale()))
            self.before = after

    scaler, watch = GradScaler("cpu", init_scale=2.0**20), Watch()
    options = {"max_epochs": 4, "plugins": [fp16(scaler)], "callbacks": [watch]}
    trainer(tmp_path, logger=losses, **options).fit(model(), Points())
    scales = [2.0**20, *(scale for _, scale in watch.seen)]
    overflowed = [after < before for before, after in pairwise(scales)]
    assert overflowed[0]
    assert not any(overflowed[-20:])
    assert [changed for changed, _ in watch.seen] == [not o for o in overflowed]
