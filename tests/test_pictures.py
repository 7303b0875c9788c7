"""The pictures of a run: they show what they should, land in the run folder, and cost no reads."""

import csv
import io
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from callbacks import ConfusionMatrix, LearningCurves, Mistakes, SampleSheet
from callbacks.pictures.base import PictureCallback
from callbacks.pictures.confusion_matrix import confusion_matrix
from callbacks.pictures.learning_curves import learning_curves
from callbacks.pictures.mistakes import mistakes, mistakes_sheet, most_probable
from callbacks.pictures.sample_sheet import from_each_class, mosaic, sample_sheet, seen_by_network
from datamodules.images.augmentation import Augmentation
from datamodules.images.base import ImageDataModule

NAMES = ("ant", "bee", "cow")
TEST_SIZE = 23  # three batches of ten, or two processes with unequal shares


class PlantedData(ImageDataModule):
    """Grey images whose first pixel says what :class:`Reader` will predict, and how surely."""

    class_names = NAMES
    image_size = (8, 8, 3)

    def __init__(self, **options: Any) -> None:
        defaults = {"batch_size": 8, "eval_batch_size": 10, "val_size": 6}
        plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        super().__init__(**{**defaults, **plain, **options})

    def read_train(self) -> tuple[Tensor, ...]:
        return planted(30, seed=1)

    def read_test(self) -> tuple[Tensor, ...]:
        return planted(TEST_SIZE, seed=2)


def planted(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(100, 140, (count, 8, 8, 3), generator=generator, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(count) % 3  # the class that is predicted
    images[:, 0, 0, 1] = 2 * torch.randperm(100, generator=generator)[:count]  # all different
    targets = torch.randint(3, (count,), generator=generator)
    return images, targets


class Reader(LightningModule):
    """Predicts what the first pixel says."""

    def __init__(self, fails_at: int = 1000) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.fails_at = fails_at

    def forward(self, images: Tensor) -> Tensor:
        preds = (images[:, 0, 0, 0] * 255).round().long()
        return F.one_hot(preds, 3) * images[:, 1, 0, 0, None] * self.scale

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.global_step == self.fails_at:
            raise RuntimeError("planted failure")
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        logits = self(batch[0])
        self.log("val/loss", F.cross_entropy(logits, batch[1]))
        return {"logits": logits, "target": batch[-1]}

    def test_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"logits": self(batch[0]), "target": batch[-1]}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        **{"logger": False, "max_epochs": 1, "log_every_n_steps": 1, **options},
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def rendered(figure: Figure) -> np.ndarray:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("L"))


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder; whatever appears in it was written by surprise."""
    folder = tmp_path / "current"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# The run folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with all pictures, trained, validated and tested in an empty folder."""
    home = tmp_path_factory.mktemp("pictures")
    logger = CSVLogger(home, name="run", version="")
    pictures = [SampleSheet(), LearningCurves(), ConfusionMatrix(), Mistakes()]
    trainer = make_trainer(home, *pictures, logger=logger)
    model, data = Reader(), PlantedData()
    current = tmp_path_factory.mktemp("current")
    with chdir(current):
        trainer.fit(model, data)
        trainer.validate(model, data, verbose=False)
        trainer.test(Reader(), data, verbose=False)
    assert not list(current.iterdir())
    return home / "run"


