"""A sample has one name, a spike says which samples it saw, and a training can leave some out."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONFIGS, end_wandb, fit_quietly
from fake_data import write_mnist
from PIL import Image
from test_resident import Numbers, Recorder
from torch import Tensor

import train
from core.errors import UserError
from datamodules import (
    CIFAR10DataModule,
    DemoDataModule,
    EchoDataModule,
    GrammarDataModule,
    ImageFolderDataModule,
    KaggleCIFAR10DataModule,
    LastNamesDataModule,
    MaskedBooksDataModule,
    MNISTDataModule,
    UCSBCIFAR10DataModule,
)
from datamodules.base import IGNORED, BaseDataModule
from datamodules.exclusion import excluded_ids
from datamodules.loaders.resident import SampleId
from datamodules.sequences.last_names import PAD, SYMBOLS, normalize
from datamodules.text.subwords import words
from lit_models.fixmatch import SemiSupervisedLoader
from steadyfit.watching.records import SpikeRecord, read_records

Make = Callable[..., BaseDataModule]
PARALLEL = [f"She {verb} to the {place} ." for verb in ("go", "walk") for place in "abcdefghi"]


# What a name stands for, read from the files a second time


def raw_images(data: Any) -> Callable[[SampleId], np.ndarray]:
    images = data.read_train()[0].numpy()
    return lambda sample: images[sample]


def numbered_png(data: Any) -> Callable[[SampleId], np.ndarray]:
    return lambda sample: np.asarray(Image.open(data.folder / "train" / f"{sample}.png"))


def name_of(data: Any) -> Callable[[SampleId], str]:
    def find(sample: SampleId) -> str:
        file, line = str(sample).split(":")
        return normalize((data.folder / file).read_text("utf-8").split("\n")[int(line) - 1].strip())

    return find


def sentence_of(data: Any) -> Callable[[SampleId], str]:
    def find(sample: SampleId) -> str:
        file, line, word = str(sample).split(":")
        rows = (
            (data.folder / file).read_text("latin-1").replace("_", "").split("\n")[int(line) - 1 :]
        )
        text = " ".join(" ".join(rows[:30]).split()[int(word) - 1 :])
        return " ".join(text[a:b] for a, b in words(text))

    return find


def line_of(data: Any) -> Callable[[SampleId], str]:
    lines = Path(data.files["train"]).read_text().split("\n")
    return lambda sample: " ".join(lines[int(sample) - 1].split())


# And what a batch holds


def images_in(data: Any, batch: list[Tensor]) -> list[np.ndarray]:
    return list(data.denormalize(batch[0]).numpy())


def names_in(data: Any, batch: list[Tensor]) -> list[str]:
    return ["".join(SYMBOLS[t] for t in row if t != PAD) for row in batch[0]]


def targets_in(data: Any, batch: list[Tensor]) -> list[str]:
    return [data.subwords.decode([int(t) for t in row if t != IGNORED][:-1]) for row in batch[3]]


def sources_in(data: Any, batch: list[Tensor]) -> list[str]:
    return [
        data.subwords.decode(row[: length - 1].tolist())
        for row, length in zip(batch[0], batch[1], strict=True)
    ]


def same(found: Any, expected: Any) -> bool:
    if isinstance(found, str):  # of a sentence, what follows it is not known
        return bool(found) and expected.startswith(found)
    return np.array_equal(found, expected)


@pytest.fixture
def parallel(tmp_path: Path) -> Path:
    (tmp_path / "own.src").write_text("".join(f"{line}\n" for line in PARALLEL))
    (tmp_path / "own.ref0").write_text("".join(f"{line} \n" for line in PARALLEL))
    return tmp_path / "own.src"


BOOKS: dict[str, Any] = {"vocab_size": 300, "epoch_size": 60, "val_size": 5}
SETS: dict[str, tuple[Make, dict[str, Any], Any, Any]] = {
    "cifar10": (CIFAR10DataModule, {"verify": False, "val_size": 30}, raw_images, images_in),
    "ucsb": (UCSBCIFAR10DataModule, {"verify": False, "val_size": 30}, raw_images, images_in),
    "mnist": (MNISTDataModule, {"verify": False, "val_size": 30}, raw_images, images_in),
    "demo": (DemoDataModule, {}, raw_images, images_in),
    "kaggle": (KaggleCIFAR10DataModule, {"val_size": 10}, numbered_png, images_in),
    "fraction": (
        CIFAR10DataModule,
        {"verify": False, "val_size": 30, "train_fraction": 0.3, "epoch_size": 200},
        raw_images,
        images_in,
    ),
    "names": (LastNamesDataModule, {"val_size": 10}, name_of, names_in),
    "balanced": (LastNamesDataModule, {"val_size": 10, "balanced": True}, name_of, names_in),
    "books": (GrammarDataModule, BOOKS, sentence_of, targets_in),
}


def begun(make: Make, folder: Path, **options: Any) -> Any:
    data: Any = make(data_dir=str(folder), batch_size=8, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def check_names(data: Any, meaning: Any, content: Any, epoch: int, batches: int = 1000) -> None:
    """Each row of each batch is what its name stands for."""
    loader = data.train_dataloader()
    loader.set_epoch(epoch)
    look_up = meaning(data)
    for number, batch in enumerate(loader):
        ids = loader.sample_ids(epoch, number)
        assert len(ids) == len(batch[-1])
        for sample, found in zip(ids, content(data, batch), strict=True):
            assert same(found, look_up(sample)), sample
        if number == batches:
            return


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("epoch", [0, 3])
def test_a_batch_is_named_by_what_a_person_finds_again(
    name: str, epoch: int, data_dir: Path
) -> None:
    make, options, meaning, content = SETS[name]
    check_names(begun(make, data_dir, **options), meaning, content, epoch, batches=10)


@pytest.mark.parametrize("epoch", [0, 3])
def test_sentences_of_a_file_are_named_by_their_line(
    epoch: int, data_dir: Path, parallel: Path
) -> None:
    data = begun(GrammarDataModule, data_dir, train=str(parallel), **BOOKS)
    assert sorted(data.train_dataloader().identify(0, list(range(18)))) == list(range(1, 19))
    check_names(data, line_of, sources_in, epoch)


def test_masked_sentences_are_named_by_where_they_begin(data_dir: Path) -> None:
    data = begun(MaskedBooksDataModule, data_dir, next_sentence=True, **BOOKS)
    loader, look_up = data.train_dataloader(), sentence_of(data)
    for number, (tokens, _, target) in enumerate(loader):
        ids = loader.sample_ids(0, number)
        for sample, row, hidden in zip(ids, tokens, target, strict=True):
            whole = torch.where(hidden == IGNORED, row, hidden)[1:].tolist()
            assert look_up(sample).startswith(
                data.subwords.decode(whole[: whole.index(row[0] + 1)])
            )


def test_photos_are_named_by_their_files(data_dir: Path) -> None:
    data = begun(ImageFolderDataModule, data_dir / "photos", image_size=16)
    again = begun(ImageFolderDataModule, data_dir / "photos", image_size=16, val_size=0.4)
    pixels = dict(zip(again.train_ids, again.splits["train"][0], strict=True))
    for sample, image, target in zip(data.train_ids, *data.splits["train"], strict=True):
        assert (data_dir / "photos" / sample).is_file()
        assert sample.startswith(f"{data.class_names[target]}/")
        assert sample not in pixels or torch.equal(pixels[sample], image)
    assert len(pixels.keys() & set(data.train_ids)) > 20
    images = data.splits["train"][0].numpy()
    by_name = dict(zip(data.train_ids, images, strict=True))
    check_names(data, lambda _: by_name.get, images_in, epoch=1)


def test_a_validation_folder_has_names_of_its_own(data_dir: Path, tmp_path: Path) -> None:
    for part in ("train", "validation"):
        (tmp_path / part).symlink_to(data_dir / "photos")
    data = begun(ImageFolderDataModule, tmp_path, image_size=16, val_size=0)
    assert {"train/cat/0.jpg", "validation/cat/0.jpg"} <= set(data.train_ids)
    assert len(set(data.train_ids)) == len(data.splits["train"][1])


@pytest.mark.parametrize("name", ["cifar10", "kaggle", "names"])
def test_a_name_stays_whatever_the_split_and_the_seed(name: str, data_dir: Path) -> None:
    make, options, _, _ = SETS[name]
    known: dict[SampleId, list[int]] = {}
    for val_size, seed in ((10, 0), (20, 1), (0, 2)):
        torch.manual_seed(seed)
        data = begun(make, data_dir, **options | {"val_size": val_size})
        for sample, *row in zip(data.train_ids, *data.splits["train"], strict=True):
            content = [part.tolist() for part in row]
            assert known.setdefault(sample, content) == content
    assert len(known) == len(data.train_ids) == len(set(data.train_ids))


@pytest.mark.parametrize("make", [SETS["cifar10"], SETS["names"]], ids=["images", "names"])
def test_the_first_process_names_the_samples_of_all(make: Any, data_dir: Path) -> None:
    data = begun(make[0], data_dir, **make[1])
    arguments = data.loader_arguments
    told, targets = [], []
    for rank in range(2):
        data.loader_arguments = lambda stage, rank=rank: (
            arguments(stage) | {"rank": rank, "world_size": 2}
        )
        data._train_loader = None
        loader = data.train_dataloader()
        targets.append(next(iter(loader))[-1].tolist())
        told.append(loader.sample_ids(0, 0))
    assert told[0] == told[1]
    classes = dict(zip(data.train_ids, data.splits["train"][-1].tolist(), strict=True))
    assert [[classes[s] for s in told[0][rank::2]] for rank in range(2)] == targets


def test_images_without_labels_are_named_behind_the_others(data_dir: Path) -> None:
    data = begun(
        CIFAR10DataModule, data_dir, verify=False, val_size=30, train_fraction=0.2, unlabelled=2
    )
    data.unlabelled_loader = SemiSupervisedLoader
    loader, raw = data.train_dataloader(), data.read_train()[0].numpy()
    loader.set_epoch(1)
    for number, (images, weak, _, _) in enumerate(loader):
        seen = [*images_in(data, [images]), *images_in(data, [weak])]
        for sample, found in zip(loader.sample_ids(1, number), seen, strict=True):
            assert np.array_equal(raw[sample], found)


def test_what_is_drawn_anew_has_no_names(data_dir: Path) -> None:
    loader = begun(EchoDataModule, data_dir).train_dataloader()
    next(iter(loader))
    assert loader.sample_ids(0, 0) is None


def test_an_epoch_that_is_over_is_not_named_wrongly(data_dir: Path) -> None:
    loader = begun(CIFAR10DataModule, data_dir, verify=False, val_size=30).train_dataloader()
    next(iter(loader))
    assert loader.sample_ids(1, 0) is None
    loader.always_the_same = True  # overfit_batches: every epoch is the first again
    assert loader.sample_ids(1, 0) == loader.sample_ids(0, 0)


class Named(Recorder):
    """Compares each batch of ``Numbers``, whose samples are their own ids, with its names."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        loader: Any = self.trainer.train_dataloader
        assert loader.sample_ids(self.trainer.current_epoch, batch_idx) == batch[0].tolist()
        return super().training_step(batch)


