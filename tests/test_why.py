"""``spikes.py why``: a run is trained again, forked before the spike, and changed.

Real trainings of a few seconds each; what is planted is that of `benchmarks/spike_plants.py`.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_data import write_books

import spikes
from benchmarks.spike_plants import ONCE
from benchmarks.spike_why import configuration
from callbacks.run.run_folder import MetricsCSV
from core.errors import UserError
from core.runs import Run, load_checkpoint
from pipeline.why.again import Again, Course, Rows
from pipeline.why.changes import Noise, OtherSamples, StepChange, scaled_rate
from pipeline.why.control import Control, compare, repeat
from pipeline.why.experiments import SHORT, Case
from pipeline.why.report import Report
from pipeline.why.spike import Spike, find_spike
from pipeline.why.trials import Tally
from pipeline.why.verdict import Verdict
from steadyfit.watching.records import ParameterEvidence, RecordFile, SpikeRecord
from train import main

Planted = Callable[..., tuple[Path, int]]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """A run with something planted, trained once for all tests."""
    known: dict[str, tuple[Path, int]] = {}

    def train(task: str, plant: str, seed: int = 101) -> tuple[Path, int]:
        key = f"{task} {plant} {seed}"
        if key not in known:
            folder = tmp_path_factory.mktemp("runs")
            config, step = configuration(task, plant, seed)
            path = folder / "planted.yaml"
            path.write_text(json.dumps(config))
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(ONCE, "1")
                main(["fit", f"--config={path}", f"--trainer.default_root_dir={folder}", "--run=x"])
            known[key] = folder / "planted" / "x", step
        return known[key]

    return train


def contents(folder: Path) -> dict[str, bytes]:
    """Files of a run folder but ``why*``."""
    files = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("why")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "from_start"), [("cnn", True), ("lstm", False)], ids=["from the start", "checkpoint"]
)
def test_a_run_is_repeated_bit_for_bit(
    planted: Planted, tmp_path: Path, task: str, from_start: bool
) -> None:
    folder, _ = planted(task, "rate jump")  # which its best checkpoint comes before
    copy = tmp_path / "planted" / "x"
    shutil.copytree(folder, copy)
    if from_start:
        shutil.rmtree(copy / "checkpoints")
    rows = MetricsCSV(str(copy)).rows
    spike = find_spike(copy, rows, None)
    again = Again(copy / "config.yaml", tmp_path, trust=True)
    control = repeat(Run(copy), again, spike, rows, tmp_path / "state.ckpt")
    assert control.is_exact, control
    assert control.spikes
    assert control.values > 3 * (spike.end - spike.start)
    assert (control.since is None) == from_start

    def fork(*changes: Any) -> Course:
        return again.train(tmp_path / "state.ckpt", Course(spike.end + 1), changes)

    first, second = fork(), fork()
    assert first.rows == second.rows
    assert compare(first.rows, rows)[1] is None
    changed = fork(Noise(spike.start, 1e-6, 0))
    assert compare(changed.rows, rows)[1] is not None
    assert compare(fork().rows, rows)[1] is None  # a change leaves nothing in the next fork
    slower = fork(StepChange(scaled_rate(0.5), spike.start))
    assert slower.rates == first.rates  # the schedule goes on as it was
    assert slower.rows[spike.start]["train/loss"] == first.rows[spike.start]["train/loss"]
    assert slower.rows[spike.start + 1]["train/loss"] != first.rows[spike.start + 1]["train/loss"]
    epoch, (batch,) = first.places[spike.start]
    size = again.datamodule.batch_size
    pairs = {(epoch, batch * size): (epoch, batch * size + 1)}
    fork(OtherSamples(pairs))
    assert compare(fork().rows, rows)[1] is None


@pytest.mark.slow
@pytest.mark.parametrize("task", ["cnn", "lstm"])
def test_a_sample_is_named(planted: Planted, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, step = planted(task, "sample x 100")
    before = contents(folder)
    spikes.main(["why", str(folder), f"--step={step}", "--trust"])
    said = capsys.readouterr().out
    assert contents(folder) == before
    facts = json.loads((folder / "why.json").read_text())
    assert facts["cause"] == "samples"
    assert facts["control"]["equal"]
    assert (folder / "why.png").stat().st_size > 10_000
    assert not (folder / "why.ckpt").exists()
    assert all(len(line) <= 80 for line in said.splitlines() if "/" not in line)
    if task == "lstm":  # its sequences are drawn, and have no ids
        assert "sample 5 of batch" in facts["verdict"]
        return
    (sample,) = facts["samples"]
    record = json.loads((folder / "spikes.jsonl").read_text().splitlines()[0])
    assert sample == record["samples"][5]
    command = facts["remedy"].partition("train.py ")[2].split()
    main([*command, "--trust"])
    assert "Left out of training: 1 of 1 samples" in capsys.readouterr().out


@pytest.mark.slow
def test_the_printed_command_goes_on_from_before_the_spike(
    planted: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, step = planted("lstm", "calm stretch")
    spikes.main(["why", str(folder), f"--step={step}", "--trust"])
    facts = json.loads((folder / "why.json").read_text())
    assert facts["cause"] == "moment"
    state = facts["control"]["since"]
    assert f"go on from before the spike, with {state}" in facts["remedy"]
    command = facts["remedy"].partition("train.py ")[2].split()
    main([*command, "--trust"])
    new, old = (MetricsCSV(str(folder.with_name(name))).rows for name in ("x_why", "x"))
    begin = load_checkpoint(folder / state)["global_step"]
    assert min(new) == begin
    assert new[begin]["train/loss"] == old[begin]["train/loss"]
    spike = facts["spike"]
    assert new[spike["peak"]]["train/loss"] < spike["limit"]


def other_kinds(kind: str, folder: Path) -> tuple[dict[str, Any], str]:
    """Another kind of training with something planted, and the cause."""
    if kind == "accumulated":
        config, _ = configuration("cnn", "sample x 100", 101)
        config["trainer"]["accumulate_grad_batches"] = 2
        return config, "samples"
    config, _ = configuration("lstm", "rate jump", 101)
    model, trainer = config["model"]["init_args"], config["trainer"]
    trainer["max_epochs"] = 9
    trainer["callbacks"][1]["init_args"] = {"step": 220, "factor": 30.0}
    if kind == "regression":
        config["model"]["class_path"] = "LitRegressor"
        model["network"]["init_args"]["read"] = "every"
        model["network"]["init_args"]["rnn"]["init_args"]["input_size"] = 1
        options: dict[str, Any] = {"epoch_size": 960, "val_size": 64}
        config["data"] = {"class_path": "RunningMeanDataModule", "init_args": options}
    if kind == "text in float16":
        write_books(folder / "data")
        sizes = {"embedding_dim": 16, "num_heads": 2, "num_layers": 1, "hidden_size": 32}
        name = "lit_models.networks.MaskedLanguageModel"
        model["network"] = {"class_path": name, "init_args": {**sizes, "dropout": 0.1}}
        options = {"data_dir": str(folder / "data"), "vocab_size": 300, "batch_size": 16}
        options |= {"epoch_size": 480, "val_size": 20}
        config["data"] = {"class_path": "MaskedBooksDataModule", "init_args": options}
        name = "lightning.pytorch.plugins.MixedPrecision"  # with a scaler
        plugin = {"class_path": name, "init_args": {"precision": "16-mixed", "device": "cpu"}}
        trainer["plugins"] = [plugin, {"class_path": "callbacks.AtomicCheckpointIO"}]
        del trainer["precision"]
    return config, "jump"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["accumulated", "regression", "text in float16"])
def test_other_kinds_of_training_are_explained(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Halves of a step of two batches had one name, and no sample was found.

    The precision was filled in beside a plugin for it, which Lightning refuses.
    """
    config, cause = other_kinds(kind, tmp_path)
    path = tmp_path / "planted.yaml"
    path.write_text(json.dumps(config))
    main(["fit", f"--config={path}", f"--trainer.default_root_dir={tmp_path}", "--run=x"])
    folder = tmp_path / "planted" / "x"
    spikes.main(["why", str(folder), "--trust"])
    facts = json.loads((folder / "why.json").read_text())
    assert facts["cause"] == cause
    assert facts["control"]["equal"]
    assert len(facts["samples"]) == (kind == "accumulated")
    if "float16" in kind:
        assert "float32" in {e["name"] for e in facts["experiments"]}


