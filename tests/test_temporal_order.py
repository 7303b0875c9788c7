"""The temporal order task: its rule, its two streams, and the course notebook's own curve."""

import csv
import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, fit_quietly
from hypothesis import given
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from core.errors import UserError
from datamodules.base import BaseDataModule
from datamodules.images.augmentation import Augmentation
from datamodules.images.base import ImageDataModule
from datamodules.sequences.temporal_order import (
    LEVELS,
    Level,
    Stream,
    TemporalOrderDataModule,
    clean_sequences,
)
from lit_models import LitClassifier
from train import main

RULE = {"XX": "Q", "XY": "R", "YX": "S", "YY": "U"}
STREAMS: tuple[Stream, ...] = ("clean", "notebook")


def data_module(seed: int = 1, **options: Any) -> TemporalOrderDataModule:
    torch.manual_seed(seed)
    data = TemporalOrderDataModule(**options)
    data.setup("fit")
    return data


def text(one_hot: Tensor) -> str:
    """A one-hot sequence (T, 8) as letters, its padding left out."""
    padding = one_hot.sum(1) == 0
    assert not padding[padding.sum() :].any()  # all of it in front
    return "".join("XYabcdBE"[i] for i in one_hot[~padding].argmax(1))


def classes(target: Tensor) -> str:
    return "".join("QRSU"[i] for i in target)


def reference(level: Level, epochs: int, size: int = 992) -> list[list[tuple[str, str]]]:
    """The notebook's sequences and classes: training and test of epoch 0, of epoch 1, ...

    It draws as the notebook does, with the slow ``choice`` on lists of letters.
    """
    random = np.random.RandomState(8382)
    drawn = []
    for _ in range(2 * epochs * size):
        length, first, second = (random.randint(*bounds) for bounds in LEVELS[level])
        letters = random.choice(list("abcd"), length)
        letters[0], letters[-1] = "B", "E"
        target = random.choice(list("QRSU"))
        pair = next(pair for pair, label in RULE.items() if label == target)
        letters[first], letters[second] = pair[0], pair[1]
        drawn.append(("".join(letters), str(target)))
    return [drawn[i : i + size] for i in range(0, len(drawn), size)]


