"""The Kaggle competition's PNG folders: unpacked safely, decoded once, numbered right."""

import json
import os
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import py7zr
import pytest
import torch
from fake_data import draw, labels_of, write_csv, write_kaggle_cifar10
from PIL import Image

from core import kaggle_client
from core.errors import UserError
from datamodules import KaggleCIFAR10DataModule
from datamodules.image_files import decode_images, image_cache
from datamodules.image_files.image_cache import (
    decode_chunk,
    decode_once,
    load_cache,
    read_record,
    write_record,
)

pytestmark = pytest.mark.usefixtures("decoders_in_process")


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
    assert "test-32x32.npy" not in files(folder)
    datamodule.trainer = SimpleNamespace(predicting=True)  # type: ignore[assignment]
    shutil.rmtree(folder / "train")
    datamodule.prepare_data()
    assert "test-32x32.npy" in files(folder)


def test_there_is_no_labelled_test_set(root: Path) -> None:
    with pytest.raises(UserError, match="has no labelled test set"):
        data(root).setup("test")


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA"])
def test_grey_palette_and_transparent_images_become_rgb(
    root: Path, folder: Path, mode: str
) -> None:
    path = folder / "test" / "7.png"
    image = Image.open(path).convert(mode)
    image.save(path)
    images, _ = data(root).read_predict()
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


@pytest.mark.parametrize(
    "change", [add, remove, exchange, copy_over], ids=lambda change: change.__name__
)
def test_a_stale_cache_is_made_again(
    root: Path,
    folder: Path,
    decodings: list[Path],
    change: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(image_cache, "_MANY", 0)
    monkeypatch.setattr(image_cache, "PROBES", 1)  # the first file alone is asked for its time
    data(root).read_predict()
    change(folder)
    images, ids = data(root).read_predict()
    assert len(decodings) == 2
    expected = [np.asarray(Image.open(folder / "test" / f"{i}.png")) for i in ids.tolist()]
    assert np.array_equal(images, np.stack(expected))
    data(root).read_predict()
    assert len(decodings) == 2


RECORD: dict[str, Any] = {"key": "k", "files": "f", "sha256": "s", "unreadable": {}}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", json.dumps(RECORD | {"unreadable": 3}), '{"key": "k", "files": "f"}']
)
def test_a_damaged_record_is_none(tmp_path: Path, text: str) -> None:
    assert read_record(tmp_path / "x.npy") is None
    (tmp_path / "x.json").write_text(text)
    assert read_record(tmp_path / "x.npy") is None
    write_record(tmp_path / "x.npy", RECORD)
    assert read_record(tmp_path / "x.npy") == RECORD


@pytest.mark.parametrize(("images", "dtype"), [(29, np.uint8), (30, np.int8), (30, np.uint8)])
def test_damaged_pixels_are_no_cache(tmp_path: Path, images: int, dtype: type) -> None:
    """Those of another shape or type, of a file cut short, or of none."""
    path, shape = tmp_path / "x.npy", (30, 4, 4, 3)
    assert load_cache(path, shape, RECORD) is None
    np.save(path, np.zeros((images, 4, 4, 3), dtype))
    is_whole = images == 30 and dtype is np.uint8
    assert (load_cache(path, shape, RECORD) is not None) == is_whole
    path.write_bytes(path.read_bytes()[:-1])
    assert load_cache(path, shape, RECORD) is None


def test_more_images_than_one_process_decodes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cache, "decode_chunk", decode_chunk)  # in processes, as users have it
    monkeypatch.setattr(image_cache, "chunk_size", lambda *_: 16)
    images, _ = data(root).read_predict()
    assert np.array_equal(images, draw(labels_of(30, 1), 1))


@pytest.mark.parametrize(
    ("images", "side", "cores", "size"), [(300_000, 32, 16, 2343), (300_000, 32, 2, 3255),
                                          (2000, 64, 2, 125), (9, 32, 16, 64), (99_999, 512, 2, 64)]
)  # fmt: skip
def test_each_core_has_some_chunks_of_a_few_megabytes(
    images: int, side: int, cores: int, size: int
) -> None:
    assert image_cache.chunk_size(images, (side, side), cores) == size


# --- images that are not as they should be --------------------------------------------------------


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def not_image(path: Path) -> None:
    path.write_text("<html>")


@pytest.mark.parametrize(
    "damage", [corrupt, not_image, lambda path: path.write_bytes(b"")],
    ids=["corrupt", "not image", "empty"],
)  # fmt: skip
def test_a_bad_image_is_named_and_nothing_is_left(
    root: Path, folder: Path, damage: Callable[[Path], None]
) -> None:
    before = files(folder)
    damage(folder / "test" / "7.png")
    with pytest.raises(UserError, match=r"7.png cannot be read"):
        data(root).read_predict()
    assert files(folder) == before


