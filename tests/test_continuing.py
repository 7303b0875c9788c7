"""A run goes on as what it is, or is refused and left as it was."""

import hashlib
import re
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CONFIGS, end_wandb
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_train import rows, sentence

import train
from callbacks.run.wandb_logger import logged_metrics
from core.errors import UserError
from core.runs import Run, load_checkpoint
from lit_models import LitClassifier
from pipeline.continuing import differences

# three epochs of ten steps
BASE = [
    f"--config={CONFIGS / 'mnist_lenet.yaml'}",
    "--data=DigitsDataModule",
    "--data.batch_size=50",
    "--data.train_fraction=0.5",
    "--model.optimizer=torch.optim.Adam",
    "--model.optimizer.lr=0.003",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.callbacks=LearningRateMonitor",
    "--trainer.logger=callbacks.MetricsCSV",
    "--trainer.enable_progress_bar=false",
]
FOLDER = Path("runs/mnist_lenet")


class Killed(BaseException):
    """As if the process were not there any more."""


def fit(*args: str, run: str = "r") -> Path:
    train.main(["fit", *BASE, f"--run={run}", *args])
    return FOLDER / run


def last(folder: Path) -> dict[str, Any]:
    return load_checkpoint(folder / "checkpoints" / "last.ckpt")


def digest(folder: Path) -> str:
    """Of the names and bytes of all files below."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = (str(f.relative_to(folder)).encode() + f.read_bytes() for f in files)
    return hashlib.sha256(b"".join(parts)).hexdigest()


def trained(folder: Path) -> list[dict[str, str]]:
    """The records of the training steps alone."""
    return [{k: v for k, v in row.items() if not k.startswith("val/")} for row in rows(folder)]


def assert_same(a: Path, b: Path, *, metrics: bool = True) -> None:
    """Weights, optimizer, steps and metrics of two runs are equal bit for bit."""
    one, other = last(a), last(b)
    assert one["global_step"] == other["global_step"]
    assert one["lr_schedulers"] == other["lr_schedulers"]
    for part in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)
    assert (rows(a) if metrics else trained(a)) == (rows(b) if metrics else trained(b))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run of one epoch has been trained."""
    home = tmp_path_factory.mktemp("one_epoch")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        torch.set_num_threads(1)  # as every test has, which comes later than this
        fit("--trainer.max_epochs=1")
    return home


@pytest.fixture
def begun(one_epoch: Path, home: Path) -> Path:
    """A copy of it."""
    shutil.copytree(one_epoch / FOLDER, home / FOLDER)
    return FOLDER / "r"


@pytest.fixture
def killed_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, list[str]], None]:
    """Train until a process would be killed in front of one of its batches, counted from 0."""

    def killed(batch: int, args: list[str]) -> None:
        batches = count()

        def dying(self: LitClassifier, *args: Any) -> Any:
            if next(batches) == batch:
                raise Killed
            return step(self, *args)

        step = LitClassifier.training_step
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(LitClassifier, "training_step", dying)
            fit(*args)

    return killed


