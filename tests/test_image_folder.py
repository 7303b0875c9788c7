"""Folders of photos of any kind: decoded as a person sees them, once, and split for good."""

import csv
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import CONFIGS, end_wandb
from fake_data import write_photos
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import random_split

import predict
import submit
import train
from core.errors import UserError
from datamodules import CIFAR10DataModule, ImageFolderDataModule
from datamodules.image_files import image_cache
from datamodules.image_files.decode_images import decode
from datamodules.image_files.image_cache import decode_chunk
from datamodules.image_files.layouts import Part, image_files
from datamodules.image_files.photo_folder import halves, split_off
from datamodules.images.augmentation import Augmentation

pytestmark = pytest.mark.usefixtures("decoders_in_process")

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """20 cats and 20 dogs."""
    return write_photos(tmp_path, per_class=20)


def data(folder: Path, **options: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(data_dir=str(folder), image_size=16, **options)


def files(datamodule: ImageFolderDataModule, part: Part) -> list[str]:
    return datamodule.photos(part).files


def pixels(path: Path, size: int = 8) -> np.ndarray:
    return np.frombuffer(decode(path, (size, size)), np.uint8).reshape(size, size, 3)


# --- what a photo looks like ----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "gif", "bmp", "webp", "jpg", "tif"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_every_format_and_mode_keeps_its_colours(tmp_path: Path, mode: str, suffix: str) -> None:
    colour = RED if mode in ("P", "RGB") else WHITE
    image = Image.new("RGB", (30, 20), colour).convert(mode)
    path = tmp_path / f"photo.{suffix}"
    (image.convert("RGB") if (mode, suffix) == ("P", "jpg") else image).save(path)
    assert np.abs(pixels(path).astype(int) - colour).max() <= 3


def test_print_colours_become_rgb(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    Image.new("CMYK", (30, 20), (0, 255, 255, 0)).save(path)
    assert np.abs(pixels(path).astype(int) - RED).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    """Beneath full transparency a file may hold anything, most often black."""
    path = tmp_path / "photo.png"
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (0, 0, 10, 20))
    (image if mode == "RGBA" else image.convert("LA")).save(path)
    assert (pixels(path) == 255).all()


def test_a_transparent_palette_colour_is_white(tmp_path: Path) -> None:
    path = tmp_path / "photo.gif"
    Image.new("P", (20, 20), 0).save(path, transparency=0)
    assert (pixels(path) == 255).all()


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    """Pillow's own conversion would make everything above 255 white."""
    path = tmp_path / "photo.png"
    Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save(path)
    assert (pixels(path) == 40_000 // 256).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_as_the_camera_was_held(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "photo.jpg"
    upright = Image.new("RGB", (64, 64), BLUE)
    upright.paste(RED, (0, 0, 64, 32))  # red above blue
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for step in undo.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif)
    seen = pixels(path).astype(int)
    assert np.abs(seen[:3] - RED).max() < 20
    assert np.abs(seen[5:] - BLUE).max() < 20


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # as decode_images.main does
def test_damaged_exif_data_do_not_cost_the_photo(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (20, 20), RED).save(path, exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff")
    assert np.abs(pixels(path).astype(int) - RED).max() <= 3


@pytest.mark.parametrize("lying", [True, False])
def test_the_middle_is_cut_out_and_nothing_squashed(tmp_path: Path, lying: bool) -> None:
    path = tmp_path / "photo.png"
    image = Image.new("RGB", (300, 100), BLUE)
    image.paste(RED, (100, 0, 200, 100))
    (image if lying else image.transpose(Image.Transpose.ROTATE_90)).save(path)
    # the scaling looks a little beyond the cut
    assert np.abs(pixels(path).astype(int) - RED).max() <= 20


def test_scaling_averages_all_pixels(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    board = np.indices((256, 256)).sum(0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(path)
    assert np.abs(pixels(path)[1:-1, 1:-1].astype(int) - 127).max() <= 2


def test_of_an_animation_the_first_picture_is_read(tmp_path: Path) -> None:
    path = tmp_path / "photo.gif"
    Image.new("RGB", (9, 9), RED).save(
        path, save_all=True, append_images=[Image.new("RGB", (9, 9), BLUE)]
    )
    assert (pixels(path) == RED).all()


def test_the_content_decides_the_format_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (9, 9), RED).save(path, "PNG")
    assert (pixels(path) == RED).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3000, 2)])
