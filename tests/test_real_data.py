"""The whole job on the real sets: train, test, predict for each competition, score with its key."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIGS, end_wandb

import benchmarks.jfleg as jfleg_table
import predict
import submit
import train
from core.errors import UserError
from datamodules import GrammarDataModule, LastNamesDataModule, MNISTDataModule
from metrics.edits import apply_edits, best_sum, compare, extract_edits
from metrics.gleu import corpus_gleu
from metrics.m2 import M2Sentence, read_m2
from metrics.maxmatch import m2_scores

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.filterwarnings("ignore:.*test_batch"),  # twenty of its images are not lossless
]


@pytest.fixture(scope="module")
def short_run(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of a narrow network, trained and tested."""
    home = tmp_path_factory.mktemp("short")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        flags = ["--model.network.widths=[16,32,32]", "--trainer.max_epochs=2", "--run=short"]
        config = f"--config={CONFIGS / 'cifar10_cpu.yaml'}"
        train.main(["fit", config, f"--data.data_dir={real_data}", *flags])
        end_wandb()
        train.main(["test", "--run=cifar10_cpu/short", "--model.tta=none"])
        end_wandb()
        return home / "runs" / "cifar10_cpu" / "short"


def accuracy_of(csv_file: Path, key: Path) -> tuple[int, float]:
    """Rows of a submission, and the share of the scored ids that it has right."""
    rows, truth = (dict(csv.reader(p.read_text().splitlines())) for p in (csv_file, key))
    del rows["id"], truth["id"]
    return len(rows), float(np.mean([rows[i] == label for i, label in truth.items()]))


def test_real_images_are_learned(short_run: Path) -> None:
    assert recorded_accuracy(short_run) > 0.55


def recorded_accuracy(run: Path) -> float:
    with (run / "metrics.csv").open(newline="") as file:
        (value,) = [r["test/accuracy"] for r in csv.DictReader(file) if r["test/accuracy"]]
    return float(value)


