"""The embedded set: fixed bytes, honest splits, and harder than it is for a simple classifier."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.results import svm_baseline
from core.errors import UserError
from core.sample_file import read_table
from datamodules.images.demo import (
    COPIES,
    HELD_OUT,
    DemoDataModule,
    draw,
    handwriting,
    tents,
)

GOLDEN = [  # SHA-256 of training images and targets, test images and targets
    "c73a8adec3c48c90a36c7435b9f93478f40fdf28c1e38406a5786e018e3ed155",
    "a5f49e1567880c25cf1093e4869c4c7cbd1b8efe897b8cd6971cde17d8eb57f9",
    "edbc66759978102db64314422c03cabf343a00e69ba75f64f90d243c3c076b63",
    "430c49c7dd893d785fdaf207342ff447d02f7d776522c7710867f8b3225658ac",
]


@pytest.fixture(scope="module")
def data() -> DemoDataModule:
    data = DemoDataModule()
    data.setup("fit")
    data.setup("test")
    data.setup("predict")
    return data


def test_bytes_are_the_same_on_every_machine(data: DemoDataModule) -> None:
    (train, train_targets), (test, test_targets) = data.read_train(), data.read_test()
    assert train.shape == (7782, 32, 32, 3)
    assert test.shape == (500, 32, 32, 3)
    assert train.dtype == test.dtype == torch.uint8
    digests = [
        hashlib.sha256(t.numpy().tobytes()).hexdigest()
        for t in (train, train_targets, test, test_targets)
    ]
    assert digests == GOLDEN
    assert data.digest == GOLDEN[2]


def test_no_random_number_of_the_run_is_used() -> None:
    before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy()
    draw(handwriting()[0][:10], seed=0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state(legacy=False)["state"]["key"] == before[1]).all()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The originals that were handed to ``draw``, call after call."""
    calls: list[np.ndarray] = []

    def spy(originals: np.ndarray, seed: int) -> np.ndarray:
        calls.append(originals)
        return np.zeros((len(originals), 32, 32, 3), np.uint8)

    monkeypatch.setattr("datamodules.images.demo.draw", spy)
    return calls


@pytest.mark.parametrize("val_size", [0, 1, 500, 1000, 7776])
def test_no_original_is_in_two_splits(val_size: int, drawn: list[np.ndarray]) -> None:
    data = DemoDataModule(val_size=val_size)
    data.read_train()
    data.read_test()
    names = [original.tobytes() for original in drawn[0]]
    (train,), (val,) = data.split((torch.arange(len(names)),))
    test = {original.tobytes() for original in drawn[1]}
    assert len(val) == val_size
    assert 0 <= len(names) - len(train) - len(val) < COPIES
    assert not {names[i] for i in train} & {names[i] for i in val}
    assert not set(names) & test
    assert len(set(names)) * COPIES == len(names)
    assert len(test) == HELD_OUT


def test_validation_must_leave_something_to_train_on() -> None:
    with pytest.raises(UserError, match="val_size is 7780, but there are 7782 training images"):
        DemoDataModule(val_size=7780).setup("fit")


def test_ids_count_the_test_images_from_one(data: DemoDataModule) -> None:
    images, ids = data.splits["predict"]
    assert torch.equal(images, data.splits["test"][0])
    assert ids.tolist() == list(range(1, 501))


def test_every_class_is_in_every_split(data: DemoDataModule) -> None:
    for split in ("train", "val", "test"):
        counts = data.splits[split][1].bincount(minlength=10)
        assert len(counts) == data.num_classes
        assert counts.min() > 0.8 * counts.float().mean()


def test_mean_and_std_are_those_of_the_training_images(data: DemoDataModule) -> None:
    pixels = data.read_train()[0].double() / 255
    torch.testing.assert_close(data.mean.double(), pixels.mean((0, 1, 2)), atol=6e-5, rtol=0)
    torch.testing.assert_close(data.std.double(), pixels.std((0, 1, 2)), atol=6e-5, rtol=0)


def test_ink_lies_where_the_original_has_it() -> None:
    """A square original must come out as a bright rectangle inside the image."""
    square = np.zeros((200, 8, 8))
    square[:, 2:6, 2:6] = 16
    images = draw(square, seed=3).astype(float).mean(3)
    blank = draw(0 * square, seed=3).astype(float).mean(3)
    inked = images - blank > 20
    assert (inked.sum((1, 2)) > 40).all()
    rows, columns = inked.any(2).sum(1), inked.any(1).sum(1)
    assert (inked.sum((1, 2)) > 0.7 * rows * columns).all()


def test_interpolation_keeps_weight_and_place() -> None:
    weights = tents(np.array([0]), np.array([32]), 8)[0]
    assert (weights[2:-2].sum(1) == 64).all()
    assert weights.argmax(1).tolist() == [pixel // 4 for pixel in range(32)]


@pytest.mark.slow
def test_the_baseline_does_badly_but_better_than_chance() -> None:
    assert 0.2 < svm_baseline(DemoDataModule()) < 0.6


def test_sample_submission_is_written_once(tmp_path: Path) -> None:
    data = DemoDataModule(data_dir=str(tmp_path))
    data.prepare_data()
    table = read_table(data.sample)
    assert data.submission().sample == data.sample
    assert table.header == ("id", "label")
    assert table.ids == list(range(1, 501))
    assert set(table.labels) == {"zero"}
    data.sample.write_text("id,label\n7,two\n")
    data.prepare_data()
    assert data.sample.read_text() == "id,label\n7,two\n"


def test_a_submission_follows_the_sample(tmp_path: Path) -> None:
    data = DemoDataModule(data_dir=str(tmp_path))
    data.prepare_data()
    path = tmp_path / "submission.csv"
    data.submission().write(path, np.arange(500, 0, -1), np.arange(500) % 10)
    lines = path.read_text().splitlines()
    assert lines[:3] == ["id,label", "1,nine", "2,eight"]
    assert len(lines) == 501
