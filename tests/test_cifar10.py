"""The official CIFAR-10 batches: read right, read safely, and known to be the official ones."""

import codecs
import hashlib
import io
import pickle
import tarfile
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
from fake_data import CLASSES, draw, labels_of, write_batch, write_cifar10
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from core.errors import UserError
from datamodules import CIFAR10DataModule
from datamodules.base import BaseDataModule
from datamodules.image_files.safe_pickle import load_arrays
from datamodules.images import cifar10


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_cifar10(tmp_path)
    return tmp_path


def read(root: Path, **options: Any) -> CIFAR10DataModule:
    return CIFAR10DataModule(data_dir=str(root), **{"verify": False, **options})


def test_training_images_and_labels_are_those_written(root: Path) -> None:
    images, labels = read(root).read_train()
    assert images.shape == (200, 32, 32, 3)
    assert images.dtype == torch.uint8
    assert images.is_contiguous()
    expected = [labels_of(40, seed) for seed in range(5)]
    assert labels.tolist() == np.concatenate(expected).tolist()
    for seed, classes in enumerate(expected):
        assert np.array_equal(images[40 * seed : 40 * (seed + 1)], draw(classes, seed))


def test_class_names_are_in_the_official_order() -> None:
    assert list(CIFAR10DataModule.class_names) == CLASSES
    assert CIFAR10DataModule().num_classes == 10


def test_training_never_reads_the_test_batch(root: Path) -> None:
    (root / "cifar-10-batches-py" / "test_batch").unlink()
    datamodule = read(root, val_size=50)
    datamodule.setup("fit")
    assert {name: len(part[0]) for name, part in datamodule.splits.items()} == {
        "train": 150,
        "val": 50,
    }
    with pytest.raises(UserError, match=r"test_batch cannot be read \(No such file"):
        datamodule.setup("test")


def test_the_validation_images_are_the_same_for_every_seed(root: Path) -> None:
    parts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        datamodule = read(root, val_size=50)
        datamodule.setup("fit")
        parts.append(datamodule.splits["val"][0])
    assert torch.equal(*parts)


def test_the_test_images_are_predicted_with_ids_from_one(root: Path) -> None:
    images, ids = read(root).read_predict()
    assert ids.tolist() == list(range(1, 41))
    assert torch.equal(images, read(root).read_test()[0])


def test_the_digest_tells_one_data_set_from_another(root: Path) -> None:
    def digest() -> str:
        datamodule = read(root)
        datamodule.read_train()
        return datamodule.digest

    before = digest()
    assert len(before) == 64
    assert digest() == before
    labels = labels_of(40)
    write_batch(root / "cifar-10-batches-py" / "data_batch_1", draw(labels, seed=9), labels)
    assert digest() != before


