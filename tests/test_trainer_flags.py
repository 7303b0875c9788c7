"""What can be told to a Trainer acts, by a number that changes, or is refused in one sentence."""

import csv
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from lightning import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_continuing import BASE, FOLDER, fit, last
from test_train import rows, sentence

import train
from core.errors import UserError
from lit_models import LitClassifier
from pipeline.refusals import refuse_settings


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def steps() -> int:
    return int(last(FOLDER / "r")["global_step"])


def validations() -> list[int]:
    """The steps whose rows have a result of validation."""
    return [int(row["step"]) for row in rows(FOLDER / "r") if row.get("val/loss")]


def counter(pattern: str) -> Callable[[], int]:
    """How many such files there are in the run."""
    return lambda: len(list((FOLDER / "r").glob(pattern)))


checkpoints, tables, profiles = map(counter, ("checkpoints/*", "metrics.csv", "fit-*.txt"))


def csv_steps() -> int:
    [path] = (FOLDER / "r").glob("lightning_logs/*/metrics.csv")
    with path.open(newline="") as file:
        return len({row["step"] for row in csv.DictReader(file) if row["train/loss"]})


def tensorboard_steps() -> int:
    [folder] = (FOLDER / "r").glob("lightning_logs/*")
    events = EventAccumulator(str(folder))
    events.Reload()
    return len(events.Scalars("train/loss"))


def tensorboard_rows() -> bool:
    """Whether TensorBoard has what metrics.csv has, and nothing else."""
    found: dict[tuple[int, str], float] = {}
    for file in (FOLDER / "r").glob("lightning_logs/*/events*"):
        events = EventAccumulator(str(file))
        events.Reload()
        for name in events.Tags()["scalars"]:
            found |= {(event.step, name): event.value for event in events.Scalars(name)}
    expected = {
        (int(row["step"]), name): pytest.approx(float(value))
        for row in rows(FOLDER / "r")
        for name, value in row.items()
        if value and name != "step"
    }
    return (9, "val/loss") in found and found == expected


CALLBACKS = "--trainer.callbacks"
PROFILER = "--trainer.profiler"
# flags, and what they make of what is measured; two that do not meet share a run
EFFECTS: list[tuple[str, dict[Callable[[], Any], Any]]] = [
    ("", {steps: 20, validations: [9, 19]}),
    ("--trainer.max_steps=7 --trainer.logger=true", {steps: 7, tables: 1}),
    (
        "--trainer.max_epochs=1 --trainer.limit_train_batches=3 --trainer.logger=false",
        {steps: 3, tables: 0},
    ),
    ("--trainer.min_epochs=2 --trainer.max_time=00:00:00:00", {steps: 20}),
    (
        "--trainer.enable_checkpointing=false --trainer.limit_val_batches=0",
        {checkpoints: 0, validations: []},
    ),
    ("--trainer.overfit_batches=2", {steps: 4}),
    (
        "--trainer.accumulate_grad_batches=5 --trainer.check_val_every_n_epoch=2",
        {steps: 4, validations: [3]},
    ),
    ("--trainer.val_check_interval=0.5", {validations: [4, 9, 14, 19]}),
    (f"--trainer.logger=CSVLogger {PROFILER}=simple", {csv_steps: 20, profiles: 0}),
    ("--trainer.logger+=TensorBoardLogger --test=true", {tensorboard_rows: True}),
    (
        f"--trainer.logger=TensorBoardLogger {PROFILER}=SimpleProfiler {PROFILER}.filename=times "
        f"{PROFILER}.dirpath=.",
        {tensorboard_steps: 20, lambda: len(Path("fit-times.txt").read_text()) > 1000: True},
    ),
    (
        f"{CALLBACKS}+=EarlyStopping {CALLBACKS}.monitor=val/loss {CALLBACKS}.stopping_threshold=9",
        {steps: 10},
    ),
    (
        f"{CALLBACKS}+=ModelCheckpoint {CALLBACKS}.every_n_train_steps=5 {CALLBACKS}.save_top_k=-1",
        {checkpoints: 4 + 2},
    ),
    (f"{CALLBACKS}+=Timer {CALLBACKS}.duration=00:00:00:00", {checkpoints: 0}),
    (
        f'{CALLBACKS}+=GradientAccumulationScheduler {CALLBACKS}.scheduling={{"0":5,"1":2}} '
        f"{CALLBACKS}+=EMAWeightAveraging",
        {steps: 2 + 5, lambda: "averaging_state" in last(FOLDER / "r"): True},
    ),
]


