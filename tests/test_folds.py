"""Folds: each sample is held out once, and judged by the one run that has not seen it."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import CONFIGS, SMALL
from fake_data import write_cifar10, write_photos
from kaggle_place import Refusal, make_run, records
from kaggle_server import KaggleServer

import predict
import submit
import train
from core.errors import UserError
from datamodules import (
    CIFAR10DataModule,
    CompetitionDataModule,
    DemoDataModule,
    ImageFolderDataModule,
    KaggleCIFAR10DataModule,
    LastNamesDataModule,
    MNISTDataModule,
)
from datamodules.base import BaseDataModule
from datamodules.folds import assign_folds
from pipeline.kaggle.prediction_file import wilson_interval
from pipeline.loading import LoadedRun
from pipeline.studies.out_of_fold import refuse_overlap

FOLDS = 3
KEPT = [flag for flag in SMALL if not flag.startswith("--data.val_size")]
SETS: dict[str, tuple[type[BaseDataModule], dict[str, Any]]] = {
    "cifar10": (CIFAR10DataModule, {"verify": False}),
    "mnist": (MNISTDataModule, {"verify": False}),
    "names": (LastNamesDataModule, {}),
    "kaggle": (KaggleCIFAR10DataModule, {}),
    "table": (
        CompetitionDataModule,
        {"competition": "digit-recognizer", "image_size": (28, 28, 1), "mean": (0,), "std": (1,)},
    ),
}


def begun(make: type[BaseDataModule], root: Path, fold: int, **options: Any) -> BaseDataModule:
    data = make(data_dir=str(root), folds=FOLDS, fold=fold, **options)
    data.setup("fit")
    return data


def copy_of(root: Path, to: Path) -> Path:
    """Miniature CIFAR-10 that a test may change."""
    name = "cifar-10-batches-py"
    shutil.copytree(root / name, to / name)
    return to


# ---- the split


@pytest.mark.parametrize(("make", "options"), SETS.values(), ids=SETS)
def test_each_sample_is_held_out_once(
    make: type[BaseDataModule], options: dict[str, Any], data_dir: Path
) -> None:
    folds = [begun(make, data_dir, fold, **options) for fold in range(FOLDS)]
    assert len({data.split_digest for data in folds}) == 1
    count = len(folds[0].read_train()[-1])
    held_out = []
    for fold, data in enumerate(folds):
        val = data.held_out(FOLDS, fold)
        val.setup("predict")
        numbers = val.splits["predict"][-1].tolist()
        held_out += numbers
        assert len(data.train_ids) + len(numbers) == count
        assert not set(data.train_ids) & {val.ids[i] for i in numbers}
        spread = data.splits["val"][-1].bincount(), data.splits["train"][-1].bincount()
        assert (spread[0] - spread[1] / (FOLDS - 1)).abs().max() <= 1.5  # the same share of each
    assert sorted(held_out) == list(range(count))


def test_photos_of_both_folders_are_divided(tmp_path: Path) -> None:
    """A folder for validation is one of the two that are labelled."""
    photos = write_photos(tmp_path, 12)
    for name in ("train", "validation"):
        (photos / name).mkdir()
    for name in ("cat", "dog"):
        shutil.move(photos / name, photos / "train" / name)
        (photos / "validation" / name).mkdir()
        for i in range(4):
            path = photos / "train" / name / f"{i}.jpg"
            shutil.move(path, photos / "validation" / name / path.name)
    options = {"image_size": 8, "test_size": 0}
    folds = [begun(ImageFolderDataModule, photos, fold, **options) for fold in range(FOLDS)]
    assert [len(data.splits["val"][-1]) for data in folds] == [8, 8, 8]
    seen = [set(data.train_ids) for data in folds]
    assert set.union(*seen) == set(folds[0].ids)
    assert not set.intersection(*seen)
    assert {str(name).split("/")[0] for name in folds[0].ids} == {"train", "validation"}


def test_drawings_of_an_original_share_a_fold() -> None:
    assert DemoDataModule.copies == 6
    targets = torch.arange(40).repeat_interleave(6) % 5
    fold_of = assign_folds(targets, 4, copies=6)
    assert (fold_of.view(40, 6) == fold_of[::6, None]).all()
    assert fold_of.bincount().tolist() == [60] * 4


def test_digest_knows_the_samples_and_not_their_place(data_dir: Path, tmp_path: Path) -> None:
    there = begun(CIFAR10DataModule, data_dir, 0, verify=False)
    moved = begun(CIFAR10DataModule, copy_of(data_dir, tmp_path), 1, verify=False)
    assert moved.split_digest == there.split_digest
    batches = tmp_path / "cifar-10-batches-py"
    (batches / "data_batch_1").rename(batches / "test_batch")
    (batches / "data_batch_2").rename(batches / "data_batch_1")
    (batches / "test_batch").rename(batches / "data_batch_2")
    other = begun(CIFAR10DataModule, tmp_path, 0, verify=False)
    assert other.split_digest != there.split_digest


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"folds": 1, "fold": 0}, "folds must be at least 2, got 1"),
        ({"fold": 0}, "folds must be at least 2, got None"),
        ({"folds": 5}, "fold must be from 0 to 4, as folds is 5, got None"),
        ({"folds": 5, "fold": 5}, "fold must be from 0 to 4, as folds is 5, got 5"),
    ],
)
def test_a_fold_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        DemoDataModule(**options)


def test_more_folds_than_samples_of_a_class(data_dir: Path) -> None:
    data = KaggleCIFAR10DataModule(data_dir=str(data_dir), folds=7, fold=0)
    with pytest.raises(UserError, match="folds is 7, but no class has more than 6 samples"):
        data.setup("fit")


# ---- the command line


def sentence(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train.main([*args])
    return capsys.readouterr().err.splitlines()[-1]


def test_val_size_beside_folds_is_refused(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "folds and val_size both choose what is for validation"
    assert said in sentence(capsys, "fit", *small, "--data.folds=3", "--data.fold=0")
    both = tmp_path / "both.yaml"
    settings = {"folds": 3, "fold": 0, "val_size": 20}
    both.write_text(yaml.safe_dump({"data": {"init_args": settings}}))
    flags = [flag for flag in small if "val_size" not in flag]
    assert said in sentence(capsys, "fit", *flags, f"--config={both}")


def test_sets_that_are_drawn_have_no_folds(capsys: pytest.CaptureFixture[str]) -> None:
    echo = f"--config={CONFIGS / 'echo.yaml'}"
    said = sentence(capsys, "fit", echo, "--data.folds=3", "--data.fold=0")
    assert "only a set of labelled samples that are always the same has folds" in said


# ---- runs


@pytest.fixture(scope="module")
def trained_folds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Runs of three folds in ``runs/cifar10_cpu`` of a folder, and their data beside."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("folds")
        patch.chdir(home)
        write_cifar10(home / "data")
        config = home / "cifar10_cpu.yaml"
        text = (CONFIGS / "cifar10_cpu.yaml").read_text()
        config.write_text(text.replace("batch_size: 1000", "batch_size: 1000, val_size: 20"))
        quick = ["--trainer.max_epochs=1", "--trainer.callbacks=[]", "--trainer.logger=false"]
        flags = [f"--config={config}", *KEPT, *quick, "--data.folds=3"]
        for fold in range(FOLDS):  # the folds of the flags win over the val_size of the file
            train.main(["fit", *flags, f"--run=fold={fold}", f"--data.fold={fold}"])
        yield home


@pytest.fixture
def runs(trained_folds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Copies of these runs somewhere else, that a test may change."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_folds, "moved", dirs_exist_ok=True)
    return sorted(Path("moved/runs/cifar10_cpu").glob("fold=*"))


def predicted(*args: str | Path) -> dict[str, Any]:
    predict.main([*map(str, args), "--data_dir=moved/data", "--accelerator=cpu", "--devices=1"])
    return json.loads(Path("moved/runs/cifar10_cpu/submission.json").read_text())


def test_a_run_knows_its_folds(runs: list[Path]) -> None:
    checkpoint = torch.load(runs[1] / "checkpoints" / "last.ckpt", weights_only=True)
    text = (runs[1] / "config.yaml").read_text()
    assert text.startswith(f"# split: {checkpoint['split']}\n")
    settings = yaml.safe_load(text)["data"]["init_args"]
    assert (settings["folds"], settings["fold"], settings["val_size"]) == (3, 1, 0)


def test_folds_predict_each_sample_once(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each accuracy is what its run has measured, whatever fold is typed: it predicts its own."""
    (runs[0].parent / "logs").mkdir()
    record = predicted(*runs, runs[0].with_name("logs"), "--tta=none", "--data.fold=1")
    oof = np.load(runs[0].parent / "oof.npz")
    data = CIFAR10DataModule(data_dir="moved/data", verify=False)
    assert oof["labels"].tolist() == data.read_train()[1].tolist()
    assert oof["ids"].tolist() == list(range(200))
    right = oof["probabilities"].argmax(1) == oof["labels"]
    for fold, run in enumerate(record["runs"]):
        assert (oof["folds"] == fold).sum() == run["validation_samples"]
        accuracy = right[oof["folds"] == fold].mean()
        assert accuracy == pytest.approx(run["validation_accuracy"])
    found = record["out_of_fold"]
    assert (found["accuracy"], found["samples"]) == (right.mean(), 200)
    assert found["interval"] == list(wilson_interval(right.mean(), 200))
    said = capsys.readouterr().out
    assert f"oof.npz: out-of-fold accuracy {right.mean():.2%} (95% interval " in said
    assert "left out, as they are no runs: moved/runs/cifar10_cpu/logs" in said


