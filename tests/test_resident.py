"""The resident loader and the augmentation on it: which samples come, when, and how they look."""

import gc
import math
import threading
import time
from collections.abc import Iterable
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import fit_quietly
from hypothesis import given
from hypothesis import strategies as st
from lightning import LightningModule
from torch import Tensor

from core.errors import UserError
from datamodules import EchoDataModule, LastNamesDataModule, TemporalOrderDataModule
from datamodules.base import BaseDataModule
from datamodules.images.augmentation import Augmentation
from datamodules.images.base import ImageDataModule
from datamodules.loaders import resident
from datamodules.loaders.images import ImageLoader, cutout, reflect_pad
from datamodules.loaders.resident import PREFETCHED, ResidentLoader, Stage
from datamodules.loaders.semi_supervised import SemiSupervisedLoader

MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])


def ranks(samples: int, batch: int, world: int, stage: Stage, epoch: int = 0) -> list[list[Tensor]]:
    """The sample numbers in the batches of every process."""
    loaders = [
        ResidentLoader([torch.arange(samples)], batch, stage, rank=rank, world_size=world)
        for rank in range(world)
    ]
    for loader in loaders:
        loader.set_epoch(epoch)
    return [[numbers for (numbers,) in loader] for loader in loaders]


def image_loader(images: Tensor, batch_size: int = 8, **options: Any) -> ImageLoader:
    """A loader whose targets are the numbers of the images."""
    chosen = {name: options.pop(name) for name in vars(Augmentation()) if name in options}
    arguments: dict[str, Any] = {"stage": "train", "mean": MEAN, "std": STD, **options}
    arguments["augmentation"] = Augmentation(**chosen)
    return ImageLoader(images, torch.arange(len(images)), batch_size=batch_size, **arguments)


def as_stored(images: Tensor) -> Tensor:
    """All images as the network sees them without augmentation (N, C, H, W)."""
    [(batch, _)] = image_loader(images, len(images), stage="predict")
    return batch