def test_a_failed_decoding_keeps_the_cache_that_was_there(root: Path, folder: Path) -> None:
    data(root).read_predict()
    before = (folder / "test-32x32.npy").read_bytes()
    add(folder)
    corrupt(folder / "test" / "31.png")
    with pytest.raises(UserError, match=r"31.png cannot be read"):
        data(root).read_predict()
    assert (folder / "test-32x32.npy").read_bytes() == before


def test_a_decoder_that_fails_for_another_reason_is_not_taken_for_a_bad_image(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_cache, "decode_chunk", decode_chunk)
    monkeypatch.setattr(decode_images, "__file__", str(folder / "no_such_program.py"))
    with pytest.raises(subprocess.CalledProcessError):
        data(root).read_predict()


# --- folders and tables that do not fit -----------------------------------------------------------


def test_hidden_files_and_other_kinds_are_left_alone(root: Path, folder: Path) -> None:
    for name in ("._1.png", ".DS_Store", "Thumbs.db"):
        (folder / "test" / name).touch()
    assert len(data(root).read_predict()[0]) == 30


@pytest.mark.parametrize("name", ["cat.png", "01.png", "-1.png", "1 copy.png", "\u0661.png"])
def test_an_image_without_a_row_is_named(root: Path, folder: Path, name: str) -> None:
    shutil.copy(folder / "test" / "1.png", folder / "test" / name)
    complaint = rf"sampleSubmission.csv has no row for .*{name}; .* or move the image away"
    with pytest.raises(UserError, match=complaint):
        data(root).read_predict()


def test_a_link_that_leads_nowhere_is_told(root: Path, folder: Path) -> None:
    (folder / "test" / "1.png").unlink()
    (folder / "test" / "1.png").symlink_to("gone.png")
    with pytest.raises(UserError, match=r"1.png cannot be read: No such file"):
        data(root).read_predict()


def nested(folder: Path) -> None:
    (folder / "test").rename(folder / "inner")
    (folder / "test").mkdir()
    (folder / "inner").rename(folder / "test" / "test")


def capitals(folder: Path) -> None:
    for path in (folder / "test").iterdir():
        path.rename(path.with_suffix(".PNG"))


def jpegs(folder: Path) -> None:
    for path in list((folder / "test").iterdir()):
        Image.open(path).save(path.with_suffix(".jpeg"), quality=100, subsampling=0)
        path.unlink()


@pytest.mark.parametrize("change", [nested, capitals, jpegs], ids=lambda c: c.__name__)
def test_images_as_people_have_them(
    root: Path, folder: Path, change: Callable[[Path], None]
) -> None:
    """Good images were called no PNG files, with the advice to delete them."""
    change(folder)
    images, ids = data(root).read_predict()
    assert ids.tolist() == list(range(1, 31))
    difference = np.abs(images.numpy().astype(int) - draw(labels_of(30, 1), 1))
    assert difference.mean() < (8 if change is jpegs else 1e-9)


@pytest.mark.parametrize("left", [(), ("a.txt", "b.txt")])
def test_a_folder_without_images_is_refused(
    root: Path, folder: Path, left: tuple[str, ...]
) -> None:
    """Nobody is advised to delete anything."""
    shutil.rmtree(folder / "test")
    (folder / "test").mkdir()
    for name in left:
        (folder / "test" / name).touch()
    found = r"the first of other files is a.txt" if "a.txt" in left else "it is empty"
    with pytest.raises(UserError, match=rf"test holds no images \(.*\): {found}") as error:
        data(root).read_predict()
    assert "delete" not in str(error.value)


def test_two_images_of_one_id_are_refused(root: Path, folder: Path) -> None:
    shutil.copy(folder / "test" / "1.png", folder / "test" / "1.jpg")
    with pytest.raises(UserError, match=r"two images of the id 1, 1.jpg and 1.png; move one"):
        data(root).read_predict()


def test_the_first_missing_image_is_named(root: Path, folder: Path) -> None:
    for i in (9, 12):
        (folder / "test" / f"{i}.png").unlink()
    complaint = r"test has no image of the id 9, which sampleSubmission.csv lists; unpack or downlo"
    with pytest.raises(UserError, match=complaint):
        data(root).read_predict()
    assert "test-32x32.npy" not in files(folder)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("id,label\n", "id\n", r"the header must name two columns, got 'id'"),
        ("\n2,", "\n3,", r"the id 3 comes more than once"),
        ("frog", "toad", r"is not one of airplane, automobile, "),
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


def pack(folder: Path, split: str, end: str = "7z") -> Path:
    """Puts a folder into the archive in which Kaggle hands it out."""
    archive = folder / f"{split}.{end}"
    if end == "zip":
        shutil.make_archive(str(folder / split), "zip", folder, split)
        shutil.rmtree(folder / split)
        return archive
    with py7zr.SevenZipFile(archive, "w") as bundle:
        bundle.writeall(folder / split, split)
    shutil.rmtree(folder / split)
    return archive


@pytest.mark.parametrize("end", ["7z", "zip"])
def test_archives_are_unpacked(root: Path, folder: Path, end: str) -> None:
    pack(folder, "test", end)
    images, _ = data(root).read_predict()
    assert np.array_equal(images, draw(labels_of(30, 1), 1))
    assert {"test", f"test.{end}"} < files(folder)
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


