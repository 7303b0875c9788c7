"""``submit.py`` against the real Kaggle client and a Kaggle that lives on this machine."""

import base64
import csv
import hashlib
import io
import json
import math
import os
import random
import shlex
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from conftest import full_disk, read_wandb
from hypothesis import given
from hypothesis import strategies as st
from kaggle_process import append_rows, start
from kaggle_server import KEY, USERNAME, Fault, KaggleServer

import datamodules
from core import kaggle_client
from core.errors import UserError
from core.sample_file import SampledSubmission
from core.submission import KNOWN_LABELS
from pipeline.kaggle import ledger, sending
from pipeline.kaggle.checks import check_submission
from pipeline.kaggle.prediction_file import wilson_interval
from submit import main

RUN = "runs/digits/first"
SAMPLE = "id,label\n1,cat\n2,cat\n3,cat\n4,cat\n"
GOOD = "id,label\n1,cat\n2,dog\n3,dog\n4,dog\n"
CONFIG = """
trainer:
  logger:
  - class_path: callbacks.MetricsCSV
  - class_path: lightning.pytorch.loggers.WandbLogger
    init_args: {project: steadyfit}
"""

Refusal = Callable[..., str]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, without an account and with offline W&B."""
    for name in [name for name in os.environ if name.startswith(("KAGGLE_", "WANDB_"))]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("COLUMNS", "200")  # tables are not folded
    monkeypatch.setattr(sending, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(sending, "SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(kaggle_client, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(kaggle_client, "UPLOAD_SECONDS", 0.05)
    monkeypatch.chdir(tmp_path)
    Path("sample.csv").write_text(SAMPLE)
    return tmp_path


@pytest.fixture
def kaggle(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KaggleServer]:
    """A Kaggle of this machine, and the user's account there."""
    for name in [name for name in sys.modules if name.split(".")[0] == "kaggle"]:
        monkeypatch.delitem(sys.modules, name)  # the client reads its settings when imported
    with KaggleServer().running() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server
    for path in workplace.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """The one sentence with which ``submit.py`` refuses."""

    def run(*args: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(list(args))
        message = capsys.readouterr().err
        assert end.value.code == 1
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        return message

    return run


def make_run(text: str = GOOD, folder: str = RUN, **changes: Any) -> str:
    """A run folder as ``train.py`` and ``predict.py`` leave it; returns its name."""
    path = Path(folder, "submission.csv")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    (path.parent / "config.yaml").write_text(CONFIG)
    made = {
        "csv": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "competition": "cifar-10",
        "sample": "sample.csv",
        "labels": ["bird", "cat", "dog"],
        "runs": [{"run": folder, "validation_accuracy": 0.91, "validation_samples": 5000}],
    }
    path.with_suffix(".json").write_text(json.dumps(made | changes))
    return folder


def records() -> list[dict[str, str]]:
    return [asdict(record) for record in ledger.read()]


# ---- sending


def test_score_comes_back(kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]) -> None:
    main([make_run(), "--wait"])
    out = capsys.readouterr().out
    assert kaggle.uploads == [GOOD.encode()]
    assert kaggle.calls == [
        *("StartSubmissionUpload", "PUT", "CreateSubmission"),
        *("GetSubmission", "GetSubmission"),
    ]
    assert "validation accuracy 91.00% (95% interval 90.17% to 91.76%, 5000 samples)" in out
    assert "Public score 0.91230; validation accuracy was 0.9100." in out
    [record] = records()
    assert record["ref"] == "4711"
    assert record["status"] == "COMPLETE"
    assert record["public_score"] == "0.91230"
    assert record["message"] == kaggle.submissions[0]["description"]
    score = json.loads(Path(RUN, "score.json").read_text())
    assert (score["ref"], score["public_score"], score["val_accuracy"]) == (4711, 0.9123, 0.91)


