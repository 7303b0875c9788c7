"""What a user types at train.py, and what is in the run folder afterwards."""

import csv
import json
import os
import platform
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CONFIGS, end_wandb, faults_of_large_tensors, read_wandb
from lightning import Trainer

import train
from core.errors import UserError
from core.runs import Run, load_checkpoint
from datamodules.base import BaseDataModule
from lit_models.base import LitModel
from pipeline.arguments import normalize_argv
from pipeline.fast_loop import disable_malloc_trim
from pipeline.parser import Parser
from pipeline.trainer import fastest_precision


def sentence(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a failing command says; it must be one sentence and a non-zero exit status."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(args)
    assert stop.value.code == 1
    said = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("Seed set")]
    assert len(said) == 1
    return said[0]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_run_folder_holds_the_whole_run(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names >= {"config.yaml", "checkpoints", "metrics.csv", "wandb", "learning_curves.png"}
    assert {p.name for p in (trained / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert [p.name for p in trained.parents[2].iterdir()] == ["runs"]


def test_metrics_have_every_step_once(trained: Path) -> None:
    table = rows(trained)
    assert [int(row["step"]) for row in table] == list(range(60))  # 6 epochs of 160 / 16 steps
    assert all(float(row["train/loss"]) > 0 for row in table)
    assert [int(row["step"]) for row in table if row["val/accuracy"]] == [9, 19, 29, 39, 49, 59]
    assert [row["epoch"] for row in table[9:11]] == ["0", "1"]


def test_training_learns_the_colours(trained: Path) -> None:
    table = rows(trained)
    assert float(table[0]["train/loss"]) == pytest.approx(2.303, abs=0.3)
    assert float(table[-1]["val/accuracy"]) > 0.5


def test_configuration_is_in_the_folder_and_in_every_checkpoint(trained: Path) -> None:
    text = (trained / "config.yaml").read_text()
    config = yaml.safe_load(text)
    assert config["model"]["init_args"]["network"]["init_args"]["widths"] == [8, 8, 8]
    assert config["trainer"]["precision"] in ("32-true", "bf16-mixed")
    assert config["seed_everything"] == 0
    for path in (trained / "checkpoints").iterdir():
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["config"] == text
        assert "hyper_parameters" not in checkpoint
        assert 0 <= checkpoint["metrics"]["val/accuracy"] <= 1


def test_wandb_run_reads_back(trained: Path) -> None:
    """Nested configuration, the loss of each step with its own step, epoch metrics, pictures."""
    (folder,) = (trained / "wandb").glob("offline-run-*")
    records = read_wandb(folder)
    history = [r["history"]["item"] for r in records if r["type"] == "history"]
    config = json.dumps([r["config"] for r in records if r["type"] == "config"])
    assert "lit_models.networks.WhitenedCNN" in config
    assert '"max_epochs' in config or "trainer.max_epochs" in config
    losses = {
        row["trainer/global_step"]: row["train/loss"] for row in history if "train/loss" in row
    }
    assert sorted(losses) == list(range(60))
    expected = {int(row["step"]): float(row["train/loss"]) for row in rows(trained)}
    assert losses == pytest.approx(expected)
    assert sum("val/accuracy" in row for row in history) == 6
    assert any(key.startswith("pictures/learning_curves") for row in history for key in row)


@pytest.mark.slow
def test_test_uses_the_run_and_adds_to_its_records(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained.parents[2])
    train.main(["test", "--run=cifar10_cpu/first"])
    printed = capsys.readouterr().out
    assert "test/accuracy" in printed
    table = rows(trained)
    assert [int(row["step"]) for row in table] == list(range(60))
    best = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    (tested,) = [row for row in table if row["test/accuracy"]]
    assert int(tested["step"]) == best["global_step"] - 1
    assert (trained / "confusion_matrix_test.png").is_file()
    assert (trained / "mistakes.png").is_file()


def test_typed_flag_wins_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "cifar10_cpu.yaml")
    for args in (
        ["--data.batch_size=5", "--config", config],
        ["-c", config, "--data.batch_size=5"],
    ):
        assert normalize_argv(["fit", *args]) == [
            *("fit", f"--config={config}", "--data.batch_size=5")
        ]
    with pytest.raises(SystemExit):
        train.main(["fit", "--data.init_args.batch_size", "5", "-c", config, "--print_config"])
    assert "batch_size: 5\n" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # it starts from another run
def test_settings_in_a_checkpoint_do_not_override_what_is_typed(
    trained: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LightningCLI lays a checkpoint's hyperparameters over the command line (PL#21455)."""
    monkeypatch.chdir(tmp_path)
    start = f"--ckpt_path={trained / 'checkpoints' / 'last.ckpt'}"
    flags = [start, "--data.eval_batch_size=30", "--run=x", "--trainer.logger=false"]
    train.main(["fit", *small, *flags, "--trainer.max_epochs=6"])
    config = yaml.safe_load((tmp_path / "runs" / "cifar10_cpu" / "x" / "config.yaml").read_text())
    assert config["data"]["init_args"]["eval_batch_size"] == 30


def test_run_without_validation_says_so_and_uses_the_last_checkpoint(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--data.val_size=0", "--run=all", "--trainer.max_epochs=1", "--trainer.logger=false"]
    train.main(["fit", *small, *flags])
    run = Run.find("cifar10_cpu/all")
    assert run.checkpoint("best") == run.last_checkpoint
    assert load_checkpoint(run.last_checkpoint)["metrics"] == {}


def test_run_without_bar_checkpoints_and_wandb(
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Lightning refuses the callbacks of the defaults when it is told to do without them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.trainer.find_spec", lambda name: None)
    flags = [f"--trainer.enable_{part}=false" for part in ("progress_bar", "checkpointing")]
    flags += ["--trainer.max_epochs=1", "--run=bare"]
    train.main(["fit", *small, *flags])
    said = capsys.readouterr()
    assert "Epoch" not in said.out + said.err
    assert said.out.startswith("wandb is not installed")
    assert said.out.endswith("The run is in runs/cifar10_cpu/bare: metrics.csv, pictures (*.png)\n")
    folder = tmp_path / "runs" / "cifar10_cpu" / "bare"
    assert not (folder / "checkpoints").exists()
    assert not (folder / "wandb").exists()
    asked = sentence(["fit", *small, *flags, "--test=true", "--run=b"], capsys)
    assert "tests the best checkpoint, and there will be none" in asked


@pytest.fixture(scope="module")
def parser() -> Parser:
    """The parser of a configuration, made once for all mistakes in one."""
    made = Parser()
    made.add_argument("--config", action="config")
    made.add_class_arguments(Trainer, "trainer")
    made.add_subclass_arguments(LitModel, "model")
    made.add_subclass_arguments(BaseDataModule, "data")
    return made


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("--model.lrr=3", "there is no lrr"),
        ("--trainer.max_epoch=3", "no --trainer.max_epoch; did you mean --trainer.max_epochs?"),
        ("--data=NoSuch", "NoSuch is neither a class of this project nor an import path"),
        ("--model.network=NoNet", "NoNet is neither a class"),
        ("--data.batch_size=many", "batch_size: many is no int"),
        ("--trainer.precision=fp16", "trainer.precision: fp16 is none of transformer-engine, "),
        ("--model.tta=x", "model: tta: x is none of none, mirror, translate, mirror_translate;"),
        ("--model.optimizer.lrr=3", "model: optimizer: there is no lrr; did you mean lr?"),
        ("--data.batchsize=3", "data: there is no batchsize; did you mean batch_size?"),
        ("--model.optimizer=MuonSDG", "did you mean MuonSGD?"),
        ("--model.optimizer=torch.optim.Adm", "optimizer: there is no torch.optim.Adm; did you"),
        ("--model.network=my_module.MyNet", "'my_module.MyNet': No module named 'my_module'"),
        ("--config=nope.yaml", "nope.yaml does not exist"),
        ("--config=class.yaml", "LitClassifierr is neither a class"),
        ("--config=flag.yaml", "max_epoch"),
    ],
)
def test_a_mistake_in_a_setting_is_named(
    args: str, said: str, parser: Parser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("class.yaml").write_text("model: {class_path: LitClassifierr}\n")
    Path("flag.yaml").write_text("trainer: {max_epoch: 2}\n")
    config = f"--config={CONFIGS / 'cifar10_cpu.yaml'}"
    with pytest.raises(UserError, match=re.escape(said)):
        parser.parse_args([config, args])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model.lrr=3"], "there is no lrr"),
        (["--data.batch_size=0"], "batch_size must be at least 1, got 0."),
        (["--data.val_size=200"], "val_size is 200, but there are 200 samples in all."),
        (["--data.data_dir=nowhere"], "nowhere"),
    ],
    ids=["parser", "constructor", "split", "files"],
)
def test_a_mistake_ends_in_one_sentence(
    args: list[str],
    said: str,
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    args = [*small, *args, "--trainer.logger=false", "--trainer.max_epochs=1"]
    assert said in sentence(["fit", *args], capsys)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_commands_that_need_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert "test needs a trained run: add --run RUN." in sentence(["test"], capsys)
    assert "nothing is not a run folder" in sentence(["validate", "--run=nothing"], capsys)


def test_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    said = sentence(["fit"], capsys)
    assert said.startswith("error: say what to train: --config FILE, or --model CLASS and --data")
    assert "in configs/ there are cifar10_96, " in said
    said = sentence(["fit", "--config=configs/mnist_lenett.yaml"], capsys)
    assert said.endswith("does not exist; did you mean configs/mnist_lenet.yaml?")


@pytest.mark.parametrize(
    ("flags", "path"),
    [
        ("--model.optimizer=MuonSGD", "lit_models.optimizers.MuonSGD"),
        ("--model.optimizer=BiasScaledSGD", "lit_models.optimizers.BiasScaledSGD"),
        ("--model.lr_scheduler=Triangle", "lit_models.schedules.Triangle"),
        ("--model.network=ResNet", "lit_models.networks.ResNet"),
        ("--model.network=torchvision.models.resnet18", "torchvision.models.resnet18"),
    ],
)
def test_names_that_people_type(
    flags: str, path: str, parser: Parser, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parser.parse_args([f"--config={CONFIGS / 'demo.yaml'}", flags])
    assert f"class_path: {path}\n" in parser.dump(config, skip_validation=True)
    said = "ResNet is lit_models.networks.ResNet; the other is torchvision.models.ResNet."
    assert (said in capsys.readouterr().out) == flags.endswith("ResNet")


def test_help_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["--help"], ["fit", "-h"], ["test", "--help"]):
        with pytest.raises(SystemExit) as stop:
            train.main(args)
        assert not stop.value.code
        assert capsys.readouterr().out == train.HELP.read_text()
    with pytest.raises(SystemExit) as stop:
        train.main(["fit", "--settings"])
    assert not stop.value.code
    assert "name of the run, started or continued" in " ".join(capsys.readouterr().out.split())


def test_what_the_help_names_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    """The page is a file, which no parser writes."""
    typed = re.findall(r"^  (--.*?)(?:   .*)?$", train.HELP.read_text(), re.MULTILINE)
    assert len(typed) > 20
    values = {"FILE": str(CONFIGS / "demo.yaml"), "RUN": "x", "NAME": "x"}
    other = {"--model CLASS": "--model=LitClassifier", "--data CLASS": "--data=DemoDataModule"}
    # no flag of the parser; a run of a study has no name; test_on_kaggle.py has the third
    left_out = {"--settings", "--study FILE", "--on kaggle"}
    together = [f"--config={CONFIGS / 'mnist_lenet.yaml'}"]
    ends: list[list[str]] = []
    for line in typed:
        flag, _, value = other.get(line, line).partition(" ")
        flags = [flag, *values.get(value, value).split()]  # of callbacks two stand in one line
        if "help" in line or "print_config" in line:
            ends.append(flags)
        elif line not in left_out:
            together += flags
    for end in ends:
        with pytest.raises(SystemExit) as stop:
            train.main(["fit", *together, *end])
        assert not stop.value.code, (end, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("gpu", "amx", "accelerator", "expected"),
    [
        (None, True, "auto", "bf16-mixed"),
        (None, False, "auto", "32-true"),
        ((9, 0), False, "auto", "bf16-mixed"),
        ((7, 5), True, "gpu", "32-true"),
        ((9, 0), False, "cpu", "32-true"),
    ],
)
def test_precision_fits_the_processor(
    gpu: tuple[int, int] | None,
    amx: bool,
    accelerator: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert fastest_precision(accelerator) == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_freed_memory_is_not_asked_of_the_kernel_again() -> None:
    disable_malloc_trim()
    # the first few find their place, between what others have put there
    assert faults_of_large_tensors() < 10 * 2**26 / resource.getpagesize()


def test_schedule_of_a_finished_run_cannot_be_stretched(
    trained: Path,
    small: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    last = Path("runs/cifar10_cpu/first/checkpoints/last.ckpt")
    last.parent.mkdir(parents=True)
    last.write_bytes((trained / "checkpoints" / "last.ckpt").read_bytes())
    flags = ["--run=first", "--trainer.max_epochs=7", "--trainer.logger=false"]
    said = sentence(["fit", *small, *flags], capsys)
    assert "planned for 60 steps, not for 70; train a new run" in said
    assert last.read_bytes() == (trained / "checkpoints" / "last.ckpt").read_bytes()


def test_one_logger_writes_into_the_run_folder(
    small: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [*small, "--run=x", "--trainer.max_epochs=1"]
    train.main(["fit", *flags, "--trainer.logger=callbacks.MetricsCSV"])
    folder = Path("runs/cifar10_cpu/x")
    assert (folder / "metrics.csv").is_file()
    assert Run(folder).last_checkpoint.is_file()


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the run was moved
def test_run_goes_on_without_its_config(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``fit --run`` alone takes the run's own configuration and folder, wherever that is."""
    home = tmp_path / "elsewhere" / "cifar10_cpu" / "first"
    shutil.copytree(trained, home, symlinks=True)
    (home / "checkpoints" / "best.ckpt").unlink()
    monkeypatch.chdir(tmp_path)
    train.main(["fit", f"--run={home}", "--trainer.logger=false"])
    assert not (tmp_path / "runs").exists()
    settings = [yaml.safe_load((run / "config.yaml").read_text()) for run in (trained, home)]
    assert settings[0]["model"] == settings[1]["model"]
    assert settings[0]["data"] == settings[1]["data"]


@pytest.mark.parametrize(
    ("place", "args", "root"),
    [
        ("elsewhere", ["--run=a/first", "--trainer.default_root_dir", "."], "."),
        (".", ["--trainer.default_root_dir=elsewhere", "--run", "a/first"], "elsewhere"),
        (".", ["--run=elsewhere/a/first"], "elsewhere"),
        ("elsewhere/a", ["--run=first"], ".."),
    ],
)
def test_a_run_is_found_where_its_root_is(
    place: str, args: list[str], root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "elsewhere" / "a" / "first" / "config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text("{model: {class_path: LitClassifier}, data: {class_path: DemoDataModule}}")
    monkeypatch.chdir(tmp_path / place)
    arranged = normalize_argv(["test", *args])
    flags = dict(flag.split("=") for flag in arranged[1:])
    assert yaml.safe_load(flags["--config"])["data"]["class_path"] == "DemoDataModule"
    assert flags["--trainer.default_root_dir"] == root
    assert flags["--run"] in args or f"--run={flags['--run']}" in args


@pytest.mark.slow
def test_a_run_can_test_itself_when_it_is_trained(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says the same, at the same step, as a test in a program of its own."""
    monkeypatch.chdir(tmp_path)
    train.main(["fit", *small, "--run=x", "--trainer.max_epochs=2", "--test=true"])
    folder = tmp_path / "runs" / "cifar10_cpu" / "x"
    [tested] = [row for row in rows(folder) if row["test/accuracy"]]
    end_wandb()
    train.main(["test", "--run=cifar10_cpu/x"])
    assert [row for row in rows(folder) if row["test/accuracy"]] == [tested]


def write_study(folder: Path, small: list[str]) -> str:
    sizes = ["short --trainer.max_epochs=1", "long --trainer.max_epochs=2"]
    content = {
        "program": "train.py",
        "method": "grid",
        "parameters": {"size": {"values": sizes}, "seed_everything": {"values": [3]}},
        "command": ["fit", small[0], "--study=tiny.yaml", *small[1:], "${args}"],
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return "--study=tiny.yaml"


@pytest.mark.slow
@pytest.mark.usefixtures("wandb_offline")
def test_a_point_of_a_study_names_its_run(
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    point = [*small, write_study(tmp_path, small), "--size=short", "--seed_everything=3"]
    train.main(["fit", *point])
    folder = tmp_path / "runs" / "tiny" / "size=short,seed_everything=3"
    assert len(rows(folder)) == 10  # one epoch of 160 / 16 steps
    record = json.loads((folder / "point.json").read_text())
    assert record["point"] == {"size": "short", "seed_everything": 3}
    assert record["finished"] is True
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["seed_everything"] == 3
    end_wandb()
    (written,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"tiny/size=short,seed_everything=3" in written.read_bytes()
    said = sentence(["fit", *point, "--data.batch_size=8"], capsys)
    assert "was trained with other settings than the study has now" in said
    assert "tiny.yaml has no size 'huge'" in sentence(["fit", *point, "--size=huge"], capsys)


def test_two_programs_do_not_train_the_same_run(
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run.claim(tmp_path / "runs" / "cifar10_cpu", "x")
    with run.lock():
        said = sentence(["fit", *small, "--run=x"], capsys)
    assert "runs/cifar10_cpu/x is being trained by another program; wait for it, or choose" in said
    assert not list(run.folder.iterdir())


def test_an_agents_run_is_sent_to_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cli.CLI", lambda *_: None)
    for sweep, mode in ((None, "offline"), ("abc", "online")):
        monkeypatch.delenv("WANDB_MODE", raising=False)
        if sweep:
            monkeypatch.setenv("WANDB_SWEEP_ID", sweep)
        train.main(["fit"])
        assert os.environ["WANDB_MODE"] == mode


@pytest.mark.slow
def test_a_test_behind_training_is_that_of_the_averaged_weights(
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``fit --test`` tested the weights of training, ``test --run`` and ``predict.py`` the mean."""
    monkeypatch.chdir(tmp_path)
    averaging = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.9"]
    train.main(["fit", *small, *averaging, "--run=mean", "--trainer.max_epochs=2", "--test=true"])
    end_wandb()
    behind = re.findall(r"test/loss +([0-9.]+)", capsys.readouterr().out)
    train.main(["test", "--run", "cifar10_cpu/mean"])
    end_wandb()
    alone = re.findall(r"test/loss +([0-9.]+)", capsys.readouterr().out)
    assert behind == alone
    assert len(alone) == 1
