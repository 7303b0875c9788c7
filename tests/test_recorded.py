"""The record of finished runs, and what the benchmarks that keep one do with it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_data import write_names
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from benchmarks import last_names, spike_fixes, spike_gpt
from benchmarks.recorded import RunRecord
from core.errors import UserError
from steadyfit.measures import SpikeMeasures

BOOK = b"It is a truth universally acknowledged, that a single man in possession of a good " * 40


@pytest.fixture
def books(tmp_path: Path) -> Path:
    (tmp_path / "books").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "books" / name).write_bytes(name.encode() + BOOK)
    return tmp_path / "books"


# The record


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    trained: list[Any] = []

    def train(run: dict[str, Any]) -> dict[str, Any]:
        trained.append(run)
        return {"loss": float("inf")}

    runs: list[dict[str, Any]] = [{"fix": "a", "betas": [0.9, 0.99]}, {"fix": "b"}]
    for _ in range(2):
        assert RunRecord(tmp_path / "x.jsonl").complete(runs, train) == 0
    assert trained == runs
    line = RunRecord(tmp_path / "x.jsonl").find({"fix": "b"})
    assert line is not None
    assert line["measures"] == {"loss": float("inf")}
    assert {"commit", "torch", "cpu", "seconds"} <= line.keys()
    assert torch.__version__.startswith(line["torch"])


def test_a_run_that_would_end_too_late_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def train(run: dict[str, Any]) -> dict[str, Any]:
        now[0] += 60
        return {}

    runs = [{"seed": seed} for seed in range(9)]
    record = RunRecord(tmp_path / "x.jsonl")
    assert record.complete(runs, train, minutes=3.5) == 9 - 3
    assert record.complete(runs, train, minutes=0) == 9 - 3
    assert record.complete(runs, train) == 0


# spike_fixes


def found(excess: float = 1.0, first: int | None = 7) -> dict[str, Any]:
    return vars(SpikeMeasures(excess, 3, 2, 1, 0, first, 0.99, 0.9, True))


def test_a_row_stands_for_the_seeds_that_have_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        spike_fixes, "train", lambda run, output: found(2.0 if run["fix"] == "untouched" else 0.5)
    )
    args = ["--record", str(tmp_path / "x.jsonl"), "--fixes", "untouched", "steady", "--seeds"]
    spike_fixes.main([*args, "1", "2"])
    monkeypatch.setattr(spike_fixes, "train", lambda run, output: pytest.fail("it has a line"))
    capsys.readouterr()
    spike_fixes.main([*args, "1", "2"])
    spike_fixes.main([*args, "1", "2", "3", "--tables"])
    printed = capsys.readouterr().out
    row = "| steady | 2 | 99.0 ± 0.0 | 2/2 | 0.500 | 4.0 | 2.0 / 1.0 / 0.0 | 0/2, 0/2 | 3.0 | 7 |"
    assert printed.count(row) == 2
    assert "4 of 4 runs, clean stream" in printed
    assert "4 of 6 runs, clean stream" in printed


def test_another_config_or_flag_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = spike_fixes.run_of("untouched", 1, "clean", [])
    assert first == json.loads(json.dumps(first))
    assert first != spike_fixes.run_of("untouched", 1, "clean", ["--trainer.max_epochs=1"])
    config = tmp_path / "configs" / "temporal_order_lstm.yaml"
    config.parent.mkdir()
    text = Path("configs/temporal_order_lstm.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    config.write_text(f"# a comment\n{text}")
    assert first == spike_fixes.run_of("untouched", 1, "clean", [])
    config.write_text(text.replace("1.0e-3", "2.0e-3"))
    assert first != spike_fixes.run_of("untouched", 1, "clean", [])


@pytest.mark.slow
@pytest.mark.parametrize("fix", ["AdaGC", "SPAM", "reaction skip", "steady"])
def test_a_fix_is_trained(fix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--trainer.max_epochs=2", "--data.epoch_size=64", "--data.val_size=32"]
    args = ["--record", str(tmp_path / "x.jsonl"), "--seeds", "101", "--fixes", fix, *small]
    spike_fixes.main([*args, "--output", str(tmp_path / "runs")])
    assert "1 of 1 runs" in capsys.readouterr().out
    (metrics,) = tmp_path.glob("runs/temporal_order_lstm*/*/metrics.csv")
    assert len(metrics.read_text().splitlines()) == 1 + 2 * 2


# spike_gpt


@pytest.mark.slow
def test_gpt_is_tuned_and_reported_once(
    books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, picture = tmp_path / "x.jsonl", tmp_path / "x.png"
    args = ["--steps", "2", "--seeds", "1", "--rates", "0.012", "--fixes", "untouched", "both"]
    args += ["--record", str(record)]
    spike_gpt.main([str(books), *args])
    lines = record.read_text().splitlines()
    assert len(lines) == 3 * 2 + 2
    printed = capsys.readouterr().out
    assert "2 runs; seeds [1]; 2 steps; commit" in printed
    assert len([line for line in printed.splitlines() if line.startswith("| both, max_rms")]) == 1
    spike_gpt.main([str(books), *args])
    spike_gpt.main([*args, "--picture", str(picture)])
    assert record.read_text().splitlines() == lines
    assert capsys.readouterr().out == 2 * printed
    assert picture.stat().st_size > 10_000


def test_a_rate_is_stable_if_all_seeds_end_near_the_best_of_untouched() -> None:
    ends = {
        ("untouched", 0.1): [1.9, 2.3],
        ("untouched", 0.2): [2.1, 2.9],
        ("fix", 0.1): [2.1, 2.3],
        ("fix", 0.2): [2.19, 2.0],
        ("fix", 0.4): [2.19, 2.21],
    }
    by_rate = {
        key: [{"measures": {"val_loss": value}} for value in values] for key, values in ends.items()
    }
    assert spike_gpt.stable_rate(by_rate, "fix", [0.1, 0.2, 0.4, 0.8]) == "0.2"
    assert spike_gpt.stable_rate(by_rate, "untouched", [0.1, 0.2]) == "none"


def test_steps_lost_are_those_above_the_lowest_median() -> None:
    loss = np.full(300, 2.0)
    loss[200:205] = 2.6
    found = spike_gpt.measures(loss)
    assert found == {"steps_lost": 5, "excess": pytest.approx(5 * 0.35), "excursions": 0}
    loss[200] = 4.5
    assert spike_gpt.measures(loss)["excursions"] == 1


def test_the_setting_of_the_lowest_mean_is_chosen(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "x.jsonl")
    runs = spike_gpt.tuning_runs(["AdaGC"], 1000)
    for run, value in zip(runs, [2.0, 3.0, 2.4, 2.4, 2.1, 2.9], strict=True):
        assert spike_gpt.chosen(record, "AdaGC", 1000) is None
        record.add(run, {"val_loss": value}, 1.0)
    assert spike_gpt.chosen(record, "AdaGC", 1000) == {"lambda_rel": 1.5}
    assert spike_gpt.chosen(record, "untouched", 1000) == {}


def test_gpt_begins_as_a_guess_and_sees_no_future() -> None:
    torch.manual_seed(0)
    network = spike_gpt.GPT()
    assert sum(p.numel() for p in network.parameters()) == 391_008
    tokens = torch.randint(256, (4, spike_gpt.LENGTH + 1))
    assert spike_gpt.loss_of(network, tokens).item() == pytest.approx(np.log(256), abs=0.1)
    other = tokens.clone()
    other[:, 40:] = 0
    with torch.no_grad():
        before, after = network(tokens[:, :-1]), network(other[:, :-1])
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_held_out_text_is_not_trained_on(books: Path) -> None:
    data = spike_gpt.Books(books)
    assert len(data.train) + len(data.val) == 2 * (len(BOOK) + 5)
    first = (books / "a.txt").read_bytes()
    cut = int(len(first) * 0.95)
    assert bytes(data.train[:cut].tolist()) == first[:cut]
    assert bytes(data.val[: len(first) - cut].tolist()) == first[cut:]
    with pytest.raises(UserError, match="holds no"):
        spike_gpt.Books(books / "none")


@pytest.mark.parametrize("fix", spike_gpt.SETTINGS)
def test_a_fix_acts_on_a_planted_spike(fix: str) -> None:
    """The gradient is a million times as large as before: what is left of it, or of the step?"""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(50))
    setting = spike_gpt.SETTINGS[fix][0]
    optimizer, before_step = spike_gpt.equip(fix, setting, [weight], lr=0.01)
    moves = []
    for t in range(130):
        weight.grad = torch.randn(50) * (1e-3 if t < 129 else 1e3)
        start = weight.detach().clone()
        before_step(torch.tensor(1.0))
        optimizer.step()
        moves.append(float((weight.detach() - start).norm()))
    usual, last = np.median(moves), moves[-1]
    if fix != "no momentum":  # 0.1 g / sqrt(0.001 g^2 / (1 - 0.999^130)) is 1.1 learning rates
        assert last < 2.1 * 0.01 * 50**0.5
    if fix in ("ZClip", "AdaGC", "update rms", "both", "StableAdamW"):
        assert last < 3 * usual
    if fix == "gradient norm":
        assert weight.grad is not None
        assert float(weight.grad.norm()) == pytest.approx(setting["max_norm"], rel=1e-4)


# Last names


def test_scores_of_names_are_those_of_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    found, target = torch.randint(0, 5, (2, 200), generator=generator)
    found[found == 3], target[target == 3] = 4, 2  # of class 3 there is nothing
    draws = np.stack([np.ones(200, int), np.arange(200) % 3])
    accuracy, macro_f1 = last_names.scores(found.numpy(), target.numpy(), draws)
    for row, counts in enumerate(draws):
        preds, truth = (e.repeat_interleave(torch.from_numpy(counts)) for e in (found, target))
        same = multiclass_accuracy(preds, truth, 5, average="micro")
        assert accuracy[row] == pytest.approx(same.item())
        assert macro_f1[row] == pytest.approx(multiclass_f1_score(preds, truth, 5).item())


def test_networks_stand_beside_the_linear_classifier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_names(tmp_path)
    record = tmp_path / "x.jsonl"
    flags = [f"--data_dir={tmp_path}", f"--record={record}", "--models=RNN", "--seeds=0"]
    last_names.main(flags)
    linear, network = RunRecord(record).lines
    assert len(linear["measures"]["classes"]) == len(network["measures"]["classes"]) == 24
    assert network["measures"]["parameters"] == 40_835  # of three languages
    table = capsys.readouterr().out
    assert table.count("| RNN | 1 | ") == 2
    assert table.startswith("24 names; ")