def test_without_all_folds_there_is_a_note_and_the_average(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def note(*args: Path) -> str:
        assert "out_of_fold" not in predicted(*args)
        assert not (runs[0].parent / "oof.npz").exists()
        [said] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("note: ")]
        return said.removeprefix("note: no out-of-fold accuracy: ")

    predicted(*runs)  # whose file would be taken for that of the next prediction
    assert note(*runs[:2]) == "no run holds out fold 2 of 3."
    path = Path("moved/data/cifar-10-batches-py")
    shutil.copy(path / "data_batch_2", path / "data_batch_1")
    assert note(*runs).startswith(f"{runs[0]} was trained with other folds than its data have now")


def test_samples_that_a_run_has_seen_are_not_out_of_fold(runs: list[Path]) -> None:
    first, second, third = (LoadedRun.load(str(run), "best", []) for run in runs)

    def refused(*others: LoadedRun) -> str:
        with pytest.raises(UserError) as error:
            refuse_overlap([first, *others])
        return str(error.value)

    def changed(**values: Any) -> LoadedRun:
        config = third.config | values.pop("config", {})
        return replace(third, checkpoint=third.checkpoint | values, config=config)

    refuse_overlap([first, second, third])
    assert refused(first, third) == f"{runs[0]} and {runs[0]} both hold out fold 0."
    other = changed(split="0" * 64)
    assert refused(second, other) == f"{runs[0]} and {runs[2]} were trained with different folds."
    assert refused(second, changed(split="")) == f"{runs[2]} was trained without folds."
    warm = changed(config={"init_from": "runs/all"})
    assert "the weights of runs/all, which may know its fold" in refused(second, warm)


