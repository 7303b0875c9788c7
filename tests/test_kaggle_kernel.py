"""What runs on Kaggle's machine, run here."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fake_data
import py7zr
import pytest
from conftest import CONFIGS
from kaggle_image import make_image, make_wheels
from kaggle_server import KaggleServer
from test_on_kaggle import FLAGS, RUN, fit, refused

import predict
import submit
from core.errors import UserError
from pipeline.kaggle import kernel, remote

pytestmark = pytest.mark.usefixtures("quick_push")


def test_what_is_mounted_is_found_where_kaggle_mounts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "INPUT", tmp_path)
    for place in ("datasets/me/names", "wheels", "competitions/cifar-10"):
        (tmp_path / place).mkdir(parents=True)
        assert kernel.mounted(f"me/{Path(place).name}") == tmp_path / place
    with pytest.raises(UserError, match="me/other is not mounted in"):
        kernel.mounted("me/other")


ENDS = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143));"
STAYS = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"


@pytest.mark.parametrize(("code", "status"), [(ENDS, 143), (STAYS, -signal.SIGKILL)])
def test_a_training_is_told_to_end_in_time(
    code: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "GRACE", 0.3)
    start = time.monotonic()
    assert kernel.call(["-c", f"{code} time.sleep(60)"], start + 1.0) == status
    assert time.monotonic() - start < 30


def test_every_command_of_the_page_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    page = Path("docs/kaggle.md").read_text()
    lines = re.findall(r"^python (\S+) (.*)$", page, re.MULTILINE)
    assert [script for script, _ in lines] == ["train.py", "submit.py", "submit.py"]
    options, rest = remote.parse(shlex.split(lines[0][1]))
    assert (options.run, rest) == ("first", ["--data", "KaggleCIFAR10DataModule"])
    for _, args in lines[1:]:
        submit.make_parser().parse_args(shlex.split(args))


@pytest.mark.slow
def test_the_cells_of_the_notebook_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in Kaggle's layout of folders, with the code of the last commit."""
    if not (CONFIGS.parent / ".git").exists():
        pytest.skip("its first cell clones this repository, and this is a copy without git")
    notebook_file = CONFIGS.parent / "docs" / "kaggle.ipynb"
    cells = ["".join(cell["source"]) for cell in json.loads(notebook_file.read_text())["cells"]]
    assert len(cells) == 5
    write_competition(tmp_path / "input/cifar-10")
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    small = " ".join(flag for flag in FLAGS if not flag.startswith(("--config", "--run", "--on")))
    cells[0] = re.sub("(?m)^CODE = .*", f'CODE = "{CONFIGS.parent}"', cells[0])
    cells[2] = re.sub("(?m)^MORE = .*", f"MORE = {small!r}", cells[2])
    notebook: dict[str, Any] = {"shell": shell}
    for cell in cells:
        exec(re.sub(r"(?m)^!((?:.*\\\n)*.*)", r'shell(f"""\1""")', cell), notebook)
    assert len(Path("submission.csv").read_text().splitlines()) == 1001


def shell(command: str) -> None:
    subprocess.run(command, shell=True, check=True)


# ---- the script


@pytest.mark.slow
def test_the_pushed_script_runs_as_it_is(
    kaggle: KaggleServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kaggle's layout with 2,000 images, read-only; no network, no git; packages from wheels."""
    machine = tmp_path / "kaggle"
    python = make_image(tmp_path / "image")
    make_wheels(machine / "input/datasets/me/wheels")
    write_competition(machine / "input/competitions/cifar-10")

    kaggle.statuses = ["ERROR"]  # so that following it ends
    message = refused(capsys, "--wheels=me/wheels")
    assert "ended with ERROR" in message
    run_there(kaggle, machine, python)
    kaggle.statuses = ["COMPLETE"]
    fit("--wheels=me/wheels")
    out = capsys.readouterr().out
    assert "Successfully installed" in out
    assert "val/accuracy" in out
    submit.main([str(RUN), "--dry_run"])
    assert "1000 rows for cifar-10" in (out := capsys.readouterr().out)
    assert "All checks passed" in out
    predict.main([str(RUN), f"--data_dir={machine / 'input'}", "--output=again.csv"])
    assert Path("again.csv").read_bytes() == (RUN / "submission.csv").read_bytes()

    # a longer training goes on from that output
    name = kaggle.scripts[0]["slug"]
    shutil.move(machine / "working", machine / "input/notebooks" / name)
    kaggle.statuses = ["COMPLETE", "ERROR"]
    longer = ["--wheels=me/wheels", "--trainer.max_epochs=2"]
    assert "ended with ERROR" in refused(capsys, *longer)
    assert kaggle.scripts[1]["kernelDataSources"] == [name]
    run_there(kaggle, machine, python)
    kaggle.statuses = ["COMPLETE"]
    fit(*longer)
    assert [row["epoch"] for row in rows(RUN / "metrics.csv") if row["val/accuracy"]] == ["0", "1"]


def run_there(kaggle: KaggleServer, machine: Path, python: Path) -> None:
    """Run the newest script as Kaggle would, and hand out what it leaves."""
    script, working = machine / "script.py", machine / "working"
    script.write_text(kaggle.scripts[-1]["text"])
    working.mkdir()
    before = state_of(machine / "input")
    done = subprocess.run(
        [python, script],
        cwd=working,
        env={"HOME": str(machine), "PATH": str(python.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert state_of(machine / "input") == before
    kaggle.output = {path.name: path.read_bytes() for path in working.iterdir()}
    kaggle.log = [done.stdout]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_competition(folder: Path) -> None:
    """CIFAR-10 as it is mounted: archives of 1,000 images each, and two tables."""
    folder.parent.mkdir(parents=True)
    fake_data.write_kaggle_cifar10(folder.parent, train=1000, test=1000).rename(folder)
    for split in ("train", "test"):
        with py7zr.SevenZipFile(folder / f"{split}.7z", "w") as archive:
            archive.writeall(folder / split, split)
        shutil.rmtree(folder / split)


def state_of(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}
