"""The Kaggle competition's PNG folders: unpacked safely, decoded once, numbered right."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import py7zr
import pytest
import torch
from fake_data import draw, labels_of, write_csv, write_kaggle_cifar10
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from core import kaggle_client
from core.errors import UserError
from datamodules import KaggleCIFAR10DataModule
from datamodules.image_files import decode_images, png_folder
from datamodules.image_files.decode_images import decode
from datamodules.image_files.image_cache import Decoded
from datamodules.image_files.png_folder import png_ids, read_images


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_kaggle_cifar10(tmp_path)
    return tmp_path


@pytest.fixture
def folder(root: Path) -> Path:
    return root / "kaggle-cifar10"


def data(root: Path) -> KaggleCIFAR10DataModule:
    return KaggleCIFAR10DataModule(data_dir=str(root), val_size=10)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- what is read ---------------------------------------------------------------------------------


def test_training_images_meet_their_labels(root: Path, folder: Path) -> None:
    """Ids are numbers: as strings, 10.png would come before 2.png and every label be wrong."""
    labels = labels_of(60)
    rows = (folder / "trainLabels.csv").read_text().splitlines()
    (folder / "trainLabels.csv").write_text("\n".join([rows[0], *reversed(rows[1:])]))
    images, classes = data(root).read_train()
    assert classes.tolist() == labels.tolist()
    assert np.array_equal(images, draw(labels))


def test_test_images_come_in_the_order_of_their_numbers(root: Path) -> None:
    datamodule = data(root)
    images, ids = datamodule.read_predict()
    assert ids.tolist() == list(range(1, 31))
    assert np.array_equal(images, draw(labels_of(30, 1), 1))


def test_the_submission_has_the_sample_files_rows(root: Path, tmp_path: Path) -> None:
    datamodule = data(root)
    _, ids = datamodule.read_predict()
    datamodule.submission().write(tmp_path / "out.csv", ids.numpy(), ids.numpy() % 10)
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[:4] == ["id,label", "1,automobile", "2,bird", "3,cat"]
    assert len(lines) == 31


def test_each_stage_touches_only_its_own_folder(root: Path, folder: Path) -> None:
    datamodule = data(root)
    datamodule.prepare_data()
    assert "test.npy" not in files(folder)
    datamodule.trainer = SimpleNamespace(predicting=True)  # type: ignore[assignment]
    shutil.rmtree(folder / "train")
    datamodule.prepare_data()
    assert "test.npy" in files(folder)


def test_there_is_no_labelled_test_set(root: Path) -> None:
    with pytest.raises(UserError, match="has no labelled test set"):
        data(root).setup("test")


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA"])
def test_grey_palette_and_transparent_images_become_rgb(folder: Path, mode: str) -> None:
    path = folder / "test" / "7.png"
    image = Image.open(path).convert(mode)
    image.save(path)
    images, _ = read_images(folder / "test", png_ids(folder / "test"), (32, 32))
    assert np.array_equal(images[6], np.asarray(image.convert("RGB")))


def test_the_digest_is_that_of_the_pixels_and_the_labels(root: Path, folder: Path) -> None:
    def digest() -> str:
        datamodule = data(root)
        datamodule.read_train()
        return datamodule.digest

    before = digest()
    assert digest() == before  # from the cache
    text = (folder / "trainLabels.csv").read_text()
    (folder / "trainLabels.csv").write_text(text.replace("frog", "deer"))
    assert digest() != before


# --- the cache ------------------------------------------------------------------------------------


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The caches that were made, one entry each time."""
    done: list[Path] = []
    make_cache = png_folder.make_cache

    def count(path: Path, *arguments: Any) -> Decoded:
        done.append(path)
        return make_cache(path, *arguments)

    monkeypatch.setattr(png_folder, "make_cache", count)
    return done


def test_images_are_decoded_once_and_then_mapped(root: Path, decodings: list[Path]) -> None:
    first, _ = data(root).read_predict()
    second, _ = data(root).read_predict()
    assert len(decodings) == 1
    assert torch.equal(first, second)
    second.zero_()  # the images in memory are one's own
    third, _ = data(root).read_predict()
    assert torch.equal(first, third)


def add(folder: Path) -> None:
    shutil.copy(folder / "test" / "3.png", folder / "test" / "31.png")
    write_csv(folder / "sampleSubmission.csv", [(i, "cat") for i in range(1, 32)])


def remove(folder: Path) -> None:
    (folder / "test" / "30.png").unlink()
    write_csv(folder / "sampleSubmission.csv", [(i, "cat") for i in range(1, 30)])