@pytest.mark.slow
def test_what_does_not_come_again_is_the_machine(
    planted: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, step = planted("lstm", "flipped bit")
    spikes.main(["why", str(folder), f"--step={step}", "--trust"])
    facts = json.loads((folder / "why.json").read_text())
    assert facts["cause"] == "irreproducible"
    assert f"of step {step} is" in facts["control"]["differing"]
    assert facts["steps"]["forks"] == 0


@pytest.mark.slow
def test_one_that_is_interrupted_goes_on(
    planted: Planted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = planted("lstm", "rate jump")
    command = ["why", str(folder), "--trust"]
    usual, trainings = Again.train, 0

    def train(self: Again, *args: Any, **options: Any) -> Course:
        nonlocal trainings
        trainings += 1
        if trainings == 8:
            raise KeyboardInterrupt
        return usual(self, *args, **options)

    monkeypatch.setattr(Again, "train", train)
    with pytest.raises(KeyboardInterrupt):
        spikes.main(command)
    lines = (folder / "why.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 5  # what is before them: the repetition and the fork without a change
    trainings = 100
    spikes.main(command)
    after = (folder / "why.jsonl").read_text().splitlines()
    assert after[:6] == lines
    assert trainings - 100 == len(after) - 6 + 1
    assert json.loads((folder / "why.json").read_text())["cause"] == "jump"


def rows_of(losses: list[float]) -> dict[int, dict[str, float]]:
    return {step: {"train/loss": loss} for step, loss in enumerate(losses)}


def course_of(rows: Rows, *spikes: SpikeRecord) -> Course:
    course = Course(stop=0)
    course.rows, course.spikes = rows, [*spikes]
    return course


def record_of(step: int, *signals: str) -> SpikeRecord:
    return SpikeRecord(step, spiked=list(signals), by_share=[ParameterEvidence("w", 1.0, 1.0, 0.0)])


def test_a_spike_is_gone_below_half_its_height_on_the_logarithmic_scale() -> None:
    rows = rows_of([1.0] * 40 + [2.0, 9.0, 4.0] + [1.0] * 20)
    spike = Spike.of([record_of(40, "gradient"), record_of(41, "loss")], rows)
    assert (spike.first, spike.peak, spike.usual, spike.height) == (40, 41, 1.0, 9.0)
    assert spike.limit == pytest.approx(3.0)
    assert spike.is_in(course_of(rows), spike.onset, spike.end)
    calm = rows_of([1.0] * 40 + [2.0, 2.9, 2.0] + [1.0] * 20)
    assert not spike.is_in(course_of(calm), spike.first, spike.end)
    broken = rows_of([1.0] * 40 + [2.0, float("nan"), 2.0] + [1.0] * 20)
    assert spike.is_in(course_of(broken), spike.first, spike.end)
    assert not Spike.of([record_of(40, "loss")], broken).is_in(course_of(calm), 40, 46)


def test_a_batch_that_sets_a_spike_off_is_not_the_spike() -> None:
    """A hard sequence makes a loss of .16, and the update after it one of 4."""
    rows = rows_of([0.003] * 40 + [0.16, 2.7, 4.2] + [0.003] * 20)
    spike = Spike.of([record_of(40, "loss"), record_of(41, "loss")], rows)
    assert not spike.is_own
    assert spike.onset == 41
    calm = rows_of([0.003] * 40 + [0.16, 0.003] + [0.003] * 20)
    assert not spike.is_in(course_of(calm), spike.onset, spike.end)
    bad = rows_of([0.003] * 40 + [4.2, 0.3] + [0.003] * 20)
    assert Spike.of([record_of(40, "loss")], bad).is_own


def test_a_spike_without_a_loss_is_what_the_monitor_sees() -> None:
    rows = rows_of([1.0] * 80)
    spike = Spike.of([record_of(40, "buffer")], rows)
    assert spike.is_in(course_of(rows, record_of(40, "buffer")), 40, 50)
    assert not spike.is_in(course_of(rows, record_of(40, "gradient")), 40, 50)
    assert not spike.is_in(course_of(rows, record_of(39, "buffer")), 40, 50)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([1.0] * 10 + [20.0] * 10, (10, 20.0)),
        ([2.0 - n / 20 for n in range(10)] + [6.2] * 10, (10, 4.0)),
        ([n / 20 for n in range(1, 21)], None),  # a warm-up
        ([0.01 * 1.6**n for n in range(20)], None),
        ([1.0] * 20, None),
    ],
)
def test_a_warm_up_is_no_jump_of_the_rate(
    rates: list[float], expected: tuple[int, float] | None
) -> None:
    spike = Spike.of([record_of(15, "loss")], rows_of([1.0] * 15 + [9.0] * 10))
    course = Course(stop=0)
    course.rates = dict(enumerate(rates))
    case = Case(spike, None, course, set())  # type: ignore[arg-type]
    assert case.jump() == (expected and (expected[0], pytest.approx(expected[1])))


def test_counts_are_compared_by_an_exact_test() -> None:
    def tally(gone: int, forks: int) -> Tally:
        return Tally("x", lines=[{"gone": number < gone} for number in range(forks)])

    assert tally(10, 10).more_than(tally(0, 10))
    assert tally(6, 10).more_than(tally(0, 10))
    assert not tally(5, 10).more_than(tally(0, 10))  # p = .016
    assert not tally(10, 10).more_than(tally(9, 10))


@pytest.mark.parametrize(
    ("prepare", "arguments", "expected"),
    [
        ("nothing", [], "is not a run folder"),
        ("no spike", [], "no spike"),
        ("spike", ["--step=7"], "no spike at step 7"),
        ("spike", ["--step=700"], "--step 700"),
        ("no metrics", [], "metrics.csv"),
    ],
)
def test_bad_input_gets_one_sentence(
    prepare: str,
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "config" / "run"
    if prepare != "nothing":
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("seed_everything: 0\n")
    if prepare in ("no spike", "spike"):
        lines = "".join(f"{step},1.0\n" for step in range(80))
        (folder / "metrics.csv").write_text(f"step,train/loss\n{lines}")
    if prepare == "spike":
        RecordFile(folder / "spikes.jsonl").begin([record_of(40, "loss")])
    with pytest.raises(SystemExit):
        spikes.main(["why", str(folder), *arguments])
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.strip().splitlines()) == 1


def test_a_shorter_memory_is_the_remedy_where_there_is_no_other(tmp_path: Path) -> None:
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "betas": [0.8, 0.99]}}
    model = {"class_path": "LitClassifier", "init_args": {"optimizer": optimizer}}
    (tmp_path / "config.yaml").write_text(json.dumps({"model": model, "trainer": {}}))
    spike = Spike.of([record_of(40, "loss")], rows_of([1.0] * 40 + [9.0] * 20))
    lost = {"update clipping": False, SHORT: True, "half the learning rate": False}
    tallies = [Tally(name, lines=[{"gone": gone}] * 3) for name, gone in lost.items()]
    report = Report(Run(tmp_path), spike, {}, Control("checkpoints/best.ckpt", 10))
    report.verdict = Verdict("moment", "it is.")
    case = SimpleNamespace(states=set())
    report.trials = SimpleNamespace(tallies=tallies, case=case)  # type: ignore[assignment]
    said = report.remedy()
    assert "train it again from the start" in said  # a state holds the memory that it had
    assert said.endswith("--model.optimizer.betas=[0.8,0.9]")
    tallies[-1].lines = [{"gone": True}] * 3
    assert report.remedy().endswith("--model.optimizer.lr=0.005")


def test_data_that_have_changed_since_are_refused(trained: Path, tmp_path: Path) -> None:
    rows = MetricsCSV(str(trained)).rows
    spike = Spike.of([record_of(max(rows), "loss")], rows)
    other: Any = SimpleNamespace(datamodule=SimpleNamespace(digest="0" * 64))
    with pytest.raises(UserError, match="the data have changed since"):
        repeat(Run(trained), other, spike, rows, tmp_path / "state.ckpt")


def test_noise_is_relative_and_of_the_seed() -> None:
    module = torch.nn.Linear(100, 100)
    before = [p.detach().clone() for p in module.parameters()]
    trainer = type("At", (), {"global_step": 3})()
    noise = Noise(3, 1e-3, 0)
    noise.on_train_batch_start(trainer, module, None, 0)  # type: ignore[arg-type]
    after = [p.detach().clone() for p in module.parameters()]
    noise.on_train_batch_start(trainer, module, None, 0)  # type: ignore[arg-type]
    size = (after[0] - before[0]).norm() / before[0].norm()
    assert float(size) == pytest.approx(1e-3, rel=0.1)
    assert torch.equal(after[0], module.weight)  # a batch that is accumulated gets no more of it
