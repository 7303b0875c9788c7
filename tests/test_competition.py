"""Any image competition: what is handed in has the form of its sample file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONFIGS
from fake_data import draw_grey, labels_of, write_digit_recognizer, write_dogs_vs_cats

import predict
import submit
import train
from core.errors import UserError
from core.sample_file import SampledSubmission, read_table
from datamodules import CompetitionDataModule

pytestmark = pytest.mark.usefixtures("decoders_in_process")

DIGITS = {"competition": "digit-recognizer", "image_size": (28, 28, 1), "mean": (0.1,), "std": (1,)}
DOGS = {"competition": "dogs-vs-cats-redux-kernels-edition", "image_size": (16, 16, 3)}


def data(root: Path, **options: Any) -> CompetitionDataModule:
    return CompetitionDataModule(data_dir=str(root), val_size=10, **options)


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    return write_digit_recognizer(tmp_path)


@pytest.fixture
def dogs(tmp_path: Path) -> Path:
    return write_dogs_vs_cats(tmp_path)


# --- what is read ---------------------------------------------------------------------------------


def test_tables_of_pixels(digits: Path) -> None:
    datamodule = data(digits.parent, **DIGITS)
    assert datamodule.class_names == tuple("0123456789")
    images, classes = datamodule.read_train()
    assert classes.tolist() == labels_of(100).tolist()
    assert np.array_equal(images[..., 0], draw_grey(labels_of(100)))
    images, ids = datamodule.read_predict()
    assert ids.tolist() == list(range(1, 31))
    assert np.array_equal(images[..., 0], draw_grey(labels_of(30)))


def test_classes_in_the_names_of_photos(dogs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datamodule = data(dogs, **DOGS)  # its own folder
    assert datamodule.class_names == ("cat", "dog")
    _, classes = datamodule.read_train()
    assert classes.bincount().tolist() == [30, 30]
    assert "train: 2 classes by file name: cat 30, dog 30" in capsys.readouterr().err
    assert datamodule.ids[:2] == ["cat.0.jpg", "cat.1.jpg"]
    images, ids = datamodule.read_predict()
    assert ids.tolist() == list(range(1, 21))
    greens = images[..., 1].float().mean((1, 2))  # yellow cats have even numbers
    assert greens[1::2].min() > greens[::2].max()


def test_photos_in_folders_of_classes_have_ids_of_their_own(dogs: Path) -> None:
    """``cat/0.jpg`` and ``dog/0.jpg`` were both sample 0."""
    for path in sorted((dogs / "train").iterdir()):
        name, number, _ = path.name.split(".")
        (dogs / "train" / name).mkdir(exist_ok=True)
        path.rename(dogs / "train" / name / f"{number}.jpg")
    datamodule = data(dogs, **DOGS)
    datamodule.read_train()
    assert len(set(datamodule.ids)) == 60
    assert datamodule.ids[0] == "cat/0.jpg"


def by_table(dogs: Path, sample: Callable[[str], str], ending: str = "") -> list[str]:
    """Gives the photos names that are no numbers, all in ``images/``, and a table of classes."""
    (dogs / "images").mkdir()
    rows, asked = ["image_id,breed"], []
    for path in sorted((dogs / "train").iterdir()):
        name = f"{path.name[:3]}-{path.stem[4:]:0>3}"[::-1]
        path.rename(dogs / "images" / f"{name}.jpg")
        rows.append(f"{name}{ending},{path.name[:3]}")
    for path in sorted((dogs / "test").iterdir()):
        name = f"x{int(path.stem):03}"
        path.rename(dogs / "images" / f"{name}.jpg")
        asked.append(f"{name}{ending}")
    shutil.rmtree(dogs / "train")
    shutil.rmtree(dogs / "test")
    (dogs / "train.csv").write_text("\n".join(rows))
    asked.reverse()
    (dogs / "sample_submission.csv").write_text(sample("") + "".join(map(sample, asked)))
    return asked


def columns(name: str) -> str:
    return f"{name},0.5,0.5\n" if name else "image_id,dog,cat\n"


def one_label(name: str) -> str:
    return f"{name},cat\n" if name else "image_id,breed\n"


@pytest.mark.parametrize("ending", ["", ".jpg"])
@pytest.mark.parametrize("sample", [columns, one_label])
def test_ids_that_are_no_numbers(
    dogs: Path, tmp_path: Path, sample: Callable[[str], str], ending: str
) -> None:
    asked = by_table(dogs, sample, ending)
    datamodule = data(dogs, **DOGS)
    _, classes = datamodule.read_train()
    assert classes.bincount().tolist() == [30, 30]
    images, ids = datamodule.read_predict()
    assert ids.tolist() == list(range(20))
    right = images[..., 1].float().mean((1, 2)) < 150  # dogs
    probabilities = np.stack([1 - 0.75 * right.numpy(), 0.75 * right.numpy()], 1)
    path = tmp_path / "out.csv"
    datamodule.submission().write_predictions(path, ids.numpy(), probabilities)
    table = read_table(path)
    assert (table.ids, table.header) == (asked, read_table(dogs / "sample_submission.csv").header)
    odd = [int(name[1:4]) % 2 for name in asked]  # dogs
    if sample is columns:  # in the order of the file
        assert table.columns[0] == ["0.75" if dog else "0" for dog in odd]
        assert table.columns[1] == ["0.25" if dog else "1" for dog in odd]
    else:
        assert table.labels == ["dog" if dog else "cat" for dog in odd]


# --- the form of what is handed in ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample", "options", "row"),
    [
        ("ImageId,Label\n1,0\n", {}, "1,b"),
        ("id,label\n1,0.5\n", {}, "1,0.7"),
        ("id,label\n1,0\n", {"probability_of": "a"}, "1,0.3"),
        ("id,b,a\n1,0,0\n", {}, "1,0.7,0.3"),
    ],
)
def test_the_sample_file_decides_the_form(
    tmp_path: Path, sample: str, options: dict[str, str], row: str
) -> None:
    (tmp_path / "sample.csv").write_text(sample)
    form = SampledSubmission(("a", "b"), tmp_path / "sample.csv", **options)
    form.check(np.array([[0.3, 0.7]]))
    form.write_predictions(tmp_path / "out.csv", np.array([1]), np.array([[0.3, 0.7]]))
    assert (tmp_path / "out.csv").read_text().splitlines() == [sample.splitlines()[0], row]
    assert form.accepted == (("a", "b") if row == "1,b" else ())


@pytest.mark.parametrize(
    ("sample", "unknown"), [("id,x,b\n1,0,0\n", "x is none"), ("id,label\n1,0.5\n", "label is no")]
)
def test_a_form_of_other_classes_is_refused(tmp_path: Path, sample: str, unknown: str) -> None:
    (tmp_path / "sample.csv").write_text(sample)
    with pytest.raises(UserError, match=f"{unknown}.*--data.probability_of=CLASS"):
        SampledSubmission(("a", "b", "c"), tmp_path / "sample.csv").check(np.ones((1, 3)))


@pytest.mark.parametrize("name", ["007", "1.jpg"])
def test_ids_are_written_as_they_are(tmp_path: Path, name: str) -> None:
    (tmp_path / "sample.csv").write_text(f"id,label\n{name},a\n")
    form = SampledSubmission(("a", "b"), tmp_path / "sample.csv")
    form.write(tmp_path / "out.csv", np.array([0]), np.array([1]))
    assert (tmp_path / "out.csv").read_text() == f"id,label\n{name},b\n"


# --- what does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("\n", "\n300", "expected 784 pixels from 0 to 255 in each row, for images of 28 x 28 x 1"),
        ("\n", "\nx", r"expected 784 pixels from 0 to 255"),
        ("\n", "\n1,", r"test.csv is not a whole table \(.*; download it again"),
    ],
)
def test_a_table_that_is_not_whole_is_refused(
    digits: Path, old: str, new: str, complaint: str
) -> None:
    path = digits / "test.csv"
    path.write_text(new.join(path.read_text().rsplit(old, 3)))
    with pytest.raises(UserError, match=complaint):
        data(digits, **DIGITS).read_predict()


def test_rows_that_differ_from_the_sample_file_are_refused(digits: Path) -> None:
    (digits / "sample_submission.csv").write_text("ImageId,Label\n1,0\n")
    with pytest.raises(UserError, match=r"test.csv has 30 rows, which are not those of the 1 ids"):
        data(digits, **DIGITS).read_predict()


def test_a_label_of_no_class_is_refused(digits: Path) -> None:
    with pytest.raises(UserError, match=r"the label '0' in train.csv is not one of 1, 2"):
        data(digits, class_names=["1", "2"], **DIGITS).read_train()


def test_training_pixels_need_labels(digits: Path) -> None:
    shutil.copy(digits / "test.csv", digits / "train.csv")
    with pytest.raises(UserError, match=r"train.csv has no column of labels; download it again"):
        data(digits, **DIGITS)


def test_two_sample_files_are_refused(digits: Path) -> None:
    shutil.copy(digits / "sample_submission.csv", digits / "sample_submission2.csv")
    with pytest.raises(UserError, match=r"may be the sample file; choose with --data.sample=FILE"):
        data(digits, **DIGITS).read_predict()
    chosen = data(digits, sample=str(digits / "sample_submission.csv"), **DIGITS)
    assert len(chosen.read_predict()[0]) == 30


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_broken_photo_is_named(dogs: Path, part: str) -> None:
    next(iter(sorted((dogs / part).iterdir()))).write_bytes(b"")
    datamodule = data(dogs, **DOGS)
    with pytest.raises(UserError, match=r"jpg cannot be read"):
        datamodule.read(part)


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_missing_part_names_the_command(dogs: Path, name: str) -> None:
    shutil.rmtree(dogs / name)
    command = rf"{name} does not exist; run `kaggle competitions download -c dogs-vs-cats-redux"
    with pytest.raises(UserError, match=command):
        data(dogs, **DOGS).read(name)


# --- from fit to a checked submission -------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "header", "note"),
    [
        ("digit_recognizer", "ImageId,Label", "rows for digit"),
        ("dogs_vs_cats", "id,label", "lowest"),
    ],
)
def test_from_fit_to_a_checked_submission(
    config: str,
    header: str,
    note: str,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--data.val_size=20", "--data.batch_size=10", "--trainer.max_epochs=4"]
    flags += [f"--data.data_dir={data_dir}", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    train.main(["fit", f"--config={CONFIGS / config}.yaml", "--run=a", *flags])
    run = Path("runs", config, "a")
    predict.main([str(run), "--accelerator=cpu"])
    lines = (run / "submission.csv").read_text().splitlines()
    assert lines[0] == header
    values = [line.split(",")[1] for line in lines[1:]]
    if config == "dogs_vs_cats":
        dogs = np.array(list(map(float, values)))
        assert ((dogs > 0.5) == (np.arange(1, 21) % 2 == 1)).mean() > 0.8
        assert json.loads((run / "submission.json").read_text())["labels"] == []
    else:
        assert (np.array(values).astype(int) == labels_of(30)).mean() > 0.8
    capsys.readouterr()
    submit.main([str(run), "--dry_run"])
    assert note in capsys.readouterr().out
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["CompetitionDataModule"]["class_names"][:2] in (["0", "1"], ["cat", "dog"])