def exchange(folder: Path) -> None:
    """Changes neither the names nor the time of a file that is asked, but the folder's own."""
    (folder / "test" / "5.png").rename(folder / "test" / "other")
    (folder / "test" / "6.png").rename(folder / "test" / "5.png")
    (folder / "test" / "other").rename(folder / "test" / "6.png")


def copy_over(folder: Path) -> None:
    """Overwrites every image in place: the names and the folder's own time stay."""
    before = os.stat(folder / "test")
    time.sleep(0.02)  # file systems count time in steps
    for path in (folder / "test").iterdir():
        with path.open("r+b") as file:
            Image.new("RGB", (32, 32)).save(file, "PNG")
    assert os.stat(folder / "test").st_mtime_ns == before.st_mtime_ns


def truncate(folder: Path) -> None:
    whole = (folder / "test.npy").read_bytes()
    (folder / "test.npy").write_bytes(whole[:-1])


def empty(folder: Path) -> None:
    (folder / "test.npy").write_bytes(b"")


def another_shape(folder: Path) -> None:
    np.save(folder / "test.npy", np.zeros((29, 32, 32, 3), np.uint8))


def another_dtype(folder: Path) -> None:
    np.save(folder / "test.npy", np.zeros((30, 32, 32, 3), np.int8))


def no_pixels(folder: Path) -> None:
    (folder / "test.npy").unlink()


def no_record(folder: Path) -> None:
    (folder / "test.json").unlink()


def broken_record(folder: Path) -> None:
    (folder / "test.json").write_text("{")


def strange_record(folder: Path) -> None:
    (folder / "test.json").write_text("[]")


