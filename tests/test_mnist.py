"""MNIST and the grey digits in its shape: read right, split as the course does, never guessed."""

import gzip
import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from fake_data import draw_grey, idx, labels_of, write_mnist
from torch.utils.data import TensorDataset, random_split

from core.errors import UserError
from datamodules import DigitsDataModule, MNISTDataModule
from datamodules.images import mnist
from datamodules.images.augmentation import Augmentation

GOLDEN = [  # SHA-256 of the digits' training images and targets, test images and targets
    "4dbbf385ae96625d3b65c1fcd644294db2f5426d376f2d16906af22f15ae4240",
    "a018f7520be308d77e7c444dc8d6bc5682bace02ec9be01969799e6839627741",
    "7c698f9024c7713fe9c10e5b52e46637e0483eb6b5075cf064a8e5d9235008d4",
    "430c49c7dd893d785fdaf207342ff447d02f7d776522c7710867f8b3225658ac",
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_mnist(tmp_path)
    return tmp_path


def read(root: Path, **options: Any) -> MNISTDataModule:
    return MNISTDataModule(data_dir=str(root), **{"verify": False, **options})


def test_images_and_labels_are_those_written(root: Path) -> None:
    data = read(root)
    for seed, (images, labels) in enumerate([data.read_train(), data.read_test()]):
        expected = labels_of(len(labels), seed)
        assert images.dtype == torch.uint8
        assert labels.tolist() == expected.tolist()
        assert np.array_equal(images[..., 0], draw_grey(expected, seed))


def test_files_that_were_never_unpacked_are_read_too(root: Path) -> None:
    images, labels = read(root).read_train()
    for path in list((root / "MNIST" / "raw").iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    again, labels_again = read(root).read_train()
    assert torch.equal(images, again)
    assert torch.equal(labels, labels_again)


def test_the_split_is_random_split_of_torch(root: Path) -> None:
    data = read(root, val_size=50)
    data.setup("fit")
    whole = TensorDataset(*data.read_train())
    parts = random_split(whole, [150, 50], torch.Generator().manual_seed(0))
    for name, part in zip(("train", "val"), parts, strict=True):
        images, labels = whole[part.indices]
        assert torch.equal(data.splits[name][0], images)
        assert torch.equal(data.splits[name][1], labels)


def test_batches_are_grey_and_come_back_as_they_were(root: Path) -> None:
    data = read(root, val_size=0, augmentation=Augmentation(crop=2, flip="random", cutout=4))
    data.setup("fit")
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (200, 1, 28, 28)
    stored = data.splits["train"][0]
    assert torch.equal(data.denormalize(data.training_inputs(200)[0]), stored)


def test_training_never_reads_the_test_files(root: Path) -> None:
    for path in (root / "MNIST" / "raw").glob("t10k*"):
        path.unlink()
    data = read(root, val_size=50)
    data.setup("fit")
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte does not exist; .*download=true"):
        data.setup("test")


def test_the_test_images_are_predicted_with_ids_from_one(root: Path) -> None:
    images, ids = read(root).read_predict()
    assert ids.tolist() == list(range(1, 41))
    assert torch.equal(images, read(root).read_test()[0])


@pytest.mark.parametrize("name", ["mean", "std"])
def test_statistics_are_given_for_each_channel(name: str) -> None:
    values = (0.1, 0.2, 0.3)
    with pytest.raises(UserError, match=rf"{name} must have one value for each of the 1 channels"):
        MNISTDataModule(**{name: values})  # type: ignore[arg-type]


# --- verification ---------------------------------------------------------------------------------


def test_another_file_is_refused_unless_it_is_asked_for(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = root / "MNIST" / "raw"
    sha256 = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    monkeypatch.setattr(mnist, "SHA256", sha256)
    data = read(root, verify=True)
    data.read_train()
    before = data.digest

    path = folder / "train-labels-idx1-ubyte"
    labels = labels_of(200)
    labels[0] = (labels[0] + 1) % 10
    path.write_bytes(idx(labels))
    with pytest.raises(UserError, match=r"is not the official file: expected SHA-256") as refusal:
        data.read_train()
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    words = (str(path), sha256[path.name], found, "--data.verify=false")
    assert all(word in str(refusal.value) for word in words)
    data = read(root)
    assert data.read_train()[1][0] == labels[0]
    assert data.digest != before


# --- files that are not as they should be ---------------------------------------------------------

IMAGES, LABELS = idx(draw_grey(labels_of(40))), idx(labels_of(40))


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        *(("images-idx3", part) for part in (b"", b"<html>", IMAGES[:10], IMAGES[:-1], LABELS)),
        *(("images-idx3", part) for part in (IMAGES + b"x", idx(np.zeros((40, 8, 8))))),
        *(("images-idx3", idx(np.zeros((0, 28, 28)))), ("labels-idx1", idx(np.zeros(0)))),
        *(("labels-idx1", part) for part in (IMAGES, idx(np.arange(10)), idx(np.arange(40)))),
    ],
)
def test_another_content_is_told_in_one_sentence(root: Path, kind: str, content: bytes) -> None:
    """Not of the format, too short or long, of another shape, empty, or no digits."""
    (root / "MNIST" / "raw" / f"t10k-{kind}-ubyte").write_bytes(content)
    with pytest.raises(UserError, match=r"t10k.*: expected .*, found"):
        read(root).read_test()


@pytest.mark.parametrize("damage", ["truncated", "no gzip"])
def test_a_broken_archive_is_told_in_one_sentence(root: Path, damage: str) -> None:
    path = root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    path.unlink()
    content = gzip.compress(LABELS)[:-9] if damage == "truncated" else b"<html>"
    path.with_name(f"{path.name}.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"ubyte.gz cannot be read \(.*\); delete it and run"):
        read(root).read_test()


# --- download -------------------------------------------------------------------------------------


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Leave the test's output alone."""


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The miniature set as the archives that a mirror hands out."""
    folder = write_mnist(tmp_path / "source")
    resources = []
    for path in list(folder.iterdir()):
        archive = path.with_name(f"{path.name}.gz")
        archive.write_bytes(gzip.compress(path.read_bytes()))
        resources.append((archive.name, hashlib.md5(archive.read_bytes()).hexdigest()))
    handler = partial(Silent, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
        address = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [address])
        yield folder
        server.shutdown()


def test_the_set_is_downloaded_only_when_asked_for(mirror: Path, tmp_path: Path) -> None:
    home = tmp_path / "data"
    read(home).prepare_data()
    assert not home.exists()
    data = read(home, download=True)
    data.prepare_data()
    assert [path.name for path in (home / "MNIST").iterdir()] == ["raw"]
    assert len(data.read_train()[0]) == 200
    (data.folder / "t10k-labels-idx1-ubyte").unlink()
    data.prepare_data()  # one file is missing: it comes back
    assert len(data.read_test()[0]) == 40
    for archive in mirror.iterdir():
        archive.unlink()
    data.prepare_data()  # it is there: nothing is downloaded again


@pytest.mark.parametrize("damage", ["wrong MD5", "unreachable"])
def test_a_failed_download_leaves_nothing(
    mirror: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if damage == "unreachable":  # a port on which nobody listens
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:1/"])
    else:
        (mirror / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"other"))
    data = read(tmp_path / "data", download=True)
    with pytest.raises(UserError, match=r"MNIST could not be downloaded from http://127.*run the"):
        data.prepare_data()
    assert list(data.folder.parent.rglob("*")) == [data.folder]


# --- scikit-learn's digits ------------------------------------------------------------------------


def test_digits_are_the_same_bytes_on_every_machine() -> None:
    data = DigitsDataModule()
    digests = []
    for images, targets in (data.read_train(), data.read_test()):
        assert images.shape == (len(targets), *data.image_size)
        digests += [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in (images, targets)]
    assert digests == GOLDEN
    assert data.digest == GOLDEN[2]


def test_digits_lie_in_the_middle_as_those_of_mnist_do() -> None:
    images, _ = DigitsDataModule().read_train()
    ink = images[..., 0].bool().any(0)
    assert not ink[:3].any()
    assert not ink[-3:].any()
    assert not ink[:, :3].any()
    assert not ink[:, -3:].any()
    assert images.max() == 255
    weight = images[..., 0].double().mean(0)
    assert abs(weight.sum(1) @ torch.arange(28.0).double() / weight.sum() - 13.5) < 0.5


def test_digits_have_splits_of_their_own_and_ids_from_one() -> None:
    data = DigitsDataModule()
    for stage in ("fit", "test", "predict"):
        data.setup(stage)
    sizes = {name: len(part[-1]) for name, part in data.splits.items()}
    assert sizes == {"train": 1000, "val": 297, "test": 500, "predict": 500}
    names = {k: {i.numpy().tobytes() for i in part[0]} for k, part in data.splits.items()}
    assert not names["train"] & names["val"]
    assert not (names["train"] | names["val"]) & names["test"]
    assert data.splits["predict"][1].tolist() == list(range(1, 501))
    assert torch.equal(data.splits["predict"][0], data.splits["test"][0])


@pytest.mark.parametrize("of", [DigitsDataModule, MNISTDataModule])
def test_digits_have_names(of: type[DigitsDataModule] | type[MNISTDataModule]) -> None:
    assert of().num_classes == 10
    assert (of.class_names[0], of.class_names[9]) == ("zero", "nine")


def test_mean_and_std_are_those_of_the_training_digits() -> None:
    data = DigitsDataModule()
    pixels = data.read_train()[0].double() / 255
    assert data.mean.item() == pytest.approx(pixels.mean().item(), abs=6e-5)
    assert data.std.item() == pytest.approx(pixels.std().item(), abs=6e-5)


# --- the real set ---------------------------------------------------------------------------------


@pytest.mark.real_data
def test_the_real_files_are_the_published_ones_and_split_as_the_course_does(
    real_data: Path,
) -> None:
    data = MNISTDataModule(data_dir=str(real_data))
    images, labels = data.read_train()  # raises if any digest differed
    pixels = images.double() / 255
    assert data.mean.item() == pytest.approx(pixels.mean().item(), abs=6e-5)
    assert data.std.item() == pytest.approx(pixels.std().item(), abs=6e-5)
    (train,), (val,) = data.split((torch.arange(60_000),))
    assert train[:5].tolist() == [36044, 10678, 57327, 55074, 21567]
    assert val[:5].tolist() == [59375, 23261, 23868, 32266, 29784]
    counts = [1057, 1099, 949, 992, 989, 930, 985, 1084, 955, 960]
    assert labels[val].bincount().tolist() == counts
    assert data.read_test()[1].bincount().sum() == 10_000
