"""The list of submissions, and what is sent after an answer was lost."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import full_disk
from kaggle_place import RUN, SAMPLE, Refusal, make_run, records
from kaggle_process import append_rows
from kaggle_server import Fault, KaggleServer
from processes import start

from core import kaggle_client
from core.errors import UserError
from pipeline.kaggle import ledger, sending
from submit import main

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.mark.parametrize(
    ("how", "made"),
    [("reset", "no"), ("slow", "no"), ("500", "late"), ("slow", "late")]
    + [(how, "yes") for how in ("504", "html", "half", "empty")],
)
def test_a_lost_answer_is_looked_for_before_anything_is_sent(
    how: str, made: str, kaggle: KaggleServer, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advised second start sent the file again, though Kaggle had it."""
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


def test_two_programs_lose_no_row(workplace: Path) -> None:
    """Of 120 rows 42 were left: each program wrote what it had read before the others wrote."""
    jobs = [start(append_rows, workplace, number) for number in (100, 200)]
    for job in jobs:
        job.join()
    assert len(ledger.read()) == 40


def test_a_row_that_does_not_fit_leaves_no_part(workplace: Path) -> None:
    write_list(OLD + "\n")
    [*_, record] = ledger.read()
    with full_disk(len(OLD) + 20), pytest.raises(UserError, match="could not be written"):
        ledger.append(record)
    assert ledger.LEDGER.read_text() == OLD + "\n"