@pytest.mark.parametrize("stop", [4, 6], ids=["between epochs", "in mid-epoch"])
def test_a_resumed_epoch_goes_on_with_its_names(stop: int, tmp_path: Path) -> None:
    models = [Named(tmp_path / "last.ckpt"), Named(None)]
    fit_quietly(models[0], Numbers(batch_size=8, val_size=8), stop)
    fit_quietly(models[1], Numbers(batch_size=8, val_size=8), 10, tmp_path / "last.ckpt")
    assert [len(model.seen) for model in models] == [stop, 10 - stop]


# Leaving samples out


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_comments_and_blank_lines_are_no_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "ids.txt", "# blurred\n\n 17 \r\ncat/a#1.jpg\t# twice\n17\n#3\n")
    assert excluded_ids(path) == "17\ncat/a#1.jpg\n"
    assert excluded_ids("17\ncat/a#1.jpg\n") == "17\ncat/a#1.jpg\n"  # as it stands in a record


@pytest.mark.parametrize("name", ["cifar10", "fraction", "kaggle", "names"])
def test_the_splits_stay_and_the_rest_is_trained_on(
    name: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, options, meaning, content = SETS[name]
    whole = begun(make, data_dir, **options)
    elsewhere = sorted({*(whole.ids or range(200))} - {*whole.train_ids})[0]  # for validation
    one, other = whole.train_ids[:2]
    path = write(tmp_path / "ids.txt", f"{other}\n{elsewhere}\n{one}")
    data = begun(make, data_dir, **options, exclude=path)
    assert data.train_ids == whole.train_ids[2:]
    for split, parts in whole.splits.items():
        assert split == "train" or all(map(torch.equal, parts, data.splits[split]))
    check_names(data, meaning, content, epoch=1)
    said = capsys.readouterr().out
    assert "Left out of training: 2 of 3 samples to exclude; the others are not in it" in said


def test_unlabelled_images_can_be_left_out_too(data_dir: Path) -> None:
    options = {"verify": False, "val_size": 30, "train_fraction": 0.2, "unlabelled": 2}
    whole = begun(CIFAR10DataModule, data_dir, **options)
    labelled = len(whole.splits["train"][0])
    one, other = whole.train_ids[0], whole.train_ids[-1]
    data = begun(CIFAR10DataModule, data_dir, **options, exclude=f"{one}\n{other}\n")
    assert data.train_ids == whole.train_ids[1:-1]
    assert len(data.splits["train"][0]) == labelled - 1
    assert torch.equal(data.splits["unlabelled"][0], whole.splits["unlabelled"][0][:-1])


@pytest.mark.parametrize("make", [GrammarDataModule, MaskedBooksDataModule])
def test_sentences_of_books_can_be_left_out(make: Make, data_dir: Path) -> None:
    whole = begun(make, data_dir, **BOOKS)
    gone, stays = whole.train_ids[3], whole.train_ids[4]
    data = begun(make, data_dir, **BOOKS, exclude=f"{gone}\n")
    ids = [data.identify(epoch, list(range(60))) for epoch in range(8)]
    seen = {sample for epoch in ids for sample in epoch}
    assert stays in seen
    assert gone not in seen
    assert data.subwords.merges == whole.subwords.merges
    for part, other in zip(whole.splits["val"], data.splits["val"], strict=True):
        assert torch.equal(part, other)


def test_sentences_of_a_file_can_be_left_out(data_dir: Path, parallel: Path) -> None:
    data = begun(GrammarDataModule, data_dir, train=str(parallel), exclude="2\n18\n", **BOOKS)
    assert sorted(data.identify(0, list(range(16)))) == [1, *range(3, 18)]
    check_names(data, line_of, sources_in, epoch=2)


def test_names_that_the_set_does_not_have_are_refused(data_dir: Path) -> None:
    text = "200\n3\nb\nc\nd\ne\n"
    with pytest.raises(UserError, match=r"exclude .* not have: 200, b, c and 2 more; .* such as 0"):
        begun(CIFAR10DataModule, data_dir, verify=False, val_size=30, exclude=text)
    with pytest.raises(UserError, match=r"exclude .* Greek\.txt:41; .* such as \w+\.txt:\d+\.$"):
        begun(LastNamesDataModule, data_dir, val_size=10, exclude="Greek.txt:41\n")
    with pytest.raises(UserError, match=r"exclude .* carroll-alice\.txt:5:1; .* austen-emma"):
        begun(GrammarDataModule, data_dir, exclude="carroll-alice.txt:5:1\n", **BOOKS)


def test_files_that_leave_nothing_or_name_nothing_are_refused(
    data_dir: Path, tmp_path: Path
) -> None:
    whole = "".join(f"{i}\n" for i in range(200))
    with pytest.raises(UserError, match="exclude leaves no sample to train on"):
        begun(CIFAR10DataModule, data_dir, verify=False, val_size=30, exclude=whole)
    with pytest.raises(UserError, match=r"ids\.txt names no sample to exclude"):
        excluded_ids(write(tmp_path / "ids.txt", "# none\n"))
    with pytest.raises(UserError, match=r"exclude takes a text file of ids: 17 cannot be read"):
        excluded_ids("17")


# A whole training


BAD = 24


@pytest.fixture(scope="module")
def mislabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST in which one training image has a wrong label."""
    root = tmp_path_factory.mktemp("mislabelled")
    path = write_mnist(root) / "train-labels-idx1-ubyte"
    content = bytearray(path.read_bytes())
    content[8 + BAD] = (content[8 + BAD] + 5) % 10
    path.write_bytes(content)
    return root


def fit(root: Path, name: str, *flags: str) -> list[SpikeRecord]:
    train.main(
        [
            "fit", f"--config={CONFIGS / 'mnist_lenet.yaml'}", f"--data.data_dir={root}",
            "--data.verify=false", "--data.val_size=40", "--data.batch_size=8",
            "--model.optimizer.lr=0.05", "--trainer.callbacks+=GradientSpikeMonitor",
            "--trainer.accelerator=cpu", "--trainer.devices=1",
            "--trainer.enable_progress_bar=false", f"--run={name}", *flags,
        ]
    )  # fmt: skip
    end_wandb()
    return read_records(Path("runs/mnist_lenet", name, "spikes.jsonl"))


@pytest.mark.slow
def test_a_bad_sample_is_found_in_the_records_and_left_out(
    mislabelled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    records = fit(mislabelled, "before", "--trainer.max_epochs=9")
    assert all(len(record.samples or ()) == 8 for record in records)
    counts = Counter(sample for record in records for sample in record.samples or ())
    (first, most), (_, next_most) = counts.most_common(2)
    assert (first, most > next_most + 1) == (BAD, True)

    write(tmp_path / "bad.txt", f"{first}  # a wrong label\n")
    flags = ["--data.exclude=bad.txt", "--trainer.max_epochs=9"]
    after = fit(mislabelled, "after", *flags)
    assert "Left out of training: 1 of 1 samples to exclude." in capsys.readouterr().out
    assert not any("loss" in record.spiked for record in after)
    assert BAD not in [sample for record in after for sample in record.samples or ()]

    (tmp_path / "bad.txt").write_text(f"{first}\n17\n")  # the record is what it was
    with pytest.raises(SystemExit):
        fit(mislabelled, "after", *flags, "--trainer.max_epochs=10")
    complaint = capsys.readouterr().err
    assert f"--data.exclude was {BAD}, not 17, {BAD}. To train a new run" in complaint
    (tmp_path / "bad.txt").unlink()  # which the run does not need to go on, nor to be tested
    run = tmp_path / "runs/mnist_lenet/after"
    train.main(["fit", f"--config={run / 'config.yaml'}", "--run=after", "--trainer.max_epochs=10"])
    end_wandb()
    train.main(["validate", f"--run={run}"])
    end_wandb()


def test_sets_that_are_drawn_anew_refuse_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "ids.txt", "17\n")
    for config in ("echo", "running_mean_lstm", "temporal_order_lstm"):
        with pytest.raises(SystemExit):
            train.main(["fit", f"--config={CONFIGS / config}.yaml", f"--data.exclude={path}"])
        assert "exclude" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_records_of_what_is_drawn_anew_have_no_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train.main(
        [
            "fit", f"--config={CONFIGS / 'temporal_order_lstm.yaml'}", "--data.level=easy",
            "--model.optimizer.lr=0.1", "--trainer.max_epochs=10", "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false", "--run=drawn",
        ]
    )  # fmt: skip
    end_wandb()
    lines = Path("runs/temporal_order_lstm/drawn/spikes.jsonl").read_text().splitlines()
    assert lines
    assert not any("samples" in json.loads(line) for line in lines)


# The real sets


REAL: dict[str, tuple[Make, dict[str, Any], Any, Any]] = {
    "cifar10": (CIFAR10DataModule, {}, raw_images, images_in),
    "mnist": (MNISTDataModule, {}, raw_images, images_in),
    "kaggle": (KaggleCIFAR10DataModule, {"val_size": 100}, numbered_png, images_in),
    "names": (LastNamesDataModule, {}, name_of, names_in),
    "books": (GrammarDataModule, {"epoch_size": 640}, sentence_of, targets_in),
}


@pytest.mark.real_data
@pytest.mark.parametrize("name", REAL)
def test_real_samples_are_found_again(name: str, real_data: Path) -> None:
    make, options, meaning, content = REAL[name]
    data = begun(make, real_data, **options)
    check_names(data, meaning, content, epoch=2, batches=1)
    gone = str(data.train_ids[-1])
    without = begun(make, real_data, **options, exclude=f"{gone}\n")
    assert without.train_ids == data.train_ids[:-1]


@pytest.mark.real_data
def test_real_corrections_are_found_again(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GrammarDataModule, "max_tokens", 1000)
    source = real_data / "jfleg" / "dev" / "dev.src"
    data = begun(GrammarDataModule, real_data, train=str(source), vocab_size=300)
    check_names(data, line_of, sources_in, epoch=1, batches=2)