def test_extreme_proportions_are_read(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "photo.png"
    Image.new("RGB", size, RED).save(path)
    assert (pixels(path) == RED).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "bmp", "tif"])
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)
@given(
    changes=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=8),
    length=st.integers(0, 3200),
)
def test_no_damage_ends_the_decoder(
    tmp_path: Path, suffix: str, changes: list[tuple[int, int]], length: int
) -> None:
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"damaged.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole)
    content = bytearray(whole.read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(content[:length])
    with suppress(ValueError):  # anything else would come through
        assert len(decode(path, (8, 8))) == 192


# --- the cache ------------------------------------------------------------------------------------


def test_photos_are_decoded_once_for_all_parts_and_runs(
    photos: Path, decodings: list[Path]
) -> None:
    first = data(photos)
    first.setup("fit")
    first.setup("test")
    second = data(photos)
    second.setup("fit")
    assert decodings == [photos / ".cache" / "photos-16x16.npy"]
    assert torch.equal(first.splits["train"][0], second.splits["train"][0])
    assert first.digest != second.digest  # of the test, and of training and validation


def add(folder: Path) -> None:
    shutil.copy(folder / "cat" / "3.jpg", folder / "cat" / "99.jpg")


def remove(folder: Path) -> None:
    (folder / "cat" / "3.jpg").unlink()


def rename(folder: Path) -> None:
    (folder / "cat" / "3.jpg").rename(folder / "cat" / "99.jpg")


def overwrite(folder: Path) -> None:
    """One file, by as many bytes: only its time and its bytes tell."""
    path = folder / "cat" / "3.jpg"
    before = path.stat()
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes(9))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def test_files_that_were_only_touched_are_not_decoded_again(
    photos: Path, decodings: list[Path]
) -> None:
    data(photos).setup("fit")
    for path in photos.glob("*/*.jpg"):
        path.touch()
    data(photos).setup("fit")
    assert len(decodings) == 1
    record = json.loads((photos / ".cache" / "photos-16x16.json").read_text())
    data(photos).setup("fit")  # the new times are known
    assert json.loads((photos / ".cache" / "photos-16x16.json").read_text()) == record


@pytest.mark.parametrize(
    "change",
    [add, remove, rename, overwrite],
    ids=lambda change: change.__name__,
)
def test_a_stale_cache_is_made_again(
    photos: Path, decodings: list[Path], change: Callable[[Path], None]
) -> None:
    data(photos).setup("fit")
    change(photos)
    data(photos).setup("fit")
    assert len(decodings) == 2
    data(photos).setup("fit")
    assert len(decodings) == 2


def test_each_size_has_its_cache(photos: Path, decodings: list[Path]) -> None:
    for size in (16, 24, 16, 24):
        ImageFolderDataModule(str(photos), image_size=size).setup("fit")
    assert [path.name for path in decodings] == ["photos-16x16.npy", "photos-24x24.npy"]


def test_the_cache_can_be_elsewhere(photos: Path, tmp_path: Path) -> None:
    data(photos, cache_dir=str(tmp_path / "cache")).setup("fit")
    (cache,) = (tmp_path / "cache").glob("*.npy")
    assert re.fullmatch(r"photos-[0-9a-f]{8}-16x16.npy", cache.name)
    assert not (photos / ".cache").exists()


