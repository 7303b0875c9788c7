"""The page of a run: its content, what is missing, and that nothing of it is code."""

import csv
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import full_disk
from scipy import stats

import study
import train
from core.provenance import recorded
from pipeline.kaggle.prediction_file import wilson_interval
from pipeline.page.facts import Facts
from pipeline.page.parts import Part, Table
from pipeline.page.settings import unusual
from pipeline.page.several import compared, differing, grouped
from pipeline.studies.metrics import difference
from steadyfit.watching.records import ParameterEvidence, RecordFile, SpikeRecord, Verdict

SCRIPT = "<script>alert(1)</script>"
VOID = {"meta", "link", "img"}  # tags without an end


Columns = dict[str, Any]


class Reader(HTMLParser):
    """The tags of a page, its texts by tag, and its tables by caption."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")
        if tag == "table":
            self.rows = []
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("th", "td"):
            self.rows[-1].append(self.texts[tag][-1])
        if tag == "table":
            self.tables[self.texts["caption"][-1]] = self.rows

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data

    def table(self, caption: str) -> list[list[str]]:
        (rows,) = (rows for name, rows in self.tables.items() if name.startswith(caption))
        return rows

    @property
    def result(self) -> str:
        return self.texts["h1"][0]

    @property
    def missing(self) -> list[str]:
        return [text for text in self.texts["p"] if text.startswith("Missing: ")]


def written(*args: Any) -> Reader:
    """The page that a command writes."""
    output = Path("page of tests.html")
    study.main(["page", *map(str, args), "--output", str(output)])
    return Reader(output.read_text())


def write_run(folder: Path, metrics: Columns, config: dict[str, Any] | None = None) -> Path:
    """A run of a network that is not there, with these columns in its metrics."""
    folder.mkdir(parents=True)
    settings = {
        "seed_everything": 0,
        "trainer": {"max_epochs": 1},
        "model": {"class_path": "lit_models.LitClassifier", "init_args": {}},
        "data": {"class_path": "datamodules.DemoDataModule", "init_args": {"val_size": 50}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | (config or {})))
    if metrics:
        table = pd.DataFrame(metrics)
        table.to_csv(folder / "metrics.csv", index_label="step")
    return folder


@pytest.fixture(scope="module")
def tested(trained: Path, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a finished run, with a test."""
    folder = tmp_path_factory.mktemp("tested") / "runs" / "cifar10_cpu" / "first"
    shutil.copytree(trained, folder)
    train.main(["test", f"--run={folder}", "--trainer.logger=callbacks.MetricsCSV"])
    return folder


@pytest.fixture
def run(tested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same for a test to change, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tested, tmp_path / "runs" / "cifar10_cpu" / "first")
    return Path("runs/cifar10_cpu/first")


@pytest.fixture(scope="module")
def page(tested: Path) -> Reader:
    study.main(["page", str(tested)])
    return Reader((tested / "page.html").read_text())


