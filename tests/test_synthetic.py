"""Data made by a rule: what is drawn, what is new in each epoch, and the rule itself."""

import string
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning import seed_everything
from torch import Tensor

from core.errors import UserError
from datamodules import EchoDataModule, RunningMeanDataModule
from datamodules.base import IGNORED
from datamodules.sequences.echo import LETTERS, echo
from datamodules.sequences.running_mean import running_mean
from datamodules.sequences.synthetic import SyntheticDataModule
from datamodules.text.books import TextLoader

SIZES: dict[str, Any] = {"epoch_size": 40, "batch_size": 8, "val_size": 30}
EACH = pytest.mark.parametrize(
    "make",
    [
        lambda: RunningMeanDataModule(**SIZES),
        lambda: EchoDataModule(**SIZES),
        lambda: EchoDataModule(max_delay=8, **SIZES),
    ],
    ids=["running_mean", "echo", "echo_of_any_delay"],
)


def made(make: Callable[[], SyntheticDataModule], seed: int = 0, stage: str = "fit") -> Any:
    seed_everything(seed, verbose=False)
    data = make()
    data.setup(stage)
    return data


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@EACH
def test_each_epoch_of_training_is_new_and_a_function_of_the_seed(make: Any) -> None:
    epochs = [made(make).training_batch(epoch, 1) for epoch in (0, 0, 1)]
    assert same(epochs[0], epochs[1])
    assert not same(epochs[0], epochs[2])
    assert not same(epochs[0], made(make, seed=1).training_batch(0, 1))
    assert not same(epochs[0], made(make).training_batch(0, 2))


def test_an_epoch_that_is_filled_up_begins_again() -> None:
    """Ten sentences in batches of four: twelve places, of which the last two are the first two's.

    A text loader once took as many as there are samples, and an epoch had a short batch.
    """
    steps = torch.arange(10)[:, None].expand(10, 3)
    loader = TextLoader([steps, torch.full((10,), 3), steps], batch_size=4, stage="train")
    batches = [batch[0] for batch in loader]
    assert [len(batch) for batch in batches] == [4, 4, 4]
    seen = torch.cat(batches)[:, 0].sort().values
    assert seen.tolist() == [0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]


@EACH
def test_validation_and_test_are_the_same_for_all_seeds(make: Any) -> None:
    batches = []
    for seed in (0, 1):
        data, tested = made(make, seed), made(make, seed, "test")
        (val,), test = list(data.val_dataloader()), next(iter(tested.test_dataloader()))
        assert len(val[-1]) == 30
        assert not same(val, test)
        batches.append([*val, *test])
    assert same(*batches)


@EACH
def test_a_resumed_loader_goes_on_with_the_same_epoch(make: Any) -> None:
    def loader(epoch: int) -> Any:
        loader = made(make).train_dataloader()
        loader.set_epoch(epoch)
        return loader

    whole = list(loader(3))
    half = loader(3)
    for _, batch in zip(range(2), half, strict=False):
        last = batch
    resumed = loader(3)
    resumed.load_state_dict(half.state_dict())
    assert same(last, whole[1])
    assert all(map(same, list(resumed), whole[2:]))


# The running mean


def test_running_mean_is_the_mean_of_all_so_far() -> None:
    x = torch.randn(3, 10)
    expected = torch.stack([x[:, : t + 1].mean(1) for t in range(10)], 1)
    torch.testing.assert_close(running_mean(x), expected)
    (inputs, target) = made(lambda: RunningMeanDataModule(**SIZES)).training_batch(0, 0)
    assert inputs.shape == (8, 10, 1)
    torch.testing.assert_close(target, running_mean(inputs[:, :, 0]))


# The echo


def said(text: str, delay: int, padded: int = 12) -> str:
    """The echo of a text of letters, with a dot for nothing; what is behind its end is cut."""
    symbols = [string.ascii_lowercase.index(c) + 1 for c in text]
    letters = torch.tensor([symbols + [1] * (padded - len(text))])
    (row,) = echo(letters, torch.tensor([delay]), torch.tensor([len(text)]))
    assert (row[len(text) :] == IGNORED).all()
    return "".join("." if k == 0 else string.ascii_lowercase[k - 1] for k in row[: len(text)])


@pytest.mark.parametrize(
    ("delay", "expected"), [(0, "abcdefg"), (2, "..abcde"), (6, "......a"), (9, ".......")]
)
def test_echo(delay: int, expected: str) -> None:
    assert said("abcdefg", delay) == expected


def test_an_echo_batch_holds_letters_and_their_delay() -> None:
    data = made(lambda: EchoDataModule(max_delay=8, epoch_size=4000, batch_size=4000, val_size=1))
    x, lengths, target = data.training_batch(0, 0)
    letters, told = x.split([LETTERS + 1, 9], 2)
    assert letters.shape == (4000, 25, 27)
    assert (letters.sum(2) == 1).all()
    assert (letters[:, :, 0] == 0).all()  # nothing is never heard
    assert (told == told[:, :1]).all()
    assert torch.equal(lengths.unique(), torch.arange(15, 26))
    delays = told[:, 0].argmax(1)
    assert (delays.bincount() / 4000 - 1 / 9).abs().max() < 0.03
    assert torch.equal(target, echo(letters.argmax(2), delays, lengths))


def test_one_delay_for_all_is_not_told() -> None:
    x, _, target = made(lambda: EchoDataModule(delay=3, **SIZES)).training_batch(0, 0)
    assert x.shape == (8, 25, 27)
    assert (target[:, :3] == 0).all()
    assert torch.equal(target[:, 3:15], x[:, :12].argmax(2))


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RunningMeanDataModule(length=0), "length must be at least 1, got 0."),
        (lambda: RunningMeanDataModule(epoch_size=0), "epoch_size must be at least 1, got 0."),
        (lambda: EchoDataModule(delay=-1), "delay must be at least 0, got -1."),
        (lambda: EchoDataModule(max_delay=-2), "max_delay must be at least 0, got -2."),
        (
            lambda: EchoDataModule(min_length=9, max_length=8),
            "min_length must be from 1 to max_length, got 9 and 8.",
        ),
        (
            lambda: EchoDataModule(min_length=0),
            "min_length must be from 1 to max_length, got 0 and 25.",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert str(caught.value) == message
