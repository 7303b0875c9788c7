"""Many runs: which are started, what becomes of those that fail, and what an interruption costs."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CONFIGS, end_wandb

import study
import train
from pipeline.studies import runner
from pipeline.studies.grid import PointRecord, Study

ROOT = CONFIGS.parent

# Takes train.py's place: does what a run does to its folder, without training.
STAND_IN = """
import os, sys, time
from pathlib import Path
from core.runs import Run
from pipeline.studies.grid import PointRecord, Study
args = sys.argv[2:]
study = Study.load("small.yaml")
made = study.record(args)
point = made["point"]
folder = Path("runs/small") / study.name_of(point)
folder.mkdir(parents=True, exist_ok=True)
lock = Run(folder).lock()
lock.__enter__()
record = PointRecord(folder)
record.write(made, finished=False)
with open("starts.txt", "a") as file:
    file.write(folder.name + "\\n")
print("GPU", os.environ.get("CUDA_VISIBLE_DEVICES"))
rate = point["model.optimizer.lr"]
print("Epoch 3:  38%|###     | 300/781 [00:02<00:03]")
time.sleep(float(os.environ.get("SLEEP", "0")))
if rate == 0.5 and not Path("mended").exists():
    sys.exit("error: it broke at [3]; mend it.")
(folder / "metrics.csv").write_text(f"step,train/loss,val/accuracy\\n0,1,\\n1,{rate},{1 - rate}\\n")
record.write(made, finished=True)
"""


def write_study(rates: list[Any], **changes: Any) -> Path:
    content = {
        "program": "train.py",
        "method": "grid",
        "metric": {"name": "val/accuracy", "goal": "maximize"},
        "parameters": {
            "model.optimizer.lr": {"values": rates},
            "seed_everything": {"values": [0, 1]},
        },
        "command": [
            "${interpreter}",
            "stand_in.py",
            "fit",
            f"--config={CONFIGS}/mnist_lenet.yaml",
            "--study=small.yaml",
            "${args}",
        ],
    }
    Path("small.yaml").write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return Path("small.yaml")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("stand_in.py").write_text(STAND_IN)


ONE_RATE = {"model.optimizer.lr": {"values": [0.1]}}


def starts() -> Counter[str]:
    path = Path("starts.txt")
    return Counter(path.read_text().splitlines() if path.exists() else [])


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        study.main([*args])
    assert stop.value.code == 1
    said = capsys.readouterr().err.splitlines()
    (sentence,) = [line for line in said if line.startswith("error: ")]
    return sentence


@pytest.mark.slow
def test_every_point_is_run_once(capsys: pytest.CaptureFixture[str]) -> None:
    write_study([0.1, 0.2])
    study.main(["run", "small.yaml", "--jobs=3"])
    said = capsys.readouterr()
    assert "4 of 4 runs of small are finished." in said.out
    assert "Next: python study.py report small.yaml" in said.out
    assert "lr=0.1,seed_everything=0: val/accuracy 0.9000" in said.err
    assert len(starts()) == 4
    assert set(starts().values()) == {1}
    study.main(["run", "small.yaml"])
    assert set(starts().values()) == {1}  # what is finished is not run again
    write_study([0.1, 0.2, 0.3])
    study.main(["run", "small.yaml"])
    assert len(starts()) == 6
    assert set(starts().values()) == {1}  # nor when the grid grows


@pytest.mark.slow
def test_a_failed_run_stops_no_other_and_is_tried_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_study([0.5, 0.1])
    with pytest.raises(SystemExit) as stop:
        study.main(["run", "small.yaml", "--jobs=2"])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert "lr=0.5,seed_everything=1 FAILED: it broke at [3]; mend it." in said
    (sentence,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "2 of 4 runs failed, the first is lr=0.5,seed_everything=" in sentence
    assert "(it broke at [3]; mend it.)" in sentence
    assert len(starts()) == 4
    Path("mended").touch()
    study.main(["run", "small.yaml"])
    assert starts()["lr=0.5,seed_everything=0"] == starts()["lr=0.5,seed_everything=1"] == 2
    assert starts()["lr=0.1,seed_everything=0"] == 1


def test_an_unknown_parameter_is_told_before_anything_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_study([0.1], parameters={"model.optimizer.momentun": {"values": [0.9]}})
    assert "momentun" in refused(capsys, "run", "small.yaml")
    write_study([0.1], parameters={"seed_everything": {"values": [0]}})
    assert "max_epoch" in refused(capsys, "run", "small.yaml", "--trainer.max_epoch=1")
    assert not starts()


def test_a_run_with_other_settings_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    write_study([0.1])
    study.main(["run", "small.yaml"])
    sentence = refused(capsys, "run", "small.yaml", "--trainer.max_epochs=1")
    assert "lr=0.1,seed_everything=0 was trained with other settings" in sentence


@pytest.mark.slow
def test_a_part_of_the_grid_can_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    write_study([0.1, 0.2])
    study.main(["run", "small.yaml", "--where", "seed_everything=1"])
    assert set(starts()) == {"lr=0.1,seed_everything=1", "lr=0.2,seed_everything=1"}
    assert "2 of 2 runs of small are finished." in capsys.readouterr().out


@pytest.mark.slow
def test_an_edited_config_fails_no_run_that_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is started has its settings; what is finished with others fails, and stops no other."""
    config = tmp_path / "own.yaml"
    config.write_text((CONFIGS / "mnist_lenet.yaml").read_text())
    write_study([0.1, 0.2])
    path = Path("small.yaml")
    path.write_text(path.read_text().replace(f"{CONFIGS}/mnist_lenet.yaml", str(config)))
    study.main(["run", "small.yaml", "--where", "lr=0.1", "seed_everything=0"])
    made: list[runner.Job] = []
    conclude = runner.conclude

    def edit_first(loaded: Study, job: runner.Job, *others: Any) -> None:
        if not made:
            config.write_text(config.read_text().replace("max_epochs: 10", "max_epochs: 9"))
        made.append(job)
        conclude(loaded, job, *others)

    monkeypatch.setattr(runner, "conclude", edit_first)
    sentence = refused(capsys, "run", "small.yaml", "--jobs=1")
    assert len(made) == 3  # none was left out
    assert "2 of 4 runs failed" in sentence  # begun after the edit, and finished with it
    assert "was trained with other settings" in sentence