@pytest.mark.parametrize(("flags", "effects"), EFFECTS, ids=[x[0] for x in EFFECTS])
def test_a_setting_acts(flags: str, effects: dict[Callable[[], Any], Any]) -> None:
    typed = ["--trainer.max_epochs=2", *flags.split()]
    fit(*typed)
    assert [measure() for measure in effects] == list(effects.values())


def classes(*names: str) -> list[Namespace]:
    return [Namespace(class_path=f"somewhere.{name}") for name in names]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"barebones": True}, "--trainer.barebones=true leaves nothing of a run"),
        ({"max_steps": 0}, "with --trainer.max_steps=0 there is nothing to train"),
        ({"limit_train_batches": 0}, "with --trainer.limit_train_batches=0 there is nothing"),
        ({"max_epochs": -1}, "training would not end"),
        ({"val_check_interval": 0}, "--trainer.val_check_interval must not be 0"),
        ({"accumulate_grad_batches": 0}, "--trainer.accumulate_grad_batches must not be 0"),
        ({"gradient_clip_val": -1}, "--trainer.gradient_clip_val must not be negative"),
        ({"gradient_clip_algorithm": "value"}, "needs --trainer.gradient_clip_val"),
        ({"min_epochs": 5}, "--trainer.min_epochs=5 is more than max_epochs"),
        ({"check_val_every_n_epoch": 5}, "nothing is validated in 2 epochs"),
        ({"callbacks": classes("BatchSizeFinder")}, "BatchSizeFinder needs a loader that is made"),
        ({"callbacks": classes("LearningRateFinder")}, "LearningRateFinder moves one rate"),
        (
            {"callbacks": classes("Timer", "StochasticWeightAveraging")},
            "StochasticWeightAveraging keeps its average in no checkpoint",
        ),
        ({"strategy": "fsdp"}, "strategy=fsdp cuts parameters into parts"),
        ({"strategy": "deepspeed_stage_2"}, "strategy=deepspeed_stage_2 cuts parameters into"),
        ({"strategy": "model_parallel"}, "strategy=model_parallel cuts parameters into parts"),
        (
            {"strategy": classes("ModelParallelStrategy")[0]},
            "--trainer.strategy=ModelParallelStrategy cuts parameters into parts",
        ),
        ({"logger": classes("TensorBoardLogger")}, "pip install tensorboard"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_act_is_refused(
    settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.refusals.find_spec", lambda name: None)
    usual: dict[str, Any] = dict.fromkeys(inspect.signature(Trainer).parameters)
    usual |= {"max_epochs": 2, "max_steps": -1, "strategy": "auto"}
    refuse_settings(Namespace(**usual), "fit")
    with pytest.raises(UserError, match=re.escape(said)):
        refuse_settings(Namespace(**usual | settings), "fit")


REFUSED = [
    ("--trainer.devices=abc", "the trainer cannot be made: "),
    (f"{CALLBACKS}+=EMAWeightAveraging {CALLBACKS}+=EMAWeightAveraging", "cannot be made: "),
    ("--ckpt_path=nowhere.ckpt", "nowhere.ckpt does not exist"),
    (
        "--trainer.num_sanity_val_steps=0 --trainer.callbacks+=EarlyStopping "
        "--trainer.callbacks.monitor=nothing",
        "EarlyStopping watches nothing, which is not measured",
    ),
    (
        "--model.lr_scheduler=torch.optim.lr_scheduler.StepLR --model.lr_scheduler.step_size=0",
        "StepLR divides by step_size, which must not be 0",
    ),
    (
        "--model.lr_scheduler=torch.optim.lr_scheduler.OneCycleLR "
        "--model.lr_scheduler.max_lr=0.003 --model.lr_scheduler.total_steps=5",
        "OneCycleLR is over after 5 of 20 optimizer steps",
    ),
    (
        "--trainer.max_epochs=-1 --trainer.max_time=00:00:01:00 "
        "--model.lr_scheduler=lit_models.schedules.OneCycle",
        "laid over the whole training, which has no end",
    ),
    (
        f"{CALLBACKS}+=EarlyStopping {CALLBACKS}.monitor=val/loss --data.val_size=0",
        "EarlyStopping watches val/loss, which is not measured in validation; nothing is",
    ),
    (
        "--model.lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau "
        "--model.lr_scheduler.monitor=val/acc",
        "ReduceLROnPlateau watches val/acc, which is not measured",
    ),
    (
        "--trainer.logger=callbacks.ResumableWandbLogger --trainer.logger.save_dir=x",
        "leave its save_dir out",
    ),
    ("--model.optimizer=torch.optim.Muon", "--model.optimizer: Muon only supports 2D parameters"),
    (
        "--model.network=torch.nn.LazyLinear --model.network.out_features=10",
        "--model.network: LazyLinear has lazy layers",
    ),
    (
        "--model.network=lit_models.networks.ResNet --model.network.in_channels=3",
        "LitClassifier with ResNet cannot be trained on DigitsDataModule, whose batches are "
        "(4, 1, 28, 28) float32, (4,) int64",
    ),
    (
        "--data=RunningMeanDataModule",
        "LitClassifier with LeNet5 cannot be trained on RunningMeanDataModule",
    ),
    (
        "--model.lr_scheduler=torch.optim.lr_scheduler.OneCycleLR --model.lr_scheduler.max_lr=0.1",
        "OneCycleLR trains with a rate of its own, 0.1, so that lr=0.003 of Adam would not be used",
    ),
]


@pytest.mark.parametrize(("flags", "said"), REFUSED, ids=[flags for flags, _ in REFUSED])
def test_a_setting_is_refused_in_one_sentence(
    flags: str, said: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = BASE
    if "--data=" in flags:
        base = [x for x in BASE if not x.startswith(("--data.", "--data="))]
    args = ["fit", *base, "--trainer.max_epochs=2", *flags.split()]
    assert said in sentence(args, capsys)
    begun = "num_sanity_val_steps=0" in flags  # only the first epoch tells what is measured
    assert begun or not list(home.rglob("config.yaml"))


def test_a_validation_leaves_the_records_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """It was recorded at step 0, and the steps to an accuracy became 1."""
    run = fit("--trainer.max_epochs=2")
    before = rows(run)
    for limit in ("", "--trainer.limit_val_batches=1"):
        train.main(["validate", f"--run={run}", *limit.split()])
        assert rows(run) == before
    assert "A part of the data: nothing of it is recorded." in capsys.readouterr().out


def test_a_part_of_a_test_does_not_take_the_place_of_the_whole() -> None:
    run = fit("--trainer.max_epochs=1", "--test=true", "--data.eval_batch_size=50")
    before = rows(run)
    matrix = (run / "confusion_matrix_test.csv").exists()
    train.main(["test", f"--run={run}", "--trainer.limit_test_batches=1"])
    assert rows(run) == before
    assert (run / "confusion_matrix_test.csv").exists() == matrix


def test_a_quick_look_is_at_the_trained_network(capsys: pytest.CaptureFixture[str]) -> None:
    """``fast_dev_run`` evaluated the initial weights."""
    run = fit("--trainer.max_epochs=3")
    flags = ["--trainer.fast_dev_run=1", "--data.eval_batch_size=1000"]
    for command in ("validate", "test"):
        capsys.readouterr()
        train.main([command, f"--run={run}", *flags])
        [line] = [x for x in capsys.readouterr().out.splitlines() if "/accuracy" in x]
        assert float(line.split()[1]) > 0.5
        overfit = [command, f"--run={run}", "--trainer.overfit_batches=2"]
        assert "--trainer.overfit_batches is for fit" in sentence(overfit, capsys)


def test_an_average_that_has_not_begun_is_the_current_weights() -> None:
    """The initial ones were validated, saved and tested (Lightning-AI/pytorch-lightning#21724)."""
    average = f"{CALLBACKS}+=EMAWeightAveraging {CALLBACKS}.update_starting_at_step=1000"
    flags = ["--trainer.max_epochs=3", "--test=true"]
    averaged, plain = fit(*flags, *average.split()), fit(*flags, run="plain")
    assert float(rows(averaged)[-1]["val/accuracy"]) > 0.5
    for a, b in zip(rows(averaged), rows(plain), strict=True):
        assert {k: v for k, v in a.items() if "/" in k} == {k: v for k, v in b.items() if "/" in k}
    torch.testing.assert_close(last(averaged)["state_dict"], last(plain)["state_dict"])


def test_overfitting_takes_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def seeing(self: LitClassifier, batch: list[torch.Tensor], *args: Any) -> Any:
        seen.append(batch[0])
        return step(self, batch, *args)

    step = LitClassifier.training_step
    monkeypatch.setattr(LitClassifier, "training_step", seeing)
    fit("--trainer.max_epochs=3", "--trainer.overfit_batches=2", "--data.augmentation.crop=2")
    _, *batches = seen  # the first one tries whether network and data fit
    assert len(batches) == 6
    assert all(torch.equal(batch, batches[i % 2]) for i, batch in enumerate(batches))
    assert not torch.equal(batches[0], batches[1])
