"""What `submit.py` checks in a file before it is sent."""

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kaggle_place import GOOD, RUN, Refusal, make_run, records
from kaggle_server import KaggleServer

import datamodules
from core.errors import UserError
from core.sample_file import SampledSubmission
from core.submission import KNOWN_LABELS
from pipeline.kaggle.checks import check_submission
from pipeline.kaggle.prediction_file import competition_name, wilson_interval
from submit import main

pytestmark = pytest.mark.usefixtures("workplace")


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


@pytest.mark.parametrize("label", ["3", "", "Cat"])
def test_labels_of_a_known_competition_are_known(refusal: Refusal, label: str) -> None:
    Path("mine.csv").write_text(GOOD.replace("2,dog", f"2,{label}"))
    address = "--competition=https://www.kaggle.com/c/cifar-10/overview"
    said = refusal("mine.csv", address, "--sample=sample.csv", "--dry_run")
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
def test_a_competition_is_named_by_its_address(address: str) -> None:
    assert competition_name(address) == "digit-recognizer"


@pytest.mark.parametrize("name", ["https://example.com/cifar-10", "../cifar", "a b", ""])
def test_what_names_no_competition_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--competition {name!r}")):
        competition_name(name)


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


def test_crlf_and_byte_order_mark_are_accepted_and_sent(
    kaggle: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()
    Path("mine.csv").write_bytes(sent)
    main(["mine.csv", "--competition", "cifar-10", "--sample", "sample.csv"])
    out = capsys.readouterr().out
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


def test_wilson_interval_of_a_share_that_was_rounded() -> None:
    """As the formula of Wilson (1927) gives it; float32 accuracies are no whole samples."""
    assert wilson_interval(0.91000003, 5000) == pytest.approx((0.9017, 0.9176), abs=5e-5)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_ensemble_and_run_without_validation(capsys: pytest.CaptureFixture[str]) -> None:
    one = {"run": "runs/digits/first", "validation_accuracy": 0.5, "validation_samples": 4}
    two = {"run": "runs/digits/second", "validation_accuracy": None, "validation_samples": 0}
    main([make_run(runs=[one, two]), "--dry_run"])
    out = capsys.readouterr().out
    assert "runs/digits/second: no validation part" in out
    assert "'runs/digits/first + runs/digits/second, sha256" in out