def test_numbers_are_those_of_metrics_csv(tested: Path, page: Reader) -> None:
    with (tested / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    shown = {row[0]: row[1:] for row in page.table("Metrics")[1:]}
    logged = {name for name in rows[0] if name.partition("/")[0] in ("train", "val", "test")}
    assert shown.keys() == logged >= {"train/loss", "val/accuracy", "test/loss"}
    for name, (step, *values) in shown.items():
        known = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        numbers = [value for _, value in known]
        assert int(step) == known[-1][0]
        assert values == [f"{x:.6g}" for x in (numbers[-1], min(numbers), max(numbers))]
    accuracy = float(shown["test/accuracy"][1])
    with (tested / "confusion_matrix_test.csv").open(newline="") as file:
        counts = np.array([row[1:] for row in csv.reader(file)][1:], int)
    assert counts.trace() / counts.sum() == pytest.approx(accuracy, abs=1e-6)
    value, low, high = (100 * x for x in (accuracy, *wilson_interval(accuracy, counts.sum())))
    assert page.result == (
        f"{value:.2f} % test accuracy, 95 % interval {low:.2f} to {high:.2f} % (40 samples)"
    )
    table = page.table("Confusion matrix of test")
    assert table[0][1:] == [row[0] for row in table[1:]]
    assert np.array([row[1:] for row in table[1:]], int).tolist() == counts.tolist()


def test_all_that_a_run_has_is_on_its_page(tested: Path, page: Reader) -> None:
    assert page.texts["h2"] == [
        *("What was trained", "Settings", "Numbers", "Curves", "Spikes"),
        *("Gradients and weights", "Confusion matrix", "Worst mistakes", "Submission and score"),
    ]
    facts = dict(page.table("What was trained")[1:])
    origin = recorded(tested / "config.yaml")
    assert facts["command"] == origin["command"]
    assert facts["hardware"] == origin["hardware"] != "not recorded"
    assert (facts["network"], facts["seed_everything"]) == ("lit_models.networks.WhitenedCNN", "0")
    digest = dict(page.table("The checkpoint")[1:])["data digest (SHA-256)"]
    assert digest == Facts(tested).best["data_digest"]
    assert len(digest) == 64
    mistakes = pd.read_csv(tested / "mistakes.csv", dtype=str)
    assert page.table(f"{len(mistakes)} mistakes")[1:] == mistakes.head(20).to_numpy().tolist()
    assert not [text for text in page.missing if "damaged" in text]
    untold = [text for text in page.missing if "timing.csv" not in text]
    assert ["submission.json" in text for text in untold] == [True]
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 6


def test_page_stands_alone_and_is_for_everybody(page: Reader) -> None:
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
        if tag == "img":
            assert len(attributes["alt"] or "") > 40
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
    assert dict(page.tags)["html"] == {"lang": "en"}
    assert page.texts["title"] == [f"cifar10_cpu/first: {page.result}"]
    assert [tag for tag in tags if tag in ("h1", "h2", "h3")] == ["h1", *["h2"] * 9]
    assert tags.count("caption") == tags.count("table")
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert {f"#{target}" for target in targets} == set(links)


def test_settings_that_differ_from_the_defaults(page: Reader) -> None:
    shown = {row[0]: row[1:] for row in page.table("What differs")[1:]}
    assert shown["data.batch_size"][0] == "16"
    assert shown["model.network.widths"][0] == "[8, 8, 8]"
    assert shown["model.optimizer.lr"] == ["0.6", "0.001"]  # torch's own default
    assert "trainer.log_every_n_steps" not in shown  # as in configs/defaults.yaml
    assert "trainer.callbacks.GradientSpikeMonitor.optional" not in shown
    assert "model.label_smoothing" not in shown or float(shown["model.label_smoothing"][0]) > 0


def test_time_and_memory(tmp_path: Path) -> None:
    """Of an elapsed time the last counts, of memory the most; an interrupted run has time left."""
    folder = write_run(tmp_path / "run", {})
    head = "step,time/data_wait,time/elapsed,time/memory,time/left"
    text = "\n".join([head, "0,,5,100,9", "50,0.5,10,300,5", "99,0.1,15,200,2\n"])
    (folder / "timing.csv").write_text(text)
    checkpoint = {"config": "", "state_dict": {}, "metrics": {}, "epoch": 0, "global_step": 100}
    (folder / "checkpoints").mkdir()
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    assert written(folder).table("Time and memory")[1:] == [
        ["time/data_wait", "0.3", "0.5", "0.1"],
        ["time/elapsed", "10", "15", "15"],
        ["time/memory", "200", "300", "200"],
        ["time/left", "5", "9", "2"],
    ]


@pytest.mark.parametrize("patch", ["", " (code.patch)"])
def test_changes_of_the_commit_have_a_patch_if_they_are_of_code(tmp_path: Path, patch: str) -> None:
    folder = write_run(tmp_path / "run", {})
    config = folder / "config.yaml"
    config.write_text(f"# git: {{commit: abc, clean: false}}\n{config.read_text()}")
    if patch:
        (folder / "code.patch").write_text("x")
    facts = dict(written(folder).table("What was trained")[1:])
    assert facts["commit"] == f"abc, with changes{patch}"


def test_predictions_that_nobody_scores_miss_no_score(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {})
    (folder / "predictions.json").write_text('{"rows": 7, "sendable": false}')
    page = written(folder)
    assert page.table("From predictions.json")[1:] == [["rows", "7"]]
    assert not any("submi" in text for text in page.missing)


def test_a_class_of_a_stranger_is_not_imported(tmp_path: Path) -> None:
    network = {"class_path": "antigravity.Network", "init_args": {"width": 3}}
    model = {"class_path": "lit_models.LitClassifier", "init_args": {"network": network}}
    config = Facts(write_run(tmp_path / "run", {}, {"model": model})).settings
    assert ("model.network.width", None, 3) in unusual(config)


def test_text_of_others_is_escaped(run: Path) -> None:
    """Classes, ids, messages and folders come from data sets, servers and strangers."""
    for name in ("confusion_matrix_test.csv", "mistakes.csv"):
        path = run / name
        path.write_text(path.read_text().replace("cat", SCRIPT).replace("dog", "$x_"))
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("# command: ", f"# command: {SCRIPT} ")
    )
    (run / "submission.json").write_text(json.dumps({"csv": SCRIPT, "competition": "'\"><b>"}))
    (run / "score.json").write_text(json.dumps({"status": SCRIPT, "message": "\udcff&amp;"}))
    (run / "why.json").write_text(json.dumps({"verdict": SCRIPT, "remedy": "", "experiments": []}))
    shutil.copyfile(run / "mistakes.png", run / "why.png")
    moved = run.rename(run.with_name("<b>&"))
    page = written(moved)
    assert {"script", "b"}.isdisjoint(tag for tag, _ in page.tags)
    assert not [text for text in page.missing if "damaged" in text]
    assert SCRIPT in page.table("Confusion matrix of test")[0]
    assert "$x_" in page.table("Confusion matrix of test")[0]
    sent = dict(page.table("From score.json")[1:])
    assert {"status": SCRIPT, "message": "?&amp;"}.items() <= sent.items()
    assert f"Why (spikes.py why): {SCRIPT} " in page.texts["p"]
    assert page.texts["title"][0].startswith("cifar10_cpu/<b>&: ")


