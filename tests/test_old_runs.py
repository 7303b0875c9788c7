"""Run folders that earlier versions have left: validated, tested, predicted with, continued."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import end_wandb

import predict
import train
from core.runs import load_checkpoint

OLD_RUNS = Path(__file__).parent / "old_runs"
pytestmark = pytest.mark.slow
RUNS = sorted(path.parent.relative_to(OLD_RUNS) for path in OLD_RUNS.glob("*/*/config.yaml"))


@pytest.fixture(params=RUNS, ids=lambda path: path.parent.name)
def old_run(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy of a kept run, below ``runs/`` of the folder that the test stands in."""
    monkeypatch.chdir(tmp_path)
    run = Path("runs") / request.param
    shutil.copytree(OLD_RUNS / request.param, run)
    return run


def metric(run: Path, name: str) -> float:
    metrics = pd.read_csv(run / "metrics.csv")
    return float(metrics[name].dropna().iloc[-1])


def test_is_tested_and_validated(old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Validation finds again what the run recorded when it was trained."""
    best = load_checkpoint(old_run / "checkpoints" / "best.ckpt")["metrics"]
    train.main(["validate", "--run", str(old_run)])
    said = capsys.readouterr().out
    for name, value in best.items():
        printed = next(
            line.split()[1] for line in said.splitlines() if line.strip().startswith(name)
        )
        assert float(printed) == pytest.approx(value, abs=2e-3), name
    end_wandb()
    train.main(["test", "--run", str(old_run)])
    assert metric(old_run, "test/loss") == pytest.approx(metric(old_run, "val/loss"), rel=0.5)


def test_is_continued(old_run: Path) -> None:
    """The same folder, one epoch more: what was recorded stays, and the steps go on."""
    before = pd.read_csv(old_run / "metrics.csv")
    last = old_run / "checkpoints" / "last.ckpt"
    done = load_checkpoint(last)
    epochs = done["epoch"] + 1
    train.main(["fit", "--run", str(old_run), f"--trainer.max_epochs={epochs + 1}"])
    after = pd.read_csv(old_run / "metrics.csv")
    assert load_checkpoint(last)["global_step"] == done["global_step"] * (epochs + 1) // epochs
    assert after["step"].max() + 1 == load_checkpoint(last)["global_step"]
    kept = after[after["step"] <= before["step"].max()].reset_index(drop=True)
    # of a count that new rows have now and then pandas makes floats
    pd.testing.assert_frame_equal(kept[before.columns], before, check_dtype=False)


def test_is_the_same_run_by_any_path(
    old_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--run LINK`` and ``--run .`` trained a new run, somewhere else."""
    steps = load_checkpoint(old_run / "checkpoints" / "last.ckpt")["global_step"]
    link = tmp_path / "link"
    link.symlink_to(old_run.resolve())
    flags = ["--trainer.max_epochs=4"]
    before = {path for path in tmp_path.glob("**/config.yaml")}
    train.main(["fit", "--run", str(link), *flags, "--trainer.logger=false"])
    end_wandb()
    monkeypatch.chdir(old_run)
    train.main(["fit", "--run", ".", *flags, "--trainer.logger=false"])
    assert {path for path in tmp_path.glob("**/config.yaml")} == before
    assert load_checkpoint(Path("checkpoints", "last.ckpt"))["global_step"] > steps


def test_predicts(old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A regression of every step has no classes: a sentence (once a TypeError of a list index)."""
    if old_run.parent.name == "running_mean_rnn":
        with pytest.raises(SystemExit):
            predict.main([str(old_run)])
        assert "error: " in capsys.readouterr().err
        assert not list(old_run.glob("submission.*"))
    else:
        predict.main([str(old_run)])
        assert len(pd.read_csv(old_run / "submission.csv")) > 0