def test_a_run_does_not_go_on_with_other_samples(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """It would hold out samples that it was trained on."""
    path = Path("moved/data/cifar-10-batches-py")
    shutil.copy(path / "data_batch_2", path / "data_batch_1")
    flags = [f"--run={runs[0]}", "--data.data_dir=moved/data"]
    said = "trained with other folds than its data have now"
    assert said in sentence(capsys, "validate", *flags)
    assert said in sentence(capsys, "fit", *flags, "--trainer.max_epochs=2")


def test_a_run_is_validated_on_what_it_held_out(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another fold it gave the accuracy on samples that the run was trained on."""
    flags = [f"--run={runs[0]}", "--data.data_dir=moved/data"]
    for flag, trained in (("--data.fold=1", 0), ("--data.folds=4", 3)):
        said = sentence(capsys, "validate", *flags, flag)
        assert f"{flag}: the run was trained with {trained}" in said
    other = ["--data.folds=null", "--data.fold=null", "--data.val_size=20"]
    assert "--data.folds=None: the run was trained" in sentence(capsys, "validate", *flags, *other)
    train.main(["validate", *flags])
    assert "val/accuracy" in capsys.readouterr().out


def test_a_config_that_names_a_class_alone_has_folds(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ended in a traceback."""
    short = tmp_path / "short.yaml"
    short.write_text("data: CIFAR10DataModule")
    flags = [flag for flag in small if "val_size" not in flag]
    said = sentence(capsys, "fit", *flags, f"--config={short}", "--data.folds=99", "--data.fold=99")
    assert "fold must be from 0 to 98" in said


def test_one_fold_alone_predicts(runs: list[Path]) -> None:
    predict.main([str(runs[0]), "--data_dir=moved/data", "--accelerator=cpu", "--devices=1"])
    [run] = json.loads((runs[0] / "submission.json").read_text())["runs"]
    assert run["validation_samples"] == 67
    assert not (runs[0] / "oof.npz").exists()


def test_the_name_of_the_out_of_fold_predictions_is_taken(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        predict.main(["runs/a", "runs/b", "--output=oof.csv"])
    assert "oof.npz is for folds; choose another name" in capsys.readouterr().err


# ---- Kaggle

TWO = [
    {"run": name, "validation_accuracy": 0.9, "validation_samples": 40}
    for name in ("runs/f/0", "runs/f/1")
]


@pytest.mark.usefixtures("workplace")
def test_out_of_fold_accuracy_stands_beside_the_score(
    kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    out_of_fold = {"accuracy": 0.9321, "samples": 80}
    submit.main([make_run(runs=TWO, out_of_fold=out_of_fold), "--wait"])
    assert "out of fold: validation accuracy 93.21% (95% interval" in capsys.readouterr().out
    assert ", validation 0.9321" in records()[0]["message"]
    submit.main(["--list"])
    [row] = [x for x in capsys.readouterr().out.splitlines() if "runs/f/1" in x]
    assert "0.9321 out-of-fold  0.91230" in row


@pytest.mark.usefixtures("workplace")
def test_a_forged_out_of_fold_accuracy(refusal: Refusal) -> None:
    for number, accuracy in enumerate((1.5, "high", True)):
        out_of_fold = {"accuracy": accuracy, "samples": 0}
        run = make_run(folder=f"runs/f/{number}", runs=TWO, out_of_fold=out_of_fold)
        assert "is not whole; run predict.py again" in refusal(run, "--dry_run")