def test_a_run_without_anything_says_what_is_missing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "empty", {})
    study.main(["page", str(folder)])
    page = Reader((folder / "page.html").read_text())
    assert page.result.startswith("No result: ")
    told = " ".join(page.missing)
    for name in ("metrics.csv", "no checkpoint", "confusion_matrix_test.csv", "mistakes.csv"):
        assert name in told
    assert "img" not in [tag for tag, _ in page.tags]
    assert "damaged" not in told


def test_a_run_without_validation(tmp_path: Path) -> None:
    loss = np.linspace(2, 1, 30)
    loss[3] = np.nan
    folder = write_run(tmp_path / "plain", {"epoch": 0, "train/loss": loss})
    study.main(["page", str(folder)])
    page = Reader((folder / "page.html").read_text())
    assert page.result == "1 lowest training loss, 95 % interval not known"
    told = " ".join(page.missing)
    assert "there was no validation" in told
    assert "there was no test" in told
    assert "the run was not watched" in told


@pytest.mark.parametrize("content", [b"\xff\x00{", b"{}\n"], ids=["bytes", "another form"])
def test_a_damaged_file_costs_its_own_section(run: Path, content: bytes) -> None:
    names = ("mistakes.csv", "confusion_matrix_test.csv", "spikes.jsonl", "norms.pt", "timing.csv")
    for name in (*names, "submission.json", "score.json", "checkpoints/best.ckpt"):
        (run / name).write_bytes(content)
    page = written(run)
    assert "val" in page.result  # the samples of the test are not known any more
    assert page.table("Metrics")
    assert [p for p in page.texts["figcaption"] if p == "Learning curves"]
    assert len(page.missing) > 3
    for name in ("metrics.csv", "config.yaml"):
        (run / name).write_bytes(content)
    page = written(run)
    assert page.result.startswith("No result: ")
    assert len(page.texts["h2"]) == 9
    assert len(page.missing) >= 7  # {} is a submission of which nothing is known