def record_without_digest(folder: Path) -> None:
    record = json.loads((folder / "test.json").read_text())
    del record["sha256"]
    (folder / "test.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "change",
    [
        add, remove, exchange, copy_over,
        truncate, empty, another_shape, another_dtype, no_pixels,
        no_record, broken_record, strange_record, record_without_digest,
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_a_stale_or_damaged_cache_is_made_again(
    root: Path,
    folder: Path,
    decodings: list[Path],
    change: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(png_folder, "PROBES", 1)  # the first file alone is asked for its time
    data(root).read_predict()
    change(folder)
    images, ids = data(root).read_predict()
    assert len(decodings) == 2
    expected = [np.asarray(Image.open(folder / "test" / f"{i}.png")) for i in ids.tolist()]
    assert np.array_equal(images, np.stack(expected))
    data(root).read_predict()
    assert len(decodings) == 2


def test_more_images_than_one_process_decodes(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(png_folder, "CHUNK", 7)
    images, _ = data(root).read_predict()
    assert np.array_equal(images, draw(labels_of(30, 1), 1))


# --- images that are not as they should be --------------------------------------------------------


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def larger(path: Path) -> None:
    Image.new("RGB", (33, 32)).save(path)


def sixteen_bit(path: Path) -> None:
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(path)


def not_png(path: Path) -> None:
    Image.new("RGB", (32, 32)).save(path, "JPEG")


def bomb(path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(path)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (corrupt, r"7.png is not a whole PNG image \("),
        (lambda path: path.write_bytes(b""), r"7.png is not a whole PNG image \("),
        (not_png, r"7.png is not a whole PNG image \("),
        (bomb, r"7.png is not a whole PNG image \("),
        (larger, r"7.png: expected 32 x 32 pixels of 8 bits, found 32 x 33 in mode RGB"),
        (sixteen_bit, r"7.png: expected 32 x 32 pixels of 8 bits, found 32 x 32 in mode I;16"),
    ],
    ids=["corrupt", "empty", "not png", "bomb", "larger", "16 bit"],
)
def test_a_bad_image_is_named_and_nothing_is_left(
    root: Path, folder: Path, damage: Callable[[Path], None], complaint: str
) -> None:
    before = files(folder)
    damage(folder / "test" / "7.png")
    with pytest.raises(UserError, match=complaint + r".*; unpack or download .*test again"):
        data(root).read_predict()
    assert files(folder) == before


def test_a_failed_decoding_keeps_the_cache_that_was_there(root: Path, folder: Path) -> None:
    data(root).read_predict()
    before = (folder / "test.npy").read_bytes()
    add(folder)
    corrupt(folder / "test" / "31.png")
    with pytest.raises(UserError, match=r"31.png is not a whole PNG image"):
        data(root).read_predict()
    assert (folder / "test.npy").read_bytes() == before


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=8),
    length=st.integers(0, 3200),
)
def test_no_damage_ends_the_decoder(
    folder: Path, changes: list[tuple[int, int]], length: int
) -> None:
    content = bytearray((folder / "test" / "1.png").read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    path = folder / "damaged.png"
    path.write_bytes(content[:length])
    with suppress(ValueError):  # anything else would come through
        assert len(decode(path, (32, 32))) == 3072


def test_a_decoder_that_fails_for_another_reason_is_not_taken_for_a_bad_image(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_images, "__file__", str(folder / "no_such_program.py"))
    with pytest.raises(subprocess.CalledProcessError):
        read_images(folder / "test", png_ids(folder / "test"), (32, 32))


# --- folders and tables that do not fit -----------------------------------------------------------


def test_hidden_files_and_other_kinds_are_left_alone(root: Path, folder: Path) -> None:
    for name in ("._1.png", ".DS_Store", "Thumbs.db"):
        (folder / "test" / name).touch()
    assert len(data(root).read_predict()[0]) == 30


@pytest.mark.parametrize("name", ["cat.png", "01.png", "-1.png", "1 copy.png", "\u0661.png"])
def test_a_name_that_is_no_id_is_refused(root: Path, folder: Path, name: str) -> None:
    shutil.copy(folder / "test" / "1.png", folder / "test" / name)
    with pytest.raises(UserError, match=rf"{name} is not named <id>.png; move it away"):
        data(root).read_predict()


def test_a_link_that_leads_nowhere_is_told(root: Path, folder: Path) -> None:
    (folder / "test" / "1.png").unlink()
    (folder / "test" / "1.png").symlink_to("gone.png")
    with pytest.raises(UserError, match=r"1.png cannot be read \(No such file"):
        data(root).read_predict()


def test_an_empty_folder_is_refused(root: Path, folder: Path) -> None:
    shutil.rmtree(folder / "test")
    (folder / "test").mkdir()
    with pytest.raises(UserError, match="holds no PNG files; delete it and run the same command"):
        data(root).read_predict()


def test_the_first_missing_image_is_named(root: Path, folder: Path) -> None:
    for i in (9, 12):
        (folder / "test" / f"{i}.png").unlink()
    complaint = r"test/9.png does not exist, though sampleSubmission.csv lists it; unpack or downlo"
    with pytest.raises(UserError, match=complaint):
        data(root).read_predict()
    assert "test.npy" not in files(folder)


def test_an_image_without_a_row_is_named(root: Path, folder: Path) -> None:
    shutil.copy(folder / "train" / "1.png", folder / "train" / "61.png")
    with pytest.raises(UserError, match=r"trainLabels.csv has no row for .*61.png; download it ag"):
        data(root).read_train()


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("id,label", "image,class", r"the columns must be id,label, got image,class"),
        ("id,label\n", "id\n", r"the header must name two columns, got 'id'"),
        ("\n2,", "\n3,", r"the id 3 comes more than once"),
        ("frog", "toad", r"the label 'toad' of id \d+ is not one of airplane, automobile, "),
    ],
)
def test_a_wrong_table_is_refused_before_anything_is_decoded(
    root: Path, folder: Path, old: str, new: str, complaint: str
) -> None:
    path = folder / "trainLabels.csv"
    path.write_text(path.read_text().replace(old, new))
    before = files(folder)
    with pytest.raises(UserError, match=rf"trainLabels.csv.*{complaint}"):
        data(root).read_train()
    assert files(folder) == before


@pytest.mark.parametrize("name", ["train", "trainLabels.csv"])
def test_a_missing_part_names_the_command(root: Path, folder: Path, name: str) -> None:
    (folder / name).rename(folder / "away")
    command = rf"kaggle-cifar10/{name} does not exist; run `kaggle competitions download -c"
    with pytest.raises(UserError, match=command):
        data(root).read_train()


# --- archives and download ------------------------------------------------------------------------


def pack(folder: Path, split: str) -> Path:
    """Puts a folder into the archive in which Kaggle hands it out."""
    archive = folder / f"{split}.7z"
    with py7zr.SevenZipFile(archive, "w") as bundle:
        bundle.writeall(folder / split, split)
    shutil.rmtree(folder / split)
    return archive


def test_archives_are_unpacked(root: Path, folder: Path) -> None:
    pack(folder, "test")
    images, _ = data(root).read_predict()
    assert np.array_equal(images, draw(labels_of(30, 1), 1))
    assert {"test", "test.7z"} < files(folder)
    assert not any(name.startswith(".") for name in files(folder))


