"""Miniature data sets, written in the formats in which the real ones lie on disk.

Images of a class share a colour, so a network learns them within a few steps.
"""

import shutil
import struct
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
COLORS = np.array([
    [0, 90, 255], [255, 0, 0], [0, 200, 0], [255, 255, 0], [130, 70, 0],
    [255, 0, 255], [0, 80, 40], [255, 140, 0], [0, 255, 255], [110, 110, 110],
])  # fmt: skip


def draw(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Noisy images (N, 32, 32, 3) uint8 in the colours of their classes (N,)."""
    noise = np.random.default_rng(seed).normal(0, 40, (len(labels), 32, 32, 3))
    return (COLORS[labels][:, None, None] + noise).clip(0, 255).astype(np.uint8)


def labels_of(count: int, seed: int = 0) -> np.ndarray:
    """Classes (N,), equally many of each, shuffled."""
    return np.random.default_rng(seed).permutation(np.arange(count) % len(CLASSES))


def python2_pickle(data: np.ndarray, labels: np.ndarray) -> bytes:
    """``{"data": data, "labels": labels}`` in the very opcodes of the official batches.

    Python 2 wrote byte strings (T), which Python 3 cannot write any more, and numpy 1 had its
    arrays made by ``numpy.core``.
    """

    def string(content: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(content)) + content

    dtype = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b")
    array += b"\x87R(K\x01" + struct.pack("<cici", b"J", len(data), b"J", data.shape[1]) + b"\x86"
    array += dtype + b"\x89" + string(data.tobytes()) + b"tb"
    integers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + integers + b"u."


def write_batch(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """One CIFAR-10 batch as its authors pickled it: planes of red, green and blue."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(python2_pickle(images.transpose(0, 3, 1, 2).reshape(-1, 3072), labels))


def write_cifar10(root: Path, batch: int = 40, test: int = 40) -> Path:
    """Five training batches and a test batch; read them with ``verify=False``."""
    folder = root / "cifar-10-batches-py"
    sizes = {**{f"data_batch_{n}": batch for n in range(1, 6)}, "test_batch": test}
    for seed, (name, size) in enumerate(sizes.items()):
        labels = labels_of(size, seed)
        write_batch(folder / name, draw(labels, seed), labels)
    return folder


def draw_grey(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Noisy images (N, 28, 28) uint8, each with a bright bar where its class (N,) says."""
    images = np.random.default_rng(seed).integers(0, 60, (len(labels), 28, 28), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[4:24, 4 + 2 * label : 6 + 2 * label] += 180
    return images


def idx(array: np.ndarray) -> bytes:
    """An array of uint8 in the format of MNIST's files."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write_mnist(root: Path, train: int = 200, test: int = 40) -> Path:
    """The four idx files; read them with ``verify=False``."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for seed, (part, size) in enumerate({"train": train, "t10k": test}.items()):
        labels = labels_of(size, seed)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(draw_grey(labels, seed)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


def write_photos(root: Path, per_class: int = 60) -> Path:
    """Upright and lying JPEG photos of cats and dogs, in a folder for each."""
    folder = root / "photos"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i, image in enumerate(draw(np.full(per_class, CLASSES.index(name)))):
            size = (48, 32) if i % 2 else (32, 40)
            Image.fromarray(image).resize(size).save(folder / name / f"{i}.jpg")
    return folder


def write_names(root: Path, per_language: int = 40) -> Path:
    """A text file of names for each of three languages, which differ in their last letters."""
    folder = root / "names"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for language, end in {"Greek": "poulos", "Italian": "ini", "Polish": "czy\u0144ski"}.items():
        stems = [
            "".join(random.choice(list("abdeglmnorst"), n % 5 + 2)) for n in range(per_language)
        ]
        names = "".join(f"{stem.title()}{end}\n" for stem in stems)
        (folder / f"{language}.txt").write_text(names, encoding="utf-8")
    return folder


BOOKS = [
    "austen-emma", "austen-persuasion", "austen-sense", "bryant-stories", "burgess-busterbrown",
    "carroll-alice", "chesterton-ball", "chesterton-brown", "chesterton-thursday",
    "edgeworth-parents", "melville-moby_dick",
]  # fmt: skip


def write_books(root: Path, sentences: int = 60) -> Path:
    """Books of short sentences, in paragraphs of hard-wrapped lines, each with a heading."""
    folder = root / "gutenberg"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    parts = [
        ["The", "My", "Every", "An"],
        ["old man", "sister", "teacher", "good child"],
        ["always goes", "walked", "has never been", "does not want to go"],
        ["to the house", "with a friend", "into the garden", "through the village"],
        ["because it is late", "in the morning", "and comes back", "every day"],
    ]
    for name in BOOKS:
        lines = [" ".join(random.choice(part) for part in parts) + "." for _ in range(sentences)]
        paragraphs = [textwrap.fill(" ".join(lines[i : i + 5]), 60) for i in range(0, sentences, 5)]
        text = "\n\n".join([f"[{name}]", "CHAPTER I", *paragraphs])
        (folder / f"{name}.txt").write_text(text, encoding="latin-1")
    return folder


def write_csv(path: Path, rows: list[tuple[int, str]], newline: str = "\n") -> None:
    lines = ["id,label", *(f"{i},{label}" for i, label in rows)]
    path.write_text("".join(line + newline for line in lines), newline="")


def write_kaggle_cifar10(root: Path, train: int = 60, test: int = 30) -> Path:
    """PNG folders, ``trainLabels.csv`` and ``sampleSubmission.csv``."""
    folder = root / "kaggle-cifar10"
    for seed, (split, count) in enumerate({"train": train, "test": test}.items()):
        (folder / split).mkdir(parents=True)
        labels = labels_of(count, seed)
        for i, image in enumerate(draw(labels, seed), start=1):
            Image.fromarray(image).save(folder / split / f"{i}.png")
        if split == "train":
            names = [(i, CLASSES[label]) for i, label in enumerate(labels, start=1)]
            write_csv(folder / "trainLabels.csv", names)
    write_csv(folder / "sampleSubmission.csv", [(i, "cat") for i in range(1, test + 1)])
    return folder


def write_ucsb(root: Path, images: int = 20) -> Path:
    """``test.npy`` and a sample file with the CRLF line ends of the course's own."""
    folder = root / "ucsb"
    folder.mkdir(parents=True)
    np.save(folder / "test.npy", draw(labels_of(images)))
    write_csv(folder / "sample_submission.csv", [(i, "0") for i in range(images)], newline="\r\n")
    return folder


def write_digit_recognizer(root: Path, train: int = 100, test: int = 30) -> Path:
    """Tables of pixels, as the competition ``digit-recognizer`` hands them out."""
    folder = root / "digit-recognizer"
    folder.mkdir(parents=True)
    pixels = ",".join(f"pixel{i}" for i in range(784))
    for part, count in {"train": train, "test": test}.items():
        labels = labels_of(count)
        rows = draw_grey(labels).reshape(count, 784)
        rows = np.column_stack([labels, rows]) if part == "train" else rows
        lines = [",".join(map(str, row)) for row in rows]
        header = f"label,{pixels}" if part == "train" else pixels
        (folder / f"{part}.csv").write_text("\n".join([header, *lines, ""]))
    lines = ["ImageId,Label", *(f"{i},0" for i in range(1, test + 1)), ""]
    (folder / "sample_submission.csv").write_text("\r\n".join(lines))
    return folder


def write_dogs_vs_cats(root: Path, per_class: int = 30, test: int = 20) -> Path:
    """Photos with their classes in their names, and a sample file of probabilities."""
    folder = root / "dogs-vs-cats-redux-kernels-edition"
    photos = write_photos(folder, max(per_class, test))
    for part in ("train", "test"):
        (folder / part).mkdir()
    for name in ("cat", "dog"):
        for i in range(per_class):
            (photos / name / f"{i}.jpg").rename(folder / "train" / f"{name}.{i}.jpg")
    for i in range(1, test + 1):
        photo = folder / "train" / f"{('cat', 'dog')[i % 2]}.{i}.jpg"
        (folder / "test" / f"{i}.jpg").write_bytes(photo.read_bytes())
    write_csv(folder / "sample_submission.csv", [(i, "0.5") for i in range(1, test + 1)])
    shutil.rmtree(photos)
    return folder