def test_kaggle_score_is_the_test_accuracy(
    short_run: Path, real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (real_data / "kaggle-cifar10").is_dir():
        pytest.skip("REAL_DATA has no kaggle-cifar10")
    monkeypatch.chdir(short_run.parents[2])
    output = ["--tta=none", "--data=KaggleCIFAR10DataModule", "--output=kaggle.csv"]
    predict.main([str(short_run), *output])
    count, score = accuracy_of(Path("kaggle.csv"), real_data / "kaggle-cifar10-key.csv")
    assert count == 12_000
    assert score == pytest.approx(recorded_accuracy(short_run), abs=0.0005)
    submit.main(["kaggle.csv", "--dry_run"])


def test_ucsb_score(short_run: Path, real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (real_data / "ucsb").is_dir():
        pytest.skip("REAL_DATA has no ucsb")
    monkeypatch.chdir(short_run.parents[2])
    output = ["--tta=none", "--data=UCSBCIFAR10DataModule", "--output=ucsb.csv"]
    predict.main([str(short_run), *output])
    count, score = accuracy_of(Path("ucsb.csv"), real_data / "ucsb-key.csv")
    assert count == 2_000
    assert score == pytest.approx(
        recorded_accuracy(short_run), abs=0.03
    )  # 2,000 of the 10,000 test images
    submit.main(["ucsb.csv", "--dry_run"])


def test_lenet_learns_mnist_in_560_steps(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of the steps in which vanilla SGD gets there, and the submission has them right."""
    if not (real_data / "MNIST").is_dir():
        pytest.skip("REAL_DATA has no MNIST")
    monkeypatch.chdir(tmp_path)
    config = f"--config={CONFIGS / 'mnist_lenet_fast.yaml'}"
    train.main(["fit", config, f"--data.data_dir={real_data}", "--run=x", "--test=true"])
    run = Path("runs/mnist_lenet_fast/x")
    accuracy = recorded_accuracy(run)
    assert accuracy > 0.975
    with (run / "metrics.csv").open(newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 560
    assert np.mean(losses[-100:]) < 0.07

    predict.main([str(run)])
    names = MNISTDataModule.class_names
    _, labels = MNISTDataModule(data_dir=str(real_data)).read_test()
    key = [("id", "label"), *enumerate((names[k] for k in labels.tolist()), start=1)]
    Path("key.csv").write_text("".join(f"{i},{name}\n" for i, name in key))
    count, score = accuracy_of(run / "submission.csv", Path("key.csv"))
    assert count == 10_000
    assert score == pytest.approx(accuracy, abs=1e-6)


def test_last_names_are_learned(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs of the course's network; 46 % of the evaluation part are Russian."""
    if not (real_data / "names").is_dir():
        pytest.skip("REAL_DATA has no names")
    data = LastNamesDataModule(str(real_data))
    assert data.num_classes == 18
    parts = {part: data.read(part) for part in ("train", "test")}
    assert [len(target) for _, _, target in parts.values()] == [16_040, 4_010]
    assert max(int(lengths.max()) for _, lengths, _ in parts.values()) == 19
    assert {int(tokens.max()) for tokens, _, _ in parts.values()} == {57}
    russian = parts["test"][2] == data.class_names.index("Russian")
    assert russian.float().mean() == pytest.approx(0.464, abs=5e-4)

    monkeypatch.chdir(tmp_path)
    flags = [f"--data.data_dir={real_data}", "--trainer.max_epochs=2", "--run=x", "--test=true"]
    train.main(["fit", f"--config={CONFIGS / 'last_names_course.yaml'}", *flags])
    run = Path("runs/last_names_course/x")
    assert recorded_accuracy(run) > 0.68
    log = json.loads((run / "submission_log.json").read_text())
    assert len(log["history"]["train_losses"]) == 2 * 63
    accuracy = 100 * recorded_accuracy(run)
    assert log["history"]["eval_accuracies"][-1] == pytest.approx(accuracy, abs=1e-3)


def jfleg_lines(real_data: Path, name: str) -> list[str]:
    path = real_data / "jfleg" / "dev" / name
    if not path.is_file():
        pytest.skip("REAL_DATA has no jfleg")
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def test_gleu_of_jfleg(real_data: Path) -> None:
    """The numbers that the authors' own program gives for the development set (Python 3)."""
    source = jfleg_lines(real_data, "dev.src")
    spellchecked = jfleg_lines(real_data, "dev.spellchecked.src")
    people = [jfleg_lines(real_data, f"dev.ref{k}") for k in range(4)]
    references = [list(those) for those in zip(*people, strict=True)]
    assert len(source) == 754
    assert corpus_gleu(source, source, references) == pytest.approx(38.20, abs=0.005)
    assert corpus_gleu(source, spellchecked, references) == pytest.approx(43.43, abs=0.01)
    for k, expected in enumerate([55.76, 55.66, 55.69, 54.11]):
        others = [[*those[:k], *those[k + 1 :]] for those in references]
        assert corpus_gleu(source, people[k], others) == pytest.approx(expected, abs=0.005)


def test_edits_of_jfleg(real_data: Path) -> None:
    """The edits of each person give that person's sentences."""
    source, *people = (
        [" ".join(line.split()) for line in jfleg_lines(real_data, name)]
        for name in ("dev.src", *(f"dev.ref{k}" for k in range(4)))
    )
    gold = []
    for lines in zip(source, *people, strict=True):
        edits = {k: extract_edits(lines[0], line) for k, line in enumerate(lines[1:])}
        assert [apply_edits(lines[0], those) for those in edits.values()] == list(lines[1:])
        gold.append(M2Sentence(lines[0], edits))

    nothing = best_sum(m2_scores(source, gold))
    assert (nothing.correct, nothing.proposed) == (0, 0)
    assert best_sum(m2_scores(people[0], gold)).f() == 1
    others = [M2Sentence(g.source, {k: g.edits[k] for k in (1, 2, 3)}) for g in gold]
    plain = best_sum(
        [compare(g.edits[0], edits) for edits in other.edits.values()]
        for g, other in zip(gold, others, strict=True)
    )
    assert plain.f() == pytest.approx(0.4813, abs=5e-4)
    assert best_sum(m2_scores(people[0], others)).f() > plain.f()


def test_maxmatch_of_jfleg(real_data: Path, tmp_path: Path) -> None:
    """What the M2 scorer (cb874a7) gives for two people against the edits of the other three."""
    path = real_data / "jfleg" / "EACL_exp" / "m2converter" / "dev.ref.m2"
    if not path.is_file():
        pytest.skip("REAL_DATA has no jfleg")
    with pytest.raises(UserError, match="line 340: an edit of tokens 13 to 13, but the sentence"):
        read_m2(path)
    kept, length = [], 0
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        length = len(line.split()) - 1 if line.startswith("S ") else length
        beyond = line.startswith("A ") and int(line.split("|||")[0].split()[2]) > length
        kept += [] if beyond else [line]  # nineteen of them
    (tmp_path / "dev.m2").write_text("".join(kept), encoding="utf-8")
    sentences = read_m2(tmp_path / "dev.m2")
    short = [i for i, those in enumerate(sentences) if len(those.source.split()) <= 20]
    assert len(short) == 500
    theirs = {0: (0.675961, 0.686830, 0.678107), 3: (0.716071, 0.600749, 0.689596)}
    for person, expected in theirs.items():
        lines = jfleg_lines(real_data, f"dev.ref{person}")
        gold = [
            M2Sentence(s.source, {k: s.edits.get(k, []) for k in range(4) if k != person})
            for s in (sentences[i] for i in short)
        ]
        score = best_sum(m2_scores([lines[i] for i in short], gold))
        assert (score.precision, score.recall, score.f()) == pytest.approx(expected, abs=1e-6)


def test_sentences_of_the_books(real_data: Path) -> None:
    if not (real_data / "gutenberg").is_dir():
        pytest.skip("REAL_DATA has no gutenberg")
    books = GrammarDataModule(str(real_data))
    counts = {split: len(books.all_sentences(split)) for split in ("train", "val", "test")}
    assert counts == {"train": 31_433, "val": 1_943, "test": 5_826}
    lines = books.all_sentences("test")
    assert len(books.subwords) == 4000
    assert [books.subwords.decode(tokens) for tokens in books.subwords.encode(lines)] == lines
    assert len(set(lines) & set(books.all_sentences("train"))) < 0.01 * len(lines)


def test_from_books_to_jfleg(
    real_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A network that has only begun to learn, and the whole way to its GLEU on JFLEG."""
    jfleg = real_data / "jfleg" / "dev"
    if not (jfleg.is_dir() and (real_data / "gutenberg").is_dir()):
        pytest.skip("REAL_DATA has no jfleg or no gutenberg")
    monkeypatch.chdir(tmp_path)
    small = ["embedding_dim=64", "num_heads=4", "num_encoder_layers=1", "num_decoder_layers=1",
             "hidden_size=128"]  # fmt: skip
    flags = [f"--model.network.{flag}" for flag in small]
    flags += [f"--data.data_dir={real_data}", "--data.epoch_size=3200", "--data.val_size=50"]
    config = f"--config={CONFIGS / 'grammar.yaml'}"
    train.main(["fit", config, *flags, "--run=x", "--trainer.max_epochs=1"])
    end_wandb()
    run = Path("runs/grammar/x")
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])

    train.main(["test", f"--run={run}", f"--data.test={jfleg}", "--model.beam_width=1"])
    capsys.readouterr()
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    found = next(row for row in reversed(rows) if row["test/gleu"])
    assert float(found["test/gleu_of_source"]) == pytest.approx(38.20, abs=0.005)
    assert float(found["test/gleu"]) < 38
    source = str(jfleg / "dev.src")
    predict.main([str(run), "--text_file", source, "--output=out.txt", "--model.beam_width=1"])
    assert len(Path("out.txt").read_text().splitlines()) == 754
    jfleg_table.main([str(jfleg), "out.txt", f"--data_dir={real_data}"])
    assert "55.76" in capsys.readouterr().out
