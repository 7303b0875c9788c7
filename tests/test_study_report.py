"""The report of a study: its numbers, its pictures, and what it refuses."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import wandb
import yaml
from matplotlib.figure import Figure

import study
from core.errors import UserError
from pipeline.studies import report as study_report
from pipeline.studies.grid import Study
from pipeline.studies.metrics import read_metrics, steps_until, summary
from pipeline.studies.report import curves_picture

RATES, VARIANTS, SEEDS = [0.1, 0.2], ["plain", "steep"], [0, 1, 2]


def accuracy(rate: float, variant: str, seed: int) -> float:
    return 0.9 + rate / 10 + 0.05 * (variant == "steep") + 0.001 * seed


def metrics(rate: float, variant: str, seed: int) -> pd.DataFrame:
    """300 steps of a loss that falls exponentially, twice as fast in the steep variant."""
    steps = np.arange(300)
    speed = rate * (2 if variant == "steep" else 1) / 10
    table = pd.DataFrame({"step": steps, "train/loss": np.exp(-speed * steps)})
    table.loc[[99, 199, 299], "val/accuracy"] = [0.5, 0.8, accuracy(rate, variant, seed)]
    return table


@pytest.fixture(autouse=True)
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study of twelve finished runs."""
    monkeypatch.chdir(tmp_path)
    content = {
        "program": "train.py",
        "method": "grid",
        "metric": {"name": "val/accuracy", "goal": "maximize"},
        "parameters": {
            "model.rate": {"values": RATES},
            "variant": {"values": VARIANTS},
            "seed_everything": {"values": SEEDS},
        },
        "command": ["fit", "--config=x.yaml", "--study=small.yaml", "${args}"],
    }
    Path("small.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    loaded = Study.load("small.yaml")
    for point in loaded.points:
        folder = Path("runs/small") / loaded.name_of(point)
        folder.mkdir(parents=True)
        metrics(*point.values()).to_csv(folder / "metrics.csv", index=False)
        (folder / "point.json").write_text(json.dumps({"finished": True}))
    return loaded


@pytest.fixture
def _no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def said(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    study.main(["report", "small.yaml", *args])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        study.main([*args])
    assert stop.value.code == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    return sentence


@pytest.mark.usefixtures("wandb_offline")
def test_table_and_picture_of_points(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "--x", "rate", "--hue", "variant")
    stem = Path("runs/small/report/val-accuracy-by-rate-and-variant")
    table = pd.read_csv(f"{stem}.csv")
    assert table["variant"].tolist() == ["plain", "steep", "plain", "steep"]
    np.testing.assert_allclose(table["mean"], [0.911, 0.961, 0.921, 0.971])
    np.testing.assert_allclose(table["sd"], 0.001)
    # Student's t for three runs: 4.303 standard errors
    np.testing.assert_allclose(table["high"] - table["mean"], 4.3027 * 0.001 / 3**0.5, rtol=1e-4)
    assert table["n"].tolist() == [3, 3, 3, 3]
    assert "| steep | 0.2 | 97.10 ± 0.10 | 96.85 to 97.35 | 3 |" in out
    assert "| variant | rate | val/accuracy, % | 95 % interval | runs |" in out
    assert Path(f"{stem}.md").read_text() in out
    assert Path(f"{stem}.png").stat().st_size > 10_000
    (folder,) = Path("runs/small/report/wandb").glob("offline-run-*")
    assert list(folder.glob("files/media/images/*.png"))
    assert list(folder.glob("files/media/table/*.json"))


@pytest.mark.usefixtures("_no_wandb")
def test_names_are_shown_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "--x", "variant", "--where", "model.rate=0.2")
    assert "| steep | 97.10 ± 0.10 |" in out
    assert len(out.splitlines()) == 5  # header, rule, two variants, and where the files are
    assert "not finished" not in out


@pytest.mark.usefixtures("_no_wandb")
def test_steps_until_a_level(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--y", "train/loss", "--below", "0.2", "--window", "10", "--hue", "variant"]
    out = said(capsys, *options)
    table = pd.read_csv("runs/small/report/steps-until-train-loss-0.2-by-rate-and-variant.csv")
    for row in table.to_dict("records"):
        loss = metrics(row["model.rate"], row["variant"], 0)["train/loss"]
        means = [loss[max(0, i - 9) : i + 1].mean() if i >= 9 else 1 for i in range(300)]
        assert row["mean"] == 1 + next(i for i, mean in enumerate(means) if mean < 0.2)
        assert row["sd"] == 0
    assert "steps until train/loss < 0.2" in out
    out = said(capsys, *options[:3], "0.04", *options[4:])
    assert "3, 3 more never" not in out
    assert "| 0, 3 more never |" in out


@pytest.mark.usefixtures("_no_wandb")
def test_steps_until_validation_is_above_a_level(capsys: pytest.CaptureFixture[str]) -> None:
    """A validation is no mean of steps: the window is for training alone."""
    out = said(capsys, "--hue", "variant", "--above", "0.7")
    assert "| plain | 0.1 | 200 ± 0 |" in out
    assert "steps until val/accuracy > 0.7" in out


def test_steps_are_counted_from_one() -> None:
    assert steps_until(pd.Series([False, True, True], index=[3, 4, 5])) == 5
    assert np.isnan(steps_until(pd.Series([False, False])))


@pytest.mark.usefixtures("_no_wandb")
def test_a_training_metric_is_the_mean_of_the_last_steps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said(capsys, "--hue", "variant", "--y", "train/loss", "--window", "20")
    table = pd.read_csv("runs/small/report/train-loss-by-rate-and-variant.csv")
    expected = metrics(0.1, "plain", 0)["train/loss"][-20:].mean()
    np.testing.assert_allclose(table["mean"][0], expected)


@pytest.mark.usefixtures("_no_wandb")
def test_a_run_that_diverged_has_no_value(
    finished: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its last loss is not a number, which is not the same as none."""
    path = Path("runs/small") / finished.name_of(finished.points[0]) / "metrics.csv"
    path.write_text("step,train/loss,val/accuracy\n0,1,0.5\n1,nan,nan\n")
    assert "| plain | 0.1 | 91.15 ± 0.07 |" in (out := said(capsys, "--hue", "variant"))
    assert "| 2, 1 more not finite |" in out


@pytest.mark.usefixtures("_no_wandb")
def test_a_study_of_seeds_alone_has_one_mean(
    finished: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    out = said(capsys, "--where", "rate=0.1", "variant=plain")
    assert "| small | 91.10 ± 0.10 | 90.85 to 91.35 | 3 |" in out
    assert "by-study-where-rate=0.1-variant=plain.png" in out


@pytest.mark.usefixtures("_no_wandb")
def test_lists_and_powers_of_ten_are_values_too(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"model.rate": {"values": ["1e-3", "1e-2"]}, "channels": {"values": [[6, 16], [3]]}}
    text = yaml.safe_load(Path("small.yaml").read_text()) | {"parameters": values}
    Path("small.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
    loaded = Study.load("small.yaml")
    for point in loaded.points:
        folder = Path("runs/small") / loaded.name_of(point)
        folder.mkdir()
        metrics(0.1, "plain", 0).to_csv(folder / "metrics.csv", index=False)
        (folder / "point.json").write_text(json.dumps({"finished": True}))
    out = said(capsys, "--x", "rate", "--hue", "channels")
    assert "| [6, 16] | 0.001 | 91.00 |" in out


@pytest.mark.usefixtures("_no_wandb")
def test_runs_from_before_a_change_are_not_mixed_with_those_after_it(
    finished: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path("runs/small") / finished.name_of(finished.points[5])
    (folder / "point.json").write_text(json.dumps({"finished": True, "common": "other"}))
    sentence = refused(capsys, "report", "small.yaml", "--hue", "variant")
    assert f"{folder} and runs/small/rate=0.1,variant=plain,seed_everything=0 were" in sentence


def test_a_report_that_wandb_refuses_is_still_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**settings: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        study.main(["report", "small.yaml", "--hue", "variant"])
    said = capsys.readouterr()
    assert "| plain | 0.1 | 91.10 ± 0.10 |" in said.out
    assert "the report is written, but W&B does not take it: No API key" in said.err
    assert Path("runs/small/report/val-accuracy-by-rate-and-variant.png").exists()


def test_one_run_has_no_interval() -> None:
    table = summary(pd.DataFrame({"a": ["x", "y", "y"], "y": [1.0, 2.0, np.nan]}), ["a"])
    assert table["mean"].tolist() == [1, 2]
    assert table[["sd", "low", "high"]].isna().all(axis=None)
    assert table["missing"].tolist() == [0, 1]


@pytest.mark.usefixtures("_no_wandb")
def test_curves_with_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []

    def draw(*args: Any) -> Figure:
        drawn.append(curves_picture(*args))
        return drawn[0]

    monkeypatch.setattr(study_report, "curves_picture", draw)
    study.main([
        *("report", "small.yaml", "--x", "step", "--y", "train/loss"),
        *("--where", "rate=0.1", "--window", "1"),
    ])  # fmt: skip
    (axes,) = drawn[0].axes
    assert [line.get_label() for line in axes.lines] == VARIANTS
    expected = metrics(0.1, "steep", 0)["train/loss"]
    np.testing.assert_allclose(np.asarray(axes.lines[1].get_ydata()), expected)
    assert axes.get_yscale() == "log"


def test_the_band_is_one_standard_deviation() -> None:
    runs = [pd.Series([1.0, 2.0]), pd.Series([3.0, 2.0])]
    (axes,) = curves_picture({"a": runs}, "val/x", 1, None).axes
    outline = axes.collections[0].get_paths()[0].vertices
    half = 2**0.5  # of 1 and 3
    assert np.asarray(outline)[:, 1].max() == pytest.approx(2 + half)
    assert np.asarray(outline)[:, 1].min() == pytest.approx(2 - half)


@pytest.mark.usefixtures("_no_wandb")
def test_unfinished_runs_are_left_out_and_told(
    finished: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path("runs/small") / finished.name_of(finished.points[0])
    (folder / "point.json").write_text(json.dumps({"finished": False}))
    out = said(capsys, "--hue", "variant")
    assert "1 of 12 runs are not finished." in out
    assert "| plain | 0.1 | 91.15 ± 0.07 |" in out


def test_what_cannot_be_reported_is_told(
    finished: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    report = ("report", "small.yaml")
    sentence = refused(capsys, *report)
    assert "variant varies as well; show it with --hue" in sentence
    assert "has no single parameter color" in refused(capsys, *report, "--hue", "color")
    sentence = refused(capsys, *report, "--hue", "variant", "--y", "val/loss")
    assert "has no metric val/loss; it has train/loss, val/accuracy" in sentence
    sentence = refused(capsys, *report, "--where", "rate=3")
    assert "has no model.rate '3'; its values are 0.1, 0.2" in sentence
    for point in finished.points:
        (Path("runs/small") / finished.name_of(point) / "point.json").unlink()
    sentence = refused(capsys, *report, "--hue", "variant")
    assert "has no finished run to report; `python study.py run small.yaml` first" in sentence
    text = Path("small.yaml").read_text().replace("name: val/accuracy", "goal: maximize")
    Path("small.yaml").write_text(text)
    assert "names no metric; say which with --y" in refused(capsys, *report)


class Server:
    """A W&B server that knows one sweep, as ``wandb.Api`` shows it."""

    def __init__(self, runs: list[Any]) -> None:
        self.runs = runs

    def sweep(self, path: str) -> Any:
        if path != "me/steadyfit/abc":
            raise wandb.Error(f"could not find sweep {path}")
        return SimpleNamespace(runs=self.runs)


def wandb_run(name: str, point: dict[str, Any], **changes: Any) -> Any:
    table = metrics(*point.values()).rename(columns={"step": "trainer/global_step"})

    def scan_history(keys: list[str]) -> list[Any]:
        return table[keys].dropna().to_dict("records") if set(keys) <= set(table) else []

    config = point | {"model": {"nested": 1}}
    found = {"name": name, "config": config, "state": "finished", "scan_history": scan_history}
    return SimpleNamespace(**found | changes)


def test_runs_of_agents_are_read_from_wandb(
    finished: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [wandb_run(f"run-{n}", p) for n, p in enumerate(finished.points)]
    runs.append(wandb_run("crashed", finished.points[0], state="crashed"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(wandb, "Api", lambda: Server(runs))
    sweep = ("--sweep", "me/steadyfit/abc")
    here = said(capsys, "--hue", "variant")
    assert said(capsys, "--hue", "variant", *sweep) == here
    report = ("report", "small.yaml", "--hue", "variant", "--sweep")
    assert "sweep other cannot be read: could not find" in refused(capsys, *report, "other")
    assert "the W&B run run-0 has no metric val/x" in refused(
        capsys, *report, sweep[1], "--y", "val/x"
    )
    runs.append(wandb_run("again", finished.points[3]))
    sentence = refused(capsys, *report, sweep[1])
    assert "run-3 and again are both runs of the point rate=0.1,variant=steep" in sentence


def test_a_run_without_metrics_is_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"metrics\.csv"):
            read_metrics(folder)
