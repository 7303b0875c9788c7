"""Training on Kaggle's machine, seen from here: pushed, followed, fetched."""

import ast
import base64
import hashlib
import io
import json
import os
import shutil
import signal
import tarfile
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, SMALL
from kaggle_server import Fault, KaggleServer

import train
from pipeline.kaggle import kernel, remote

FLAGS = [f"--config={CONFIGS / 'cifar10_cpu.yaml'}", "--run=first", "--on=kaggle", *SMALL]
FLAGS += ["--data=KaggleCIFAR10DataModule", "--trainer.max_epochs=1", "--trainer.strategy=auto"]
FLAGS += ["--model.lr_scheduler=null"]
FLAGS = [flag for flag in FLAGS if not flag.startswith("--data.verify")]
RUN = Path("runs/cifar10_cpu/first")
pytestmark = pytest.mark.usefixtures("quick_push")


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
    text = json.dumps(record)[:-1] + ', "start": START}'
    return {kernel.OUTPUT: pack, kernel.RECORD: text.encode(), "other.txt": b""}


def job_of(script: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What is said to the script, and the files that it brings."""
    code = script["text"].partition('"""')[2].partition('"""')[0]
    call = script["text"].rpartition("main(")[2].rstrip()[:-1]
    return ast.literal_eval(call), unpacked(base64.b64decode(code))


def unpacked(code: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(code), mode="r:bz2") as archive:
        files = {name: archive.extractfile(name) for name in archive.getnames()}
        return {name: file.read() for name, file in files.items() if file}


def test_a_run_is_pushed_followed_and_fetched(
    kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {"submission.json": b'{"sample": "/tmp/run/sample.csv"}', "checkpoints/last.ckpt": b"1"}
    kaggle.output = output_of(made | {"submission.csv": b"id,label\n"})
    kaggle.log = ["Epoch 0: 1%\rEpoch 0: 9", "9%\nnext\x1b[2J\n", "1%\rhalf a li", "ne"]
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


def test_a_fetch_that_was_cut_off_is_done_again(
    kaggle: KaggleServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new checkpoint was taken for one that was trained on this machine."""
    kaggle.output = output_of({"checkpoints/last.ckpt": b"1", "metrics.csv": b"2"})

    def once(path: Path, target: Path) -> None:
        path.rename(target)
        if target.suffix == ".ckpt":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(remote, "os", types.SimpleNamespace(replace=once))
        with pytest.raises(SystemExit, match="130"):
            fit()
    fit()
    assert (RUN / "metrics.csv").is_file()
    assert len(kaggle.scripts) == 1


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


@pytest.mark.parametrize("again", [False, True])
def test_a_lost_answer_starts_no_second_session(
    again: bool, kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle.output = output_of({"config.yaml": b""}, status=143)
    if again:
        fit()
    kaggle.faults["SaveKernel"] = [Fault("reset", made="yes")]
    assert "Kaggle could not be reached" in refused(capsys)
    fit()
    assert len(kaggle.scripts) == 1 + again


def test_a_push_that_did_not_arrive_is_made_by_the_start_after_next(
    kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """It waited for ever for what that push would leave."""
    kaggle.output = output_of({"config.yaml": b""})
    fit()
    longer = "--trainer.max_epochs=2"
    kaggle.faults["SaveKernel"] = [Fault("reset")]
    assert "Kaggle could not be reached" in refused(capsys, longer)
    kaggle.output = {name: file.replace(b"START", b"12.5") for name, file in kaggle.output.items()}
    assert "still has what an earlier start left" in refused(capsys, longer)
    kaggle.output = output_of({"metrics.csv": b""})
    fit(longer)
    assert (RUN / "metrics.csv").is_file()
    assert len(kaggle.scripts) == 2


def test_the_config_of_another_run(kaggle: KaggleServer) -> None:
    """There the run had another folder than was packed."""
    config = Path("runs/old/one/config.yaml")
    config.parent.mkdir(parents=True)
    config.write_text((CONFIGS / "cifar10_cpu.yaml").read_text())
    kaggle.output = output_of({"config.yaml": b""})
    train.main(["fit", f"--config={config}", *FLAGS[1:]])
    job, files = job_of(kaggle.scripts[0])
    there = Path(job["args"][1].removeprefix("--config="))
    assert files[str(there)] == config.read_bytes()
    assert job["run"] == f"{there.parents[1].name}/first" == "old/first"
    assert Path("runs/old/first/config.yaml").is_file()


def test_trouble_on_the_way_is_waited_for(kaggle: KaggleServer) -> None:
    kaggle.retry_after = "0"
    kaggle.faults["GetKernelSessionStatus"] = [Fault("503")]
    kaggle.faults["ListKernelSessionOutput"] = [Fault("500")]
    kaggle.output = output_of({"config.yaml": b""})
    fit()
    assert (RUN / "config.yaml").is_file()


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """A program in the background ignores SIGINT, and so do tests that it runs."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("method", ["IntrospectToken", "SaveKernel", "ListKernelSessionOutput"])
def test_ctrl_c_ends_nothing_there(
    method: str,
    kaggle: KaggleServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """While logging in it ended in a traceback."""
    if method == "IntrospectToken":
        monkeypatch.setenv("KAGGLE_API_TOKEN", "KGAT_of-the-user")
    kaggle.clients = [types.SimpleNamespace(pid=os.getpid())]
    kaggle.statuses = ["RUNNING", "RUNNING", "COMPLETE"]
    kaggle.faults[method] = [Fault("interrupt", made="yes")]
    with pytest.raises(SystemExit, match="130"):
        fit()
    assert "the same command again goes on" in capsys.readouterr().out
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
        (["--run="], "needs --config FILE and --run NAME"),
        (["--config=none.yaml"], "error: --config=none.yaml"),
        (["--mount=names"], "--mount=names"),
        (["--wheels", "https://www.kaggle.com/datasets/me/wheels"], "OWNER/NAME"),
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


def test_data_that_would_be_downloaded_without_internet(
    kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would have been seen after the queue."""
    public = "--data=CIFAR10DataModule"
    assert "add --mount OWNER/NAME" in refused(capsys, public, "--wheels=me/wheels")
    assert not kaggle.scripts


def test_a_run_of_this_machine_is_left_alone(
    kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    (RUN / "checkpoints").mkdir(parents=True)
    (RUN / "checkpoints/last.ckpt").write_bytes(b"mine")
    assert f"{RUN} was trained on this machine" in refused(capsys)
    shutil.rmtree(RUN / "checkpoints")
    (RUN / "config.yaml").write_text("of a run that keeps no checkpoint")
    assert f"{RUN} was trained on this machine" in refused(capsys)
    assert not kaggle.scripts


def test_a_push_that_is_forbidden_names_the_rules(
    kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle.failures["SaveKernel"] = (403, "Permission denied")
    assert "https://www.kaggle.com/competitions/cifar-10/rules" in refused(capsys)
    kaggle.failures = {"GetAcceleratorQuotaStatistics": (403, "Permission denied")}
    assert "verified phone number: https://www.kaggle.com/settings" in refused(capsys)


def test_a_state_that_is_not_whole_is_left_alone(
    kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    RUN.mkdir(parents=True)
    (RUN / "on_kaggle.json").write_text('{"args": [')
    assert f"{RUN}/on_kaggle.json is not whole" in refused(capsys)
    assert not kaggle.calls


# ---- what comes back is data


def altered(files: dict[str, bytes]) -> None:
    files[kernel.OUTPUT] += b"x"


def earlier(files: dict[str, bytes]) -> None:
    files[kernel.RECORD] = files[kernel.RECORD].replace(b"START", b"12.5")


def cut(files: dict[str, bytes]) -> None:
    files[kernel.RECORD] = files[kernel.RECORD][:-2]


def missing(files: dict[str, bytes]) -> None:
    del files[kernel.OUTPUT]


WHOLE = "is not whole; run the same command again"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *((change, WHOLE) for change in (altered, cut, missing)),
        (earlier, "still has what an earlier start left"),
    ],
)
def test_an_output_that_is_not_that_of_the_run_is_not_taken(
    change: Callable[[dict[str, bytes]], None],
    said: str,
    kaggle: KaggleServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kaggle.output = output_of({"config.yaml": b""})
    change(kaggle.output)
    assert said in refused(capsys)
    assert [path.name for path in RUN.iterdir()] == ["on_kaggle.json"]


@pytest.mark.parametrize("name", ["../stolen", "/tmp/stolen", "a/../../stolen"])
def test_an_output_stays_in_the_folder_of_the_run(
    name: str, kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle.output = output_of({"config.yaml": b"", name: b""})
    assert "which would be written outside" in refused(capsys)
    assert [path.name for path in RUN.iterdir()] == ["on_kaggle.json"]


# ---- where the data are


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
