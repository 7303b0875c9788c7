"""Parts of a training set, epochs of a fixed length, and images that come without a label."""

from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fit_quietly
from hypothesis import given
from hypothesis import strategies as st
from test_resident import Recorder
from torch import Tensor

from core.errors import UserError
from datamodules import DemoDataModule, MNISTDataModule
from datamodules.images.augmentation import Augmentation
from datamodules.images.base import ImageDataModule, balanced_order
from datamodules.loaders.images import ImageLoader
from datamodules.loaders.resident import ResidentLoader
from datamodules.loaders.semi_supervised import SemiSupervisedLoader


class Numbered(ImageDataModule):
    """Grey images of 6 x 6 which all show their own number, row by row from dark to bright."""

    class_names = ("a", "b", "c", "d", "e")
    image_size = (6, 6, 1)
    samples = 100

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"val_size": 0, "mean": (0.0,), "std": (1 / 255,), **options})

    def read_train(self) -> tuple[Tensor, ...]:
        images = torch.arange(self.samples)[:, None, None, None] + 10 * torch.arange(6)[:, None]
        return images.expand(-1, 6, 6, 1).to(torch.uint8), torch.arange(self.samples) % 5


def data(**options: Any) -> Numbered:
    datamodule = Numbered(**{"batch_size": 8, **options})
    datamodule.unlabelled_loader = SemiSupervisedLoader  # as LitFixMatch does
    datamodule.setup("fit")
    return datamodule


def numbers(images: Tensor) -> list[int]:
    """Which images these are, if they are not cropped."""
    return images[:, 0, 0, 0].round().int().tolist()


def of_rank(rank: int, world: int, epoch: int = 0, **options: Any) -> list[list[Tensor]]:
    """The training batches that one of several processes gets."""
    datamodule = data(**options)
    images, targets = datamodule.splits["train"]
    arguments = datamodule.loader_arguments("train") | {"rank": rank, "world_size": world}
    if datamodule.unlabelled:
        (others,) = datamodule.splits["unlabelled"]
        arguments |= {"unlabelled": others, "ratio": datamodule.unlabelled}
        loader: ImageLoader = SemiSupervisedLoader(images, targets, **arguments)
    else:
        loader = ImageLoader(images, targets, **arguments)
    loader.set_epoch(epoch)
    return list(loader)


# --- fractions ------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 6), min_size=1, max_size=80), st.data())
def test_classes_take_turns_as_long_as_they_last(classes: list[int], draw: st.DataObject) -> None:
    targets = torch.tensor(classes)
    order = balanced_order(targets)
    assert sorted(order.tolist()) == list(range(len(classes)))
    head = targets[order[: draw.draw(st.integers(1, len(classes)))]].bincount(minlength=7)
    whole = targets.bincount(minlength=7)
    most = head.max()
    assert all(h in (most, most - 1) or h == w for h, w in zip(head, whole, strict=True))


def test_a_part_is_contained_in_every_larger_one_whatever_the_seed() -> None:
    parts = []
    for seed, fraction in enumerate((0.01, 0.1, 0.2, 0.5, 0.9)):
        torch.manual_seed(seed)
        images, targets = data(train_fraction=fraction).splits["train"]
        assert len(targets) == round(100 * fraction)
        parts.append(set(images[:, 0, 0, 0].tolist()))
    assert all(small < large for small, large in pairwise(parts))


def test_the_members_of_a_class_are_chosen_at_random() -> None:
    chosen = data(train_fraction=0.5).splits["train"][0][:, 0, 0, 0].sort().values
    assert not torch.equal(chosen, torch.arange(50))
    assert abs(chosen.float().mean() - 49.5) < 10


def test_at_least_one_image_is_trained_on() -> None:
    assert len(data(train_fraction=1e-6).splits["train"][0]) == 1


def test_all_of_the_training_part_is_trained_on_in_the_order_of_old() -> None:
    """The first draws of the epoch are the order, as they were before there were fractions."""
    whole = data(train_fraction=1.0)
    images, _ = whole.split(whole.read_train())[0]
    assert torch.equal(whole.splits["train"][0], images)
    loader = whole.train_dataloader()
    order = torch.randperm(100, generator=loader.generator())[:96]
    assert numbers(torch.cat([batch for batch, _ in loader])) == images[order, 0, 0, 0].tolist()


