"""What Kaggle and its client refuse, told in one sentence, and waiting for the score."""

import base64
import json
import random
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from kaggle_place import RUN, Refusal, make_run, records
from kaggle_server import KEY, USERNAME, Fault, KaggleServer

from core import kaggle_client
from core.errors import UserError
from pipeline.kaggle import ledger, sending
from submit import main

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.mark.parametrize(
    ("method", "how", "said"),
    [
        ("StartSubmissionUpload", "429", "Kaggle refused (429): trouble"),
        ("StartSubmissionUpload", "reset", "Kaggle could not be reached (ProxyError)"),
        ("PUT", "500", "Kaggle did not take the file (500)"),
        ("PUT", "reset", "Kaggle could not be reached (ProxyError)"),
        ("GetSubmission", "500", "Kaggle refused (500): trouble"),
        ("GetSubmission", "slow", "Kaggle could not be reached (ReadTimeout)"),
    ],
)
def test_trouble_that_passes_is_waited_for(
    method: str,
    how: str,
    said: str,
    kaggle: KaggleServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One 500 ended the waiting, and an upload that was reset was silent for six minutes."""
    monkeypatch.setattr(kaggle_client, "TIMEOUT", (5.0, 0.5))
    monkeypatch.setattr(kaggle_client, "UPLOAD_SECONDS", 5.0)
    kaggle.slow, kaggle.retry_after = 0.8, "0"
    kaggle.faults[method] = [Fault(how)]
    main([make_run(), "--wait"])
    out = capsys.readouterr().out
    assert f"{said}; trying again in 0 s." in out
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


# ---- what Kaggle refuses


@pytest.mark.parametrize(
    ("method", "status", "said", "remedy"),
    [
        ("Start", 401, "Unauthenticated", "https://www.kaggle.com/settings/api"),
        ("Start", 403, "You must accept the rules", "/competitions/cifar-10/rules"),
        ("Start", 503, "Unavailable", "in a few minutes"),
        ("Create", 400, "You have used all 5 submissions for today.", "the limits"),
        ("Create", 404, "Not found", "is 'cifar-10' the last part of"),
        ("Create", 429, "Too many requests", "again in 7 seconds"),
        ("Create", 503, "Unavailable", sending.SEEK),
    ],
)
def test_what_kaggle_refuses_can_be_sent_again(
    kaggle: KaggleServer, refusal: Refusal, method: str, status: int, said: str, remedy: str
) -> None:
    full = {"Start": "StartSubmissionUpload", "Create": "CreateSubmission"}[method]
    kaggle.failures[full] = (status, said)
    message = refusal(make_run(), "--wait")
    assert f"Kaggle refused ({status}): {said.rstrip('.')}; " in message
    assert remedy in message
    assert len(records()) == (remedy == sending.SEEK)  # it may have become one
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
        ("kaggle.json", f'["tester", "{KEY}"]', "the Kaggle client failed ("),
        ("kaggle.json", '{"username": "tester", "key": "\u0142"}', "(UnicodeEncodeError)"),
        ("kaggle.json", f'{{"username": "tester", "key": "{KEY}', "error: "),
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


def test_no_secret_in_what_60_failures_say(
    kaggle: KaggleServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(0)
    make_run()
    secrets = [KEY, base64.b64encode(f"{USERNAME}:{KEY}".encode()).decode()]
    told = Counter[str]()
    for number in range(60):
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
    assert len(told) > 8
    print(f"60 failures, {len(told)} different sentences, 0 secrets.")
