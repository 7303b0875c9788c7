"""Runs side by side: what is printed, what is drawn, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from test_spike_pictures import metrics_of, trained_lstm  # noqa: F401  a fixture

import spikes
from core.runs import Run
from pipeline.comparison import replay


def make_run(folder: Path, seed: int = 0, accuracy: float = 0.99, peak: float = 0.0) -> Path:
    """A run folder with as much as a comparison needs: 20 epochs of 10 steps, and one peak."""
    loss = np.ones(200)
    loss[159] += peak
    metrics = metrics_of(loss)
    metrics.loc[metrics["val/accuracy"].notna(), "val/accuracy"] = accuracy
    folder.mkdir(parents=True)
    metrics.to_csv(folder / "metrics.csv", index=False)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed_everything": seed}))
    return folder


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take most of the time, and not every test looks at them."""
    monkeypatch.setattr("pipeline.comparison.spike_pictures", lambda runs: {})


def said(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    spikes.main([str(arg) for arg in args])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    with pytest.raises(SystemExit) as stop:
        spikes.main([str(arg) for arg in args])
    assert stop.value.code == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    return sentence


@pytest.mark.slow
def test_accuracy_stands_beside_excess(capsys: pytest.CaptureFixture[str]) -> None:
    plain = make_run(Path("runs/plain/a"), peak=8.25)
    steady = make_run(Path("runs/steady/a"))
    out = said(capsys, plain, steady)
    rows = [line.split() for line in out.splitlines()]
    assert ["plain", "0", "99.0%", "epoch", "1", "0.80", "1"] in rows
    assert "steady against plain: excess loss 0.80 -> 0.00, final accuracy 99.0% -> 99.0%; " in out
    assert "no kinks." in out
    assert "No gradient through time of plain: it has neither worst_spike.pt nor" in out
    files = {path.name for path in (steady / "comparison").iterdir()}
    assert files == {"spikes_curves.png", "spikes_norms.png", "spikes.csv"}
    table = pd.read_csv(steady / "comparison" / "spikes.csv")
    assert table["label"].tolist() == ["plain", "steady"]
    np.testing.assert_allclose(table["excess"], [0.8, 0])
    assert table["learned"].tolist() == [True, True]


@pytest.mark.usefixtures("_undrawn")
def test_a_run_that_does_not_learn_is_not_called_fixed(capsys: pytest.CaptureFixture[str]) -> None:
    plain = make_run(Path("runs/plain/a"), peak=8.25)
    frozen = make_run(Path("runs/frozen/a"), accuracy=0.25)
    out = said(capsys, plain, frozen)
    assert "NOT FIXED: 1 of 1 end below 95% accuracy" in out
    assert "no kinks" not in out
    assert "NOT FIXED" not in said(capsys, plain, frozen, "--target", "0.2")


@pytest.mark.usefixtures("_undrawn")
def test_seeds_of_a_config_belong_together(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(Path(f"runs/plain/{s}"), seed=s, peak=4 * s + 0.25) for s in (1, 2)]
    runs += [make_run(Path(f"runs/steady/{s}"), seed=s) for s in (1, 2)]
    labels = ["plain", "plain", *["a label of more characters than there is room for"] * 2]
    out = said(capsys, *runs, "--output", "here", "--labels", *labels)
    assert "against plain: excess loss 0.60 -> 0.00" in out  # the mean of .4 and .8
    assert all(len(line) <= 80 for line in out.splitlines()[:5])
    assert Path("here/spikes_seeds.png").exists()
    assert not Path("runs/steady/2/comparison").exists()


@pytest.mark.usefixtures("_undrawn")
def test_labels_say_what_belongs_together(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(Path(f"runs/plain/{n}"), seed=1, peak=8.25 * (n == "a")) for n in "ab"]
    assert "plain/b against plain/a" in said(capsys, *runs)  # equal seeds: something else differs
    assert "after against before" in said(capsys, *runs, "--labels", "before", "after")


@pytest.mark.slow
def test_the_gradient_through_time_is_made_again(
    capsys: pytest.CaptureFixture[str],
    trained_lstm: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    other = tmp_path / "other" / "first"
    shutil.copytree(trained_lstm, other)
    for name in ("worst_spike.pt", "spikes.jsonl"):
        (other / name).unlink(missing_ok=True)
    out = said(capsys, trained_lstm, other, "--output", "here", "--labels", "kept", "lost")
    assert "No gradient through time of kept" not in out
    assert "No gradient through time of lost" in out
    assert Path("here/spikes_through_time.png").exists()
    run = Run(trained_lstm)
    seen = replay(run)
    assert seen.proof.endswith("reproduced")


def test_without_kept_weights_a_checkpoint_serves(
    trained_lstm: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    other = tmp_path / "other" / "first"
    shutil.copytree(trained_lstm, other)
    saved = torch.load(other / "worst_spike.pt", weights_only=True)
    torch.save(saved | {"weights": None, "step": 4}, other / "worst_spike.pt")
    assert replay(Run(other)).origin == "11 steps later"
    torch.save(saved | {"weights": None, "step": 20}, other / "worst_spike.pt")
    assert replay(Run(other)).origin == "5 steps before"


def test_what_cannot_be_compared_is_told_in_one_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, other = make_run(Path("runs/plain/a")), make_run(Path("runs/other/a"))
    Path("empty").mkdir()
    assert "empty is not a run folder" in refused(capsys, run, "empty")
    assert "needs two runs or more" in refused(capsys, run)
    assert "needs two runs or more" in refused(capsys, run, run.resolve())
    assert "one label for each of the 2 runs, got 1" in refused(capsys, run, other, "--labels", "x")
    same = refused(capsys, run, other, "--labels", "x", "x")
    assert "are both labelled x and have the same seed" in same
    assert "--target must be in (0, 1], got 95" in refused(capsys, run, other, "--target", "95")
    (other / "metrics.csv").write_text("step,epoch\n0,0\n")
    assert "cannot be compared: it has no column train/loss" in refused(capsys, run, other)
    (other / "metrics.csv").write_text("")
    assert "cannot be compared: No columns to parse" in refused(capsys, run, other)
    (other / "metrics.csv").unlink()
    assert "metrics.csv does not exist; train the run" in refused(capsys, run, other)