def climbing(bundle: py7zr.SevenZipFile) -> None:
    bundle.writestr(b"evil", "member")
    bundle.header.files_info.files[-1]["filename"] = "../../evil.png"


def absolute(bundle: py7zr.SevenZipFile) -> None:
    bundle.writestr(b"evil", "member")
    bundle.header.files_info.files[-1]["filename"] = "/tmp/evil.png"


def another_folder(bundle: py7zr.SevenZipFile) -> None:
    bundle.writestr(b"evil", "train/1.png")


def another_kind(bundle: py7zr.SevenZipFile) -> None:
    bundle.writestr(b"evil", "test/evil.py")


@pytest.mark.parametrize("member", [climbing, absolute, another_folder, another_kind])
def test_an_archive_with_any_other_member_is_refused(
    root: Path, folder: Path, member: Callable[[py7zr.SevenZipFile], None]
) -> None:
    archive = pack(folder, "test")
    with py7zr.SevenZipFile(archive, "a") as bundle:
        member(bundle)
    before = files(folder), files(root)
    with pytest.raises(UserError, match=r"test.7z holds .*, which is no test/<id>.png; nothing"):
        data(root).read_predict()
    assert (files(folder), files(root)) == before


def test_a_link_in_an_archive_is_refused(root: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "test" / "31.png").symlink_to(folder / "test" / "1.png")
    pack(folder, "test")
    with pytest.raises(UserError, match=r"holds 'test/31.png', which is no"):
        data(root).read_predict()


@pytest.mark.parametrize("cut", [0, 10, 0.5, -20])
def test_a_broken_archive_leaves_nothing(root: Path, folder: Path, cut: float) -> None:
    archive = pack(folder, "test")
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(cut * len(whole)) if 0 < cut < 1 else int(cut)])
    before = files(folder)
    with pytest.raises(UserError, match=r"test.7z could not be unpacked \(.*; free space or"):
        data(root).read_predict()
    assert files(folder) == before


def test_the_folder_is_downloaded_where_somebody_is_logged_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Path]] = []

    def download(competition: str, folder: Path) -> None:
        asked.append((competition, folder))
        write_kaggle_cifar10(folder.parent)

    monkeypatch.setattr(kaggle_client, "has_credentials", lambda: True)
    monkeypatch.setattr(kaggle_client, "download_competition", download)
    datamodule = data(tmp_path / "data")
    datamodule.prepare_data()
    datamodule.prepare_data()
    assert asked == [("cifar-10", tmp_path / "data" / "kaggle-cifar10")]


def test_without_credentials_the_command_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kaggle_client, "has_credentials", lambda: False)
    with pytest.raises(UserError, match=r"does not exist; run `kaggle competitions download"):
        data(tmp_path / "data").prepare_data()
    assert files(tmp_path) == set()


# --- the real set ---------------------------------------------------------------------------------


@pytest.mark.real_data
def test_the_real_test_images_are_mapped_much_faster_than_decoded(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = real_data / "kaggle-cifar10"
    folder = tmp_path / "kaggle-cifar10"
    folder.mkdir()
    for name in ("test", "sampleSubmission.csv"):
        (folder / name).symlink_to(source / name)
    datamodule = KaggleCIFAR10DataModule(data_dir=str(tmp_path))

    def seconds() -> float:
        start = time.perf_counter()
        images, ids = datamodule.read_predict()
        assert images.shape == (len(ids), 32, 32, 3)
        return time.perf_counter() - start

    first, second = seconds(), min(seconds() for _ in range(3))
    with capsys.disabled():
        print(f"\ndecoded in {first:.2f} s, mapped in {second:.4f} s: {first / second:.0f} times")
    images, ids = datamodule.read_predict()
    for i in (1, 2, 10, len(ids)):
        assert np.array_equal(images[i - 1], np.asarray(Image.open(source / "test" / f"{i}.png")))


@pytest.mark.real_data
def test_the_real_training_images_are_those_of_cifar10(real_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kaggle-cifar10"
    folder.mkdir()
    for name in ("train", "trainLabels.csv"):
        (folder / name).symlink_to(real_data / "kaggle-cifar10" / name)
    images, classes = KaggleCIFAR10DataModule(data_dir=str(tmp_path)).read_train()
    assert images.shape == (50_000, 32, 32, 3)
    assert classes.bincount().tolist() == [5000] * 10