def test_a_cache_of_photos_with_a_broken_one_serves_no_competition(tmp_path: Path) -> None:
    """Its black image would have been trained on, or handed in."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "0.png")
    (folder / "1.png").write_bytes(b"no image")
    source = folder, ["0.png", "1.png"], (4, 4), tmp_path
    assert decode_once(*source).unreadable.keys() == {1}
    with pytest.raises(UserError, match=r"1\.png"):
        decode_once(*source, strict=True)


@pytest.mark.parametrize("target", ["../trainLabels.csv", "1.png"])
def test_a_link_in_an_archive_is_refused(root: Path, folder: Path, target: str) -> None:
    (folder / "test" / "31.png").symlink_to(target)
    pack(folder, "test")
    with pytest.raises(UserError, match=r"test.7z holds the link 'test/31.png'"):
        data(root).read_predict()
    assert "test" not in files(folder)


@pytest.mark.parametrize("name", ["../../evil.png", "/tmp/evil.png", "test/../e.png", "test/a.py"])
def test_a_zip_with_any_other_member_is_refused(root: Path, folder: Path, name: str) -> None:
    with zipfile.ZipFile(pack(folder, "test", "zip"), "a") as bundle:
        bundle.writestr(name, b"evil")
    before = files(folder), files(root)
    with pytest.raises(UserError, match=r"test.zip holds .*, which is no test/<id>.png; nothing"):
        data(root).read_predict()
    assert (files(folder), files(root)) == before


@pytest.mark.parametrize("cut", [0, 10, 0.5, -20])
@pytest.mark.parametrize("end", ["7z", "zip"])
def test_a_broken_archive_leaves_nothing(root: Path, folder: Path, end: str, cut: float) -> None:
    archive = pack(folder, "test", end)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(cut * len(whole)) if 0 < cut < 1 else int(cut)])
    before = files(folder)
    with pytest.raises(UserError, match=r"test.* could not be unpacked to .*; free space or"):
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


# --- read-only inputs, as Kaggle mounts them ------------------------------------------------------


@pytest.fixture
def read_only(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder; that of the competition cannot be written, not even by root."""
    writable = os.access

    def access(path: Any, mode: int) -> bool:
        return folder not in (Path(path), *Path(path).parents) and writable(path, mode)

    monkeypatch.setattr(image_cache.os, "access", access)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    image_cache._say_where.cache_clear()
    return tmp_path / "home"


@pytest.mark.parametrize("end", ["", "7z", "zip"])
def test_a_read_only_folder_is_left_alone(
    folder: Path, read_only: Path, decodings: list[Path], end: str, capsys: pytest.CaptureFixture
) -> None:
    """Unpacking and decoding ended at /kaggle/input, which cannot be written."""
    if end:
        pack(folder, "test", end)
    before = sorted(folder.rglob("*"))
    for _ in range(2):
        images, _ = data(folder).read_predict()  # data_dir is the competition's own folder
        assert np.array_equal(images, draw(labels_of(30, 1), 1))
    assert sorted(folder.rglob("*")) == before
    assert len(decodings) == 1
    assert decodings[0].is_relative_to(read_only / "steadyfit")
    said = capsys.readouterr().err
    assert said.count(f"{folder} is read-only: what is made of it is kept in {read_only}") == 1


@pytest.mark.parametrize("beside", [True, False])
def test_a_cache_made_elsewhere_is_recognised_by_content(
    folder: Path, tmp_path: Path, read_only: Path, decodings: list[Path], beside: bool
) -> None:
    """Copies have other paths and times than the files that were decoded."""
    cache = tmp_path / "cache"
    home = shutil.copytree(folder, tmp_path / "elsewhere" / "cifar")
    KaggleCIFAR10DataModule(str(home), cache_dir=str(cache)).read_predict()
    assert len(decodings) == 1
    time.sleep(0.02)
    for path in (folder / "test").iterdir():
        path.touch()
    if beside:
        for path in cache.iterdir():
            shutil.copy(path, folder)
    options = {} if beside else {"cache_dir": str(cache)}
    images, _ = KaggleCIFAR10DataModule(str(folder), **options).read_predict()
    assert np.array_equal(images, draw(labels_of(30, 1), 1))
    assert len(decodings) == 1
    Image.new("RGB", (32, 32)).save(folder / "test" / "1.png")
    images, _ = KaggleCIFAR10DataModule(str(folder), **options).read_predict()
    assert not images[0].any()
    assert len(decodings) == 2


@pytest.mark.parametrize("name", ["cifar-10", "competitions/cifar-10", "datasets/me/my-cifar"])
def test_any_place_of_the_folder_is_found(root: Path, folder: Path, name: str) -> None:
    place = root / "input" / name
    place.parent.mkdir(parents=True)
    folder.rename(place)
    given = place if "datasets" in name else root / "input"
    assert data(given).folder == place
    assert len(data(given).read_predict()[0]) == 30


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