def test_drawings_of_the_demo_can_be_fewer() -> None:
    demo = DemoDataModule(train_fraction=0.01)
    demo.setup("fit")
    counts = demo.splits["train"][1].bincount(minlength=10)
    assert counts.sum() == 68
    assert counts.max() - counts.min() == 1
    assert len(demo.splits["val"][1]) == 1000


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"train_fraction": 0.0}, "train_fraction must be above 0 and at most 1, got 0.0"),
        ({"train_fraction": 1.1}, "train_fraction must be above 0 and at most 1, got 1.1"),
        ({"train_fraction": float("nan")}, "train_fraction must be above 0 and at most 1, got nan"),
        ({"epoch_size": 0}, "epoch_size must be at least 1, got 0"),
        ({"unlabelled": -1}, "unlabelled .* got -1"),
    ],
)
def test_impossible_values_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Numbered(**options)


# --- epochs of a fixed length ---------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 90), st.integers(0, 3))
def test_an_epoch_is_as_many_passes_as_it_takes(samples: int, size: int, epoch: int) -> None:
    loader = ResidentLoader([torch.arange(samples)], 1, "train", epoch_size=size)
    loader.set_epoch(epoch)
    seen = torch.cat([batch for (batch,) in loader])
    assert len(seen) == len(loader) == size
    for part in seen.split(samples):
        assert part.unique().numel() == len(part)  # nobody twice within a pass


def test_each_pass_has_an_order_of_its_own() -> None:
    loader = ResidentLoader([torch.arange(20)], 20, "train", epoch_size=60)
    orders = {tuple(batch.tolist()) for (batch,) in loader}
    assert len(orders) == 3


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.03])
def test_every_fraction_has_the_same_number_of_steps(fraction: float) -> None:
    loader = data(train_fraction=fraction, epoch_size=96).train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 12
    assert {len(target) for _, target in batches} == {8}


def test_images_and_labels_stay_together_in_every_pass() -> None:
    for images, target in data(train_fraction=0.2, epoch_size=96).train_dataloader():
        assert [number % 5 for number in numbers(images)] == target.tolist()


def test_each_pass_is_augmented_anew() -> None:
    options: dict[str, Any] = {"train_fraction": 0.2, "epoch_size": 80, "batch_size": 20}
    loader = data(augmentation=Augmentation(crop=2, cutout=2), **options).train_dataloader()
    batches = [images[target.argsort(stable=True)] for images, target in loader]
    assert len({batch.sum().item() for batch in batches}) == 4


def test_alternating_flip_turns_every_image_in_every_pass() -> None:
    loader = ImageDataModule(
        augmentation=Augmentation(flip="alternating"), epoch_size=60, val_size=0, batch_size=20
    )
    images = torch.randint(256, (20, 32, 32, 3), dtype=torch.uint8)
    resident = loader.make_loader((images, torch.arange(20)), "train")
    seen = []
    for epoch in range(2):
        resident.set_epoch(epoch)
        seen += [batch[target.argsort()] for batch, target in resident]
    assert len(seen) == 6
    for before, after in pairwise(seen):
        assert torch.equal(before, after.flip(3))


@pytest.mark.parametrize("unlabelled", [0, 2])
@pytest.mark.parametrize("size", [96, 90])
def test_processes_share_the_batches_of_one(unlabelled: int, size: int) -> None:
    options: dict[str, Any] = {"train_fraction": 0.2, "epoch_size": size, "unlabelled": unlabelled}
    options |= {"augmentation": Augmentation(crop=1, flip="random"), "epoch": 1}
    alone = of_rank(0, 1, batch_size=16, **options)
    pair = [of_rank(rank, 2, batch_size=8, **options) for rank in range(2)]
    assert [len(share) for share in pair] == [len(alone)] * 2
    for expected, *parts in zip(alone, *pair, strict=True):
        for whole, *halves in zip(expected, *parts, strict=True):
            assert torch.equal(whole[0::2], halves[0])
            assert torch.equal(whole[1::2], halves[1])


# --- images without a label -----------------------------------------------------------------------


def test_unlabelled_images_are_those_left_out_and_come_pass_after_pass() -> None:
    datamodule = data(train_fraction=0.2, unlabelled=7, epoch_size=32)
    loader = datamodule.train_dataloader()
    labelled = set(datamodule.splits["train"][0][:, 0, 0, 0].tolist())
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    for images, weak, strong, target in batches:
        assert images.shape == (8, 1, 6, 6)
        assert weak.shape == strong.shape == (56, 1, 6, 6)
        assert [number % 5 for number in numbers(images)] == target.tolist()
        assert set(numbers(images)) <= labelled
        assert torch.equal(weak, strong)  # nothing is augmented
    others = list(chain(*(numbers(weak) for _, weak, _, _ in batches)))
    for start in range(0, len(others), 80):
        part = others[start : start + 80]
        assert len(set(part)) == len(part)
        assert not set(part) & labelled
    assert others[:80] != others[80:160]


