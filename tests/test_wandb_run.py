"""What people look for on a W&B run; its own offline files are read back."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import end_wandb, offline_wandb, read_wandb
from test_continuing import FOLDER, fit, last
from test_train import rows
from wandb.sdk.lib import run_stopping

import predict
import train
from callbacks.run.run_folder import RunRecord
from callbacks.run.wandb_logger import ResumableWandbLogger, logged_metrics
from core import provenance
from core.runs import Run
from core.wandb_runs import describe, keeps_artifacts, logger_settings

LOGGER = ("--trainer.logger=ResumableWandbLogger", "--trainer.logger.project=steadyfit")


def of_type(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind in an offline folder, oldest first."""
    return [record[kind] for record in read_wandb(folder) if record["type"] == kind]


def folders(run: Path) -> list[Path]:
    return sorted((run / "wandb").glob("offline-run-*"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps its artifacts, trained, tested and predicted with, relative to its home."""
    home = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch, offline_wandb():
        patch.chdir(home)
        patch.setattr(
            sys, "argv", ["train.py", "fit", "--url=http://me:pass@host/x", "k3y-of-mine"]
        )
        patch.setenv("OWN_API_KEY", "k3y-of-mine")
        run = fit(*LOGGER, "--trainer.logger.log_model=true", "--trainer.max_epochs=2")
        end_wandb()
        predict.main([str(run)])
    return home / run


def test_a_run_says_what_it_is(finished: Path) -> None:
    [said] = of_type(folders(finished)[0], "run")
    assert said["job_type"] == "train"
    assert said["run_group"] == "mnist_lenet"
    assert said["tags"][:2] == ["mnist_lenet", "DigitsDataModule"]
    assert said["tags"][-1] == "cpu"
    assert said["notes"] == "python train.py fit '--url=http://***@host/x' '***'"


def test_the_summary_has_best_values(finished: Path) -> None:
    [seen] = read_wandb(folders(finished)[0], "--summary")
    values = [float(row["val/accuracy"]) for row in rows(finished) if row["val/accuracy"]]
    losses = [float(row["train/loss"]) for row in rows(finished) if row["train/loss"]]
    assert len(values) == 2
    found = {name: seen["summary"][name] for name in ("val/accuracy", "train/loss")}
    assert found["val/accuracy"] == pytest.approx({"max": max(values), "last": values[-1]})
    assert found["train/loss"] == pytest.approx({"min": min(losses), "last": losses[-1]})
    defined = {m["name"]: m for m in of_type(folders(finished)[0], "metric") if "name" in m}
    assert defined["val/accuracy"]["summary"] == {"max": True, "last": True}  # while it trains
    assert defined["val/accuracy"]["step_metric"] == "trainer/global_step"


def test_each_value_of_a_step_comes_once(finished: Path) -> None:
    """Lightning's monitor of the learning rate told it on log steps, besides the rows of all."""
    held = logged_metrics(folders(finished)[0])
    pairs = Counter((step, name) for step, name in held if name != "epoch" and name[0] != "_")
    assert sum(name.startswith("lr-") for _, name in pairs) == len(rows(finished))
    assert [pair for pair, count in pairs.items() if count > 1] == []


def test_an_alert_comes_at_the_end(finished: Path) -> None:
    ended = [
        a for a in of_type(folders(finished)[0], "alert") if a["title"] == "training has ended"
    ]
    assert len(ended) == 1
    assert ended[0]["level"] == "INFO"
    assert "after 20 steps" in ended[0]["text"]
    assert "val/accuracy max 0." in ended[0]["text"]


def test_data_model_and_predictions_are_a_lineage(finished: Path) -> None:
    """What one run logs, the next one uses: to W&B the same name and content are one version."""
    training, predicting = (of_type(folder, "artifact") for folder in folders(finished))
    read, model = training
    assert (read["type"], read["name"]) == ("dataset", "dataset-DigitsDataModule")
    assert read["use_after_commit"] is True
    digest = last(finished)["data_digest"]
    assert [entry["ref"] for entry in read["manifest"]["contents"]] == [f"sha256:{digest}"]
    assert (model["type"], model.get("use_after_commit", False)) == ("model", False)
    to_predict, used, made = predicting
    assert to_predict["type"] == "dataset"
    assert to_predict["digest"] != read["digest"]  # the test images
    assert (used["name"], used["digest"]) == (model["name"], model["digest"])
    assert used["use_after_commit"] is True
    assert made["type"] == "predictions"
    assert json.loads(made["metadata"])["rows"] > 0
    [said] = of_type(folders(finished)[1], "run")
    assert said["job_type"] == "predict"
    assert said["run_id"] == f"{Run(finished).wandb_id}-predict"
    assert Run(finished).wandb_id == of_type(folders(finished)[0], "run")[0]["run_id"]


def test_artifacts_are_made_online_unless_told(finished: Path) -> None:
    assert keeps_artifacts(None, offline=False)
    assert not keeps_artifacts(None, offline=True)
    assert keeps_artifacts(True, offline=True)
    assert not keeps_artifacts(False, offline=False)


@pytest.mark.parametrize("text", ["", "[", "trainer: 1", "trainer: {logger: [1]}", "trainer: {}"])
def test_a_damaged_record_names_no_logger(text: str, tmp_path: Path) -> None:
    """``predict.py`` reads a run from its checkpoint, and had no need of this file."""
    assert logger_settings(Run(tmp_path)) == {}
    (tmp_path / "config.yaml").write_text(text)
    assert logger_settings(Run(tmp_path)) == {}


def test_variables_of_the_environment_win(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = {"group", "job_type", "tags", "notes"}
    assert describe(Run(finished), "train").keys() == ours
    monkeypatch.chdir(tmp_path)
    with offline_wandb():
        monkeypatch.setenv("WANDB_TAGS", "mine,too")
        monkeypatch.setenv("WANDB_NOTES", "a note")
        monkeypatch.setenv("WANDB_RUN_GROUP", "my group")
        monkeypatch.setenv("WANDB_JOB_TYPE", "debugging")
        keeps = ("--trainer.enable_checkpointing=false", "--trainer.logger.log_model=true")
        run = fit(*LOGGER, *keeps, "--trainer.max_steps=1")  # there is nothing to be kept
    [said] = of_type(folders(run)[0], "run")
    assert said["tags"] == ["mine", "too"]
    assert (said["run_group"], said["job_type"]) == ("my group", "debugging")
    assert said["notes"] == "a note"


def test_a_test_of_a_run_that_w_and_b_does_not_know_is_a_run_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = fit(*LOGGER, "--trainer.max_epochs=1")  # W&B is off
    with offline_wandb():
        train.main(["test", f"--run={run}"])
    [said] = of_type(folders(run)[0], "run")
    assert (said["job_type"], said["run_group"]) == ("test", "mnist_lenet")
    assert said["tags"][:2] == ["mnist_lenet", "DigitsDataModule"]


@pytest.mark.slow
def test_rows_come_once_after_a_kill_and_best_values_are_those_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process killed behind its test left two rows of it: the first was logged from the file.

    The second folder's best values were those after the resume alone.
    """
    monkeypatch.chdir(tmp_path)
    with offline_wandb():
        run = fit(*LOGGER, "--trainer.max_epochs=2", "--test=true")
        end_wandb()
        (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
        written = file.read_bytes()
        file.write_bytes(written[:7])  # what a kill leaves within the first seconds
        fit(*LOGGER, "--trainer.max_epochs=2", "--test=true")
        end_wandb()
        second = folders(run)[1]
        assert of_type(second, "run")[0]["job_type"] == "train"  # the first had not said it
        recorded = Counter(pair for folder in folders(run) for pair in logged_metrics(folder))
        assert {pair: n for pair, n in recorded.items() if n > 1 and pair[1] != "epoch"} == {}
        assert sum(name == "test/accuracy" for _, name in recorded) == 1
        file.write_bytes(written)
        fit(*LOGGER, "--trainer.max_epochs=2", "--test=true")
        end_wandb()
    third = folders(run)[2]
    assert "job_type" not in of_type(third, "run")[0]  # as people have left it
    [seen] = read_wandb(third, "--summary")
    best = max(float(row["val/accuracy"]) for row in rows(run) if row["val/accuracy"])
    assert seen["summary"]["val/accuracy"]["max"] == pytest.approx(best)


@pytest.mark.slow
def test_a_loss_that_is_no_number_is_not_the_lowest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To W&B the minimum of 1 and NaN is NaN."""
    monkeypatch.chdir(tmp_path)
    with offline_wandb():
        run = fit(*LOGGER, "--trainer.max_epochs=1", "--model.optimizer.lr=1e20")
    [seen] = read_wandb(folders(run)[0], "--summary")
    losses = [float(row["train/loss"]) for row in rows(run)]
    assert not math.isfinite(losses[-1])
    lowest = min(filter(math.isfinite, losses))
    assert seen["summary"]["train/loss"] == {"min": pytest.approx(lowest), "last": "NaN"}
    titles = [alert["title"] for alert in of_type(folders(run)[0], "alert")]
    assert titles == ["the loss is not finite", "training has ended"]


def test_a_loss_that_is_no_number_alerts_once(tmp_path: Path) -> None:
    with offline_wandb():
        logger = ResumableWandbLogger(save_dir=str(tmp_path))
        logger.log_history({3: {"train/loss": float("inf")}})  # of an earlier start
        logger.log_rows({step: {"train/loss": float("nan")} for step in (7, 8)})
    alerts = of_type(folders(tmp_path)[0], "alert")
    assert [alert["level"] for alert in alerts] == ["ERROR"]
    assert "train/loss is nan at step 7" in alerts[0]["text"]


def test_stop_run_on_the_page_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """W&B sends SIGINT by itself, which loses the epoch.

    Offline nobody asks the server; here its own checker does, and is told that it was pressed.
    """
    monkeypatch.chdir(tmp_path)
    write = RunRecord.on_train_start

    async def is_pressed(self: Any) -> bool:
        return True

    def ask(self: RunRecord, trainer: Any, pl_module: Any) -> None:
        write(self, trainer, pl_module)
        run = trainer.loggers[1].experiment
        asked = run_stopping.RunStopChecker(
            run._wl.asyncer, run._interface, run._settings.stop_fn, poll_interval=0.01
        )
        asked.start()

    monkeypatch.setattr(run_stopping._RunStopCheckerImpl, "_check_should_stop", is_pressed)
    monkeypatch.setattr(RunRecord, "on_train_start", ask)
    with offline_wandb(), pytest.raises(SystemExit) as end:
        fit(*LOGGER, "--trainer.max_epochs=30")
    assert end.value.code == 143
    step = last(FOLDER / "r")["global_step"]
    assert 0 < step < 300
    said = capsys.readouterr().err
    assert "W&B asks this run to stop" in said
    assert f"Stopped by SIGTERM after step {step}" in said


# ---- code.patch


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clean one, which counts as this project's."""
    monkeypatch.setattr(provenance, "HERE", tmp_path)
    (tmp_path / "code.py").write_text("x = 1\n")
    (tmp_path / ".gitignore").write_text("runs/\n")
    for command in ("init -q", "add .", "-c user.name=n -c user.email=n@example.org commit -qm a"):
        subprocess.run(["git", "-C", str(tmp_path), *command.split()], check=True)
    return tmp_path


def test_a_patch_holds_what_the_commit_does_not(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert provenance.code_patch() == ""
    monkeypatch.setenv("OWN_TOKEN", "0123456789")
    (repository / "code.py").write_text("x = 2\ntoken = '0123456789'\n")
    (repository / "new.py").write_text("untracked = 'own'\n")
    patch = provenance.code_patch()
    assert "0123456789" not in patch
    assert "own" not in patch
    assert "new.py" in patch.splitlines()[0]
    git = ["git", "-C", str(repository)]
    subprocess.run([*git, "checkout", "-q", "code.py"], check=True)
    subprocess.run([*git, "apply", "-"], input=patch, text=True, check=True)
    assert (repository / "code.py").read_text() == "x = 2\ntoken = '***'\n"


def test_a_patch_brings_back_pictures_however_git_is_set(repository: Path) -> None:
    git = ["git", "-C", str(repository)]
    (repository / "code.py").write_bytes(b"\x89PNG\x00\xff")
    subprocess.run([*git, "config", "diff.noprefix", "true"], check=True)
    patch = provenance.code_patch()
    subprocess.run([*git, "checkout", "-q", "code.py"], check=True)
    subprocess.run([*git, "apply", "-"], input=patch, text=True, check=True)
    assert (repository / "code.py").read_bytes() == b"\x89PNG\x00\xff"


def test_a_secret_that_begins_like_another_is_masked_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(8):  # the order of a set is not known
        monkeypatch.setenv(f"ANOTHER{i}_KEY", f"{i}" * 8)
        monkeypatch.setenv(f"LONGER{i}_KEY", f"{i}" * 8 + "tail")
    told = provenance.masked(" ".join(f"{i}" * 8 + "tail" for i in range(8)))
    assert told == " ".join(["***"] * 8)


def test_a_patch_is_bounded(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "LONGEST_PATCH", 1000)
    (repository / "code.py").write_text("x = 2\n" * 100_000)
    patch = provenance.code_patch()
    assert len(patch) < 1200
    assert patch.startswith("# cut after 1,000 bytes: it cannot be applied\n")


def test_without_git_there_is_no_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "HERE", tmp_path)
    assert provenance.code_patch() == ""
    monkeypatch.setenv("PATH", "")
    assert provenance.code_patch() == ""


@pytest.mark.slow
def test_an_unclean_tree_is_in_the_folder_and_on_the_run(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "code.py").write_text("x = 2\n")
    monkeypatch.chdir(repository)
    with offline_wandb():
        run = fit(*LOGGER, "--trainer.max_steps=1")
        end_wandb()
        (folder,) = folders(run)
        text = (run / "code.patch").read_text()
        assert "+x = 2" in text
        assert (folder / "files" / "code.patch").read_text() == text
        saved = [file["path"] for files in of_type(folder, "files") for file in files["files"]]
        assert "code.patch" in saved
        subprocess.run(["git", "-C", str(repository), "checkout", "-q", "code.py"], check=True)
        fit(*LOGGER, "--trainer.max_steps=2")
    assert not (run / "code.patch").exists()  # what went on was committed