def test_all_options_can_be_given_on_the_command_line(root: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(BaseDataModule, "data")
    arguments = ["--data=CIFAR10DataModule", f"--data.data_dir={root}", "--data.verify=false"]
    config = parser.parse_args(
        [*arguments, "--data.batch_size=7", "--data.augmentation.flip=alternating"]
    )
    datamodule = parser.instantiate(config).data
    assert (datamodule.batch_size, datamodule.verify) == (7, False)
    assert datamodule.augmentation.flip == "alternating"


# --- verification ---------------------------------------------------------------------------------


def binary_sha1(images: np.ndarray, labels: np.ndarray) -> str:
    """SHA-1 of what the official binary version would hold, image by image."""
    digest = hashlib.sha1()
    for image, label in zip(images, labels, strict=True):
        digest.update(bytes([label]))
        for channel in range(3):
            digest.update(image[:, :, channel].tobytes())
    return digest.hexdigest()


@pytest.fixture
def published(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The miniature set as if it were the published one."""
    sha1 = [binary_sha1(draw(labels_of(40, n), n), labels_of(40, n)) for n in range(6)]
    names = [f"data_batch_{n}" for n in range(1, 6)]
    monkeypatch.setattr(cifar10, "TRAIN_SHA1", dict(zip(names, sha1[:5], strict=True)))
    monkeypatch.setattr(cifar10, "TEST_SHA1", {"test_batch": sha1[5]})
    return root


def test_published_batches_pass_without_a_word(published: Path) -> None:
    datamodule = read(published, verify=True)
    assert len(datamodule.read_train()[0]) == 200
    assert len(datamodule.read_test()[0]) == 40


def change_one_pixel(path: Path, seed: int) -> str:
    """Changes a pixel and returns the batch's new SHA-1."""
    labels = labels_of(40, seed)
    images = draw(labels, seed)
    images[7, 3, 2, 1] ^= 1
    write_batch(path, images, labels)
    return binary_sha1(images, labels)


def test_one_changed_training_pixel_is_refused(published: Path) -> None:
    path = published / "cifar-10-batches-py" / "data_batch_2"
    found = change_one_pixel(path, seed=1)
    expected = cifar10.TRAIN_SHA1["data_batch_2"]
    with pytest.raises(UserError) as refusal:
        read(published, verify=True).read_train()
    message = str(refusal.value)
    assert all(word in message for word in (str(path), expected, found, "--data.verify=false"))
    assert len(read(published).read_train()[0]) == 200  # not verified


def test_one_changed_test_pixel_is_a_warning(published: Path) -> None:
    path = published / "cifar-10-batches-py" / "test_batch"
    found = change_one_pixel(path, seed=5)
    with pytest.warns(UserWarning, match=f"found {found}; accuracy on it may differ"):
        images, _ = read(published, verify=True).read_test()
    assert len(images) == 40


# --- files that are not as they should be ---------------------------------------------------------


def test_a_missing_folder_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist; .* --data.download=true"):
        read(tmp_path).setup("fit")


def dump(batch: object, protocol: int = 2) -> bytes:
    return pickle.dumps(batch, protocol)


PIXELS = np.zeros((4, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (dump([1, 2]), r"found no 'data' and 'labels'"),
        (dump({"data": PIXELS}), r"found no 'data' and 'labels'"),
        (dump({"data": [0], "labels": [0]}), r"found no 'data' and 'labels'"),
        (dump({"data": PIXELS, "labels": 4}), r"found no 'data' and 'labels'"),
        (
            dump({"data": PIXELS, "labels": [0] * 3}),
            r"expected pixels, uint8 of shape \(N, 3072\), and N labels, "
            r"found uint8 of shape \(4, 3072\) and 3 labels",
        ),
        (dump({"data": PIXELS[:, :100], "labels": [0] * 4}), r"found uint8 of shape \(4, 100\)"),
        (dump({"data": PIXELS.astype(float), "labels": [0] * 4}), r"found float64 of shape"),
        (dump({"data": PIXELS[:0], "labels": []}, 4), r"found uint8 of shape \(0, 3072\)"),
        (dump({"data": PIXELS, "labels": [0, 1, 10, 2]}), r"labels from 0 to 9, found 10"),
        (dump({"data": PIXELS, "labels": [0, -1, 1, 2]}), r"labels from 0 to 9, found -1"),
        (dump({"data": PIXELS, "labels": ["cat"] * 4}), r"labels from 0 to 9, found 'cat'"),
        (b"", r"expected a pickle of arrays .* \(0 bytes in all\)"),
        (b"not a pickle", r"expected a pickle of arrays .* \(12 bytes in all\)"),
    ],
)
def test_another_content_is_told_in_one_sentence(
    root: Path, content: bytes, complaint: str
) -> None:
    path = root / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as refusal:
        read(root).read_test()
    assert str(path) in str(refusal.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_batch_is_a_user_error_wherever_it_ends(root: Path, cut: float) -> None:
    whole = (root / "cifar-10-batches-py" / "test_batch").read_bytes()
    path = root / "truncated"
    path.write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(UserError, match=r"truncated: expected a pickle .* fetch the file again"):
        load_arrays(path)


# --- pickles that want more -----------------------------------------------------------------------


class Runs:
    """Pickles to a call of ``function(*arguments)``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_runs_code_is_refused_before_it_runs(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / "evil"
    path.write_bytes(dump({"data": Runs(exec, f"open({str(trace)!r}, 'w')")}, protocol))
    with pytest.raises(UserError, match=r"evil: .* found a call of \w+\.exec, which could run any"):
        load_arrays(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        dump(Runs(np.load, "other", None, True), 4),  # an array library can load pickles too
        dump(Runs(getattr, "text", "upper"), 4),
        dump(Path("file"), 2),
        b"\x80\x02cnumpy\nndarray.tofile\n.",
        b"(S'echo'\nios\nsystem\n.",  # INST, as of protocol 0
        b"\x80\x02\x82\x01.",  # a code of copyreg's extension registry
        b"\x80\x02X\x01\x00\x00\x00aQ.",  # a persistent id
        dump({"data": np.array([object], dtype=object)}, 2),
        dump(np.zeros(2, [("a", "u1")]), 2),
        dump(Runs(bytes.__add__, b"a", b"b"), 4),
        dump(Runs(codecs.encode, "a codec that is no text encoding", "rot13"), 2),
    ],
)
def test_everything_but_arrays_of_numbers_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "strange"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"strange: expected a pickle of arrays and built-in"):
        load_arrays(path)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_batches_pickled_again_by_python_3_are_read(tmp_path: Path, protocol: int) -> None:
    data = np.arange(6144, dtype=np.uint8).reshape(2, 3072)
    path = tmp_path / "batch"
    path.write_bytes(dump({"data": data, "labels": [3, 8]}, protocol))
    batch = load_arrays(path)
    assert np.array_equal(batch["data"], data)
    assert batch["labels"] == [3, 8]


# --- download -------------------------------------------------------------------------------------


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Leave the test's output alone."""


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The miniature set as the archive that the authors' server hands out."""
    write_cifar10(tmp_path / "source")
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path / "source" / "cifar-10-batches-py", "cifar-10-batches-py")
    handler = partial(Silent, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/{path.name}"
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", md5)
        yield path
        server.shutdown()


def test_the_set_is_downloaded_only_when_asked_for(archive: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    read(data).prepare_data()
    assert not data.exists()
    datamodule = read(data, download=True)
    datamodule.prepare_data()
    assert [path.name for path in data.iterdir()] == ["cifar-10-batches-py"]
    assert len(datamodule.read_train()[0]) == 200
    archive.unlink()
    datamodule.prepare_data()  # it is there: nothing is downloaded again


@pytest.mark.parametrize("damage", ["wrong MD5", "unreachable"])
def test_a_failed_download_leaves_nothing(archive: Path, tmp_path: Path, damage: str) -> None:
    if damage == "unreachable":
        archive.unlink()
    else:
        with tarfile.open(archive, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("other"), io.BytesIO())
    data = tmp_path / "data"
    with pytest.raises(UserError, match=r"could not be downloaded to .* run the same command agai"):
        read(data, download=True).prepare_data()
    assert list(data.iterdir()) == []


# --- the real set ---------------------------------------------------------------------------------


@pytest.mark.real_data
def test_the_real_training_batches_are_the_published_ones(real_data: Path) -> None:
    datamodule = CIFAR10DataModule(data_dir=str(real_data))
    images, labels = datamodule.read_train()  # raises if any digest differed
    assert images.shape == (50_000, 32, 32, 3)
    assert labels.bincount().tolist() == [5000] * 10
    levels = np.arange(256) / 255
    for channel, (mean, std) in enumerate(zip(datamodule.mean, datamodule.std, strict=True)):
        share = np.bincount(images[..., channel].flatten(), minlength=256) / images[..., 0].numel()
        assert share @ levels == pytest.approx(mean.item(), abs=1e-4)
        assert share @ levels**2 - (share @ levels) ** 2 == pytest.approx(std.item() ** 2, abs=1e-4)


@pytest.mark.real_data
def test_the_test_set_with_twenty_lossy_images_is_warned_of(real_data: Path) -> None:
    with pytest.warns(UserWarning, match="test_batch is not the official batch"):
        images, labels = CIFAR10DataModule(data_dir=str(real_data)).read_test()
    assert images.shape == (10_000, 32, 32, 3)
    assert labels.bincount().tolist() == [1000] * 10
