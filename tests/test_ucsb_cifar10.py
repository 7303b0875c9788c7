"""The UCSB competition: CIFAR-10 to learn from, a numpy file to predict."""

from pathlib import Path

import numpy as np
import pytest
from fake_data import draw, labels_of, write_cifar10, write_csv, write_ucsb

from core.errors import UserError
from datamodules import UCSBCIFAR10DataModule


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_cifar10(tmp_path)
    write_ucsb(tmp_path)
    return tmp_path


def data(root: Path) -> UCSBCIFAR10DataModule:
    return UCSBCIFAR10DataModule(data_dir=str(root), verify=False, val_size=10)


def test_it_trains_on_cifar10_and_predicts_its_own_images(root: Path) -> None:
    datamodule = data(root)
    assert len(datamodule.read_train()[0]) == 200
    images, ids = datamodule.read_predict()
    assert np.array_equal(images, draw(labels_of(20)))
    assert ids.tolist() == list(range(20))
    assert len(datamodule.digest) == 64


def test_predicting_asks_for_no_training_data(tmp_path: Path) -> None:
    write_ucsb(tmp_path)
    data(tmp_path).setup("predict")


def test_labels_are_handed_in_as_digits(root: Path, tmp_path: Path) -> None:
    ids = np.arange(20)
    data(root).submission().write(tmp_path / "out.csv", ids, ids % 10)
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines == ["id,label", *(f"{i},{i % 10}" for i in range(20))]


def save(path: Path, array: np.ndarray) -> None:
    np.save(path, array, allow_pickle=True)


IMAGES = np.zeros((20, 32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (IMAGES.astype(np.float32), r"expected uint8 of shape \(N, 32, 32, 3\), found float32"),
        (IMAGES.transpose(0, 3, 1, 2), r"found uint8 of shape \(20, 3, 32, 32\); download it"),
        (IMAGES[0], r"found uint8 of shape \(32, 32, 3\); download it again"),
        (IMAGES[:19], r"must list the ids 0 to 18, one for .*, found 20 rows from 0 to 19"),
        (IMAGES[:0], r"must list the ids 0 to -1, one for each image"),
        (np.array([print]), r"is not a whole array of numbers \("),
    ],
)
def test_another_array_is_refused(root: Path, array: np.ndarray, complaint: str) -> None:
    save(root / "ucsb" / "test.npy", array)
    with pytest.raises(UserError, match=complaint):
        data(root).read_predict()


@pytest.mark.parametrize("cut", [0, 5, 50, -1])
def test_a_short_file_is_refused(root: Path, cut: int) -> None:
    path = root / "ucsb" / "test.npy"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"test.npy is not a whole array of numbers \(.*download"):
        data(root).read_predict()


@pytest.mark.parametrize("first", [1, 5])
def test_other_ids_are_refused(root: Path, first: int) -> None:
    rows = [(i, "0") for i in range(first, first + 20)]
    write_csv(root / "ucsb" / "sample_submission.csv", rows)
    with pytest.raises(UserError, match=rf"found 20 rows from {first} to {first + 19}"):
        data(root).read_predict()


def test_a_missing_file_names_the_command(root: Path) -> None:
    (root / "ucsb" / "test.npy").unlink()
    command = r"kaggle competitions download -c ucsb-cs291k-hw2-2022-fall -p .*ucsb` and unzip"
    with pytest.raises(UserError, match=command):
        data(root).read_predict()


@pytest.mark.real_data
def test_the_competitions_real_layout(real_data: Path) -> None:
    images, ids = UCSBCIFAR10DataModule(data_dir=str(real_data)).read_predict()
    assert images.shape == (2000, 32, 32, 3)
    assert ids.tolist() == list(range(2000))