@pytest.fixture
def images() -> Tensor:
    return torch.randint(
        256, (24, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


shapes = st.tuples(st.integers(1, 60), st.integers(1, 20), st.integers(1, 5))


@given(shapes)
def test_evaluation_shows_every_sample_once(shape: tuple[int, int, int]) -> None:
    samples, batch, world = shape
    if samples < world:
        return
    shares = ranks(samples, batch, world, "evaluate")
    assert sorted(torch.cat([*chain(*shares)]).tolist()) == list(range(samples))
    assert len({len(share) for share in shares}) == 1  # collectives meet
    assert all(len(numbers) > 0 for share in shares for numbers in share)


@given(shapes)
def test_prediction_batches_do_not_depend_on_the_number_of_processes(
    shape: tuple[int, int, int],
) -> None:
    samples, batch, world = shape
    [alone] = ranks(samples, batch, 1, "predict")
    shares = ranks(samples, batch, world, "predict")
    assert torch.equal(torch.cat(alone), torch.arange(samples))
    for number, expected in enumerate(alone):
        assert torch.equal(shares[number % world][number // world], expected)
    assert sum(map(len, shares)) == len(alone)


@given(shapes, st.integers(0, 3))
def test_training_batches_of_the_processes_make_up_one_global_batch(
    shape: tuple[int, int, int], epoch: int
) -> None:
    samples, batch, world = shape
    if samples < world:
        return
    batch = min(batch, samples // world)  # few samples make a small batch rather than none
    shares = ranks(samples, batch, world, "train", epoch)
    [alone] = ranks(samples, batch * world, 1, "train", epoch)
    assert [len(share) for share in shares] == [samples // (batch * world)] * world
    for step, expected in enumerate(alone):
        parts = [share[step] for share in shares]
        assert all(len(part) == batch for part in parts)
        assert sorted(torch.cat(parts).tolist()) == sorted(expected.tolist())
    seen = torch.cat([*chain(*shares)]).tolist()
    assert len(seen) == len(set(seen))  # shards are disjoint


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        torch.rand(3)  # the global generator plays no part
        loader = ResidentLoader([torch.arange(100)], 10, "train", seed=seed)
        loader.set_epoch(epoch)
        return torch.cat([numbers for (numbers,) in loader]).tolist()

    assert order(0, 0) == order(0, 0)
    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert len({tuple(o) for o in orders}) == 4


def test_a_resumed_epoch_goes_on_where_it_stopped(images: Tensor) -> None:
    options: dict[str, Any] = {"crop": 2, "flip": "random", "cutout": 6}
    whole = image_loader(images, **options)
    whole.set_epoch(3)
    expected = list(whole)
    for stop in (1, 2):
        first = image_loader(images, **options)
        first.set_epoch(3)
        batches = iter(first)
        before = [next(batches) for _ in range(stop)]
        second = image_loader(images, **options)
        second.load_state_dict(first.state_dict())
        second.set_epoch(3)
        for got, wanted in zip([*before, *second], expected, strict=True):
            assert torch.equal(got[0], wanted[0])
            assert torch.equal(got[1], wanted[1])


def test_a_finished_epoch_resumes_with_the_next_one() -> None:
    loader = ResidentLoader([torch.arange(20)], 5, "train")
    assert len(list(loader)) == 4
    other = ResidentLoader([torch.arange(20)], 5, "train")
    other.load_state_dict(loader.state_dict())
    assert len(list(other)) == 4
    assert len(list(other)) == 4  # a resume shortens one epoch, not those after it


class Recorder(LightningModule):
    """Learns nothing and remembers what it saw."""

    def __init__(self, save: Path | None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[list[int]] = []
        self.save = save

    def training_step(self, batch: list[Tensor]) -> Tensor:
        self.seen.append(batch[0].tolist())
        return self.layer(batch[0][:, None].float()).sum() * 0

    def validation_step(self, batch: list[Tensor]) -> None:
        """Validate between the epochs, as real runs do."""

    def on_train_batch_end(self, *args: object) -> None:
        if self.save:
            self.trainer.save_checkpoint(self.save)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Numbers(BaseDataModule):
    class_names = ("one",)

    def read_train(self) -> tuple[Tensor, ...]:
        return (torch.arange(40),)


def fit(max_steps: int, save: Path | None = None, resume: Path | None = None) -> list[list[int]]:
    """Train up to ``max_steps``, which end in mid-epoch or not; returns the batches seen."""
    model = Recorder(save)
    fit_quietly(model, Numbers(batch_size=8, val_size=8), max_steps, resume)
    return model.seen


@pytest.mark.parametrize("stop", [4, 6], ids=["between epochs", "in mid-epoch"])
def test_resumed_training_sees_what_the_uninterrupted_one_saw(stop: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = fit(10)  # 4 steps an epoch
    interrupted = fit(stop, save=tmp_path / "last.ckpt")
    resumed = fit(10, resume=tmp_path / "last.ckpt")
    assert interrupted + resumed == whole


def test_two_processes_augment_as_one_does(images: Tensor) -> None:
    options: dict[str, Any] = {"crop": 3, "flip": "random", "cutout": 8}
    alone = list(image_loader(images, 8, **options))
    pair = [list(image_loader(images, 4, rank=r, world_size=2, **options)) for r in range(2)]
    for step, (batch, numbers) in enumerate(alone):
        parts = torch.cat([pair[0][step][0], pair[1][step][0]])
        order = torch.cat([pair[0][step][1], pair[1][step][1]]).argsort()
        assert torch.equal(batch[numbers.argsort()], parts[order])


@given(st.integers(0, 4), st.integers(0, 2**16))
def test_flip_and_crop_equal_a_slow_reference(crop: int, seed: int) -> None:
    images = torch.randint(256, (6, 8, 5, 3), dtype=torch.uint8)
    loader = image_loader(images, 6, crop=crop, flip="random", seed=seed)
    [(batch, numbers)] = loader
    generator = loader.generator()
    torch.randperm(6, generator=generator)  # the order of the epoch comes first
    draws = torch.rand(6, 5, generator=generator)
    for image, number in zip(batch, numbers.tolist(), strict=True):
        mirror, row, column = draws[number, :3].tolist()
        expected = images[number].numpy()[:, :: -1 if mirror < 0.5 else 1]
        expected = np.pad(expected, ((crop, crop), (crop, crop), (0, 0)), mode="reflect")
        top, left = int(row * (2 * crop + 1)), int(column * (2 * crop + 1))
        expected = expected[top : top + 8, left : left + 5]
        floats = (expected / 255 - MEAN.numpy()) / STD.numpy()
        np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), floats, atol=1e-5)


def test_every_offset_comes_about_equally_often() -> None:
    """An image of distinct pixels tells from its corner which window was cut."""
    rows = torch.arange(8)[:, None].expand(8, 8)
    image = torch.stack([rows, rows.T, torch.zeros(8, 8)], -1).to(torch.uint8)
    loader = image_loader(image.expand(9000, 8, 8, 3).contiguous(), 9000, crop=1)
    [(batch, _)] = loader
    pixels = batch * STD[:, None, None] + MEAN[:, None, None]
    inner = (pixels[:, :2, 1, 1] * 255).round().long()  # 0, 1 or 2 rows and columns further
    counts = torch.bincount(inner[:, 0] * 3 + inner[:, 1], minlength=9)
    assert counts.sum() == 9000
    assert ((counts - 1000).abs() < 150).all()  # five standard deviations


def test_alternating_flip_turns_every_image_every_epoch(images: Tensor) -> None:
    loader = image_loader(images, len(images), flip="alternating")
    mirrored = []
    for epoch in range(4):
        loader.set_epoch(epoch)
        [(batch, numbers)] = loader
        plain = as_stored(images)[numbers]
        flipped = (batch == plain.flip(3)).all(3).all(2).all(1)
        assert torch.equal(batch[~flipped], plain[~flipped])
        mirrored.append(flipped[numbers.argsort()])
    assert torch.equal(mirrored[0], ~mirrored[1])
    assert torch.equal(mirrored[0], mirrored[2])
    assert torch.equal(mirrored[1], mirrored[3])
    assert 0 < mirrored[0].sum() < len(images)


@given(st.integers(1, 12), st.integers(0, 2**16))
def test_cutout_equals_a_slow_reference(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(5, 3, 9, 7, generator=generator) + 1
    centers = torch.rand(5, 2, generator=generator)
    expected = images.clone()
    for image, (y, x) in zip(expected, centers.tolist(), strict=True):
        top, left = int(y * 9) - size // 2, int(x * 7) - size // 2
        image[:, max(0, top) : max(0, top + size), max(0, left) : max(0, left + size)] = 0
    assert torch.equal(cutout(images.clone(), size, centers), expected)


def test_reflect_pad_equals_numpy(images: Tensor) -> None:
    border = ((0, 0), (4, 4), (4, 4), (0, 0))
    assert np.array_equal(reflect_pad(images, 4), np.pad(images, border, mode="reflect"))


def test_normalized_images_come_back_exactly_and_are_channels_last(images: Tensor) -> None:
    batch = as_stored(images)
    assert batch.shape == (24, 3, 32, 32)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    expected = (images.double() / 255 - MEAN) / STD
    torch.testing.assert_close(batch.permute(0, 2, 3, 1).double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(ImageDataModule().denormalize(batch), images)


@pytest.mark.parametrize("stage", ["evaluate", "predict"])
def test_only_training_images_are_augmented(images: Tensor, stage: Stage) -> None:
    datamodule = ImageDataModule(augmentation=Augmentation(crop=4, flip="random", cutout=8))
    [(batch, numbers)] = datamodule.make_loader((images, torch.arange(24)), stage)
    assert torch.equal(batch, as_stored(images))
    assert torch.equal(numbers, torch.arange(24))


class Flat(ImageDataModule):
    image_size = (32, 8, 3)


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ({"crop": 8}, r"crop .* 0 to 7, got 8"),
        ({"crop": -1}, r"crop .* got -1"),
        ({"cutout": -1}, r"cutout .* got -1"),
    ],
)
def test_impossible_augmentation_is_refused(option: dict[str, int], complaint: str) -> None:
    """A crop as large as the image ended in an index out of bounds."""
    with pytest.raises(UserError, match=complaint):
        Flat(augmentation=Augmentation(**option))  # type: ignore[arg-type]


def test_the_largest_crop_is_padded() -> None:
    images = torch.randint(256, (4, 32, 8, 3), dtype=torch.uint8)
    datamodule = Flat(augmentation=Augmentation(crop=7, cutout=40))
    batch, _ = next(iter(datamodule.make_loader((images, torch.arange(4)), "train")))
    assert batch.shape == (4, 3, 32, 8)


def test_fewer_samples_than_processes_are_refused() -> None:
    with pytest.raises(UserError, match=r"3 samples cannot be shared by 4 processes; use fewer"):
        ranks(3, 1, 4, "evaluate")
    assert sum(map(len, ranks(3, 1, 4, "predict"))) == 3  # a process may have nothing to predict


def test_few_samples_make_a_small_training_batch() -> None:
    [[batch]] = ranks(5, 512, 1, "train")
    assert len(batch) == 5


@pytest.mark.parametrize(
    ("stage", "complaint"),
    [
        ("fit", "has no training data; train on another set"),
        ("test", "has no labelled test set; use predict.py on it"),
        ("predict", "has nothing to predict"),
    ],
)
def test_a_data_set_says_what_it_does_not_have(stage: str, complaint: str) -> None:
    with pytest.raises(UserError, match=f"BaseDataModule {complaint}"):
        BaseDataModule().setup(stage)


# Data larger than the device's memory


def on_host(loader: ResidentLoader) -> ResidentLoader:
    """The same loader, as it is where the data do not fit on the device."""
    loader.move_to(torch.device("cpu"), fits=False)
    return loader


def same_batches(left: Iterable[list[Tensor]], right: Iterable[list[Tensor]]) -> bool:
    pairs = list(zip(left, right, strict=True))
    return bool(pairs) and all(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in pairs)


def no_threads() -> bool:
    """Whether the threads that gather end, soon after nobody asks them any more."""
    for _ in range(200):
        if not any(thread.name.startswith("prefetch") for thread in threading.enumerate()):
            return True
        time.sleep(0.01)
    return False


AUGMENTATIONS: list[dict[str, Any]] = [
    {},
    {"crop": 3},
    {"flip": "random", "cutout": 8},
    {"crop": 2, "flip": "alternating", "epoch_size": 60},
    {"crop": 2, "flip": "random", "rotate": 10, "brightness": 0.2},
    {"crop": 2, "flip": "random", "stage": "evaluate"},
    {"stage": "predict", "rank": 1, "world_size": 2},
]


@pytest.mark.parametrize("options", AUGMENTATIONS, ids=str)
def test_batches_from_host_memory_are_the_same(images: Tensor, options: dict[str, Any]) -> None:
    for epoch in (0, 3):
        loaders = [image_loader(images, 7, **options) for _ in range(2)]
        for loader in loaders:
            loader.set_epoch(epoch)
        assert same_batches(loaders[0], on_host(loaders[1]))
    assert no_threads()


def test_unlabelled_images_from_host_memory_are_the_same(images: Tensor) -> None:
    datamodule = ImageDataModule(
        augmentation=Augmentation(crop=2, flip="random", cutout=4), batch_size=4
    )
    options = datamodule.loader_arguments("train") | {"unlabelled": images[8:], "ratio": 3}
    host = on_host(SemiSupervisedLoader(images[:8], torch.arange(8), **options))
    assert same_batches(SemiSupervisedLoader(images[:8], torch.arange(8), **options), host)
    assert (
        host.resident_bytes() > images.nbytes * 2 * 36 * 36 / 32**2
    )  # the others are counted as well


@pytest.mark.parametrize("make", [TemporalOrderDataModule, EchoDataModule])
def test_drawn_sequences_from_host_memory_are_the_same(make: type[BaseDataModule]) -> None:
    datamodule = make(epoch_size=40, batch_size=16, val_size=0)  # type: ignore[call-arg]
    datamodule.setup("fit")
    loader = datamodule.train_dataloader()
    expected = list(loader)
    assert same_batches(expected, on_host(loader))


def test_bucketed_names_from_host_memory_are_the_same(data_dir: Path) -> None:
    datamodule = LastNamesDataModule(str(data_dir), batch_size=8, val_size=20)
    datamodule.setup("fit")
    for loader in (datamodule.train_dataloader(), datamodule.val_dataloader()):
        expected = list(loader)
        assert same_batches(expected, on_host(loader))


def test_an_epoch_from_host_memory_resumes_where_it_stopped(images: Tensor) -> None:
    """The thread is ahead; what counts is what was handed out."""
    options: dict[str, Any] = {"crop": 2, "flip": "random"}
    expected = list(image_loader(images, 4, **options))
    first = on_host(image_loader(images, 4, **options))
    batches = iter(first)
    before = [next(batches) for _ in range(2)]
    second = on_host(image_loader(images, 4, **options))
    second.load_state_dict(first.state_dict())
    assert same_batches([*before, *second], expected)


def test_a_dropped_iterator_leaves_no_thread(images: Tensor) -> None:
    batches = iter(on_host(image_loader(images, 2)))
    next(batches)
    assert any(thread.name.startswith("prefetch") for thread in threading.enumerate())
    del batches
    assert no_threads()


def test_the_last_batch_leaves_no_thread(images: Tensor) -> None:
    """Lightning keeps the iterator of an epoch that is over."""
    loader = on_host(image_loader(images, 8))
    batches = iter(loader)
    for _ in range(len(loader)):
        next(batches)
    assert no_threads()


class Torn(ResidentLoader):
    def gather(self, index: Tensor) -> list[Tensor]:
        if 5 in index:
            raise OSError("the disk is gone")
        return super().gather(index)


def test_what_the_thread_raises_is_raised_by_the_batch() -> None:
    batches = iter(on_host(Torn([torch.arange(12)], 2, "predict")))
    assert [next(batches)[0].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert no_threads()


def test_few_batches_wait() -> None:
    """However slowly they are taken, so that the memory does not grow."""
    gathered = []

    class Counting(ResidentLoader):
        def gather(self, index: Tensor) -> list[Tensor]:
            gathered.append(index)
            return super().gather(index)

    batches = iter(on_host(Counting([torch.arange(100)], 2, "predict")))
    next(batches)
    time.sleep(0.1)
    assert len(gathered) <= 1 + PREFETCHED


@pytest.mark.parametrize(("free", "stays"), [(math.inf, False), (60_000, True), (700_000, False)])
def test_data_larger_than_half_the_free_memory_stay_on_the_host(
    images: Tensor, free: float, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "free_memory", lambda device: free)
    loader = image_loader(images, crop=4, flip="random")
    assert loader.resident_bytes() == images.nbytes + 2 * 24 * 40 * 40 * 3 + 24 * 8
    said = pytest.warns(UserWarning, match="stay in host memory") if stays else nullcontext()
    with said:
        loader.to(torch.device("cpu"))
    assert (loader.copies_to is not None) == stays
    assert same_batches(loader, image_loader(images, crop=4, flip="random"))


def test_memory_that_pytorch_holds_unused_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 8000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert resident.free_memory(torch.device("cuda", 0)) == 1300
    assert resident.free_memory(torch.device("cpu")) == math.inf


def test_training_from_host_memory_is_the_same_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    whole = fit(10)
    monkeypatch.setattr(resident, "free_memory", lambda device: 100)
    with pytest.warns(UserWarning, match="stay in host memory"):
        interrupted = fit(6, save=tmp_path / "last.ckpt")  # in mid-epoch
    with pytest.warns(UserWarning, match="stay in host memory"):
        resumed = fit(10, resume=tmp_path / "last.ckpt")
    assert interrupted + resumed == whole
    gc.collect()
    assert no_threads()