def test_weak_images_are_as_stored_and_strong_ones_augmented() -> None:
    options: dict[str, Any] = {"train_fraction": 0.2, "unlabelled": 1}
    datamodule = data(augmentation=Augmentation(crop=2), **options)
    batches = list(datamodule.train_dataloader())
    stored = datamodule.splits["unlabelled"][0][..., 0].float()
    for _, weak, strong, _ in batches:
        assert all((stored - image[0]).abs().amax((1, 2)).min() < 1e-3 for image in weak)
        assert not torch.equal(weak, strong)
    plain = list(data(**options).train_dataloader())
    assert all(torch.equal(a[1], b[1]) for a, b in zip(batches, plain, strict=True))


def test_their_order_depends_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        torch.manual_seed(seed)
        loader = data(train_fraction=0.2, unlabelled=2).train_dataloader()
        loader.set_epoch(epoch)
        return list(chain(*(numbers(weak) for _, weak, _, _ in loader)))

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(2) for epoch in range(2)}) == 4


def test_labelled_images_are_those_of_a_run_without_the_others() -> None:
    options: dict[str, Any] = {
        "train_fraction": 0.3,
        "augmentation": Augmentation(crop=2, flip="random"),
    }
    alone = data(**options).train_dataloader()
    together = data(unlabelled=2, **options).train_dataloader()
    for (images, target), batch in zip(alone, together, strict=True):
        assert torch.equal(images, batch[0])
        assert torch.equal(target, batch[3])


def test_a_batch_of_both_can_be_made_again_in_mid_epoch() -> None:
    options: dict[str, Any] = {
        "train_fraction": 0.2,
        "unlabelled": 2,
        "epoch_size": 64,
        "augmentation": Augmentation(crop=2),
    }
    expected = list(data(**options).train_dataloader())
    datamodule = data(**options)
    running = iter(datamodule.train_dataloader())
    batches = list(islice(running, 3))
    again = datamodule.training_batch(0, 2)
    datamodule.training_batch(1, 0)
    for got, wanted in zip([*batches, *running], expected, strict=True):
        assert all(map(torch.equal, got, wanted))
    assert all(map(torch.equal, again, expected[2]))


def test_there_must_be_images_left_out() -> None:
    with pytest.raises(UserError, match=r"unlabelled is 2, but train_fraction 1.0 leaves no image"):
        data(unlabelled=2).train_dataloader()
    with pytest.raises(UserError, match=r"train_fraction 0.999 leaves no image out; lower it"):
        data(unlabelled=2, train_fraction=0.999).train_dataloader()


# --- resume ---------------------------------------------------------------------------------------


class ImageRecorder(Recorder):
    """Remembers the sum of every tensor of a batch."""

    def __init__(self, save: Path | None) -> None:
        super().__init__(save)
        self.sums: list[list[float]] = []

    def training_step(self, batch: list[Tensor]) -> Tensor:
        self.sums.append([tensor.double().sum().item() for tensor in batch])
        return self.layer(torch.ones(1, 1)).sum() * 0


def fit(max_steps: int, save: Path | None = None, resume: Path | None = None) -> list[Any]:
    options: dict[str, Any] = {"train_fraction": 0.2, "unlabelled": 2, "epoch_size": 48}
    model = ImageRecorder(save)
    options |= {
        "batch_size": 8,
        "val_size": 20,
        "augmentation": Augmentation(crop=2, flip="alternating"),
    }
    datamodule = Numbered(**options)
    datamodule.unlabelled_loader = SemiSupervisedLoader
    fit_quietly(model, datamodule, max_steps, resume)
    return model.sums


@pytest.mark.parametrize("stop", [6, 9], ids=["between epochs", "in mid-epoch"])
def test_resumed_training_sees_what_the_uninterrupted_one_saw(stop: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = fit(15)  # 6 steps an epoch, five passes of 16 images
    interrupted = fit(stop, save=tmp_path / "last.ckpt")
    assert interrupted + fit(15, resume=tmp_path / "last.ckpt") == whole


@pytest.mark.real_data
def test_a_hundred_digits_of_mnist_are_ten_of_each(real_data: Path) -> None:
    few = MNISTDataModule(data_dir=str(real_data), train_fraction=0.002)
    few.setup("fit")
    assert few.splits["train"][1].bincount().tolist() == [10] * 10