# What may not change


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "--model.network.channels=[8,16] --model.optimizer.lr=0.1 --seed_everything=3",
            [
                "--model.network.channels was [6, 16], not [8, 16]",
                "--model.optimizer.lr was 0.003, not 0.1",
                "--seed_everything was 0, not 3",
            ],
        ),
        (
            "--data.epoch_size=300 --trainer.gradient_clip_val=1 --trainer.callbacks+=Freeze "
            "--trainer.callbacks.parameters=[network] --trainer.callbacks.from_epoch=1",
            [
                "--data.epoch_size was none, not 300",
                "--trainer.gradient_clip_val was none, not 1",
                "--trainer.callbacks.Freeze was none, not Freeze",
            ],
        ),
        ("--data.batch_size=25", ["optimizer steps of 50 samples, not of 25"]),
    ],
)
@pytest.mark.usefixtures("begun")
def test_another_run_is_refused_and_nothing_changes(
    flags: str, said: list[str], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was written into the config.yaml of the good run, which then could not be tested."""
    before = digest(home)
    told = sentence(["fit", *BASE, "--run=r", "--trainer.max_epochs=2", *flags.split()], capsys)
    assert [part for part in said if part not in told] == []
    assert digest(home) == before


def test_a_refused_run_leaves_no_folder(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", *BASE, "--run=new", "--trainer.max_epochs=1", "--data.val_size=99999"]
    assert "val_size is 99999" in sentence(args, capsys)
    assert list(home.iterdir()) == [home / "runs"]
    assert list((home / "runs").iterdir()) == []


@pytest.mark.usefixtures("begun")
def test_places_and_lengths_may_change(capsys: pytest.CaptureFixture[str]) -> None:
    fit("--trainer.max_epochs=2", "--data.eval_batch_size=99")
    whole = fit("--trainer.max_epochs=2", run="whole")
    assert_same(FOLDER / "r", whole, metrics=False)  # other batches have other sums of the loss
    recorded = yaml.safe_load((FOLDER / "r" / "config.yaml").read_text())
    assert recorded["data"]["init_args"]["eval_batch_size"] == 99
    assert "already finished" not in capsys.readouterr().out
    fit("--trainer.max_epochs=2", "--test=true")
    assert "runs/mnist_lenet/r was already finished after 20 steps." in capsys.readouterr().out


def test_another_precision_is_told() -> None:
    fit("--trainer.max_epochs=1", "--trainer.precision=32-true")
    with pytest.warns(UserWarning, match="goes on with --trainer.precision=bf16-mixed instead of"):
        fit("--trainer.max_epochs=2", "--trainer.precision=bf16-mixed")


@pytest.mark.usefixtures("begun")
def test_smaller_batches_that_make_up_the_same_steps_go_on() -> None:
    fit("--trainer.max_epochs=2", "--data.batch_size=25", "--trainer.accumulate_grad_batches=2")
    assert [row["step"] for row in rows(FOLDER / "r")] == [str(step) for step in range(20)]


def test_other_batches_inside_an_epoch_are_refused(
    killed_in: Callable[[int, list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The epoch went on with whatever came behind the same number of batches."""
    fit("--trainer.max_epochs=3", "--trainer.max_steps=14")
    flags = ["--data.batch_size=25", "--trainer.accumulate_grad_batches=2"]
    said = sentence(["fit", *BASE, "--run=r", "--trainer.max_epochs=3", *flags], capsys)
    assert "the run stopped after 4 of 10 batches of 50 samples, and this epoch has 20 of" in said


def test_a_branch_may_clip_what_the_run_did_not(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = begun / "checkpoints" / "last.ckpt"
    flags = ["--trainer.max_epochs=2", f"--ckpt_path={state}"]
    clipped = "--trainer.callbacks+=UpdateClipping"
    new = fit(*flags, clipped, "--trainer.gradient_clip_val=1", run="new")
    assert last(new)["global_step"] == 2 * load_checkpoint(state)["global_step"]
    said = sentence(["fit", *BASE, *flags, "--run=third", "--model.optimizer.lr=1"], capsys)
    assert "--model.optimizer.lr was" in said


def test_a_run_goes_on_from_its_own_checkpoints(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = begun.rename(begun.with_name("other")) / "checkpoints" / "last.ckpt"
    fit("--trainer.max_epochs=1")
    said = sentence(
        ["fit", *BASE, "--run=r", "--trainer.max_epochs=1", f"--ckpt_path={other}"], capsys
    )
    assert "runs/mnist_lenet/r goes on from its own checkpoints" in said


def test_a_new_run_begins_with_the_weights_of_another(begun: Path) -> None:
    flags = [f"--init_from={begun}", "--model.optimizer.lr=1e-30"]
    new = fit("--trainer.max_epochs=1", *flags, run="new")
    weights, origin = last(new)["state_dict"], load_checkpoint(begun / "checkpoints/best.ckpt")
    torch.testing.assert_close(weights, origin["state_dict"])
    recorded = yaml.safe_load((new / "config.yaml").read_text())
    assert recorded["init_from"] == str(begun)
    fit("--trainer.max_epochs=2", *flags, run="new")  # goes on, instead of beginning again
    assert last(new)["global_step"] == 20


def test_a_recorded_rate_that_was_never_used_stays(
    killed_in: Callable[[int, list[str]], None],
) -> None:
    """Ten configs had a rate of the optimizer beside a ``max_lr``; a user could type another."""
    cycle = "--model.lr_scheduler=torch.optim.lr_scheduler.OneCycleLR"
    args = [cycle, "--model.lr_scheduler.max_lr=0.003", "--trainer.max_epochs=2"]
    killed_in(14, args)
    run = FOLDER / "r"
    old = (
        (run / "config.yaml")
        .read_text()
        .replace("lr: 0.003\n        betas", "lr: 0.1\n        betas")
    )
    assert "lr: 0.1\n" in old
    (run / "config.yaml").write_text(old)
    for path in run.glob("checkpoints/*.ckpt"):
        torch.save(torch.load(path, weights_only=True) | {"config": old}, path)
    train.main(["fit", f"--run={run}"])
    assert_same(run, fit(*args, run="whole"))
    assert "lr: 0.1\n" in (run / "config.yaml").read_text()


def test_weights_that_do_not_fit(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--run=new", f"--init_from={begun}", "--model.network.channels=[8,16]"]
    said = sentence(["fit", *BASE, "--trainer.max_epochs=1", *flags], capsys)
    assert "the weights are those of another network: size mismatch for network.conv1" in said


def test_differences_go_no_deeper_than_the_class() -> None:
    def setting(name: str, **options: Any) -> dict[str, Any]:
        return {"model": {"class_path": "m.Lit", "init_args": {"network": named(name, options)}}}

    def named(name: str, options: dict[str, Any]) -> dict[str, Any]:
        return {"class_path": f"m.{name}", "init_args": options}

    assert differences(setting("A", width=1), setting("A", width=1)) == []
    assert differences(setting("A", width=1), setting("A", width=2)) == [
        ("model.network.width", 1, 2)
    ]
    assert differences(setting("A", width=1), setting("B", depth=2)) == [
        ("model.network", "m.A", "m.B")
    ]


# As if it had not been interrupted


@pytest.mark.parametrize(
    "args",
    [
        ["--trainer.max_steps=27", "--trainer.max_epochs=-1"],
        ["--trainer.max_steps=25", "--trainer.max_epochs=3", "--data.augmentation.flip=random"],
    ],
    ids=["max_steps", "both"],
)
def test_a_killed_run_ends_with_the_same_bits(
    args: list[str], killed_in: Callable[[int, list[str]], None]
) -> None:
    """With max_steps every restart moved the data by one epoch."""
    killed_in(13, args)
    killed_in(7, args)  # in the third epoch
    assert_same(fit(*args), fit(*args, run="whole"))


def test_a_plateau_goes_on_exactly(killed_in: Callable[[int, list[str]], None]) -> None:
    """Lightning's turn came behind ``last.ckpt``, and a resumed run never lowered its rate."""
    plateau = "--model.lr_scheduler=ReduceLROnPlateau"
    options = ["--model.lr_scheduler.patience=0", "--model.lr_scheduler.threshold=0.5"]
    args = [plateau, *options, "--trainer.max_epochs=4"]
    killed_in(26, args)
    run, whole = fit(*args), fit(*args, run="whole")
    assert last(whole)["optimizer_states"][0]["param_groups"][0]["lr"] < 0.003
    assert_same(run, whole)


def test_more_steps_go_on_in_the_midst_of_an_epoch() -> None:
    fit("--trainer.max_epochs=-1", "--trainer.max_steps=14")
    fit("--trainer.max_epochs=-1", "--trainer.max_steps=26")
    whole = fit("--trainer.max_epochs=-1", "--trainer.max_steps=26", run="whole")
    assert_same(FOLDER / "r", whole)


def test_the_last_validation_is_in_a_checkpoint_that_is_written_before_the_next() -> None:
    """It was not if the training had been interrupted in between."""
    flags = ["--trainer.max_epochs=-1", "--trainer.max_steps=14"]
    fit("--trainer.max_epochs=1")
    assert last(fit(*flags))["metrics"] == last(fit(*flags, run="whole"))["metrics"] != {}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_run_that_a_time_limit_stopped_goes_on_inside_the_epoch(
    accumulated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of the epoch was lost."""
    steps = f"--trainer.accumulate_grad_batches={accumulated}"
    args = ["--trainer.max_epochs=3", steps]
    with monkeypatch.context() as patch:
        seconds = count()
        elapsed = "lightning.pytorch.callbacks.timer.Timer.time_elapsed"
        patch.setattr(elapsed, lambda *_: next(seconds))
        fit(*args, "--trainer.max_time=00:00:00:15")
    stopped = last(FOLDER / "r")
    assert 0 < stopped["global_step"] * accumulated < 20
    assert stopped["global_step"] * accumulated % 10
    fit(*args)
    # where it stopped it was validated as well
    assert_same(FOLDER / "r", fit(*args, run="whole"), metrics=False)


def test_a_run_that_stopped_early_is_finished(capsys: pytest.CaptureFixture[str]) -> None:
    """Each repetition of the command trained one more epoch."""
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    args = [*stop, "--trainer.callbacks.stopping_threshold=9", "--trainer.max_epochs=5"]
    run = fit(*args)
    before = digest(run / "checkpoints")
    assert last(run)["global_step"] == 10
    capsys.readouterr()
    fit(*args)
    assert digest(run / "checkpoints") == before
    assert "was already finished after 10 steps" in capsys.readouterr().out


def test_last_checkpoint_holds_what_the_others_learned() -> None:
    own = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val/loss"]
    run = fit(*own, "--trainer.callbacks.filename=own", "--trainer.max_epochs=2")
    states = last(run)["callbacks"]
    [state] = [s for key, s in states.items() if key.startswith("ModelCheckpoint")]
    losses = [float(row["val/loss"]) for row in rows(run) if row["val/loss"]]
    assert float(state["best_model_score"]) == pytest.approx(min(losses))


def test_a_plain_list_of_callbacks_leaves_the_run_whole() -> None:
    """``--trainer.callbacks=X`` dropped the checkpoints, and the run could not be resumed."""
    run = fit("--trainer.callbacks=LearningRateMonitor", "--trainer.max_epochs=1")
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["best.ckpt", "last.ckpt"]


# Any pair of settings

SETTINGS: dict[str, list[str]] = {
    "--model.optimizer.lr": ["0.003", "0.01"],
    "--model.optimizer": ["torch.optim.Adam", "torch.optim.AdamW"],
    "--model.lr_scheduler": ["null", "OneCycle", "InverseSquareRoot"],
    "--model.network.dropout": ["0.0", "0.3"],
    "--model.label_smoothing": ["0.0", "0.1"],
    "--data.augmentation.crop": ["0", "2"],
    "--data.epoch_size": ["null", "300"],
    "--data.eval_batch_size": ["1000", "77"],
    "--seed_everything": ["0", "1"],
    "--trainer.max_epochs": ["3", "4"],
    "--trainer.max_steps": ["-1", "25"],
    "--trainer.log_every_n_steps": ["50", "3"],
    "--trainer.gradient_clip_val": ["null", "0.5"],
    "--trainer.check_val_every_n_epoch": ["1", "2"],
    "--trainer.num_sanity_val_steps": ["2", "0"],
}


@pytest.mark.slow
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # shrinking would train for minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_run_goes_on_exactly_or_is_left_as_it_was(
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
    killed_in: Callable[[int, list[str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = tmp_path_factory.mktemp("pair")
    monkeypatch.chdir(home)
    names = sorted(SETTINGS)
    before = {name: data.draw(st.sampled_from(SETTINGS[name]), label=name) for name in names}
    changed = data.draw(st.lists(st.sampled_from(names), max_size=2, unique=True), label="changed")
    after = before | {name: data.draw(st.sampled_from(SETTINGS[name])) for name in changed}
    first, second = ([f"{k}={v}" for k, v in flags.items()] for flags in (before, after))
    # the optimizer first, whose class decides on its settings
    first, second = (sorted(flags, key=len) for flags in (first, second))
    killed_in(data.draw(st.integers(7, 17), label="batch"), first)
    if not (FOLDER / "r" / "checkpoints" / "last.ckpt").is_file():
        return  # killed in its first epoch
    kept = digest(home)
    try:
        fit(*second)
    except SystemExit:
        assert digest(home) == kept
        assert before != after
        return
    whole = fit(*second, run="whole")
    one, other = last(FOLDER / "r"), last(whole)
    for part in ("global_step", "state_dict", "optimizer_states"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)


# Names


@pytest.mark.parametrize("name", ["..", "a/b", "#1 2", "ä", "n" * 101, "x\0y", "", "lr0.5/s7"])
def test_names_that_no_run_can_have(name: str) -> None:
    """``--run=lr0.003/s7`` and ``--run=lr0.5/s7`` were one folder."""
    with pytest.raises(UserError, match=re.escape(f"--run={name[:100]!r}")):
        Run.name(name, FOLDER)


def test_names_of_runs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("lr=0.003", "runs/mnist_lenet/r", "mnist_lenet/r", "null")
    assert [Run.name(name, FOLDER) for name in names] == ["lr=0.003", "r", "r", "null"]
    said = sentence(["fit", *BASE, "--run=..", "--trainer.max_epochs=1"], capsys)
    assert "--run='..' cannot be the name of a run in runs/mnist_lenet" in said
    assert list(home.iterdir()) == []
    fit("--trainer.max_epochs=1", run="null")  # which YAML takes for none
    assert (FOLDER / "null" / "config.yaml").is_file()


@pytest.mark.usefixtures("wandb_offline")
def test_any_id_of_wandb_is_found_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``WANDB_RUN_ID=exp-1`` at the start and absent at the resume made two W&B runs."""
    wandb = "--trainer.logger=[callbacks.MetricsCSV,callbacks.ResumableWandbLogger]"
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_RUN_ID", "exp-1.b [c]")
        fit(wandb, "--trainer.max_epochs=1")
        end_wandb()
    fit(wandb, "--trainer.max_epochs=2")
    end_wandb()
    folders = sorted(home.glob("runs/mnist_lenet/r/wandb/offline-run-*"))
    assert [folder.name.partition("_")[2][7:] for folder in folders] == ["exp-1.b [c]"] * 2
    steps = [step for f in folders for step, name in logged_metrics(f) if name == "train/loss"]
    assert steps == list(range(20))