def test_printed_command_is_the_one_that_was_sent(
    kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    main([make_run(), "--message", "it's better"])
    [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("The same by hand")]
    command = shlex.split(line.split(": ", 1)[1])
    assert command[:3] == ["kaggle", "competitions", "submit"]
    message = f"it's better, sha256 {hashlib.sha256(GOOD.encode()).hexdigest()[:8]}"
    assert command[3:] == ["-c", "cifar-10", "-f", f"{RUN}/submission.csv", "-m", message]
    assert kaggle.submissions[0]["description"] == message


def test_histogram_shows_classes_that_are_never_predicted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main([make_run(), "--dry_run"])
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert ["bird", "0", "0.0%"] in rows
    assert ["dog", "3", "75.0%"] in rows


def test_dry_run_needs_no_account(
    kaggle: KaggleServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KAGGLE_KEY")
    main([make_run(), "--dry_run"])
    assert "nothing was sent" in capsys.readouterr().out
    assert kaggle.calls == []
    assert not Path("runs/submissions.csv").exists()


def test_same_bytes_are_sent_once(kaggle: KaggleServer, refusal: Refusal) -> None:
    main([make_run(), "--wait"])
    assert "as submission 4711 (0.91230); add --again" in refusal(RUN)
    assert "add --again" in refusal(RUN, "--dry_run")
    assert len(kaggle.uploads) == 1
    main([RUN, "--competition", "another"])
    main([RUN, "--again"])
    assert [record["ref"] for record in records()] == ["4711", "4712", "4713"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("500"), "Kaggle refused (500): trouble; trying again in 0 s."),
        (Fault("429"), "Kaggle refused (429): trouble; trying again in 0 s."),
        (Fault("reset"), "Kaggle could not be reached (ProxyError); trying again in 0 s."),
        (Fault("slow"), "Kaggle could not be reached (ReadTimeout); trying again in 0 s."),
    ],
    ids=lambda value: getattr(value, "how", None),
)
@pytest.mark.parametrize("method", ["StartSubmissionUpload", "PUT", "GetSubmission"])
def test_trouble_that_passes_is_waited_for(
    fault: Fault,
    said: str,
    method: str,
    kaggle: KaggleServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One 500 ended the waiting, and an upload that was reset was silent for six minutes."""
    monkeypatch.setattr(kaggle_client, "TIMEOUT", (5.0, 0.5))
    monkeypatch.setattr(kaggle_client, "UPLOAD_SECONDS", 5.0)
    kaggle.slow, kaggle.retry_after = 0.8, "0"
    kaggle.faults[method] = [fault]
    main([make_run(), "--wait"])
    out = capsys.readouterr().out
    if method == "PUT" and fault.how in ("500", "429"):
        said = f"Kaggle did not take the file ({fault.how}); trying again in 0 s."
    assert said in out
    assert "Public score 0.91230" in out
    assert len(kaggle.made) == 1


def test_waiting_ends(
    kaggle: KaggleServer, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A submission that stayed PENDING was waited for without end."""
    monkeypatch.setattr(sending, "WAIT_SECONDS", 0.1)
    kaggle.verdicts = [{"status": "PENDING"}]
    message = refusal(make_run(), "--wait")
    assert "Kaggle has not scored submission 4711 in" in message
    assert "go on with the same command, or see python submit.py --list later" in message
    kaggle.verdicts = [{"status": "COMPLETE", "publicScore": "0.5"}]
    main([RUN, "--wait"])
    assert len(kaggle.made) == 1


def test_the_score_is_asked_for_by_reference(kaggle: KaggleServer) -> None:
    """More than 200 newer submissions hid it."""
    main([make_run()])
    kaggle.submissions += [{"ref": 5000 + i, "description": ""} for i in range(201)]
    main([RUN, "--wait"])
    assert records()[0]["public_score"] == "0.91230"


def test_a_submission_that_cannot_be_read_yet_is_waited_for(kaggle: KaggleServer) -> None:
    kaggle.faults["GetSubmission"] = [Fault("404")]
    main([make_run(), "--wait"])
    assert records()[0]["public_score"] == "0.91230"


@pytest.mark.parametrize("made", ["no", "yes", "late"])
@pytest.mark.parametrize("how", ["reset", "500", "504", "html", "half", "empty", "slow"])
def test_a_lost_answer_is_looked_for_before_anything_is_sent(
    how: str, made: str, kaggle: KaggleServer, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "Run the same command again" sent the file again, though Kaggle had it."""
    monkeypatch.setattr(sending, "SETTLE_SECONDS", 0.5)
    kaggle.slow, kaggle.patience = 0.3, 0.2
    kaggle.faults["CreateSubmission"] = [Fault(how, made)]
    with monkeypatch.context() as patch:
        patch.setattr(kaggle_client, "TIMEOUT", (5.0, 0.2))
        message = refusal(make_run())
    assert "Kaggle may have made a submission or not" in message
    assert "the same command again looks at Kaggle before it sends anything" in message
    [record] = records()
    assert (record["ref"], record["status"]) == ("", "SENDING")
    main([RUN, "--message", "mine"])
    assert len(kaggle.made) == 1
    [record] = records()
    assert (record["ref"], record["message"] == "mine") == ("4711", False)
    assert "add --again" in refusal(RUN)


def test_nothing_is_sent_while_the_list_of_submissions_is_not_to_be_had(
    kaggle: KaggleServer, refusal: Refusal
) -> None:
    kaggle.faults["CreateSubmission"] = [Fault("reset")]
    refusal(make_run())
    kaggle.failures["ListSubmissions"] = (500, "Trouble")
    message = refusal(RUN)
    assert "nothing was sent: Kaggle may have these bytes from before" in message
    assert "(Kaggle refused (500): Trouble)" in message
    assert "add --again to send them nevertheless" in message
    assert kaggle.made == []
    main([RUN, "--again"])
    assert len(kaggle.made) == 1
    assert "as submission 4711" in refusal(RUN)


def test_a_refused_second_attempt_leaves_the_first_unclear(
    kaggle: KaggleServer, refusal: Refusal
) -> None:
    kaggle.faults["CreateSubmission"] = [Fault("reset", "yes"), Fault("400")]
    refusal(make_run())
    assert "Kaggle refused (400)" in refusal(RUN, "--again")
    main([RUN])
    assert len(kaggle.made) == 1


@pytest.mark.parametrize("message", [None, "mine", 600 * "long "])
def test_any_message_carries_the_digest(
    kaggle: KaggleServer, refusal: Refusal, message: str | None
) -> None:
    kaggle.faults["CreateSubmission"] = [Fault("reset", "yes")]
    refusal(make_run(), *([] if message is None else ["--message", message]))
    main([RUN])
    assert len(kaggle.made) == 1


def test_a_lost_submission_is_found_beyond_the_first_page(
    kaggle: KaggleServer, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kaggle_client, "PAGE", 2)
    kaggle.faults["CreateSubmission"] = [Fault("reset", "yes")]
    refusal(make_run())
    kaggle.submissions += [{"ref": 5000 + i, "description": f"sha256 {i:08}"} for i in range(5)]
    main([RUN])
    assert [record["ref"] for record in records()] == ["4711"]
    assert kaggle.calls.count("ListSubmissions") == 3


def test_the_list_finds_a_lost_submission(
    kaggle: KaggleServer, refusal: Refusal, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle.faults["CreateSubmission"] = [Fault("reset", "yes")]
    refusal(make_run())
    kaggle.verdicts = kaggle.verdicts[1:]
    main(["--list"])
    assert "0.91230" in capsys.readouterr().out.splitlines()[-1]


def test_ctrl_c_while_sending(
    kaggle: KaggleServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(kaggle_client, "create", interrupt)
        main([make_run()])
    assert end.value.code == 130
    assert f"made a submission or not; {sending.SEEK}\n" in capsys.readouterr().err
    main([RUN])
    assert len(kaggle.made) == 1


def test_two_programs_do_not_send_at_once(kaggle: KaggleServer, refusal: Refusal) -> None:
    make_run()
    with ledger.sending():
        assert "another submit.py is sending from this folder" in refusal(RUN)
    assert kaggle.calls == []


def test_a_file_changed_after_the_checks_is_not_sent(
    kaggle: KaggleServer, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change() -> Any:
        Path(RUN, "submission.csv").write_text(SAMPLE)
        return authenticate()

    authenticate = kaggle_client.authenticate
    monkeypatch.setattr(kaggle_client, "authenticate", change)
    assert "submission.csv has just been changed; run the same" in refusal(make_run())
    assert kaggle.calls == []


# ---- the list of what was sent

OLD = """time,run,competition,ref,status,public_score,val_accuracy,file,sha256,message,error
2026-01-02T03:04:05,runs/a/b,cifar-10,12,PENDING,,0.9100,x.csv,ab,"one,
two",
2026-01-02T03:04:06,,cifar-10,13,COMPLETE,0.5,,y.csv,cd,three,
2026-01-02T03:05:05,runs/a/b,cifar-10,12,COMPLETE,0.9,0.9100,x.csv,ab,one,"""


def write_list(text: str) -> Path:
    ledger.ROOT.mkdir()
    ledger.LEDGER.write_text(text)
    return ledger.LEDGER


def test_a_list_of_today_is_read_and_continued() -> None:
    """Also without the end of its last line, and with blank lines, as an editor leaves it."""
    write_list(OLD)
    first, second = ledger.read()
    assert (first.ref, first.public_score, second.ref) == ("12", "0.9", "13")
    ledger.append(replace(second, ref="14", message="ü \udcff"))
    assert ledger.LEDGER.read_bytes().startswith(OLD.encode() + b"\n")
    assert [record.ref for record in ledger.read()] == ["12", "13", "14"]
    write_list_again = ledger.LEDGER.read_bytes().replace(b"\n2026", b"\n\n2026") + b"\n\n"
    ledger.LEDGER.write_bytes(write_list_again)
    assert [record.ref for record in ledger.read()] == ["12", "13", "14"]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (",13,", ",x,", 4),
        (",13,", ",,", 4),
        ("2026-01-02T03:04:06", "2.1.2026", 4),
        (",three,", "", 4),
        (",three,", ",three,,,", 4),
        (",three,", ',"three', 5),
    ],
)
def test_a_list_changed_by_hand_is_told_by_its_line(
    refusal: Refusal, old: str, new: str, line: int
) -> None:
    write_list(OLD.replace(old, new))
    assert f"runs/submissions.csv, line {line}: not a submission; mend" in refusal("--list")


def test_a_list_that_leads_nowhere(refusal: Refusal) -> None:
    """A link to a drive that is not there was taken for an empty list."""
    ledger.ROOT.mkdir()
    ledger.LEDGER.symlink_to("gone.csv")
    assert "submissions.csv cannot be read (No such file" in refusal("--list")


def test_three_programs_lose_no_row(workplace: Path) -> None:
    """Of 120 rows 42 were left: each program wrote what it had read before the others wrote."""
    jobs = [start(append_rows, workplace, number) for number in (100, 200, 300)]
    for job in jobs:
        job.join()
    assert len(ledger.read()) == 120


def test_a_row_that_does_not_fit_leaves_no_part(workplace: Path) -> None:
    write_list(OLD + "\n")
    [*_, record] = ledger.read()
    with full_disk(len(OLD) + 20), pytest.raises(UserError, match="could not be written"):
        ledger.append(record)
    assert ledger.LEDGER.read_text() == OLD + "\n"


# ---- what Kaggle refuses


@pytest.mark.parametrize("method", ["StartSubmissionUpload", "CreateSubmission"])
@pytest.mark.parametrize(
    ("status", "said", "remedy"),
    [
        (400, "You have used all 5 submissions for today.", "the limits and the deadline are at"),
        (401, "Unauthenticated", "make a new token at https://www.kaggle.com/settings/api"),
        (403, "You must accept the rules", "https://www.kaggle.com/competitions/cifar-10/rules"),
        (404, "Not found", "is 'cifar-10' the last part of the competition's address"),
        (429, "Too many requests", "run the same command again in 7 seconds"),
        (503, "Unavailable", "run the same command again in a few minutes"),
    ],
)
def test_what_kaggle_refuses_can_be_sent_again(
    kaggle: KaggleServer, refusal: Refusal, method: str, status: int, said: str, remedy: str
) -> None:
    kaggle.failures[method] = (status, said)
    message = refusal(make_run(), "--wait")
    assert f"Kaggle refused ({status}): {said.rstrip('.')}; " in message
    unclear = method == "CreateSubmission" and status == 503
    assert (sending.SEEK if unclear else remedy) in message
    assert len(records()) == unclear
    kaggle.failures.clear()
    main([RUN, "--wait"])
    assert records()[0]["public_score"] == "0.91230"


def test_failed_upload_is_an_error(kaggle: KaggleServer, refusal: Refusal) -> None:
    """The client does not raise, but answers "Could not submit to competition", without a ref."""
    kaggle.failures["PUT"] = (403, "Forbidden")
    message = refusal(make_run())
    assert "Kaggle did not take the file (403); run the same command again" in message
    assert "CreateSubmission" not in kaggle.calls
    assert not Path("runs/submissions.csv").exists()


def test_unreachable(
    kaggle: KaggleServer, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    with KaggleServer().running() as gone:
        nobody = gone.environment["http_proxy"]
    monkeypatch.setenv("http_proxy", nobody)
    assert "Kaggle could not be reached (ProxyError)" in refusal(make_run())


def test_failed_scoring_is_an_error(kaggle: KaggleServer, refusal: Refusal) -> None:
    kaggle.verdicts = [{"status": "ERROR", "errorDescription": "ID column not found"}]
    message = refusal(make_run(), "--wait")
    assert "could not score submission 4711: ID column not found" in message
    assert records()[0]["status"] == "ERROR"


def test_interrupted_waiting_goes_on(
    kaggle: KaggleServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    make_run()
    with monkeypatch.context() as patch:
        patch.setattr(sending.time, "sleep", interrupt)
        with pytest.raises(SystemExit) as end:
            main([RUN, "--wait"])
    assert end.value.code == 130
    assert records()[0]["status"] == "PENDING"
    assert json.loads(Path(RUN, "score.json").read_text())["public_score"] is None
    main([RUN, "--wait"])
    assert len(kaggle.uploads) == 1
    assert "Public score 0.91230" in capsys.readouterr().out


def test_trouble_while_waiting_loses_nothing(kaggle: KaggleServer, refusal: Refusal) -> None:
    kaggle.failures["GetSubmission"] = (401, "Unauthenticated")
    assert "make a new token" in refusal(make_run(), "--wait")
    kaggle.failures.clear()
    main([RUN, "--wait"])
    assert len(kaggle.uploads) == 1
    assert records()[0]["public_score"] == "0.91230"


def test_reference_is_told_when_it_cannot_be_written(
    kaggle: KaggleServer, refusal: Refusal
) -> None:
    Path(make_run()).joinpath("score.json").mkdir()
    message = refusal(RUN)
    assert "submission 4711 is at Kaggle, do not send it again; but" in message
    assert "score.json could not be written" in message


def test_command_never_shows_the_key(
    kaggle: KaggleServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With VERBOSE=1 the client prints its request headers."""
    monkeypatch.setenv("VERBOSE", "1")
    main([make_run(), "--wait"])
    out, err = capfd.readouterr()
    assert "Public score 0.91230" in out
    for secret in (KEY, base64.b64encode(f"{USERNAME}:{KEY}".encode()).decode()):
        assert secret not in out + err


# ---- logging in


def test_no_credentials(
    kaggle: KaggleServer, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KAGGLE_KEY")
    assert "no valid Kaggle credentials were found; run `kaggle auth login`" in refusal(make_run())
    assert not kaggle_client.has_credentials()


def test_token(kaggle: KaggleServer, refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAGGLE_KEY")
    monkeypatch.setenv("KAGGLE_API_TOKEN", KEY)
    assert kaggle_client.has_credentials()
    kaggle.failures["IntrospectToken"] = (404, "Not found")
    assert "no valid Kaggle credentials" in refusal(make_run())
    kaggle.failures["IntrospectToken"] = (503, "Unavailable")
    assert "Kaggle refused (503): Unavailable" in refusal(RUN)


@pytest.mark.parametrize("name", ["KAGGLE_API_TOKEN", "KAGGLE_KEY"])
def test_a_key_that_ends_in_a_newline(
    kaggle: KaggleServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """So files of secrets end; the traceback showed the token."""
    monkeypatch.delenv("KAGGLE_KEY")
    monkeypatch.setenv(name, f"{KEY}\n")
    main([make_run()])
    assert kaggle.keys[-1] == KEY


@pytest.mark.parametrize(
    ("where", "content", "sentence"),
    [
        ("kaggle.json", f'["tester", "{KEY}"]', "the Kaggle client failed (TypeError)"),
        ("kaggle.json", '{"username": "tester", "key": "\u0142"}', "(UnicodeEncodeError)"),
        ("kaggle.json", f'{{"username": "tester", "key": "{KEY}', "no valid Kaggle credentials"),
        ("KAGGLE_KEY", "\u0142", "the Kaggle client failed (UnicodeEncodeError)"),
        ("KAGGLE_API_TOKEN", f"{KEY}\n{KEY}", "the Kaggle client failed (ValueError)"),
        (
            "KAGGLE_API_TOKEN",
            KEY * 99,
            "cannot use its folder or a file in it (File name too long)",
        ),
        (
            "KAGGLE_CONFIG_DIR",
            "sample.csv/none",
            "cannot use its folder or a file in it (Not a dir",
        ),
    ],
)
def test_damaged_credentials_are_told_without_showing_them(
    kaggle: KaggleServer,
    refusal: Refusal,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    content: str,
    sentence: str,
) -> None:
    monkeypatch.delenv("KAGGLE_KEY")
    if where == "kaggle.json":
        monkeypatch.delenv("KAGGLE_USERNAME")
        folder = Path("home", ".kaggle")
        folder.mkdir()
        folder.joinpath(where).write_text(content)
    else:
        monkeypatch.setenv(where, content)
    said = refusal(make_run())
    assert sentence in said
    assert KEY not in said
    for path in Path("home").rglob("kaggle.json"):
        path.unlink()


def test_an_unknown_status_word(kaggle: KaggleServer, refusal: Refusal) -> None:
    kaggle.verdicts = [{"status": "BEING_JUDGED"}]
    assert "the Kaggle client failed (KeyError); " in refusal(make_run(), "--wait")


def test_escape_codes_of_the_server_are_shown(
    kaggle: KaggleServer, refusal: Refusal, capsys: pytest.CaptureFixture[str]
) -> None:
    """They cleared the screen, or wrote a title over the window."""
    kaggle.failures["CreateSubmission"] = (400, "\x1b[2Jno\nmore \u202e")
    assert r"(400): \x1b[2Jno\nmore \u202e; " in refusal(make_run())
    kaggle.failures.clear()
    kaggle.verdicts = [{"status": "ERROR", "errorDescription": "\x1b]0;title\x07"}]
    assert r"4711: \x1b]0;title\x07" in refusal(RUN, "--wait")
    [record] = ledger.read()
    ledger.append(replace(record, error="\x1b[2J"))  # an older version wrote so
    main(["--list"])
    assert r"ERROR \x1b[2J" in capsys.readouterr().out


BODIES = [
    ("", "application/json"),
    ("{}", "application/json"),
    ("[1]", "application/json"),
    ('{"ref": 47', "application/json"),
    ('{"ref": "AUTHORIZATION"}', "application/json"),
    ('{"code": 500}', "application/json"),
    ('{"code": 403, "message": ["AUTHORIZATION"]}', "application/json"),
    ('{"message": "AUTHORIZATION\\u001b[2J", "code": 400}', "application/json"),
    ('{"submissions": [{"status": "AUTHORIZATION"}], "status": "AUTHORIZATION"}', "text/plain"),
    ('{"token": "a", "createUrl": "http://localhost:0/AUTHORIZATION"}', "application/json"),
    ("<html>AUTHORIZATION</html>", "text/html"),
    ("AUTHORIZATION", "application/json; charset=utf-7"),
]


def test_no_secret_in_what_200_failures_say(
    kaggle: KaggleServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(0)
    make_run()
    secrets = [KEY, base64.b64encode(f"{USERNAME}:{KEY}".encode()).decode()]
    told = Counter[str]()
    for number in range(200):
        method = draw.choice(["StartSubmissionUpload", "CreateSubmission", "GetSubmission"])
        method = draw.choice([method, "ListSubmissions", "IntrospectToken", "PUT"])
        body, kind = draw.choice(BODIES)
        status = draw.choice(["200", "200", "302", "400", "401", "403", "404", "408", "429", "503"])
        fault = draw.choice([Fault(status, body=body, kind=kind), Fault("reset"), Fault("half")])
        kaggle.faults = {method: [fault] * 20}
        with monkeypatch.context() as patch:
            patch.setattr(sending, "WAIT_SECONDS", 0.02)
            patch.setattr(sending, "SETTLE_SECONDS", 0.0)
            if draw.random() < 0.5 or method == "IntrospectToken":
                patch.setenv("KAGGLE_API_TOKEN", KEY)
            options = draw.choice([["--wait"], ["--debug"], []])
            with suppress(SystemExit, UserError):
                main([RUN, *options, *["--again"] * (method != "ListSubmissions")])
        out, err = capfd.readouterr()
        assert not any(secret in out + err for secret in secrets), (number, method, fault)
        assert "Traceback" not in err
        assert "\x1b" not in out + err
        told[err.partition(";")[0]] += 1
    assert len(told) > 20
    print(f"200 failures, {len(told)} different sentences, 0 secrets.")


# ---- the file


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "submission.csv is empty."),
        ("id,label\n", "submission.csv has a header but no rows."),
        (GOOD.replace("id,", "Id,"), "the header is Id,label, but sample.csv has id,label"),
        (GOOD.replace(",label", ""), "the header must name two columns, got 'id'"),
        (GOOD.replace("1,cat\n", ""), "1 of the 4 ids in sample.csv are missing, the first is 1"),
        (GOOD + "4,dog\n", "1 ids come more than once, the first is 4"),
        (GOOD + "5,dog\n", "1 ids are not in sample.csv, the first is 5"),
        (GOOD.replace("2,dog", "2,frog"), "id 2 has the unknown label 'frog'; allowed are bird"),
        (GOOD.replace("2,dog", "two,dog"), "line 3: expected an integer id and a label"),
        (GOOD.replace("2,dog", '2,"' + 200_000 * "x"), "line 3: field larger than field limit"),
    ],
)
def test_wrong_file(refusal: Refusal, text: str, complaint: str) -> None:
    assert complaint in refusal(make_run(text), "--dry_run")


@pytest.mark.parametrize(
    ("sample", "label", "complaint"),
    [
        ("cat", "dog", ""),
        ("cat", "Corn_(maize)", ""),
        ("cat", "", "the label '' of id 2 is empty or padded with spaces, but sample.csv"),
        ("", "", "the label '' of id 2 is empty or padded with spaces"),
        ("cat", " cat", "the label ' cat' of id 2 is empty or padded with spaces"),
        ("cat", "3", "the label '3' of id 2 is an integer, but sample.csv has text; write labels"),
        ("cat", "nan", "the label 'nan' of id 2 is not finite, but sample.csv has text"),
        ("cat", "tensor(3)", "the label 'tensor(3)' of id 2 is a printed array"),
        ("cat", "np.int64(3)", "is a printed array"),
        ("0", "3", ""),
        ("0", "-1", ""),
        ("0", "3.0", "the label '3.0' of id 2 is a number, but sample.csv has an integer"),
        ("0", "cat", "the label 'cat' of id 2 is text, but sample.csv has an integer"),
        ("0.5", "1", ""),
        ("0.5", "1e-3", ""),
        (
            "0.5",
            "inf",
            "the label 'inf' of id 2 is not finite, but sample.csv has a number and an integer",
        ),
    ],
)
def test_labels_are_of_the_sample_files_type(
    refusal: Refusal,
    capsys: pytest.CaptureFixture[str],
    sample: str,
    label: str,
    complaint: str,
) -> None:
    """A file of one's own passed with any label at all."""
    Path("sample.csv").write_text(f"id,label\n1,{sample}\n2,{sample}\n")
    Path("mine.csv").write_text(f"id,label\n1,{sample or 'cat'}\n2,{label}\n")
    args = ["mine.csv", "--competition=some-other", "--sample=sample.csv", "--dry_run"]
    if complaint:
        assert complaint in refusal(*args)
    else:
        main(args)
        assert "note: of its labels only the type is checked" in capsys.readouterr().out


@pytest.mark.parametrize("label", ["3", "", "nan", " cat", "tensor(3)", "Cat"])
@pytest.mark.parametrize("competition", ["cifar-10", "https://www.kaggle.com/c/cifar-10/overview"])
def test_labels_of_a_known_competition_are_known(
    refusal: Refusal, competition: str, label: str
) -> None:
    Path("mine.csv").write_text(GOOD.replace("2,dog", f"2,{label}"))
    said = refusal("mine.csv", f"--competition={competition}", "--sample=sample.csv", "--dry_run")
    assert f"id 2 has the unknown label {label!r}; allowed are airplane, automobile" in said


def test_known_labels_are_those_of_the_data_modules() -> None:
    modules = [getattr(datamodules, name) for name in datamodules.__all__]
    known = {cls.competition: cls().submission().labels for cls in modules if cls.competition}
    assert known == KNOWN_LABELS


@pytest.mark.parametrize(
    "address",
    [
        "https://www.kaggle.com/competitions/digit-recognizer",
        "kaggle.com/c/digit-recognizer/data?select=train.csv",
        "http://kaggle.com/competitions/digit-recognizer/#evaluation",
        "digit-recognizer",
    ],
)
def test_a_competition_is_named_by_its_address(
    capsys: pytest.CaptureFixture[str], address: str
) -> None:
    Path("mine.csv").write_text(GOOD)
    main(["mine.csv", "--competition", address, "--sample=sample.csv", "--dry_run"])
    assert "submit -c digit-recognizer -f mine.csv" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["https://example.com/cifar-10", "../cifar", "a b", ""])
def test_what_names_no_competition_is_refused(refusal: Refusal, name: str) -> None:
    Path("mine.csv").write_text(GOOD)
    said = refusal("mine.csv", f"--competition={name}", "--sample=sample.csv", "--dry_run")
    assert f"--competition {name!r} is no competition's name; give the last part" in said


def test_blank_lines_at_the_end_are_accepted(refusal: Refusal) -> None:
    """An editor leaves them; they were a row that is not an integer and a label."""
    main([make_run(GOOD + "\r\n\n"), "--dry_run"])
    Path("mine.csv").write_text(GOOD.replace("\n2", "\n\n2"))
    said = refusal("mine.csv", "--competition=cifar-10", "--sample=sample.csv")
    assert "mine.csv, line 3: expected an integer id and a label, got ''" in said


def test_links_that_lead_nowhere(refusal: Refusal) -> None:
    Path("mine.csv").symlink_to("gone.csv")
    assert "mine.csv does not exist; make it with predict.py" in refusal("mine.csv")
    make_run(sample="mine.csv")
    assert "mine.csv does not exist; name the competition's file" in refusal(RUN)


@given(
    ids=st.lists(st.integers(0, 10**6), min_size=2, unique=True),
    labels=st.lists(st.text(min_size=1), min_size=1, unique=True),
    mistake=st.sampled_from([None, "drop", "double", "add", "label"]),
    data=st.data(),
)
def test_any_order_is_right_and_any_mistake_is_seen(
    tmp_path_factory: pytest.TempPathFactory,
    ids: list[int],
    labels: list[str],
    mistake: str | None,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.getbasetemp()
    sample, path = folder / "sample.csv", folder / "submission.csv"
    rows = [(i, data.draw(st.sampled_from(labels))) for i in data.draw(st.permutations(ids))]
    right = list(rows)
    match mistake:
        case "drop":
            rows.pop()
        case "double":
            rows.append(rows[0])
        case "add":
            rows.append((max(ids) + 1, labels[0]))
        case "label":
            rows[-1] = (rows[-1][0], "".join(labels) + "!")
    for where, content in (sample, [(i, labels[0]) for i in ids]), (path, rows):
        with where.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("id", "label"), *content])
    if mistake:
        with pytest.raises(UserError, match=r"missing|more than once|not in|unknown label"):
            check_submission(path, sample, labels)
    else:
        table = check_submission(path, sample, labels)
        assert list(zip(table.ids, table.labels, strict=True)) == right


def test_written_file_is_in_the_order_of_the_sample_and_passes() -> None:
    Path("sample.csv").write_text("id,label\n3,cat\n1,cat\n2,cat\n")
    form = SampledSubmission(labels=("cat", "dog"), sample=Path("sample.csv"))
    path = Path("new", "submission.csv")
    form.write(path, np.array([1, 2, 3]), np.array([0, 1, 1]))
    assert path.read_bytes() == b"id,label\n3,dog\n1,cat\n2,dog\n"
    assert check_submission(path, Path("sample.csv"), form.labels).ids == [3, 1, 2]
    with pytest.raises(UserError, match=r"2 ids differ .* sample.csv, the first is 3; check"):
        form.write(path, np.array([1, 2, 4]), np.array([0, 1, 1]))


def test_crlf_and_byte_order_mark_are_accepted_and_told(
    kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()
    Path("mine.csv").write_bytes(sent)
    main(["mine.csv", "--competition", "cifar-10", "--sample", "sample.csv"])
    out = capsys.readouterr().out
    assert "note: the file starts with a byte-order mark" in out
    assert "note: the lines end in CRLF" in out
    assert "note: predict.py did not make this file" in out
    assert kaggle.uploads == [sent]
    assert not Path("score.json").exists()
    assert records()[0]["file"] == "mine.csv"


def test_file_must_be_the_one_that_was_made(refusal: Refusal) -> None:
    Path(make_run(), "submission.csv").write_text(GOOD.replace("1,cat", "1,dog"))
    assert "is not the file that runs/digits/first/submission.json records" in refusal(RUN)
    Path(RUN, "submission.json").write_text('{"sha256": "0"}')
    assert "submission.json is not whole; run predict.py again" in refusal(RUN)


@pytest.mark.parametrize(
    "changes",
    [
        {"sha256": 3},
        {"labels": "cat"},
        {"labels": ["cat", None]},
        {"labels": 5},
        {"sendable": "no"},
        {"competition": ["cifar-10"]},
        {"sample": 7},
        {"sample": "a\0b"},
        {"runs": {}},
        {"runs": None},
        {"runs": ["first"]},
        {"runs": [{"run": 1, "validation_accuracy": 0.5, "validation_samples": 9}]},
        {"runs": [{"run": "x", "validation_accuracy": "0.5", "validation_samples": 9}]},
        {"runs": [{"run": "x", "validation_accuracy": 1.5, "validation_samples": 9}]},
        {"runs": [{"run": "x", "validation_accuracy": float("nan"), "validation_samples": 9}]},
        {"runs": [{"run": "x", "validation_accuracy": 0.5, "validation_samples": 0}]},
        {"runs": [{"run": "x", "validation_accuracy": 0.5, "validation_samples": None}]},
        {"runs": [{"run": "x", "validation_accuracy": 0.5, "validation_samples": True}]},
    ],
)
def test_a_changed_record_is_told_in_a_sentence(changes: dict[str, Any], refusal: Refusal) -> None:
    """Nine of twenty-two ended in a traceback, or were taken as they were."""
    make_run(**changes)
    assert "submission.json is not whole; run predict.py again" in refusal(RUN)


def test_what_is_not_known_is_asked_for(refusal: Refusal) -> None:
    Path("mine.csv").write_text(GOOD)
    assert "say which with --competition NAME and --sample FILE" in refusal("mine.csv")
    assert "say which" in refusal("mine.csv", "--competition", "cifar-10")
    assert "none.csv does not exist; make it with predict.py" in refusal("none.csv")
    made = make_run(sample="data/gone.csv")
    assert "data/gone.csv does not exist; name the competition's file: --sample" in refusal(made)
    main([made, "--sample", "sample.csv", "--dry_run"])
    Path(made, "submission.csv").unlink()
    assert "has no submission.csv; make it: python predict.py runs/digits/first" in refusal(made)


def test_unreadable_file(tmp_path: Path) -> None:
    Path("binary.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"binary.csv is not a UTF-8 text file"):
        check_submission(Path("binary.csv"), Path("sample.csv"))
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        check_submission(tmp_path, Path("sample.csv"))


@pytest.mark.parametrize(("right", "samples"), [(4550, 5000), (1, 7)])
def test_wilson_interval_ends_where_the_score_test_does(right: int, samples: int) -> None:
    """At its ends the observed fraction is z standard deviations of the end away."""
    fraction = right / samples
    for end in wilson_interval(fraction, samples):
        deviation = math.sqrt(end * (1 - end) / samples)
        assert abs(fraction - end) == pytest.approx(1.96 * deviation)


def test_wilson_interval_stays_within_zero_and_one() -> None:
    assert wilson_interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_ensemble_and_run_without_validation(capsys: pytest.CaptureFixture[str]) -> None:
    one = {"run": "runs/digits/first", "validation_accuracy": 0.5, "validation_samples": 4}
    two = {"run": "runs/digits/second", "validation_accuracy": None, "validation_samples": 0}
    main([make_run(runs=[one, two]), "--dry_run"])
    out = capsys.readouterr().out
    assert "runs/digits/second: no validation part" in out
    assert "'runs/digits/first + runs/digits/second, sha256" in out


# ---- the list


def test_list_fetches_scores_that_were_out(
    kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--list"])
    assert "Nothing was sent yet." in capsys.readouterr().out
    main([make_run()])
    main(["--list"])
    assert "PENDING" in capsys.readouterr().out
    main(["--list"])
    [row] = [line.split() for line in capsys.readouterr().out.splitlines() if RUN in line]
    assert row[2:] == [RUN, "cifar-10", "4711", "0.9100", "0.91230", "COMPLETE"]
    calls = len(kaggle.calls)
    main(["--list"])
    assert len(kaggle.calls) == calls  # nothing is out any more
    assert json.loads(Path(RUN, "score.json").read_text())["public_score"] == 0.9123


def test_list_shows_what_is_known_without_an_account(
    kaggle: KaggleServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main([make_run()])
    monkeypatch.delenv("KAGGLE_KEY")
    main(["--list"])
    out = capsys.readouterr().out
    assert "note: scores still out were not fetched: no valid Kaggle credentials" in out
    assert "4711" in out.splitlines()[-1]


def test_list_of_somebody_else(refusal: Refusal) -> None:
    Path(make_run()).parents[1].joinpath("submissions.csv").write_text("a,b\n1,2\n")
    assert "is not a list of submissions; move it away" in refusal("--list")
    assert "is not a list of submissions" in refusal(RUN, "--dry_run")


# ---- W&B


@pytest.fixture
def wandb_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The W&B folder of a run that was trained offline a while ago."""
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(workplace / "home"))
    folder = Path(make_run(), "wandb")
    (folder / "offline-run-20260101_000000-abc123").mkdir(parents=True)
    yield folder
    wandb.teardown()  # it reads its settings once in a process


def test_score_is_on_the_offline_wandb_run(kaggle: KaggleServer, wandb_run: Path) -> None:
    main([RUN, "--wait"])
    _, folder = sorted(wandb_run.glob("offline-run-*"))
    [seen] = read_wandb(folder, "--summary")
    assert (seen["run_id"], seen["project"]) == ("abc123", "steadyfit")
    assert seen["summary"]["kaggle/ref"] == 4711
    assert seen["summary"]["kaggle/public_score"] == 0.9123


def test_score_is_kept_when_wandb_refuses(
    kaggle: KaggleServer,
    wandb_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")  # without a key
    main([RUN, "--wait"])
    out = capsys.readouterr().out
    assert "note: the score is not on the W&B run: " in out
    assert "Public score 0.91230" in out
    assert records()[0]["public_score"] == "0.91230"


# ---- downloading


def zipped(**files: str) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as bundle:
        for name, text in files.items():
            bundle.writestr(name.replace("__", "/"), text)
    return archive.getvalue()


def test_download(kaggle: KaggleServer) -> None:
    kaggle.archive = zipped(labels="id,label\n", train__1="png")
    folder = Path("data", "kaggle-cifar10")
    kaggle_client.download_competition("cifar-10", folder)
    assert (folder / "labels").read_text() == "id,label\n"
    assert (folder / "train" / "1").read_text() == "png"
    assert list(Path("data").iterdir()) == [folder]
    with pytest.raises(UserError, match="is already there; move it away"):
        kaggle_client.download_competition("cifar-10", folder)


def test_download_that_climbs_out(kaggle: KaggleServer) -> None:
    kaggle.archive = zipped(good="x", **{"..__..__evil": "x"})
    with pytest.raises(UserError, match=r"'../../evil', which would be written outside"):
        kaggle_client.download_competition("cifar-10", Path("data", "set"))
    assert list(Path("data").iterdir()) == []


def test_download_that_fails(kaggle: KaggleServer) -> None:
    kaggle.archive = b"<html>"
    with pytest.raises(UserError, match="is not a whole zip archive; run the same"):
        kaggle_client.download_competition("cifar-10", Path("data", "set"))
    kaggle.failures["DownloadDataFiles"] = (403, "You must accept the rules")
    with pytest.raises(UserError, match="competitions/cifar-10/rules"):
        kaggle_client.download_competition("cifar-10", Path("data", "set"))
    assert list(Path("data").iterdir()) == []
    with pytest.raises(UserError, match=r"could not be written \(.*\); free space or choose"):
        kaggle_client.download_competition("cifar-10", Path("sample.csv", "set"))