def assert_same(batches: list[list[Tensor]], others: list[list[Tensor]]) -> None:
    for (x, target), (other_x, other_target) in zip(batches, others, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(target, other_target)


# The task


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("level", LEVELS)
def test_every_sequence_follows_the_rule(level: Level, stream: Stream) -> None:
    data = data_module(level=level, stream=stream, epoch_size=320, val_size=40)
    lengths, firsts, seconds = LEVELS[level]
    for x, target in [*data.train_dataloader(), *data.val_dataloader()]:
        assert x.dtype == torch.float32
        assert x.shape[1:] == (lengths[1], 8)
        assert target.dtype == torch.int64
        for one_hot, label in zip(x, target, strict=True):
            sequence = text(one_hot)
            places = [i for i, letter in enumerate(sequence) if letter in "XY"]
            assert len(sequence) in range(*lengths)
            assert sequence[0] == "B"
            assert sequence[-1] == "E"
            assert set(sequence[1:-1]) <= set("XYabcd")
            assert places[0] in range(*firsts)
            assert places[1] in range(*seconds)
            assert RULE["".join(sequence[i] for i in places)] == "QRSU"[label]


def test_the_last_step_is_always_the_end() -> None:
    data = data_module(level="easy")
    for x, _ in data.train_dataloader():
        assert (x[:, -1].argmax(1) == 7).all()
        assert (x[:, 0] == 0).all()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"level": "brutal"}, "level must be one of easy, normal, moderate, hard, nightmare, got"),
        ({"stream": "dirty"}, "stream must be one of clean, notebook, got 'dirty'"),
        ({"epoch_size": 0}, "epoch_size must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"val_size": -1}, "val_size must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        TemporalOrderDataModule(**options)


# The clean stream


@given(st.sampled_from([*LEVELS]), st.integers(0, 2**40), st.integers(0, 2**64 - 1))
def test_a_sequence_alone_is_the_one_in_a_batch(level: Level, start: int, seed: int) -> None:
    many = clean_sequences(LEVELS[level], "train", start, 5, seed)
    for i in range(5):
        alone = clean_sequences(LEVELS[level], "train", start + i, 1, seed)
        assert torch.equal(alone[0][0], many[0][i])
        assert alone[1].item() == many[1][i]


def test_all_choices_come_about_equally_often() -> None:
    ranges = LEVELS["moderate"]
    symbols, target = clean_sequences(ranges, "train", 0, 40_000)
    lengths = (symbols != 8).sum(1)
    begin = ranges.padded - lengths
    marked = (symbols < 2).nonzero()[:, 1].reshape(-1, 2) - begin[:, None]
    letters = symbols[(symbols >= 2) & (symbols < 6)] - 2
    draws = {(60, 81): lengths, (10, 21): marked[:, 0], (45, 55): marked[:, 1], (0, 4): target}
    for (low, high), values in [*draws.items(), ((0, 4), letters)]:
        counts = (values.long() - low).bincount(minlength=high - low).double()
        expected = len(values) / (high - low)
        assert len(counts) == high - low
        assert (counts - expected).abs().max() < 5 * expected**0.5  # five standard deviations
    assert (
        np.corrcoef(torch.stack([lengths, *marked.T, target]))[~np.eye(4, dtype=bool)].max() < 0.03
    )


def test_bytes_are_the_same_on_every_machine() -> None:
    data = TemporalOrderDataModule()
    symbols, target = data.read_test()
    assert len(symbols) == 2560
    assert hashlib.sha256(symbols.numpy().tobytes()).hexdigest() == data.digest
    assert data.digest == "eae56f146d557ac157d17b238832cb19b65887a7bb444c328683fd23fba603af"
    assert classes(target[:32]) == "USSURSSURRRQQQURUSRUSQRUUSQUUSQS"


def test_only_training_depends_on_the_seed() -> None:
    one, same, other = data_module(1), data_module(1), data_module(2)
    assert_same([*one.train_dataloader()], [*same.train_dataloader()])
    assert_same([*one.val_dataloader()], [*other.val_dataloader()])
    train = {text(s) for x, _ in one.train_dataloader() for s in x}
    assert not train & {text(s) for x, _ in other.train_dataloader() for s in x}


def test_no_sequence_comes_twice() -> None:
    data = data_module()
    data.setup("test")
    loader = data.train_dataloader()
    seen = [text(s) for x, _ in [*data.val_dataloader(), *data.test_dataloader()] for s in x]
    for epoch in range(3):
        loader.set_epoch(epoch)
        seen += [text(s) for x, _ in loader for s in x]
    assert len(seen) == len(set(seen)) == 992 + 2560 + 3 * 992


def test_validation_stays_and_can_be_left_out() -> None:
    loader = data_module().val_dataloader()
    first = [*loader]
    loader.set_epoch(5)
    assert_same(first, [*loader])
    for stream in STREAMS:
        data = data_module(val_size=0, stream=stream)
        assert data.val_dataloader is None
        assert len(data.train_dataloader()) == 31


def test_prediction_sees_the_test_sequences_with_ids() -> None:
    data = TemporalOrderDataModule()
    data.setup("test")
    data.setup("predict")
    test, predict = [*data.test_dataloader()], [*data.predict_dataloader()]
    assert torch.equal(torch.cat([x for x, _ in test]), torch.cat([x for x, _ in predict]))
    assert torch.cat([ids for _, ids in predict]).tolist() == list(range(1, 2561))


@pytest.mark.parametrize("stream", STREAMS)
def test_processes_share_the_batches_of_one(stream: Stream) -> None:
    [whole] = [[*data_module(stream=stream, batch_size=32).train_dataloader()]]
    shares = []
    for rank in range(2):
        data = TemporalOrderDataModule(stream=stream, batch_size=16)
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        trainer: Any = SimpleNamespace(
            global_rank=rank, world_size=2, overfit_batches=0, strategy=strategy
        )
        data.seed, data.trainer = 1, trainer
        data.setup("fit")
        shares.append([*data.train_dataloader()])
    assert_same([[x[0::2], target[0::2]] for x, target in whole], shares[0])
    assert_same([[x[1::2], target[1::2]] for x, target in whole], shares[1])


# The notebook's stream

FIRST = {  # golden values of the notebook's own generator
    "easy": "BbXcXcbE",
    "normal": "BbcccXbcaccdccdadddddcbcbdXbcccaE",
    "moderate": "BbccccbcaccdcXdadddddcbcbddbcccacaccbaccddbbbcabdbcXbdcaaadcbcE",
}
FIRST_PLACES = {"hard": (103, {13: "Y", 56: "X"}), "nightmare": (431, {13: "X", 256: "X"})}


@pytest.mark.parametrize("level", LEVELS)
def test_first_sequence_is_the_notebooks(level: Level) -> None:
    data = data_module(level=level, stream="notebook")
    sequence = text(next(iter(data.train_dataloader()))[0][0])
    if level in FIRST:
        assert sequence == FIRST[level]
    else:
        found = {i: letter for i, letter in enumerate(sequence) if letter in "XY"}
        assert (len(sequence), found) == FIRST_PLACES[level]


def test_first_classes_are_the_notebooks() -> None:
    data = data_module(stream="notebook")
    train, val = [*data.train_dataloader()], [*data.val_dataloader()]
    assert len(train) == len(val) == 31
    assert all(len(target) == 32 for _, target in [*train, *val])
    assert classes(train[0][1]) == "QSSRQSRURSQQSQUUQQQQSRUQUQQQRQRQ"
    assert classes(val[0][1]) == "RSSSURRQURQRSSRQSUQSSUSUUSQUURSS"


@pytest.mark.slow
def test_epochs_equal_a_slow_reference_in_any_order() -> None:
    expected = reference("moderate", epochs=3)
    data = data_module(stream="notebook")
    train, val = data.train_dataloader(), data.val_dataloader()
    for epoch in (0, 2, 1, 2, 0):
        for loader, wanted in ((train, expected[2 * epoch]), (val, expected[2 * epoch + 1])):
            loader.set_epoch(epoch)
            got = [
                (text(s), classes(y[None])) for x, t in loader for s, y in zip(x, t, strict=True)
            ]
            assert got == wanted


def test_the_seed_of_the_run_plays_no_part() -> None:
    one, other = data_module(1, stream="notebook"), data_module(2, stream="notebook")
    assert_same([*one.train_dataloader()], [*other.train_dataloader()])


# In training


class Recorder(LightningModule):
    """Learns nothing and remembers the sequences it saw."""

    def __init__(self, save: Path | None) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[tuple[str, str]] = []
        self.save = save

    def training_step(self, batch: list[Tensor]) -> Tensor:
        self.seen += [("train", text(sequence)) for sequence in batch[0]]
        return self.layer(torch.ones(1)) * 0

    def validation_step(self, batch: list[Tensor]) -> None:
        if not self.trainer.sanity_checking:
            self.seen += [("val", text(sequence)) for sequence in batch[0]]

    def on_train_batch_end(self, *args: object) -> None:
        if self.save:
            self.trainer.save_checkpoint(self.save)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    stream: Stream, max_steps: int, save: Path | None = None, resume: Path | None = None
) -> list[tuple[str, str]]:
    torch.manual_seed(0)
    model = Recorder(save)
    data = TemporalOrderDataModule(
        stream=stream, epoch_size=24, batch_size=8, val_size=16, eval_batch_size=8
    )
    fit_quietly(model, data, max_steps, resume)
    return model.seen


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("stop", [3, 5], ids=["between epochs", "in mid-epoch"])
def test_resumed_training_sees_what_the_uninterrupted_one_saw(
    stop: int, stream: Stream, tmp_path: Path
) -> None:
    whole = fit(stream, 9)  # 3 steps an epoch
    interrupted = fit(stream, stop, save=tmp_path / "last.ckpt")
    resumed = fit(stream, 9, resume=tmp_path / "last.ckpt")
    for split in ("train", "val"):
        parts = [s for s in [*interrupted, *resumed] if s[0] == split]
        assert parts == [s for s in whole if s[0] == split]


