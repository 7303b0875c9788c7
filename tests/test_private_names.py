"""Each private name of a library that the code leans on is taken away once, and training goes on.

Names that methods of ours override are among them: without the name nobody calls the method.
"""

import signal
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CONFIGS, end_wandb
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from other_names import renamed
from small_training import Plain, column, scaled
from small_training import fit as fit_with
from test_classification import Points, model, trainer, weights
from test_termination import SignalAt, Small, same
from test_wandb_logger import ROWS
from torch import nn

import train
from benchmarks.step_overhead import RandomNumbers
from callbacks import GradientSpikeMonitor, ProgressBar, Termination
from callbacks.run.wandb_logger import ResumableWandbLogger, logged_metrics
from core.errors import UserError
from pipeline.fast_loop import skip_noop_hooks
from pipeline.parser import Parser

pytestmark = pytest.mark.slow  # what they tell of changes with the libraries alone
SIGTERM_NAMES = ("_signal_connector", "_sigterm_notifier_fn", "_broadcast_sigterm_tensor")
LOOP_NAMES = ("_data_fetcher", "_should_accumulate", "_is_training_done", "_should_check_val_fx")
W_AND_B_NAMES = ("_interface", "_assign", "_asyncer", "_client", "_publish")


def test_a_name_is_taken_away() -> None:
    with renamed("_signal_connector", "lightning"):
        other = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        assert not hasattr(other, "_signal_connector")
        assert other.received_sigterm is False
    assert hasattr(Trainer(accelerator="cpu", logger=False), "_signal_connector")


# SIGTERM


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> LightningModule:
    return Small(tmp_path_factory.mktemp("whole")).fit()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
@pytest.mark.parametrize(
    ("name", "step"),
    [*((name, 5) for name in SIGTERM_NAMES), *((name, 12) for name in LOOP_NAMES)],
)
def test_sigterm_loses_nothing(
    name: str,
    step: int,
    uninterrupted: LightningModule,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Lightning's handler is replaced, and its loop asked whether training can stop at a batch.

    Without the names of the handler, ours is installed when training starts. Without that of the
    broadcast, Lightning sends a flag around that nobody sets. Without those of the loop, training
    stops at the end of the epoch, after 12 batches, and says so.
    """
    handler = signal.getsignal(signal.SIGTERM)
    with renamed(name, "lightning"):
        with pytest.raises(SIGTERMException) as stop:
            Small(tmp_path).fit(SignalAt("on_train_batch_start", 5))
        assert stop.value.code == 143
        assert signal.getsignal(signal.SIGTERM) == handler
        assert Small(tmp_path).saved()["global_step"] == step
        said = capsys.readouterr().err
        assert said.count("training stops at the end of this epoch") == (name in LOOP_NAMES)
        resumed = Small(tmp_path).fit(resume=True)
    assert same(resumed, uninterrupted)
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize("name", SIGTERM_NAMES)
def test_sigterm_ends_a_test_at_once(name: str, tmp_path: Path) -> None:
    """Lightning's own handler only takes note of it, and nobody asks for it outside of training."""
    data = RandomNumbers(samples=52, batch_size=4, val_size=4)
    data.read_test = data.read_train  # type: ignore[method-assign]
    with renamed(name, "lightning"):
        run = trainer(tmp_path, callbacks=[SignalAt("on_test_batch_start", 1)])
        run.callbacks.append(Termination())  # type: ignore[attr-defined]
        with pytest.raises(SIGTERMException) as stop:
            run.test(model(nn.Linear(1, 5)), data, verbose=False)
    assert stop.value.code == 143


# The loop


@pytest.mark.parametrize("name", ["_every_n_train_steps", "_train_time_interval"])
def test_checkpoints_are_saved(name: str, tmp_path: Path) -> None:
    """They tell whether a ModelCheckpoint looks at every step; without them it is asked to."""
    with renamed(name, "lightning"):
        by_steps = ModelCheckpoint(every_n_train_steps=4, save_top_k=-1, filename="{step}")
        by_time = ModelCheckpoint(train_time_interval=timedelta(0), filename="time")
        by_epochs = ModelCheckpoint(every_n_epochs=1, filename="{epoch}")
        callbacks = [by_steps, by_time, by_epochs]
        run = trainer(tmp_path, max_epochs=1, callbacks=callbacks, enable_checkpointing=True)
        skip_noop_hooks(run)
        run.fit(model(), Points())
    names = {"step=4.ckpt", "step=8.ckpt", "time.ckpt", "epoch=0.ckpt"}
    assert names <= {path.name for path in tmp_path.rglob("*.ckpt")}


def test_the_bar_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """We override it to draw less often; without it Lightning draws at every step."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with renamed("_should_update", "lightning"):
        bar = ProgressBar()
        run = trainer(tmp_path, max_epochs=1, callbacks=[bar], enable_progress_bar=True)
        run.fit(model(), Points())
    said = capsys.readouterr()
    assert "10/10" in said.out + said.err


def test_weights_do_not_depend_on_a_quick_way_to_set_an_attribute(tmp_path: Path) -> None:
    """Lightning sets it forty times in a step; without it nn.Module's way is the slower one."""
    found = []
    for name in ("_current_fx_name", "_no_such_name"):
        with renamed(name, "lightning"):
            lit = model()
            trainer(tmp_path, max_epochs=1).fit(lit, Points())
            found.append(weights(lit))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# The command line


def test_a_run_is_described_and_its_checkpoint_chooses_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """``_parser`` would give the parser of a subcommand; that of all has the configuration too.

    ``_parse_ckpt_path``, whatever its name, lets the hyperparameters in a checkpoint choose class
    and arguments; it never sees the path.
    """
    monkeypatch.chdir(tmp_path)
    run = Path("runs", "running_mean_rnn", "x")
    config = f"--config={CONFIGS / 'running_mean_rnn.yaml'}"
    sizes = ["--data.epoch_size=64", "--data.val_size=32", "--trainer.max_epochs=1"]
    with renamed("_parser", "lightning"):
        train.main(["fit", config, *sizes, "--trainer.logger=false", "--run=x"])
    text = (run / "config.yaml").read_text()
    assert text.startswith("# hardware:")
    assert "\n# command:" in text
    described = yaml.safe_load(text)
    assert [*described] == ["seed_everything", "trainer", "model", "data"]
    assert described["trainer"]["precision"] == "32-true"
    assert described["data"]["init_args"]["epoch_size"] == 64
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] = {"_class_path": "antigravity.Model", "lr": 9}
    torch.save(checkpoint, tmp_path / "foreign.ckpt")
    train.main(["validate", f"--run={run}", f"--ckpt_path={tmp_path / 'foreign.ckpt'}"])
    assert "antigravity" not in sys.modules


