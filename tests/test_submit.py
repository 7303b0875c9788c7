"""``submit.py`` against the real Kaggle client and a Kaggle that lives on this machine."""

import hashlib
import io
import json
import shlex
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from conftest import read_wandb
from kaggle_place import GOOD, RUN, Refusal, make_run, records
from kaggle_server import KaggleServer

from core import kaggle_client
from core.errors import UserError
from submit import main

pytestmark = pytest.mark.usefixtures("workplace")


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
def wandb_run(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, wandb_offline: None
) -> Iterator[Path]:
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


def test_predictions_and_score_are_a_lineage_where_artifacts_are_kept(
    kaggle: KaggleServer, wandb_run: Path
) -> None:
    config = wandb_run.with_name("config.yaml")
    config.write_text(config.read_text().replace("{project:", "{log_model: true, project:"))
    main([RUN, "--wait"])
    (folder,) = wandb_run.glob("offline-run-*-abc123-submit")
    records = read_wandb(folder)
    [said] = [record["run"] for record in records if record["type"] == "run"]
    assert (said["job_type"], said["run_group"]) == ("submit", "digits")
    used, made = (record["artifact"] for record in records if record["type"] == "artifact")
    assert (used["name"], used["use_after_commit"]) == ("predictions-abc123", True)
    assert (made["name"], made["type"]) == ("score-abc123", "score")
    assert json.loads(made["metadata"]) == {"kaggle/ref": 4711, "kaggle/public_score": 0.9123}


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