@pytest.mark.slow
def test_a_run_that_another_program_has_taken_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between our look at the lock and the run's own, another program may come first."""
    write_study([0.1], parameters={"seed_everything": {"values": [0]}, **ONE_RATE})
    monkeypatch.setenv("SLEEP", "4")  # longer than a second one needs to start
    loaded = Study.load("small.yaml")
    other = subprocess.Popen(loaded.command(loaded.points[0]), stdout=subprocess.DEVNULL)
    while not starts():
        time.sleep(0.05)
    looks = iter([False])  # the first look is too early
    is_busy = runner.Job.is_busy
    monkeypatch.setattr(runner.Job, "is_busy", lambda job: next(looks, is_busy(job)))
    study.main(["run", "small.yaml"])
    other.wait()
    assert sum(starts().values()) == 1
    assert "by another program" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("visible", "expected"), [(None, {"0", "1"}), ("2,5", {"2", "5"})], ids=["all", "some"]
)
def test_with_several_gpus_each_slot_has_its_own(
    visible: str | None, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    write_study([0.1, 0.2])
    study.main(["run", "small.yaml"])
    logs = [path.read_text().split() for path in Path("runs/small/logs").iterdir()]
    assert {words[words.index("GPU") + 1] for words in logs} == expected


def test_wrong_arguments_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    write_study([0.1])
    assert "--jobs must be at least 1, got 0" in refused(capsys, "run", "small.yaml", "--jobs=0")
    report = ("report", "small.yaml", "--window=0")
    assert "--window must be at least 1, got 0" in refused(capsys, *report)
    sentence = refused(capsys, "run", "small.yaml", "--seed_everything=1")
    assert "--seed_everything is the study's to set; choose points with --where" in sentence
    sentence = refused(capsys, "run", "small.yaml", "--run=x")
    assert "--run is the study's to set" in sentence
    sentence = refused(capsys, "run", "small.yaml", "--data.data_dir", "x")
    assert "unknown argument --data.data_dir" in sentence
    assert "write settings as --NAME=VALUE" in sentence
    assert "unknown argument --z" in refused(capsys, "report", "small.yaml", "--z=1")


def in_the_background() -> subprocess.Popen[bytes]:
    """``study.py run`` with jobs that take two seconds, once the first two of them run."""
    write_study([0.1, 0.2])
    script = [sys.executable, str(ROOT / "study.py"), "run", "small.yaml", "--jobs=2"]
    process = subprocess.Popen(
        script,
        env=os.environ | {"SLEEP": "2"},
        stderr=subprocess.DEVNULL,
        # a shell's job in the background, as tests may be, has its programs ignore Ctrl-C
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    while len(starts()) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_killed_and_started_again(capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL leaves two runs behind; the next start waits for them and repeats none."""
    process = in_the_background()
    process.kill()
    process.wait()
    first = set(starts())
    study.main(["run", "small.yaml", "--jobs=2"])
    assert len(starts()) == 4
    assert set(starts().values()) == {1}
    said = capsys.readouterr().err
    for name in first:
        assert f"{name}, by another program" in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_study_takes_its_jobs_along(number: signal.Signals) -> None:
    process = in_the_background()
    process.send_signal(number)
    assert process.wait(20) == 1
    time.sleep(2.5)
    loaded = Study.load("small.yaml")
    folders = [Path("runs/small") / loaded.name_of(point) for point in loaded.points]
    records = [PointRecord(folder).read() for folder in folders]
    assert not any(record and record["finished"] for record in records)
    study.main(["run", "small.yaml", "--jobs=2"])
    assert sorted(starts().values()) == [1, 1, 2, 2]


# With the real train.py


def write_real_study() -> Path:
    content = {
        "program": "train.py",
        "method": "grid",
        "metric": {"name": "test/accuracy", "goal": "maximize"},
        "parameters": {
            "variant": {"values": ["plain", "momentum"]},
            "seed_everything": {"values": [0]},
        },
        "command": [
            "${env}",
            "OMP_NUM_THREADS=1",
            "${interpreter}",
            str(ROOT / "train.py"),
            "fit",
            f"--config={CONFIGS}/mnist_lenet.yaml",
            "--study=digits.yaml",
            "--data=DigitsDataModule",
            "--data.val_size=200",
            "--trainer.max_epochs=2",
            "--test=true",
            "${args}",
        ],
    }
    groups = {"variant": {"plain": [], "momentum": ["--model.optimizer.momentum=0.9"]}}
    Path("digits.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    Path("digits_groups.yaml").write_text(yaml.safe_dump(groups))
    return Path("digits.yaml")


def results(root: Path) -> dict[str, list[dict[str, str]]]:
    """All metrics of all runs."""
    found = {}
    for path in sorted(root.glob("digits/*/metrics.csv")):
        with path.open(newline="") as file:
            found[path.parent.name] = list(csv.DictReader(file))
    return found


@pytest.mark.slow
def test_an_interrupted_study_ends_with_the_same_numbers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed with its runs, started again: as with an agent's commands, one for each point."""
    write_real_study()
    loaded = Study.load("digits.yaml")
    for point in loaded.points:
        by_hand = loaded.command(point, ["--trainer.default_root_dir=whole"])
        train.main(by_hand[by_hand.index("fit") :])
        end_wandb()
    whole = results(Path("whole"))
    assert list(whole) == sorted(loaded.name_of(point) for point in loaded.points)
    # the test set is a part of the record only where the study asks for it
    expected = {"step", "train/loss", "val/accuracy", "test/accuracy"}
    assert all(rows[0].keys() >= expected for rows in whole.values())
    assert all(any(row["test/accuracy"] for row in rows) for rows in whole.values())

    script = [sys.executable, str(ROOT / "study.py"), "run", "digits.yaml", "--jobs=1"]
    process = subprocess.Popen(script, start_new_session=True, stderr=subprocess.DEVNULL)
    first = Path("runs/digits/variant=plain,seed_everything=0")
    while not (first / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # the run dies too, behind its first epoch
    process.wait()
    capsys.readouterr()
    study.main(["run", "digits.yaml", "--jobs=2"])
    assert results(Path("runs")) == whole