def test_a_prefix_of_an_option_is_refused() -> None:
    """argparse looks for them in ``_get_option_tuples``, unless ``allow_abbrev`` is off."""
    with renamed("_get_option_tuples", "argparse", "jsonargparse"):
        parser = Parser()
        parser.add_argument("--trainer.max_epochs", type=int)
        assert parser.parse_args(["--trainer.max_epochs=3"]).trainer.max_epochs == 3
        with pytest.raises(UserError, match=r"there is no --trainer\.max_epoch"):
            parser.parse_args(["--trainer.max_epoch=3"])


# W&B


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("_wandb_init", "lightning"),
        *((name, "wandb") for name in W_AND_B_NAMES),
        ("wandb.proto.wandb_server_pb2", ""),
    ],
)
@pytest.mark.usefixtures("wandb_offline")
def test_rows_reach_wandb(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of many steps are sent together; without a part of W&B's connection one by one.

    Without ``_wandb_init`` W&B only warns of an argument of Lightning's.
    """
    monkeypatch.setenv("WANDB_SILENT", "true")
    if not package:
        monkeypatch.setitem(sys.modules, name, None)
    with renamed(name, package):
        logger = ResumableWandbLogger(save_dir=str(tmp_path))
        try:
            logger.log_rows(dict(reversed(ROWS.items())))
        finally:
            end_wandb()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [step for step, name in logged_metrics(folder) if name == "train/loss"] == [*ROWS]


def test_a_resumed_wandb_run_says_what_is_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows of an earlier folder are left out; without W&B's record nobody can read them."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    earlier = tmp_path / "wandb" / "offline-run-20260101_000000-abc"
    earlier.mkdir(parents=True)
    (earlier / "run-abc.wandb").write_bytes(b":W&B")
    monkeypatch.setitem(sys.modules, "wandb.proto.wandb_internal_pb2", None)
    assert not list(logged_metrics(earlier))
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert str(earlier) in said


# torch


def test_matrix_units_are_known() -> None:
    """The private name tells what the public ``get_capabilities`` tells, where there is one."""
    known = {"amx_tile": torch.cpu._is_amx_tile_supported()}
    public = getattr(torch.cpu, "get_capabilities", lambda: known)()
    assert known["amx_tile"] == public.get("amx_tile", False)


def test_norms_of_a_fused_optimizer_are_unscaled(tmp_path: Path) -> None:
    """It gets scaled gradients, as a private attribute says; without it ``fused`` tells."""
    optimizer = partial(torch.optim.Adam, lr=0.01, fused=True)
    whole = fit_with(tmp_path / "a", Plain(optimizer), GradientSpikeMonitor(), max_steps=5)
    with renamed("_step_supports_amp_scaling", "torch", "lightning"):
        half = fit_with(
            tmp_path / "b",
            Plain(optimizer),
            GradientSpikeMonitor(),
            plugins=scaled(1024.0),
            max_steps=5,
        )
    norms = column(whole, "grad_norm/total")
    assert len(norms) == 5
    assert column(half, "grad_norm/total") == pytest.approx(norms, rel=0.02)
