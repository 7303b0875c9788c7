"""Training on Kaggle's machine: ``train.py fit --on kaggle``."""

import ast
import base64
import csv
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types
import zipfile
from collections.abc import Callable
from contextlib import chdir, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import fake_data
import py7zr
import pytest
import yaml
from conftest import CONFIGS, SMALL
from kaggle_image import make_image, make_wheels
from kaggle_server import KEY, Fault, KaggleServer

import predict
import submit
import train
from pipeline.kaggle import kernel, parcel, remote

FLAGS = [f"--config={CONFIGS / 'cifar10_cpu.yaml'}", "--run=first", "--on=kaggle", *SMALL]
FLAGS += ["--data=KaggleCIFAR10DataModule", "--trainer.max_epochs=1", "--trainer.strategy=auto"]
FLAGS += ["--model.lr_scheduler=null"]
FLAGS = [flag for flag in FLAGS if not flag.startswith("--data.verify")]
RUN = Path("runs/cifar10_cpu/first")


@pytest.fixture(autouse=True)
def _quick(
    request: pytest.FixtureRequest, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arguments are read in this process, where PyTorch is loaded already; not in slow tests."""

    def resolve(args: list[str], code: bytes) -> dict[str, Any]:
        printed = io.StringIO()
        with redirect_stdout(printed), suppress(SystemExit), chdir(parcel.ROOT):
            train.main([*args, "--print_config"])
        return dict(yaml.safe_load(printed.getvalue()))

    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(parcel, "resolve", resolve)
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(remote, "PATIENCE", 0.05)


def fit(*flags: str) -> None:
    train.main(["fit", *FLAGS, *flags])


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one sentence with which it ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        fit(*flags)
    message = capsys.readouterr().err
    assert end.value.code == 1
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


def output_of(files: dict[str, bytes], status: int = 0) -> dict[str, bytes]:
    """What the script leaves behind."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    pack = content.getvalue()
    record = {"status": status, "sha256": hashlib.sha256(pack).hexdigest(), "folder": "/tmp/run"}
    return {kernel.OUTPUT: pack, kernel.RECORD: json.dumps(record).encode(), "other.txt": b""}


def job_of(script: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What is said to the script, and the files that it brings."""
    code = script["text"].partition('"""')[2].partition('"""')[0]
    call = script["text"].rpartition("main(")[2].rstrip()[:-1]
    return ast.literal_eval(call), unpacked(base64.b64decode(code))


def unpacked(code: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(code), mode="r:xz") as archive:
        files = {name: archive.extractfile(name) for name in archive.getnames()}
        return {name: file.read() for name, file in files.items() if file}


def test_a_run_is_pushed_followed_and_fetched(
    kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {"submission.json": b'{"sample": "/tmp/run/sample.csv"}', "checkpoints/last.ckpt": b"1"}
    kaggle.output = output_of(made | {"submission.csv": b"id,label\n"})
    kaggle.log = ["Epoch 0: 1%\rEpoch 0: 9", "9%\nnext\x1b[2J\n", "half a li", "ne\n"]
    fit()
    [script] = kaggle.scripts
    slug = script["slug"].partition("/")[2]
    assert script["slug"].startswith("tester/cifar10-cpu-first-")
    assert script["newTitle"] == slug
    assert script["kernelType"] == "script"
    assert script["isPrivate"] is script["enableInternet"] is True
    assert script["machineShape"] == "NvidiaTeslaT4"
    assert script["competitionDataSources"] == ["cifar-10"]
    assert not script.get("kernelDataSources")
    assert script["sessionTimeoutSeconds"] == 36000  # what the week has left
    job, files = job_of(script)
    assert job["args"][1] == "--config=configs/cifar10_cpu.yaml"
    assert job["args"][2] == "--config=configs/hardware/kaggle_t4x2.yaml"
    assert job["seconds"] == [34200.0, 36000.0]
    assert job["predict"]
    assert files["train.py"] == Path(train.__file__).read_bytes()
    assert not [name for name in files if name.startswith(("tests", "docs", "runs", "."))]

    out = capsys.readouterr().out
    assert f"https://www.kaggle.com/code/tester/{slug}" in out
    assert "\nEpoch 0: 99%\nnext\\x1b[2J\nhalf a line\n" in out
    assert out.count("half a line") == 1
    assert f"Next: python submit.py {RUN}" in out
    assert (RUN / "checkpoints/last.ckpt").read_bytes() == b"1"
    assert json.loads((RUN / "submission.json").read_text()) == {"sample": f"{RUN}/sample.csv"}
    assert sorted(path.name for path in RUN.iterdir()) == sorted(
        ["checkpoints", "on_kaggle.json", "submission.csv", "submission.json"]
    )

    fit()
    assert f"{RUN} was trained to its end, and is here." in capsys.readouterr().out
    assert len(kaggle.scripts) == 1


def test_what_runs_there_is_followed_from_another_machine(
    kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle.output = output_of({"config.yaml": b""})
    fit()
    shutil.rmtree("runs")
    fit()
    assert (RUN / "config.yaml").is_file()
    assert len(kaggle.scripts) == 1
    kaggle.statuses = ["RUNNING"]
    assert "runs with other arguments; choose another --run" in refused(capsys, "--test=true")


def test_after_its_time_it_goes_on_from_its_output(
    kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle.output = output_of({"checkpoints/last.ckpt": b"1"}, status=143)
    fit()
    assert "its time was up; the same command goes on" in capsys.readouterr().out
    kaggle.output = output_of({"checkpoints/last.ckpt": b"2"})
    kaggle.statuses = ["COMPLETE"]
    fit()
    slug = kaggle.scripts[1]["slug"]
    assert kaggle.scripts[1]["kernelDataSources"] == [slug]
    assert job_of(kaggle.scripts[1])[0]["former"] == slug
    assert (RUN / "checkpoints/last.ckpt").read_bytes() == b"2"


def test_an_error_of_the_training_is_told_and_what_it_left_is_here(
    kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle.output = output_of({"checkpoints/last.ckpt": b"1"}, status=1)
    assert "train.py ended there with exit status 1" in refused(capsys)
    assert (RUN / "checkpoints/last.ckpt").is_file()


@pytest.mark.parametrize("status", ["ERROR", "CANCEL_ACKNOWLEDGED"])
def test_a_start_that_failed_or_was_cancelled_is_pushed_again(
    status: str, kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle.statuses = ["RUNNING", status]
    message = refused(capsys)
    assert f"ended with {status}" in message
    assert ("(Out of memory)" in message) == (status == "ERROR")
    kaggle.statuses = [status, "COMPLETE"]
    kaggle.output = output_of({"config.yaml": b""})
    fit()
    assert len(kaggle.scripts) == 2


def test_a_lost_answer_starts_no_second_session(
    kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle.faults["SaveKernel"] = [Fault("reset", made="yes")]
    assert "Kaggle could not be reached" in refused(capsys)
    kaggle.output = output_of({"config.yaml": b""})
    fit()
    assert len(kaggle.scripts) == 1


def test_trouble_on_the_way_is_waited_for(kaggle: KaggleServer) -> None:
    kaggle.retry_after = "0"
    kaggle.faults["GetKernelSessionStatus"] = [Fault("503")]
    kaggle.faults["ListKernelSessionOutput"] = [Fault("500")]
    kaggle.output = output_of({"config.yaml": b""})
    fit()
    assert (RUN / "config.yaml").is_file()


def test_ctrl_c_ends_nothing_there(
    kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle.clients = [types.SimpleNamespace(pid=os.getpid())]
    kaggle.statuses = ["RUNNING", "RUNNING", "COMPLETE"]
    kaggle.faults["ListKernelSessionOutput"] = [Fault("interrupt")]
    with pytest.raises(SystemExit, match="130"):
        fit()
    assert "The same command again looks at https://www.kaggle" in capsys.readouterr().out
    kaggle.output = output_of({"config.yaml": b""})
    fit()
    assert (RUN / "config.yaml").is_file()
    assert len(kaggle.scripts) == 1


# ---- what is refused


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"error": "Maximum batch GPU session count of 2 reached"}, "session count of 2 reached"),
        ({"invalidCompetitionSources": ["cifar-10"]}, "unknown: cifar-10"),
        ({"invalidDatasetSources": ["me/none"]}, "unknown: me/none"),
    ],
)
def test_errors_of_a_push_come_without_an_exception(
    answer: dict[str, Any],
    said: str,
    kaggle: KaggleServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kaggle.push_answer = answer
    message = refused(capsys)
    assert "Kaggle did not take the script: " in message
    assert said in message
    assert not Path("runs").exists() or not list(Path("runs").rglob("*.json"))


def test_without_an_account_nothing_is_begun(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no valid Kaggle credentials were found" in refused(capsys)
    assert not RUN.exists()


def test_without_time_nothing_is_pushed(
    kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle.quota = 29.5
    message = refused(capsys)
    assert "Kaggle has 0.5 h of GPU time left for you" in message
    assert "2026-12-05 00:00 UTC" in message
    assert not kaggle.scripts


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--on=mars"], "--on=mars"),
        (["--study=x.yaml"], "--study"),
        (["--init_from", "x"], "--init_from"),
        (["--data.data_dir", "/kaggle/input"], "--data.data_dir"),
        (["--run=a/../b"], "--run"),
    ],
)
def test_what_would_not_act_is_refused(
    flags: list[str], said: str, kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, *flags)
    assert not kaggle.calls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "said"),
    [("--model.nothing=1", "nothing"), ("--model.network=own_network.Net", "own_network")],
)
def test_arguments_are_read_by_the_code_that_travels_before_anything_waits_there(
    flag: str, said: str, kaggle: KaggleServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """A network that git does not track would be missed after the queue."""
    Path("own_network.py").write_text("from torch.nn import Linear as Net")
    with pytest.raises(SystemExit):
        fit(flag)
    assert said in capfd.readouterr().err
    assert not kaggle.scripts
    assert not RUN.exists()


def test_a_run_of_this_machine_is_left_alone(
    kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    (RUN / "checkpoints").mkdir(parents=True)
    (RUN / "checkpoints/last.ckpt").write_bytes(b"mine")
    assert f"{RUN} was trained on this machine" in refused(capsys)
    assert not kaggle.scripts


def test_a_push_that_is_forbidden_names_the_rules(
    kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle.failures["SaveKernel"] = (403, "Permission denied")
    assert "https://www.kaggle.com/competitions/cifar-10/rules" in refused(capsys)
    kaggle.failures = {"GetAcceleratorQuotaStatistics": (403, "Permission denied")}
    assert "verified phone number: https://www.kaggle.com/settings" in refused(capsys)


# ---- what comes back is data


def altered(files: dict[str, bytes]) -> None:
    files[kernel.OUTPUT] += b"x"


def cut(files: dict[str, bytes]) -> None:
    files[kernel.RECORD] = files[kernel.RECORD][:-2]


def missing(files: dict[str, bytes]) -> None:
    del files[kernel.OUTPUT]


@pytest.mark.parametrize("change", [altered, cut, missing])
def test_an_output_that_is_not_whole_is_not_taken(
    change: Callable[[dict[str, bytes]], None],
    kaggle: KaggleServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kaggle.output = output_of({"config.yaml": b""})
    change(kaggle.output)
    assert "is not whole; run the same command again" in refused(capsys)
    assert [path.name for path in RUN.iterdir()] == ["on_kaggle.json"]


@pytest.mark.parametrize("name", ["../stolen", "/tmp/stolen", "a/../../stolen"])
def test_an_output_stays_in_the_folder_of_the_run(
    name: str, kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle.output = output_of({"config.yaml": b"", name: b""})
    assert "which would be written outside" in refused(capsys)
    assert [path.name for path in RUN.iterdir()] == ["on_kaggle.json"]


# ---- what travels


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with what must stay at home."""
    root = tmp_path / "repository"
    names = ["train.py", "core/__init__.py", "core/x.py", "configs/a.yaml", "requirements.txt"]
    names += [".env", "kaggle.json", "core/key.pem", "runs/x/config.yaml", "data/names/a.txt"]
    for name in [*names, "untracked.py"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    git = ["git", "-C", str(root)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", *names], check=True)
    monkeypatch.setattr(parcel, "ROOT", root)
    return root


CODE = ["configs/a.yaml", "core/__init__.py", "core/x.py", "requirements.txt", "train.py"]


def test_code_travels_and_nothing_else(repository: Path) -> None:
    args, code = parcel.pack(["fit", "--run=x"], [])
    assert list(unpacked(code)) == CODE
    assert args == ["fit", "--run=x"]
    assert parcel.pack(args, [])[1] == code
    shutil.rmtree(repository / ".git")
    assert list(unpacked(parcel.pack(args, [])[1])) == sorted([*CODE, "untracked.py"])


def test_files_that_arguments_name_travel(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("1\n")
    typed = [f"--config={repository}/untracked.py", f"--data.exclude={tmp_path}/ids.txt"]
    args, code = parcel.pack(typed, [])
    assert args == ["--config=untracked.py", "--data.exclude=given/ids.txt"]
    assert {"untracked.py", "given/ids.txt"} <= unpacked(code).keys()


def test_a_key_in_the_code_is_refused(
    repository: Path, kaggle: KaggleServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "another-secret")
    for secret in (KEY, "another-secret"):
        (repository / "core/x.py").write_text(f"key = '{secret}'")
        with pytest.raises(remote.UserError, match=r"core/x\.py holds a key or"):
            parcel.pack([], [KEY])


@pytest.mark.parametrize(
    ("name", "flags", "data"),
    [
        ("CIFAR10DataModule", [], ""),
        ("CIFAR10DataModule", ["--mount=me/cifar"], "me/cifar"),
        ("LastNamesDataModule", ["--mount=me/names", "--wheels=me/wheels"], "me/names"),
        ("DemoDataModule", [], ""),
    ],
)
def test_the_data_are_found_there(
    name: str, flags: list[str], data: str, kaggle: KaggleServer
) -> None:
    config = {"LastNamesDataModule": "last_names", "DemoDataModule": "demo"}.get(
        name, "mnist_lenet"
    )
    config = "cifar10_speedrun" if name == "CIFAR10DataModule" else config
    kaggle.output = output_of({"config.yaml": b""})
    kaggle.statuses = ["COMPLETE"]
    args = ["fit", f"--config={CONFIGS}/{config}.yaml", "--run=x", "--on", "kaggle", *flags]
    train.main(args)
    [script] = kaggle.scripts
    job, _ = job_of(script)
    assert job["data"] == data
    assert ("--data.download=true" in job["args"]) == (name == "CIFAR10DataModule" and not data)
    assert script["enableInternet"] == (len(flags) < 2)
    assert (script.get("datasetDataSources") or []) == [x.partition("=")[2] for x in flags]


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


def test_every_command_of_the_page_is_read() -> None:
    page = (CONFIGS.parent / "docs" / "kaggle.md").read_text()
    lines = re.findall(r"^python (\S+) (.*)$", page, re.MULTILINE)
    assert [script for script, _ in lines] == ["train.py", "submit.py", "submit.py"]
    options, rest = remote.parse(shlex.split(lines[0][1]))
    assert (options.run, rest) == ("first", ["--data", "KaggleCIFAR10DataModule"])
    for _, args in lines[1:]:
        submit.make_parser().parse_args(shlex.split(args))


@pytest.mark.slow
def test_the_cells_of_the_notebook_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in Kaggle's layout of folders, with the code of the last commit."""
    cells = json.loads((CONFIGS.parent / "docs" / "kaggle.ipynb").read_text())["cells"]
    assert [cell["cell_type"] for cell in cells] == ["code"] * 5
    write_competition(tmp_path / "input/cifar-10")
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    small = " ".join([*SMALL, "--trainer.max_epochs=1", "--trainer.strategy=auto"])
    names = {
        "CODE": f'"{CONFIGS.parent}"',
        "MORE": repr(small.replace("--data.verify=false ", "--model.lr_scheduler=null ")),
    }
    notebook: dict[str, Any] = {"shell": shell}
    for cell in cells:
        code = "".join(cell["source"])
        for name, value in names.items():
            code = re.sub(rf"^{name} = .*", lambda _, x=f"{name} = {value}": x, code, flags=re.M)
        code = re.sub(r"^!((?:.*\\\n)*.*)", r'shell(f"""\1""")', code, flags=re.M)
        exec(code, notebook)
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