def test_all_pictures_land_in_the_run_folder(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names == {
        "metrics.csv",
        "sample_sheet.png",
        "learning_curves.png",
        "confusion_matrix_val.csv",
        "confusion_matrix_val.png",
        "confusion_matrix_test.csv",
        "confusion_matrix_test.png",
        "mistakes.csv",
        "mistakes.png",
    }
    for path in run.glob("*.png"):
        grey = np.asarray(Image.open(path).convert("L"))
        assert grey.shape[0] > 100
        assert (grey < 128).mean() > 0.005, f"{path.name} is blank"


def test_without_a_logger_the_root_folder_is_the_run_folder(
    tmp_path: Path, empty_folder: Path
) -> None:
    run = tmp_path / "run"
    trainer = make_trainer(run, LearningCurves(), ConfusionMatrix())
    trainer.fit(Reader(), PlantedData())
    trainer.test(Reader(), PlantedData(), verbose=False)
    names = {path.name for path in run.iterdir()}
    assert names == {"confusion_matrix_test.csv", "confusion_matrix_test.png"}
    assert not list(empty_folder.iterdir())


def test_a_fast_dev_run_leaves_nothing_behind(tmp_path: Path, empty_folder: Path) -> None:
    pictures = [SampleSheet(), LearningCurves(), ConfusionMatrix(), Mistakes()]
    logger = CSVLogger(tmp_path / "run")
    trainer = make_trainer(tmp_path / "run", *pictures, logger=logger, fast_dev_run=2)
    trainer.fit(Reader(), PlantedData())
    trainer.test(Reader(), PlantedData(), verbose=False)
    assert [path.name for path in tmp_path.iterdir()] == ["current"]
    assert not list(empty_folder.iterdir())


def test_data_without_classes_or_images_is_left_alone(tmp_path: Path) -> None:
    """Without a datamodule nothing is known of classes or images."""
    pictures = [SampleSheet(), ConfusionMatrix(), Mistakes()]
    trainer = make_trainer(tmp_path / "run", *pictures)
    data = PlantedData()
    data.setup("fit")
    data.setup("test")
    trainer.fit(Reader(), data.train_dataloader(), data.val_dataloader())
    trainer.test(Reader(), data.test_dataloader(), verbose=False)
    assert not (tmp_path / "run").exists()


def test_a_picture_is_shown_on_the_wandb_run(tmp_path: Path) -> None:
    class Recorder(WandbLogger):
        def __init__(self) -> None:
            self.shown: list[tuple[Any, ...]] = []

        def log_image(self, *args: Any, **kwargs: Any) -> None:
            self.shown.append((*args, kwargs))

    callback, logger = PictureCallback(), Recorder()
    callback.folder = tmp_path
    trainer: Any = SimpleNamespace(loggers=[CSVLogger(tmp_path), logger])
    callback.save(trainer, "it", Figure())
    assert logger.shown == [("pictures/it", [str(tmp_path / "it.png")], {})]


@pytest.mark.slow
def test_two_processes_write_what_one_does(tmp_path: Path) -> None:
    for run, options in (("one", {}), ("two", {"strategy": "ddp_spawn", "devices": 2})):
        trainer = make_trainer(tmp_path / run, ConfusionMatrix(), Mistakes(), **options)
        trainer.test(Reader(), PlantedData(), verbose=False)
    for name in (
        "confusion_matrix_test.csv",
        "confusion_matrix_test.png",
        "mistakes.csv",
        "mistakes.png",
    ):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# The sample sheet


def test_samples_are_of_their_class_and_spread_over_the_set() -> None:
    targets = torch.tensor([2, 0, 0, 2, 0, 0, 5])
    classes, index = from_each_class(targets, 2)
    assert classes.tolist() == [0, 2, 5]
    assert index.tolist() == [[1, 4], [0, 3], [6, 6]]


def test_augmented_samples_are_what_the_loader_makes_of_the_stored_ones() -> None:
    data = PlantedData(augmentation=Augmentation(flip="random", cutout=2))
    data.setup("fit")
    stored, augmented = seen_by_network(data, torch.tensor([[4, 9, 11], [2, 7, 0]]))
    assert torch.equal(stored[1, 0], data.splits["train"][0][2])
    assert stored.shape == augmented.shape == (2, 3, 8, 8, 3)
    for one, other in zip(stored.flatten(0, 1), augmented.flatten(0, 1), strict=True):
        cut = (other == 0).all(2)
        assert 0 < cut.sum() <= 4
        assert ((one == other).all(2) | cut).all() or ((one.flip(1) == other).all(2) | cut).all()


def test_the_sheet_disturbs_neither_random_numbers_nor_the_loader() -> None:
    data = PlantedData(augmentation=Augmentation(crop=2, flip="random"))
    data.setup("fit")
    first = [images.clone() for images, _ in data.train_dataloader()]
    state = torch.get_rng_state()
    seen_by_network(data, torch.arange(6).reshape(3, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert data.train_dataloader().state_dict()["batches"] == len(first)
    assert all(map(torch.equal, first, (images for images, _ in data.train_dataloader())))


def test_the_sheet_shows_the_images_under_the_names_of_their_classes() -> None:
    stored, augmented = torch.randint(256, (2, 2, 3, 8, 8, 1), dtype=torch.uint8)
    left, right = sample_sheet(stored, augmented, ["ant", "bee"]).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["ant", "bee"]
    for axes, images in ((left, stored), (right, augmented)):
        shown = np.asarray(axes.images[0].get_array())
        np.testing.assert_array_equal(shown, mosaic(images))
        np.testing.assert_array_equal(shown[10:18, 20:28, 2], images[1, 2, :, :, 0])


# Learning curves


def metrics_table(steps: int = 100) -> pd.DataFrame:
    """As a logger writes it: validation and learning rate in rows of their own."""
    loss = 2 / (1 + np.arange(steps))
    train = pd.DataFrame({"step": range(steps), "train/loss": loss, "train/accuracy": 1 - loss / 2})
    val = pd.DataFrame({"step": [49, 99], "val/loss": [0.5, 0.4], "val/accuracy": [0.7, 0.8]})
    rates = pd.DataFrame({"step": [0, 50], "lr-SGD": [0.1, 0.2]})
    return pd.concat([train, val, rates], ignore_index=True)


def test_learning_rates_far_apart_are_all_seen() -> None:
    """Those of filters, biases and head of MuonSGD are 0.24, 106 and 1.75."""
    rates = {"lr-MuonSGD/filters": [0.24, 0.0], "lr-MuonSGD/biases": [106.0, 0.0]}
    metrics = pd.concat([metrics_table(), pd.DataFrame({"step": [0, 99], **rates})])
    panel = learning_curves(metrics).axes[2]
    assert panel.get_yscale() == "log"
    low, high = panel.get_ylim()
    assert 0 < low < 0.1 < 106 < high
    near = pd.concat([metrics_table(), pd.DataFrame({"step": [0, 99], "lr-Adam": [0.3, 0.0]})])
    assert learning_curves(near).axes[2].get_yscale() == "linear"


def test_every_step_has_its_learning_rate(trained: Path) -> None:
    """A rate on log steps alone, as Lightning's monitor has it, misses a warm-up."""
    metrics = pd.read_csv(trained / "metrics.csv")
    rate = np.asarray(learning_curves(metrics).axes[2].lines[0].get_ydata())
    assert len(rate) == len(metrics) == 60  # of which Lightning's monitor has one
    top = int(np.argmax(rate))
    assert 0 < top < 49
    assert rate[0] < rate[top] == pytest.approx(0.6, rel=0.01)


def test_curves_show_the_logged_values() -> None:
    metrics = metrics_table()
    loss, accuracy, rate = learning_curves(metrics).axes
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        each, _, val = axes.lines
        np.testing.assert_array_equal(each.get_xdata(), range(100))
        np.testing.assert_array_equal(each.get_ydata(), metrics[f"train/{name}"][:100])
        np.testing.assert_array_equal(val.get_xdata(), [49, 99])
        np.testing.assert_array_equal(val.get_ydata(), metrics[f"val/{name}"].dropna())
    np.testing.assert_array_equal(rate.lines[0].get_xydata(), [[0, 0.1], [50, 0.2]])
    assert [axes.get_ylabel() for axes in (loss, accuracy, rate)] == [
        "loss",
        "accuracy",
        "learning rate",
    ]
    assert rate.get_xlabel() == "optimizer step"
    assert loss.get_yscale() == "log"  # from 2 to 0.02
    assert accuracy.get_title(loc="right") == "last validation: 80.00%"


def test_a_spike_stands_out_of_the_smooth_line() -> None:
    metrics = pd.DataFrame({"step": range(200), "train/loss": 1.0})
    metrics.loc[100, "train/loss"] = 50.0
    each, smooth = learning_curves(metrics).axes[0].lines
    assert np.argmax(each.get_ydata()) == 100
    np.testing.assert_array_equal(smooth.get_ydata(), 1)


def nothing_finite(metrics: pd.DataFrame) -> pd.DataFrame:
    return metrics.assign(**{"train/loss": np.nan, "val/loss": np.inf})


def diverged(metrics: pd.DataFrame) -> pd.DataFrame:
    metrics.loc[40:50, "train/loss"] = np.inf
    metrics.loc[51:99, "train/loss"] = np.nan
    return metrics


@pytest.mark.parametrize(
    ("change", "panels"),
    [
        (lambda metrics: metrics.iloc[:1], 3),
        (lambda metrics: metrics[["step", "val/loss"]], 1),
        (lambda metrics: metrics[["step", "lr-SGD"]], 2),
        (lambda metrics: metrics[["step", "train/loss"]] * -1, 1),
        (nothing_finite, 3),
        (diverged, 3),
    ],
    ids=[
        "one row",
        "no training",
        "rate",
        "negative",
        "nothing finite",
        "diverged",
    ],
)
def test_curves_of_odd_metrics_can_be_drawn(
    change: Callable[[pd.DataFrame], pd.DataFrame], panels: int
) -> None:
    figure = learning_curves(change(metrics_table()))
    assert len(figure.axes) == panels
    figure.draw_without_rendering()


def test_curves_are_drawn_no_more_often_than_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(
        LearningCurves,
        "save",
        lambda self, trainer, name, figure: drawn.append(trainer.global_step),
    )
    for interval, expected in ((0.0, [3, 3, 6, 6, 6]), (1e9, [6])):
        drawn.clear()
        logger = CSVLogger(tmp_path, version=f"{interval}")
        curves = LearningCurves()
        curves.min_interval = interval
        make_trainer(tmp_path, curves, logger=logger, max_epochs=2).fit(Reader(), PlantedData())
        assert drawn == expected  # at validation, at the end of each epoch, and at the very end


def test_curves_show_how_far_a_failed_run_came(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="run", version="")
    trainer = make_trainer(tmp_path, LearningCurves(), logger=logger)
    with pytest.raises(RuntimeError, match="planted failure"):
        trainer.fit(Reader(fails_at=2), PlantedData())
    assert (tmp_path / "run" / "learning_curves.png").exists()
    assert len(pd.read_csv(tmp_path / "run" / "metrics.csv")) == 2


# The confusion matrix


def test_counts_equal_a_few_lines_of_numpy(run: Path) -> None:
    images, target = planted(TEST_SIZE, seed=2)
    expected = np.zeros((3, 3), int)
    np.add.at(expected, (target.numpy(), images[:, 0, 0, 0].numpy()), 1)
    header, *rows = csv.reader((run / "confusion_matrix_test.csv").read_text().splitlines())
    assert header == ["true/predicted", *NAMES]
    assert [row[0] for row in rows] == list(NAMES)
    assert np.array_equal(np.array([row[1:] for row in rows], int), expected)


def test_a_second_test_starts_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConfusionMatrix, "save", lambda *_: None)  # drawing takes longest
    trainer = make_trainer(tmp_path, ConfusionMatrix())
    for _ in range(2):
        trainer.test(Reader(), PlantedData(), verbose=False)
    table = pd.read_csv(tmp_path / "confusion_matrix_test.csv", index_col=0)
    assert table.to_numpy().sum() == TEST_SIZE


def test_the_matrix_shows_counts_coloured_by_their_share_of_the_row() -> None:
    counts = np.array([[9, 1, 0], [0, 0, 0], [5, 0, 15]])
    axes, _ = confusion_matrix(counts, NAMES).axes
    shares = np.array([[0.9, 0.1, 0], [0, 0, 0], [0.25, 0, 0.75]])
    np.testing.assert_allclose(np.asarray(axes.images[0].get_array()), shares)
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {(0, 0): "9", (1, 0): "1", (0, 2): "5", (2, 2): "15"}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    assert axes.get_title() == "24 of 30 right"


@pytest.mark.slow
def test_a_hundred_classes_are_drawn_without_numbers() -> None:
    figure = confusion_matrix(np.eye(100, dtype=int), [f"class {k}" for k in range(100)])
    assert not figure.axes[0].texts
    assert (rendered(figure) < 128).any()


# Mistakes


def test_planted_mistakes_are_listed_in_order(run: Path) -> None:
    table = pd.read_csv(run / "mistakes.csv")
    stored, targets = planted(TEST_SIZE, seed=2)
    preds, sureness = stored[:, 0, 0, 0].long(), stored[:, 0, 0, 1].float()
    wrong = (preds != targets).nonzero().flatten()
    expected = wrong[sureness[wrong].argsort(descending=True, stable=True)]
    assert table["id"].tolist() == expected.tolist()
    assert table["label"].tolist() == [NAMES[k] for k in targets[expected]]
    assert table["prediction"].tolist() == [NAMES[k] for k in preds[expected]]
    logit = 10 * sureness[expected].double() / 255
    np.testing.assert_allclose(table["probability"], logit.exp() / (logit.exp() + 2), atol=2e-6)
    assert set(table["set"]) == {"test"}


def test_right_answers_are_no_mistakes_and_ids_are_named() -> None:
    columns = [torch.tensor(c) for c in ([2, 0, 1], [0, 0, 1], [1, 0, 0], [0.6, 1.0, 0.9])]
    rows, table = mistakes(columns, ["ant", "bee"], ["a.png", "b.png", "c.png"])
    assert rows.tolist() == [1, 2]
    assert table["id"].tolist() == ["b.png", "c.png"]
    assert table["prediction"].tolist() == ["ant", "bee"]


def test_a_diverged_network_is_unsure_of_its_mistakes() -> None:
    _, probability = most_probable(torch.tensor([[torch.nan, torch.nan], [3.0, 0.0]]))
    assert probability.tolist() == [0.0, pytest.approx(0.9526, abs=1e-4)]


def test_the_mistakes_sheet_names_prediction_truth_and_id() -> None:
    images = np.random.default_rng(0).integers(256, size=(7, 8, 8, 3), dtype=np.uint8)
    numbers = torch.arange(9)
    columns = [numbers, 0 * numbers, 1 + 0 * numbers, torch.linspace(0.999, 0.5, 9)]
    _, table = mistakes(columns, ["ant", "bee"], [f"{'deep/' * 9}{n}.png" for n in range(9)])
    figure = mistakes_sheet(images, table, samples=1000)
    assert figure.get_suptitle() == "the most confident of 9 mistakes in 1,000 images"
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 7
    first = shown[0].get_title().splitlines()
    assert first[:2] == ["99.9% bee", "true: ant"]
    assert first[2].endswith("deep/0.png")
    np.testing.assert_array_equal(shown[6].images[0].get_array(), images[6])


def test_no_mistakes_are_called_so() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    _, table = mistakes([none, none, none, none.float()], ["ant"], [])
    figure = mistakes_sheet(np.zeros((0, 8, 8, 3), np.uint8), table, samples=3)
    assert figure.get_suptitle() == "no mistakes in 3 images"


# Cost


def test_a_test_batch_is_never_read_from_the_device() -> None:
    """Tensors on the meta device have no values: whatever would read one fails."""
    images, target = torch.empty(10, 3, 8, 8, device="meta"), torch.empty(10, device="meta").long()
    outputs = {"logits": torch.empty(10, 3, device="meta"), "target": target}
    model: Any = SimpleNamespace(device=torch.device("meta"))
    trainer: Any = None  # is not asked
    for callback in (ConfusionMatrix(), Mistakes()):
        callback.data = PlantedData()
        callback.on_test_start(trainer, model)
        for batch_idx in range(2):
            callback.on_test_batch_end(trainer, model, outputs, [images, target], batch_idx)
    with pytest.raises(RuntimeError, match="meta tensors"):
        target.max().item()