def test_photo_sets_may_share_the_place_of_their_caches(
    photos: Path, tmp_path: Path, decodings: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sets with a ``train`` each overwrote one file, and decoded again at every start."""
    folders = [shutil.copytree(photos, tmp_path / name / "train").parent for name in "ab"]
    (folders[1] / "train" / "cat" / "3.jpg").unlink()  # equal ones share a cache
    for folder in (*folders, *folders):
        data(folder, cache_dir=str(tmp_path / "cache")).setup("fit")
    monkeypatch.chdir(tmp_path)
    data(Path("a"), cache_dir="cache").setup("fit")  # the same folder by another name
    assert len(set(decodings)) == len(decodings) == 2


def test_a_cache_that_cannot_be_written_names_the_remedy(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    complaint = r"photos-\w{8}-16x16.npy could not be written .*elsewhere: --data.cache_dir=FOLDER"
    with pytest.raises(UserError, match=complaint):
        data(photos, cache_dir=str(tmp_path / "file")).setup("fit")


@pytest.mark.slow
@pytest.mark.parametrize(("chunk", "cores"), [(64, 1), (7, 3)])
def test_same_bytes_for_any_number_of_processes(
    photos: Path, chunk: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "cat" / "11.jpg").write_bytes(b"broken")
    (photos / "dog" / "5.jpg").write_bytes(b"")
    monkeypatch.setattr(image_cache, "decode_chunk", decode_chunk)
    monkeypatch.setattr(image_cache, "chunk_size", lambda *_: chunk)
    monkeypatch.setattr(image_cache.os, "cpu_count", lambda: cores)
    with pytest.warns(UserWarning, match="2 of 40 photos"):
        read = data(photos).photos("train")
    names, _ = image_files(photos)
    expected = [pixels(photos / name, 16) for name in names if name not in read_nothing(photos)]
    assert np.array_equal(read.pixels[all_rows(read.pixels)], np.stack(expected))


def read_nothing(folder: Path) -> set[str]:
    return {f.relative_to(folder).as_posix() for f in folder.glob("*/*") if f.stat().st_size < 9}


def all_rows(images: np.ndarray) -> np.ndarray:
    return np.flatnonzero(images.any((1, 2, 3)))


# --- the parts ------------------------------------------------------------------------------------


def test_a_folder_of_classes_is_split_into_three(photos: Path) -> None:
    parts = {part: files(data(photos), part) for part in ("train", "val", "test")}
    assert {part: len(names) for part, names in parts.items()} == {"train": 28, "val": 6, "test": 6}
    assert sorted(chain(*parts.values())) == image_files(photos)[0]
    for names in parts.values():
        assert sum(name.startswith("cat/") for name in names) == len(names) / 2


def test_images_meet_their_classes(photos: Path) -> None:
    datamodule = data(photos)
    datamodule.setup("fit")
    for part in ("train", "val"):
        images, classes = datamodule.splits[part]
        names = files(datamodule, part)
        assert [datamodule.class_names[k] for k in classes] == [n.split("/")[0] for n in names]
        assert np.array_equal(images, np.stack([pixels(photos / name, 16) for name in names]))
    assert "test" not in datamodule.splits


def test_no_seed_and_no_other_size_moves_the_test_photos(photos: Path) -> None:
    before = files(data(photos), "test")
    torch.manual_seed(5)
    assert files(data(photos, val_size=3), "test") == before
    assert files(data(photos, val_size=0), "test") == before


@pytest.mark.parametrize(("size", "count"), [(0.3, 12), (10, 10), (1, 2)])
def test_sizes_are_shares_or_numbers(photos: Path, size: float, count: int) -> None:
    """Of every class there is one at least."""
    assert len(files(data(photos, val_size=size), "val")) == count


def test_rare_classes_are_in_every_part() -> None:
    classes = torch.tensor([0] * 100 + [1] * 3)
    parts = split_off(classes, {"test": 0.15, "val": 0.15})
    assert {part: classes[i].bincount().tolist() for part, i in parts.items()} == {
        "test": [15, 1],
        "val": [15, 1],
        "train": [70, 1],
    }


@pytest.mark.parametrize("count", [2, 7, 1000])
def test_halves_are_those_of_the_course_notebook(count: int) -> None:
    parts = random_split(range(count), [0.5, 0.5], torch.Generator().manual_seed(42))  # type: ignore[arg-type,var-annotated]
    for mine, notebook in zip(halves(count), parts, strict=True):
        assert mine.tolist() == sorted(notebook.indices)


def layout(photos: Path, *parts: str) -> Path:
    """Copies of the photos in ``train`` and so on."""
    root = photos.parent / "split"
    for part in parts:
        shutil.copytree(photos, root / part)
    return root


@pytest.mark.parametrize("name", ["validation", "val", "valid", "Validation"])
def test_a_validation_folder_is_halved(photos: Path, name: str) -> None:
    datamodule = data(layout(photos, "train", name))
    assert len(files(datamodule, "train")) == 40
    val, test = files(datamodule, "val"), files(datamodule, "test")
    assert len(val) == len(test) == 20
    assert sorted(val + test) == image_files(photos)[0]


def test_without_a_test_the_validation_folder_is_whole(photos: Path) -> None:
    datamodule = data(layout(photos, "train", "validation"), test_size=0)
    assert len(files(datamodule, "val")) == 40
    with pytest.raises(UserError, match=r"no photos of .* were kept for the test; test_size is 0"):
        datamodule.setup("test")


def test_all_three_folders_are_taken_as_they_are(photos: Path) -> None:
    datamodule = data(layout(photos, "train", "val", "test"))
    assert [len(files(datamodule, part)) for part in ("train", "val", "test")] == [40, 40, 40]


def test_with_a_test_folder_alone_validation_comes_from_training(photos: Path) -> None:
    datamodule = data(layout(photos, "train", "test"))
    assert [len(files(datamodule, part)) for part in ("train", "val", "test")] == [34, 6, 40]


def test_each_stage_reads_its_own_folders(photos: Path, decodings: list[Path]) -> None:
    root = layout(photos, "train", "val", "test")
    data(root).setup("fit")
    assert [path.name for path in decodings] == ["train-16x16.npy", "val-16x16.npy"]


@pytest.mark.parametrize(("parts", "count"), [(("train", "val"), 60), ((), 34)])
def test_without_validation_its_photos_are_trained_on(
    photos: Path, parts: tuple[str, ...], count: int
) -> None:
    datamodule = data(layout(photos, *parts) if parts else photos, val_size=0)
    datamodule.setup("fit")
    assert len(datamodule.splits["train"][1]) == count
    assert datamodule.val_dataloader is None


def test_a_class_may_be_called_train(photos: Path) -> None:
    (photos / "cat").rename(photos / "train")
    assert data(photos).class_names == ("dog", "train")


# --- layouts as they are downloaded ---------------------------------------------------------------


def as_unzipped(photos: Path) -> None:
    """Dogs-vs-cats: classes in the names, and test photos without."""
    for path in list(photos.glob("*/*.jpg")):
        path.rename(photos.parent / f"{path.parent.name}.{path.name}")
    shutil.rmtree(photos / "dog")
    (photos / "cat").rename(photos / "train")
    for path in photos.parent.glob("*.jpg"):
        path.rename(photos / "train" / path.name)
    (photos / "test1").mkdir()
    shutil.copy(photos / "train" / "cat.1.jpg", photos / "test1" / "1.jpg")


def in_a_table(photos: Path) -> None:
    as_unzipped(photos)
    lines = ["id,breed"]
    for i, path in enumerate(sorted((photos / "train").iterdir())):
        lines.append(f"{i:03x},{path.name[:3]}")
        path.rename(path.with_name(f"{i:03x}.jpg"))
    (photos / "labels.csv").write_text("\n".join(lines))
    (photos / "sample_submission.csv").write_text("id,cat,dog\n000,0.5,0.5\n")


def doubled(photos: Path) -> None:
    for part in ("training_set", "test_set"):
        shutil.copytree(photos, photos.parent / "new" / part / part)
    shutil.rmtree(photos)
    (photos.parent / "new").rename(photos)


def segments(photos: Path) -> None:
    doubled(photos)
    for old, new in {"training_set": "seg_train", "test_set": "seg_test"}.items():
        (photos / old / old).rename(photos / old / new)
        (photos / old).rename(photos / new)
    (photos / "seg_pred").mkdir()


def capitals(photos: Path) -> None:
    for part in ("Training", "Test"):
        shutil.copytree(photos, photos.parent / "new" / part)
    shutil.rmtree(photos)
    (photos.parent / "new").rename(photos)


def doubled_classes(photos: Path) -> None:
    photos.rename(photos.parent / "inner")
    photos.mkdir()
    (photos.parent / "inner").rename(photos / "photos")


@pytest.mark.parametrize(
    ("change", "source", "counts"),
    [
        (as_unzipped, "train: 2 classes by file name", [28, 6, 6]),
        (in_a_table, "train: 2 classes by labels.csv", [28, 6, 6]),
        (doubled, "training_set/training_set: 2 classes by folder", [34, 6, 40]),
        (segments, "seg_train/seg_train: 2 classes by folder", [34, 6, 40]),
        (capitals, "Training: 2 classes by folder", [34, 6, 40]),
        (doubled_classes, "photos/photos: 2 classes by folder", [28, 6, 6]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_known_layouts(
    photos: Path,
    change: Callable[[Path], None],
    source: str,
    counts: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Folders of parts silently became the classes, and names and tables were no classes at all."""
    change(photos)
    datamodule = data(photos)
    datamodule.setup("fit")
    assert datamodule.class_names == ("cat", "dog")
    assert f"{source}: cat 20, dog 20" in capsys.readouterr().err
    assert [len(files(datamodule, part)) for part in ("train", "val", "test")] == counts
    (images, classes), path = datamodule.splits["train"], datamodule.folders["train"]
    shown = np.stack([pixels(path / name, 16) for name in files(datamodule, "train")])
    assert np.array_equal(images, shown)
    # cats are yellow, dogs magenta
    greens = images[..., 1].float().mean((1, 2))
    assert greens[classes == 0].min() > greens[classes == 1].max()


def test_folders_that_are_no_part_are_named(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_unzipped(photos)
    data(photos)
    assert "left out, neither training nor classes: test1/" in capsys.readouterr().err


def two_trainings(photos: Path) -> None:
    layout(photos, "train", "training_set").rename(photos / "sets")
    for name in ("train", "training_set"):
        (photos / "sets" / name).rename(photos / name)


def parts_without_training(photos: Path) -> None:
    layout(photos, "val", "test").rename(photos.parent / "new")
    shutil.rmtree(photos)
    (photos.parent / "new").rename(photos)


def unlabelled_beside_classes(photos: Path) -> None:
    shutil.copytree(photos / "cat", photos / "test")


def parts_of_other_names(photos: Path) -> None:
    layout(photos, "one", "two").rename(photos.parent / "new")
    shutil.rmtree(photos)
    (photos.parent / "new").rename(photos)


def no_labels(photos: Path) -> None:
    capitals(photos)
    for part in ("Training", "Test"):
        for path in list((photos / part).glob("*/*.jpg")):
            path.rename(photos / part / path.name)
        shutil.rmtree(photos / part / "cat")
        shutil.rmtree(photos / part / "dog")


def two_tables(photos: Path) -> None:
    in_a_table(photos)
    shutil.copy(photos / "labels.csv", photos / "train.csv")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (two_trainings, "train and training_set, which may both be the train part; move one away"),
        (parts_without_training, "holds test, val: parts without photos of classes to train on"),
        (
            unlabelled_beside_classes,
            "holds cat, dog, test: parts without photos of classes to tra",
        ),
        (parts_of_other_names, "one holds no photos but cat, dog, as others there do: is one a cl"),
        (no_labels, "holds Test, Training: parts without photos of classes to train on, or cl"),
        (two_tables, r"both .*labels.csv and .*train.csv name the images; choose with --data.labe"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_not_known_is_refused_with_the_choice(
    photos: Path, change: Callable[[Path], None], complaint: str
) -> None:
    change(photos)
    with pytest.raises(UserError, match=complaint):
        data(photos)


def test_the_table_can_be_named(photos: Path, tmp_path: Path) -> None:
    two_tables(photos)
    table = tmp_path / "mine.csv"
    rows = (photos / "labels.csv").read_text().splitlines()
    table.write_text("\n".join(["image,cat,dog", *(f"{r[:3]}.jpg,1,0" for r in rows[1:10])]))
    table.write_text(table.read_text() + "".join(f"\n{r[:3]}.jpg,0,1" for r in rows[10:31]))
    datamodule = data(photos, labels=str(table))
    with pytest.warns(UserWarning, match="or have no class are passed over: 10, the first is 01e"):
        datamodule.setup("fit")
    assert datamodule.labelled("train").labels == 9 * ["cat"] + 21 * ["dog"]


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ("id,label,sex\n1,cat,f\n", "has the columns id, label, sex; keep two, the names of the"),
        ("id,label\n1,cat\n1,dog\n", "the id 1 comes more than once"),
        ("id,label\n1\n", "line 2: expected an id and a label, got '1'"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    photos: Path, tmp_path: Path, table: str, complaint: str
) -> None:
    (tmp_path / "mine.csv").write_text(table)
    with pytest.raises(UserError, match=complaint):
        data(photos, labels=str(tmp_path / "mine.csv"))


# --- files that are no photos, and folders that do not fit ----------------------------------------


def test_a_broken_photo_is_left_out_and_told_of_once(photos: Path) -> None:
    path = photos / "dog" / "7.jpg"
    path.write_bytes(path.read_bytes()[:300])
    (photos / "cat" / "nowhere.jpg").symlink_to(photos / "gone.jpg")
    datamodule = data(photos)
    message = r"2 of 41 photos in .*photos cannot be read and are left out; the first is cat/nowhe"
    with pytest.warns(UserWarning, match=message):
        datamodule.setup("fit")
    datamodule.setup("test")  # a second warning would be an error here
    assert [len(files(datamodule, part)) for part in ("train", "val", "test")] == [27, 6, 6]
    with pytest.warns(UserWarning, match=message):  # so it is when they come from the cache
        data(photos).setup("fit")


@pytest.mark.slow
def test_a_photo_that_would_fill_the_memory_is_left_out(photos: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(photos / "cat" / "0.png")
    with pytest.warns(UserWarning, match=r"cat/0.png: Image size \(400000000 pixels\) exceeds"):
        data(photos).setup("fit")


def test_other_files_are_passed_over_and_hidden_ones_not_mentioned(photos: Path) -> None:
    for name in ("cat/notes.txt", "dog/Thumbs.db", "dog/.DS_Store", "dog/._1.jpg", "labels.csv"):
        (photos / name).touch()
    datamodule = data(photos)
    with pytest.warns(UserWarning, match=r"are passed over: 2, the first is cat/notes.txt"):
        datamodule.setup("fit")
    assert len(datamodule.photos("train").files) == 28


def test_links_are_followed_but_not_in_circles(photos: Path, tmp_path: Path) -> None:
    (photos / "dog").rename(tmp_path / "elsewhere")
    (photos / "dog").symlink_to(tmp_path / "elsewhere")
    (photos / "dog" / "again").symlink_to(tmp_path / "elsewhere")
    datamodule = data(photos)
    assert len(files(datamodule, "train")) == 28


def no_folder(photos: Path) -> None:
    shutil.rmtree(photos)


def no_classes(photos: Path) -> None:
    shutil.rmtree(photos / "cat")
    shutil.rmtree(photos / "dog")


def one_class(photos: Path) -> None:
    shutil.rmtree(photos / "cat")


def empty_class(photos: Path) -> None:
    (photos / "bird").mkdir()


def few_photos(photos: Path) -> None:
    for path in (photos / "cat").glob("1*.jpg"):
        path.unlink()
    for i in range(2, 9):
        (photos / "cat" / f"{i}.jpg").unlink()


def no_whole_photo(photos: Path) -> None:
    for path in (photos / "cat").iterdir():
        path.write_bytes(b"GIF89a")


def other_classes(photos: Path) -> None:
    layout(photos, "train", "val")
    root = photos.parent / "split"
    shutil.rmtree(photos)
    root.rename(photos)
    (photos / "val" / "cat").rename(photos / "val" / "kitten")


def no_classes_in_test(photos: Path) -> None:
    other_classes(photos)
    shutil.rmtree(photos / "val")
    shutil.copytree(photos / "train" / "cat", photos / "val")


@pytest.mark.filterwarnings("ignore:.*cannot be read")
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (no_folder, r"photos is no folder; name the folder of your photos: --data.data_dir=FOLDER"),
        (no_classes, r"photos has no folders and 0 photos.* Put the photos of each class, two at "),
        (one_class, r"photos has only the folder dog. Put the photos of each class"),
        (empty_class, r"photos/bird holds no photos \(.jpg.*\); put some there or move it away"),
        (
            few_photos,
            r"a class has 2 photos only, of which test_size 0.15 and val_size 0.15 leave ",
        ),
        (no_whole_photo, r"none of the photos of the class cat in .*photos can be read; replace"),
        (other_classes, r"val must have photos of each .* cat, dog, but cat is missing there"),
        (no_classes_in_test, r"val has no folders and 20 photos.* predict them: predict.py RUN -"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_folder_that_does_not_fit_is_refused(
    photos: Path, change: Callable[[Path], None], complaint: str
) -> None:
    change(photos)
    with pytest.raises(UserError, match=complaint):
        data(photos).setup("fit")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"test_size": -1}, "test_size .* got -1"),
        ({"val_size": -1}, "val_size .* got -1"),
        (
            {"image_size": 16, "augmentation": Augmentation(crop=16)},
            "crop must be from 0 to 15, got 16",
        ),
        (
            {"image_size": 64, "augmentation": Augmentation(crop=64)},
            "crop must be from 0 to 63, got 64",
        ),
    ],
)
def test_a_setting_that_means_nothing_is_refused(
    photos: Path, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        ImageFolderDataModule(str(photos), **options)


def test_large_photos_take_a_crop_that_small_images_do_not(photos: Path) -> None:
    datamodule = ImageFolderDataModule(
        str(photos), image_size=64, augmentation=Augmentation(crop=63)
    )
    datamodule.setup("fit")
    images, _ = next(iter(datamodule.train_dataloader()))
    assert images.shape[2:] == (64, 64)


# --- predicting -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, whose training photos are gone."""
    home = tmp_path_factory.mktemp("photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        write_photos(home)
        config = f"--config={CONFIGS / 'image_folder.yaml'}"
        small = ["--model.network.widths=[8,16]", "--data.image_size=16", "--data.batch_size=8"]
        fast = ["--trainer.max_epochs=6", "--trainer.accelerator=cpu", "--trainer.logger=false"]
        train.main(["fit", config, "--data.data_dir=photos", "--run=a", *small, *fast])
        end_wandb()
        train.main(["test", "--run=image_folder/a", "--trainer.logger=false"])
        shutil.move("photos", "moved")
        return home / "runs" / "image_folder" / "a"


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "runs/image_folder/a", symlinks=True)
    return Path("runs/image_folder/a")


def rows(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


def test_every_photo_of_a_folder_is_labelled(
    run: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also without the training photos, since a checkpoint knows the classes."""
    source = trained.parents[2] / "moved"
    for name, original in {
        "b.jpg": "cat/1.jpg",
        "a, b.JPG": "dog/2.jpg",
        "2/z.jpg": "cat/3.jpg",
        os.fsdecode(b"\xff.jpg"): "cat/1.jpg",
    }.items():
        path = Path("new", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / original, path)
    Path("new/half.jpg").write_bytes(Path("new/b.jpg").read_bytes()[:400])
    Path("new/notes.txt").touch()
    before = sorted(Path("new").rglob("*"))
    predict.main([str(run), "--images", "new", "--accelerator=cpu"])
    # names that are not text keep their bytes
    text = (run / "predictions.csv").read_text(errors="surrogateescape")
    written = list(csv.reader(text.splitlines()))
    assert written[0] == ["file", "label", "probability"]
    assert [row[:2] for row in written[1:]] == [
        ["2/z.jpg", "cat"], ["a, b.JPG", "dog"], ["b.jpg", "cat"],
        [os.fsdecode(b"\xff.jpg"), "cat"],
    ]  # fmt: skip
    assert all(0.5 <= float(row[2]) <= 1 for row in written[1:])
    printed = capsys.readouterr()
    assert re.search(r"new/half.jpg is left out: .*[Tt]runcated", printed.err)
    assert "new: left out, not named as photos: notes.txt" in printed.err
    assert "submit.py" not in printed.out
    assert sorted(Path("new").rglob("*")) == before
    record = json.loads((run / "predictions.json").read_text())
    assert (record["rows"], record["labels"]) == (4, ["cat", "dog"])
    for what in (run, run / "predictions.csv"):
        said = sentence(capsys, submit.main, str(what), "--dry_run")
        assert "predictions.csv is a table of photos and their labels, which no competition" in said


def test_by_default_the_test_photos_are_labelled(run: Path, trained: Path) -> None:
    moved = trained.parents[2] / "moved"
    predict.main([str(run), f"--data_dir={moved}", "--accelerator=cpu"])
    written = rows(run / "predictions.csv")[1:]
    settings = {"image_size": 16, "data_dir": str(moved)}
    assert [row[0] for row in written] == ImageFolderDataModule(**settings).photos("test").files  # type: ignore[arg-type]
    assert np.mean([row[0].startswith(row[1]) for row in written]) > 0.9


def sentence(capsys: pytest.CaptureFixture[str], main: Callable[..., None], *args: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(list(args))
    return capsys.readouterr().err.splitlines()[-1]


def test_photos_that_are_gone_are_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = sentence(capsys, predict.main, str(run), "--accelerator=cpu")
    assert "photos is no folder" in said
    assert not (run / "predictions.csv").exists()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("gone", "gone is no folder"),
        ("empty", "empty holds no photos"),
        ("broken", "none of the 1 photos in .*broken can be read"),
    ],
)
def test_a_folder_without_photos_to_predict_is_refused(
    photos: Path, tmp_path: Path, name: str, complaint: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").touch()
    with pytest.raises(UserError, match=complaint):
        data(photos, images=str(tmp_path / name)).read_predict()


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_classes(
    run: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = Path("photos")
    shutil.copytree(trained.parents[2] / "moved", photos)
    (photos / "cat").rename(photos / "tiger")
    said = sentence(capsys, train.main, "test", f"--run={run}", "--trainer.logger=false")
    assert "the run was trained on cat, dog, but photos has dog, tiger; train a new run" in said


def test_runs_with_other_classes_are_not_averaged(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["ImageFolderDataModule"]["class_names"].reverse()
    torch.save(checkpoint, "other.ckpt")
    said = sentence(capsys, predict.main, str(run), "other.ckpt", "--images=.", "--output=both.csv")
    assert "different classes have no average: cat, dog and dog, cat" in said


@pytest.fixture
def other(run: Path) -> Callable[..., Path]:
    """The run again, with other settings of the data."""

    def make(**settings: object) -> Path:
        checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
        config = yaml.safe_load(checkpoint["config"])
        config["data"]["init_args"] |= settings
        checkpoint["config"] = yaml.safe_dump(config)
        torch.save(checkpoint, "other.ckpt")
        return Path("other.ckpt")

    return make


@pytest.mark.slow
def test_other_photos_are_not_averaged(
    run: Path, trained: Path, other: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Another ``test_size`` ended in a traceback, other photos in the mean of unlike ones."""
    shutil.copytree(trained.parents[2] / "moved", "photos")
    shutil.copytree("photos/cat", "swapped/dog")
    shutil.copytree("photos/dog", "swapped/cat")
    for change in ({"test_size": 0.3}, {"data_dir": "swapped"}):
        arguments = [str(run), str(other(**change)), "--accelerator=cpu", "--output=both.csv"]
        said = sentence(capsys, predict.main, *arguments)
        assert f"{run} and other.ckpt predict different samples, which have no average" in said
        assert not list(Path().glob("*both*"))
        predict.main([*arguments, "--images=photos/cat"])
        assert len(rows(Path("both.csv"))) == 1 + 60
        for path in Path().glob("both*"):
            path.unlink()


def test_the_recorded_classes_are_in_the_checkpoint(run: Path) -> None:
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["ImageFolderDataModule"] == {"class_names": ["cat", "dog"]}
    assert yaml.safe_load(checkpoint["config"])["data"]["init_args"]["class_names"] is None


# --- the real set ---------------------------------------------------------------------------------


@pytest.mark.real_data
def test_real_cats_are_told_from_dogs(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images, labels = CIFAR10DataModule(data_dir=str(real_data)).read_train()
    for name, label in {"cats": 3, "dogs": 5}.items():
        for number, image in enumerate(images[labels == label][:750].numpy()):
            folder = Path("photos", "train" if number < 500 else "validation", name)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number}.jpg", quality=95)
    config = f"--config={CONFIGS / 'image_folder.yaml'}"
    small = ["--data.image_size=32", "--model.network.widths=[16,32]", "--trainer.max_epochs=8"]
    train.main(["fit", config, "--data.data_dir=photos", "--run=a", *small])
    with Path("runs/image_folder/a/metrics.csv").open(newline="") as file:
        values = [float(r["val/accuracy"]) for r in csv.DictReader(file) if r["val/accuracy"]]
    assert max(values) > 0.58  # chance gives 0.5 with a standard deviation of 0.03


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """One of 420 kB took 1.7 GB."""
    path = tmp_path / "large.png"
    Image.new("1", (9000, 8000)).save(path)
    assert path.stat().st_size < 20_000
    with pytest.raises(ValueError, match="9000 x 8000 pixels are too many"):
        decode(path, (8, 8))
