"""Many runs: which are started, what becomes of those that fail, and what an interruption costs."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections import Counter
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
from pipeline.studies.grid import PointRecord, Study
study = Study.load("small.yaml")
made = study.record(sys.argv[2:])
folder = Path("runs/small") / study.name_of(made["point"])
record = PointRecord(folder)
record.write(made, finished=False)
with open("starts.txt", "a") as file:
    file.write(folder.name + "\\n")
print("GPU", os.environ.get("CUDA_VISIBLE_DEVICES"), "threads", os.environ["THREADS"])
rate = made["point"]["model.optimizer.lr"]
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
            *("${env}", "THREADS=1", "${interpreter}", "${program}", "fit"),
            *(f"--config={CONFIGS}/mnist_lenet.yaml", "--study=small.yaml", "${args}"),
        ],
    }
    Path("small.yaml").write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return Path("small.yaml")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("train.py").write_text(STAND_IN)


@pytest.fixture
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings are not read by the real command line, which takes a second for each."""
    monkeypatch.setattr(runner, "_check_settings", lambda jobs: None)


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


@pytest.mark.usefixtures("_unchecked")
def test_every_point_is_run_once_and_a_failed_one_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A failed run stops no other; neither mending it nor a larger grid repeats the others."""
    write_study([0.5, 0.1])
    with pytest.raises(SystemExit) as stop:
        study.main(["run", "small.yaml", "--jobs=2"])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert "lr=0.5,seed_everything=1 FAILED: it broke at [3]; mend it." in said
    assert "lr=0.1,seed_everything=0: val/accuracy 0.9000" in said
    (sentence,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "2 of 4 runs failed, the first is lr=0.5,seed_everything=" in sentence
    assert len(starts()) == 4
    Path("mended").touch()
    study.main(["run", "small.yaml", "--jobs=2"])
    assert capsys.readouterr().out.splitlines() == [
        "4 of 4 runs of small are finished.",
        "Next: python study.py report small.yaml",
    ]
    write_study([0.5, 0.1, 0.2])
    study.main(["run", "small.yaml", "--where", "seed_everything=1"])
    assert "3 of 3 runs of small are finished." in capsys.readouterr().out
    assert starts() == {
        **{f"lr=0.5,seed_everything={seed}": 2 for seed in (0, 1)},
        **{f"lr=0.1,seed_everything={seed}": 1 for seed in (0, 1)},
        "lr=0.2,seed_everything=1": 1,
    }
    sentence = refused(capsys, "run", "small.yaml", "--trainer.max_epochs=1")
    assert "lr=0.5,seed_everything=0 was trained with other settings" in sentence


def test_an_unknown_parameter_is_told_before_anything_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_study([0.1], parameters={"model.optimizer.momentun": {"values": [0.9]}})
    assert "momentun" in refused(capsys, "run", "small.yaml")
    write_study([0.1], parameters={"seed_everything": {"values": [0]}})
    assert "max_epoch" in refused(capsys, "run", "small.yaml", "--trainer.max_epoch=1")
    assert not starts()


def test_why_a_run_has_failed() -> None:
    """Its own sentence, the end of a traceback, a signal; or a config that was edited meanwhile."""
    loaded = Study.load(write_study([0.1]))
    job = runner.Job.of(loaded, loaded.points[0], [])
    job.log.parent.mkdir(parents=True)
    job.log.write_text("Epoch 3\nerror: no data.\nbye\n")
    assert job.failure(1) == "no data."
    job.log.write_text("Traceback\n  File x\nKeyError: 3\n\n")
    assert job.failure(1) == "KeyError: 3"
    assert job.failure(-9) == "ended with -9"
    PointRecord(job.run.folder).write(job.record, finished=True)
    assert job.failure(0) == ""
    edited = runner.Job.of(loaded, loaded.points[0], ["--trainer.max_epochs=9"])
    assert "was trained with other settings" in edited.failure(0)


@pytest.mark.slow
@pytest.mark.usefixtures("_unchecked")
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
    write_study([0.1])
    study.main(["run", "small.yaml"])
    logs = [path.read_text().split() for path in Path("runs/small/logs").iterdir()]
    assert {words[words.index("GPU") + 1] for words in logs} == expected
    assert {words[words.index("threads") + 1] for words in logs} == {"1"}


def test_wrong_arguments_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    write_study([0.1])
    for args, named in (
        (["run", "small.yaml", "--jobs=0"], "--jobs must be at least 1, got 0"),
        (["report", "small.yaml", "--window=0"], "--window must be at least 1, got 0"),
        (["run", "small.yaml", "--seed_everything=1"], "--seed_everything is the study's to set"),
        (["run", "small.yaml", "--run=x"], "--run is the study's to set"),
        (["run", "small.yaml", "--data.data_dir", "x"], "--data.data_dir"),
        (["report", "small.yaml", "--z=1"], "unknown argument --z"),
    ):
        assert named in refused(capsys, *args)


@pytest.mark.slow
def test_an_interrupted_study_takes_its_jobs_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLEEP", "4")
    write_study([0.1, 0.2])
    script = [sys.executable, str(ROOT / "study.py"), "run", "small.yaml", "--jobs=2"]
    process = subprocess.Popen(script, stderr=subprocess.DEVNULL)
    while len(starts()) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(20) == 1
    time.sleep(4.5)
    loaded = Study.load("small.yaml")
    folders = [Path("runs/small") / loaded.name_of(point) for point in loaded.points]
    records = [PointRecord(folder).read() for folder in folders]
    assert not any(record and record["finished"] for record in records)


# With the real train.py


def write_real_study() -> Path:
    content = {
        "program": "train.py",
        "method": "grid",
        "metric": {"name": "test/accuracy", "goal": "maximize"},
        "parameters": {
            "variant": {"values": ["plain", "momentum --model.optimizer.momentum=0.9"]},
            "seed_everything": {"values": [0]},
        },
        "command": [
            *("${env}", "OMP_NUM_THREADS=1", "${interpreter}", "${program}", "fit"),
            f"--config={CONFIGS}/mnist_lenet.yaml",
            "--study=digits.yaml",
            "--data=DigitsDataModule",
            "--data.val_size=200",
            "--trainer.max_epochs=2",
            "--test=true",
            "${args}",
        ],
    }
    Path("digits.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    Path("train.py").unlink()
    Path("train.py").symlink_to(ROOT / "train.py")
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
    loaded = Study.load(write_real_study())
    for point in loaded.points:
        train.main(["fit", *loaded.arguments(point, ["--trainer.default_root_dir=whole"])])
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
    os.killpg(process.pid, signal.SIGKILL)  # the run dies too, after its first epoch
    process.wait()
    capsys.readouterr()
    study.main(["run", "digits.yaml", "--jobs=2"])
    assert results(Path("runs")) == whole