def test_training_and_validation_interleave_on_the_notebooks_stream() -> None:
    """The sanity check before training takes nothing from it."""
    expected = reference("moderate", epochs=2, size=8)
    model, data = (
        Recorder(None),
        TemporalOrderDataModule(stream="notebook", epoch_size=8, batch_size=4, val_size=8),
    )
    Trainer(
        max_epochs=2,
        enable_checkpointing=False,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, data)
    wanted = [sequence for part in expected for sequence, _ in part]
    assert [sequence for _, sequence in model.seen] == wanted


class Notebook(nn.Module):
    """The notebook's SimpleLSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 12, batch_first=True)
        self.linear = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.lstm(x)[0])


def notebook_batch(sequences: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    x = torch.zeros(len(sequences), 81, 8)
    for one_hot, (sequence, _) in zip(x, sequences, strict=True):
        for place, letter in enumerate(sequence, 81 - len(sequence)):
            one_hot[place, "XYabcdBE".index(letter)] = 1
    return x, torch.tensor(["QRSU".index(label) for _, label in sequences])


@pytest.mark.slow
def test_the_notebooks_curve_comes_out_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs of its Section 8 as a plain loop, and as a user runs the config."""
    drawn = reference("moderate", epochs=2)
    torch.manual_seed(1)
    network = Notebook()
    optimizer = torch.optim.RMSprop(network.parameters(), lr=0.001)
    losses, accuracies = [], []
    for train, test in zip(drawn[::2], drawn[1::2], strict=True):
        for start in range(0, 992, 32):
            x, target = notebook_batch(train[start : start + 32])
            loss = F.cross_entropy(network(x)[:, -1, :], target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        x, target = notebook_batch(test)
        with torch.no_grad():
            right = network(x)[:, -1, :].argmax(1) == target
        accuracies.append(right.float().mean().item())

    monkeypatch.chdir(tmp_path)
    config = f"--config={CONFIGS / 'temporal_order_lstm.yaml'}"
    settings = ["--data.stream=notebook", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"]
    main(
        [
            "fit",
            config,
            *settings,
            "--trainer.logger=[{class_path: callbacks.MetricsCSV}]",
            "--run=x",
        ]
    )
    with Path("runs/temporal_order_lstm/x/metrics.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    ours = {
        name: [float(row[name]) for row in rows if row[name]]
        for name in ("train/loss", "val/accuracy")
    }
    np.testing.assert_allclose(ours["train/loss"], losses, rtol=1e-8, atol=0)  # 9 digits are kept
    np.testing.assert_allclose(ours["val/accuracy"], accuracies, rtol=1e-6)


# A batch made again


class Images(ImageDataModule):
    class_names = ("one", "two")

    def read_train(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (50, 8, 8, 3), dtype=torch.uint8, generator=generator)
        return images, torch.arange(50) % 2


def augmented_images() -> Images:
    torch.manual_seed(1)
    data = Images(
        batch_size=8, val_size=10, augmentation=Augmentation(crop=2, flip="random", cutout=3)
    )
    data.setup("fit")
    return data


REPLAYED = pytest.mark.parametrize(
    "make",
    [augmented_images, data_module, lambda: data_module(stream="notebook", epoch_size=64)],
    ids=["images", "clean", "notebook"],
)


@REPLAYED
def test_a_training_batch_can_be_made_again(make: Any) -> None:
    data: BaseDataModule = make()
    loader = data.train_dataloader()
    seen = {}
    for epoch in range(3):
        loader.set_epoch(epoch)
        for batch_idx, batch in enumerate(loader):
            seen[epoch, batch_idx] = batch
    fresh: BaseDataModule = make()
    for epoch, batch_idx in ((2, 1), (0, 0), (1, len(loader) - 1)):
        assert_same([data.training_batch(epoch, batch_idx)], [seen[epoch, batch_idx]])
        assert_same([fresh.training_batch(epoch, batch_idx)], [seen[epoch, batch_idx]])
    assert not torch.equal(seen[0, 0][0], seen[1, 0][0])


@REPLAYED
def test_making_a_batch_again_does_not_disturb_training(make: Any) -> None:
    def batches(data: BaseDataModule, replay: bool) -> list[list[Tensor]]:
        loader = data.train_dataloader()
        loader.set_epoch(3)
        seen = []
        for batch in loader:
            seen.append(batch)
            if replay:
                data.training_batch(1, 0)
        return [*seen, *loader]

    assert_same(batches(make(), replay=True), batches(make(), replay=False))


@pytest.mark.parametrize("batch_idx", [-1, 31])
def test_a_batch_that_never_was_is_refused(batch_idx: int) -> None:
    with pytest.raises(UserError, match=f"batch_idx must be from 0 to 30, .* got {batch_idx}"):
        data_module().training_batch(0, batch_idx)


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["clean", "notebook"])
def test_only_the_training_procedure_of_the_steady_config_differs(
    stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same network, same initial weights, same sequences in every epoch."""
    built: list[tuple[LitClassifier, TemporalOrderDataModule]] = []

    def fit(trainer: Trainer, model: LitClassifier, datamodule: Any, **options: Any) -> None:
        built.append((model, datamodule))

    monkeypatch.setattr(Trainer, "fit", fit)
    for name in ("temporal_order_lstm", "temporal_order_lstm_steady"):
        config = f"--config={CONFIGS / name}.yaml"
        main(["fit", config, f"--data.stream={stream}", "--trainer.fast_dev_run=1"])
    (plain, plain_data), (steady, steady_data) = built
    assert repr(plain.network) == repr(steady.network)
    weights, others = plain.state_dict(), steady.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    for epoch in (0, 1, 5):
        for split in ("train", "val"):
            pairs = zip(plain_data.draw(split, epoch), steady_data.draw(split, epoch), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
