"""Last names: the course's data and split, batches of similar length, its log, and the guesses."""

import csv
import json
import random
import string
import unicodedata
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, end_wandb
from fake_data import write_names
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import predict
import train
from benchmarks.last_names import linear_baseline
from core.errors import UserError
from datamodules import LastNamesDataModule
from datamodules.sequences.last_names import (
    PAD,
    SYMBOLS,
    NameLoader,
    encode,
    normalize,
)

COURSE = CONFIGS / "last_names_course.yaml"


def data(folder: Path, **options: Any) -> LastNamesDataModule:
    torch.manual_seed(0)
    return LastNamesDataModule(str(folder), **({"val_size": 10} | options))


def text(tokens: Tensor, length: Tensor | int) -> str:
    """Tokens (T,) as letters; behind the end there is nothing but padding."""
    assert (tokens[int(length) :] == PAD).all()
    return "".join(SYMBOLS[i] for i in tokens[: int(length)])


def texts(batch: list[Tensor]) -> list[str]:
    return [text(*pair) for pair in zip(batch[0], batch[1], strict=True)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """40 Greek, 40 Italian and 40 Polish names."""
    return write_names(tmp_path).parent


# --- what is read ---------------------------------------------------------------------------------


def test_symbols_are_the_course_s() -> None:
    assert len(SYMBOLS) == PAD == 57
    assert (SYMBOLS[0], SYMBOLS[26], SYMBOLS[56]) == ("a", "A", "'")


@pytest.mark.parametrize(
    ("name", "spelled"),
    [("Ślusàrski", "Slusarski"), ("O'Néàl", "O'Neal"), ("Abd-al 7", "Abdal "), ("Strauß", "Strau")],
)
def test_names_lose_accents_and_what_is_unknown(name: str, spelled: str) -> None:
    assert normalize(name) == spelled
    tokens, lengths = encode([name, "a" * 19])
    assert tokens.shape == (2, 19)
    assert text(tokens[0], lengths[0]) == spelled


def test_split_is_the_course_s(root: Path) -> None:
    """As the notebook does it, but for the order of the files, which there is the file system's."""
    pairs = []
    for category in ("Greek", "Italian", "Polish"):
        for line in (root / "names" / f"{category}.txt").read_text(encoding="utf-8").split():
            plain = unicodedata.normalize("NFD", line)
            kept = [c for c in plain if unicodedata.category(c) != "Mn"]
            name = "".join(c for c in kept if c in string.ascii_letters + " .,;'")
            pairs.append((name, category))
    random.seed(227)
    random.shuffle(pairs)
    datamodule = data(root)
    for part, expected in (("train", pairs[:96]), ("test", pairs[96:])):
        tokens, lengths, target = datamodule.read(part)
        found = zip(texts([tokens, lengths]), target, strict=True)
        assert [(name, datamodule.class_names[k]) for name, k in found] == expected


def test_validation_is_cut_from_training_whatever_the_seed(root: Path) -> None:
    datamodule = data(root)
    datamodule.setup("fit")
    train, val = (sorted(texts(list(datamodule.splits[s]))) for s in ("train", "val"))
    assert (len(train), len(val)) == (86, 10)
    assert sorted(train + val) == sorted(texts(list(datamodule.read("train"))))
    other = data(root)
    other.seed = 5
    other.setup("fit")
    assert torch.equal(other.splits["val"][0], datamodule.splits["val"][0])


def test_hidden_files_blank_lines_and_blanks_are_left_out(root: Path) -> None:
    (root / "names" / "._Greek.txt").write_bytes(b"\xff")  # as macOS leaves them
    (root / "names" / "MD5SUMS").write_text("x")
    (root / "names" / "Korean.txt").write_text("\ufeffPark \r\n\r\n Lim\r\n")
    datamodule = data(root)
    assert datamodule.class_names == ("Greek", "Italian", "Korean", "Polish")
    read = [texts(list(datamodule.read(part))) for part in ("train", "test")]
    assert {"Park", "Lim"} < {*chain(*read)}
    assert sum(map(len, read)) == 122


def test_linear_baseline_answers_for_the_evaluation_part(root: Path) -> None:
    datamodule = data(root)
    found = linear_baseline(datamodule)
    *_, target = datamodule.read_test()
    assert found.shape == target.shape
    assert (found == target).float().mean() > 0.9


# --- batches --------------------------------------------------------------------------------------


def loader(lengths: list[int], stage: str = "train", **options: Any) -> NameLoader:
    """Names of given lengths; the target is the number of the name."""
    tokens, sizes = encode(["a" * length for length in lengths])
    arguments: dict[str, Any] = {"batch_size": 4, "stage": stage} | options
    return NameLoader([tokens, sizes, torch.arange(len(lengths))], **arguments)


name_lengths = st.lists(st.integers(1, 19), min_size=4, max_size=60)


@given(name_lengths, st.integers(1, 4), st.integers(0, 3))
def test_every_name_comes_in_every_epoch_and_no_batch_is_longer_than_its_longest(
    lengths: list[int], world: int, epoch: int
) -> None:
    loaders = [loader(lengths, rank=rank, world_size=world) for rank in range(world)]
    for each in loaders:
        each.set_epoch(epoch)
    shares = [list(each) for each in loaders]
    assert len({len(share) for share in shares}) == 1  # collectives meet
    assert len({len(batch[2]) for batch in chain(*shares)}) == 1
    for tokens, sizes, target in chain(*shares):
        assert tokens.shape[1] == sizes.max()
        assert sizes.tolist() == [lengths[number] for number in target]
    seen = torch.cat([batch[2] for batch in chain(*shares)])
    batch = len(shares[0][0][2]) * world
    assert set(seen.tolist()) == set(range(len(lengths)))
    assert len(seen) - len(lengths) < batch  # only the last batch is filled up


@given(name_lengths, st.integers(1, 4))
def test_evaluation_shows_every_name_once(lengths: list[int], world: int) -> None:
    loaders = [loader(lengths, "evaluate", rank=r, world_size=world) for r in range(world)]
    seen = [batch for each in loaders for batch in each]
    assert sorted(torch.cat([batch[2] for batch in seen]).tolist()) == list(range(len(lengths)))
    assert all(tokens.shape[1] == sizes.max() for tokens, sizes, _ in seen)


def test_prediction_keeps_the_order() -> None:
    found = torch.cat([batch[2] for batch in loader([5, 1, 19, 3, 7, 2], "predict")])
    assert found.tolist() == list(range(6))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = torch.randint(1, 20, (200,), generator=torch.Generator().manual_seed(0)).tolist()

    def order(seed: int, epoch: int) -> list[int]:
        torch.rand(3)  # the global generator plays no part
        each = loader(lengths, seed=seed)
        each.set_epoch(epoch)
        return torch.cat([batch[2] for batch in each]).tolist()

    assert order(0, 0) == order(0, 0)
    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert len({tuple(o) for o in orders}) == 4


def test_batches_hold_little_padding() -> None:
    lengths = torch.randint(2, 20, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = list(loader(lengths, batch_size=32))
    assert sum(batch[0].numel() for batch in batches) < 1.15 * sum(lengths)
    short = [tokens.shape[1] for tokens, _, _ in batches]
    assert short != sorted(short)  # the batches are shuffled


@pytest.mark.parametrize("balanced", [True, 0.5])
def test_balanced_draws_large_languages_less_often(root: Path, balanced: bool | float) -> None:
    extra = "".join(f"{'abcdefgh'[i % 8]}{i * 'o'}ini\n" for i in range(15))
    with (root / "names" / "Italian.txt").open("a") as file:
        file.write(extra * 40)
    datamodule = data(root, balanced=balanced, batch_size=32)
    datamodule.setup("fit")
    each = datamodule.train_dataloader()
    first = torch.cat([batch[2] for batch in each])
    expected = datamodule.splits["train"][2].bincount() ** (1 - float(balanced))
    drawn, wanted = first.bincount() / len(first), expected / expected.sum()
    assert drawn.tolist() == pytest.approx(wanted.tolist(), abs=0.08)
    assert torch.equal(first, torch.cat([batch[2] for batch in each]))
    each.set_epoch(1)
    assert not torch.equal(first, torch.cat([batch[2] for batch in each]))
    val = torch.cat([batch[2] for batch in datamodule.val_dataloader()])
    assert sorted(val.tolist()) == sorted(datamodule.splits["val"][2].tolist())


# --- mistakes -------------------------------------------------------------------------------------


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"names is missing.* unzip https://.*Arabic.txt exists"):
        data(tmp_path)


@pytest.mark.parametrize("balanced", [-0.5, 1.5])
def test_a_power_out_of_range(root: Path, balanced: float) -> None:
    with pytest.raises(UserError, match=rf"balanced must be in \[0, 1\], got {balanced}; 0 draws"):
        data(root, balanced=balanced)


def test_a_single_language(root: Path) -> None:
    for name in ("Greek", "Polish"):
        (root / "names" / f"{name}.txt").unlink()
    with pytest.raises(UserError, match=r"holds 1 of the files .* at least two are needed"):
        data(root)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_file(root: Path, content: bytes) -> None:
    (root / "names" / "Greek.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"Greek.txt holds no names; write one a line"):
        data(root).setup("fit")


def test_file_that_is_not_utf8(root: Path) -> None:
    (root / "names" / "Greek.txt").write_bytes("Ñ\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"Greek.txt, line 1: not UTF-8"):
        data(root).setup("fit")


def test_missing_names_file(root: Path) -> None:
    with pytest.raises(UserError, match=r"nothing.txt cannot be read: No such file"):
        data(root, names_file=str(root / "nothing.txt")).setup("predict")


@pytest.mark.parametrize("name", ["李", "007", ""])
def test_name_without_a_known_letter(root: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"{name!r} has none of the letters a to z; spell it"):
        data(root, names=["Rossini", name]).setup("predict")


def test_other_languages_than_the_run_s(root: Path) -> None:
    state = data(root).state_dict()
    (root / "names" / "Greek.txt").unlink()
    with pytest.raises(UserError, match=r"trained on Greek, Italian, Polish, but .*train a new"):
        data(root).load_state_dict(state)


# --- a run, its log and its guesses ---------------------------------------------------------------


def fit(root: Path, run: str, *flags: str, epochs: int = 2) -> Path:
    flags = (f"--data.data_dir={root}", "--data.batch_size=32", *flags)
    train.main(["fit", f"--config={COURSE}", f"--run={run}", *flags,
                f"--trainer.max_epochs={epochs}", "--trainer.accelerator=cpu"])  # fmt: skip
    end_wandb()
    return Path("runs/last_names_course") / run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with names and a run that has learned them."""
    home = tmp_path_factory.mktemp("home")
    write_names(home / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        fit(Path("data"), "x", "--trainer.callbacks.last_name=Nguyen", "--test=true", epochs=8)
    return home


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return Path("runs/last_names_course/x")


def column(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def test_log_has_the_course_s_format(run: Path) -> None:
    log = json.loads((run / "submission_log.json").read_text())
    history = log["history"]
    assert history["train_losses"] == pytest.approx(column(run, "train/loss"), abs=1e-6)
    assert len(history["train_losses"]) == 8 * 3  # 96 names in batches of 32
    accuracies = torch.tensor(column(run, "train/accuracy")).reshape(8, 3).mean(1)
    assert history["train_accuracies"] == pytest.approx((100 * accuracies).tolist(), abs=1e-3)
    assert len(history["eval_accuracies"]) == 8
    assert log["hparams"] == {
        "hidden_size": 128, "num_layers": 1, "dropout": 0.0, "optimizer_class": "Adam",
        "lr": 0.002, "batch_size": 32, "epochs": 8, "seed": 0,
    }  # fmt: skip
    assert [name for name, _ in log["model"]] == [
        "embedding.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0",
        "rnn.bias_hh_l0", "output.weight", "output.bias",
    ]  # fmt: skip
    assert log["model"][0][1] == [58, 128]
    assert log["last_name"] == "Nguyen"
    assert log["source_init"].lstrip().startswith("def __init__(")
    assert log["source_forward"].lstrip().startswith("def forward(")


def test_last_evaluation_is_what_the_test_finds(run: Path) -> None:
    (accuracy,) = column(run, "test/accuracy")
    log = json.loads((run / "submission_log.json").read_text())
    assert log["history"]["eval_accuracies"][-1] == pytest.approx(100 * accuracy, abs=1e-3)
    assert accuracy > 0.9


@pytest.mark.slow
def test_training_is_the_same_without_the_log(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    logged, bare = fit(Path("data"), "logged"), fit(Path("data"), "bare", "--trainer.callbacks=[]")
    assert column(logged, "train/loss") == column(bare, "train/loss")
    assert not (bare / "submission_log.json").exists()


@pytest.mark.slow
def test_log_of_a_continued_run_is_that_of_an_uninterrupted_one(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    whole = fit(Path("data"), "whole", epochs=3)
    fit(Path("data"), "halves", epochs=1)
    halves = fit(Path("data"), "halves", epochs=3)
    logs = [json.loads((each / "submission_log.json").read_text()) for each in (whole, halves)]
    assert logs[0] == logs[1]


def test_names_are_predicted_without_the_training_names(
    run: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.txt").write_text("Aleczyński\nMasini\n", encoding="utf-8")
    names = ["Papadopoulos", "Ro[b]ini"]
    predict.main([str(run), "--names", *names, f"--names_file={tmp_path / 'new.txt'}",
                  f"--data_dir={tmp_path}", "--accelerator=cpu"])  # fmt: skip
    with (run / "predictions.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header[:5] == ["name", "language", "probability", "language2", "probability2"]
    assert [row[0] for row in rows] == [*names, "Aleczyński", "Masini"]
    assert [row[1] for row in rows] == ["Greek", "Italian", "Polish", "Italian"]
    for row in rows:
        first, second, third = (float(p) for p in row[2::2])
        assert 1 >= first >= second >= third >= 0
        assert first + second + third == pytest.approx(1, abs=2e-4)
    printed = capsys.readouterr().out
    assert "Ro[b]ini" in printed
    assert f"4 predictions in {run / 'predictions.csv'}" in printed
    assert "submit.py" not in printed


def test_inputs_of_another_kind_are_told_with_those_of_the_run(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        predict.main([str(run), "--text", "A line."])
    told = capsys.readouterr().err
    assert told.startswith(f"error: --text does not fit {run}: a run on LastNamesDataModule")
    assert told.endswith("predicts --names or --names_file.\n")


def test_unknown_characters_are_told_in_one_sentence(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        predict.main([str(run), "--names", "李"])
    assert capsys.readouterr().err.startswith("error: '李' has none of the letters a to z")