def test_a_page_is_replaced_whole_or_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", {})
    (folder / "page.html").write_text("before")
    with full_disk(1024), pytest.raises(SystemExit):
        study.main(["page", str(folder)])
    assert (folder / "page.html").read_text() == "before"
    assert str(folder / "page.html") in capsys.readouterr().err


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    """5,000 steps, watched, of which every tenth spikes: far less than a megabyte."""
    steps = np.arange(5000)
    noise = np.random.default_rng(0).lognormal(size=(4, 5000))
    names = ("train/loss", "grad_norm/total", "update_norm/total", "grad_norm/threshold")
    columns = dict(zip(names, noise, strict=True))
    counts = {"spikes/loss": steps // 10, "spikes/gradient": steps // 10}
    accuracy = {"train/accuracy": noise[0] % 1, "lr-SGD": np.exp(-steps / 5000)}
    metrics = {"epoch": steps // 100} | columns | counts | accuracy
    folder = write_run(tmp_path / "run", metrics)
    part = ParameterEvidence("network.weight", 1.0, 0.5, 0.0)
    signals = {"loss": Verdict(9.0, "spike", center=1.0)}
    records = [
        SpikeRecord(
            step,
            spiked=["loss"],
            signals=signals,
            by_share=[part],
            confirmed=True,
            max_loss_after=step,
        )
        for step in range(0, 5000, 10)
    ]
    RecordFile(folder / "spikes.jsonl").begin(records)
    study.main(["page", str(folder)])
    assert (folder / "page.html").stat().st_size < 1_000_000
    page = Reader((folder / "page.html").read_text())
    assert "500 spikes in 5,000 optimizer steps, 500 seen in the loss." in page.texts["p"]
    rows = page.table("Spikes, the 20 worst")[1:]
    assert [row[0] for row in rows] == [str(step) for step in range(4990, 4790, -10)]
    assert "loss 9 (usual 1); network.weight holds 50% of the squared gradient" in rows[0][2]


# Several runs


def write_group(root: Path, rate: float, accuracies: list[float]) -> list[Path]:
    """Runs of seeds 0, 1, ... that end at these accuracies."""
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": rate}}
    model = {"class_path": "lit_models.LitClassifier", "init_args": {"optimizer": optimizer}}
    loss = np.linspace(2, 1, 40)
    return [
        write_run(
            root / f"{rate},{seed}",
            {
                "epoch": 0,
                "train/loss": loss,
                "val/accuracy": np.where(loss == 1, accuracy, np.nan),
            },
            {"seed_everything": seed, "model": model},
        )
        for seed, accuracy in enumerate(accuracies)
    ]


def told_of(*folders: Path) -> tuple[str, list[Part]]:
    """First line and comparisons of the page of several runs, without its pictures."""
    runs = [Facts(folder) for folder in folders]
    return compared(grouped(runs, differing(runs)))


def result_of(*folders: Path) -> str:
    return told_of(*folders)[0]


FIRST, SECOND = [0.90, 0.92, 0.91], [0.92, 0.93, 0.93]


@pytest.fixture(autouse=True)
def _place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "run" not in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("tmp_path"))


def test_pairs_of_equal_seeds_are_compared(tmp_path: Path) -> None:
    page = written(*write_group(tmp_path, 0.1, FIRST), *write_group(tmp_path, 0.2, SECOND))
    apart = 100 * (np.array(SECOND) - FIRST)
    half = stats.t.ppf(0.975, 2) * apart.std(ddof=1) / 3**0.5
    p = 2 * stats.t.sf(apart.mean() / apart.std(ddof=1) * 3**0.5, 2)
    assert page.result == (
        "lr=0.2 against lr=0.1: val/accuracy 91.00 % -> 92.67 %, +1.67 points, 95 % interval "
        f"{apart.mean() - half:+.3g} to {apart.mean() + half:+.3g}; more than seed noise "
        f"(3 pairs of one seed, p = {p:.2g})."
    )
    assert p < 0.05
    assert page.table("Settings that differ") == [
        ["setting", "lr=0.1", "lr=0.2"],
        ["model.optimizer.lr", "0.1", "0.2"],
    ]
    assert [row[3] for row in page.table("Every run, by its best validation accuracy")[1:4]] == [
        "90.00 %",
        "92.00 %",
        "91.00 %",
    ]
    means = [row[1] for row in page.table("Means")[1:]]
    assert means == ["91.00 ± 1.00", "92.67 ± 0.58"]
    captions = [text for text in page.texts["figcaption"] if "same axes" in text]
    assert captions == ["train/loss on the same axes", "val/accuracy on the same axes"]


def test_runs_of_other_seeds_are_compared_by_welch(tmp_path: Path) -> None:
    first, second = (
        write_group(tmp_path, 0.1, FIRST),
        write_group(tmp_path, 0.2, [0, 0, 0.91, 0.92]),
    )
    result = result_of(*first[:2], *second[2:])
    found = difference(pd.Series(FIRST[:2]), pd.Series([0.91, 0.92], index=[2, 3]))
    assert not found.paired
    assert found.p == stats.ttest_ind([0.91, 0.92], FIRST[:2], equal_var=False).pvalue
    assert "not to be told from seed noise (2 and 2 runs, p = 0.7" in result


def test_one_run_of_each_tells_nothing_of_seeds(tmp_path: Path) -> None:
    result = result_of(
        *write_group(tmp_path, 0.1, FIRST[:1]), *write_group(tmp_path, 0.2, SECOND[:1])
    )
    assert "+2 points; 1 and 1 runs cannot tell it from seed noise" in result


def test_equal_runs_have_no_p(tmp_path: Path) -> None:
    result = result_of(*write_group(tmp_path, 0.1, FIRST), *write_group(tmp_path, 0.2, FIRST))
    assert result.endswith("91.00 %, +0 points; equal in every run (3 pairs of one seed).")
    assert np.isnan(difference(pd.Series(FIRST), pd.Series(SECOND[:1])).p)


def test_seeds_alone_have_a_mean(tmp_path: Path) -> None:
    result = result_of(*write_group(tmp_path, 0.1, FIRST))
    interval = "95 % interval 88.52 to 93.48 %"
    assert result.startswith(f"val/accuracy 91.00 ± 1.00 %, {interval} (")
    assert result.endswith("/0.1,0, 3 runs)")


def test_runs_without_a_number_in_common(tmp_path: Path) -> None:
    page = written(write_run(tmp_path / "a", {}), *write_group(tmp_path, 0.2, SECOND[:1]))
    assert page.result.startswith("No result: ")


def test_runs_that_all_diverged(tmp_path: Path) -> None:
    runs = (*write_group(tmp_path, 0.1, [np.inf]), *write_group(tmp_path, 0.2, [np.inf]))
    result, [means] = told_of(*runs)
    assert result == "No result: val/accuracy: not finite in any of the runs"
    assert isinstance(means, Table)
    assert [row[1] for row in means.rows] == ["-", "-"]


def test_runs_of_different_data_are_told_so(tmp_path: Path) -> None:
    first, second, third = write_group(tmp_path, 0.1, FIRST)
    for other, kind in ((second, "UCSBCIFAR10"), (third, "KaggleCIFAR10")):
        config = other / "config.yaml"
        config.write_text(config.read_text().replace("DemoData", f"{kind}Data"))
    assert written(first, second).result.startswith("Of different data: ")
    result, told = told_of(first, second, third)
    assert result.startswith("val/accuracy 92.00 %")
    assert not any("Each p" in str(text) for text in told)  # there is none


def test_a_study_has_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    parameters = {"model.rate": {"values": [0.1, 0.2]}, "seed_everything": {"values": [0, 1, 2]}}
    command = ["fit", "--config=x.yaml", "--study=small.yaml", "${args}"]
    content = {"program": "train.py", "method": "grid", "metric": {"name": "val/accuracy"}}
    content |= {"parameters": parameters, "command": command}
    Path("small.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    for rate, accuracies in ((0.1, FIRST), (0.2, SECOND)):
        for seed, accuracy in enumerate(accuracies):
            folder = write_run(
                Path(f"runs/small/rate={rate},seed_everything={seed}"),
                {"val/accuracy": [accuracy]},
            )
            (folder / "point.json").write_text(json.dumps({"finished": True}))
    study.main(["report", "small.yaml", "--html"])
    page = Reader(Path("runs/small/report/val-accuracy-by-rate.html").read_text())
    assert page.result.startswith("rate=0.2 against rate=0.1: val/accuracy 91.00 % -> 92.67 %, ")
    assert "more than seed noise (3 pairs of one seed" in page.result
    assert page.table("Parameters")[1:] == [
        ["model.rate", "0.1, 0.2"],
        ["seed_everything", "0, 1, 2"],
    ]
    assert [tag for tag, _ in page.tags].count("img") == 1
