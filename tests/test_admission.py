"""A run from somebody else is data: what its files name is admitted before it is imported."""

import copy
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CONFIGS
from processes import start_command, wait
from test_train import sentence

import predict
import train
from core.errors import UserError
from core.runs import load_checkpoint
from pipeline.admission import admit, plain_trainer, read_config
from pipeline.history import update
from pipeline.loading import LoadedRun

OLD = Path(__file__).parent / "old_runs" / "mnist_lenet" / "old"
EVIL = "open('trapped', 'w').close()\nclass Net: pass\n"


@pytest.fixture
def config() -> dict[str, Any]:
    return read_config((OLD / "config.yaml").read_text(), "old")


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that another person has made, and ``evil.py`` wherever it might be looked for."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "mnist_lenet" / "old"
    shutil.copytree(OLD, run)
    for folder in (tmp_path, run, run / "checkpoints"):
        (folder / "evil.py").write_text(EVIL)
        for name in ("evil", "evil.yaml"):
            (folder / name).write_text("class_path: evil.Net\n")
        monkeypatch.syspath_prepend(folder)
    return run


def changed_config(run: Path, place: str, value: Any) -> str:
    """The run's configuration with another value of one setting."""
    changed = read_config((run / "config.yaml").read_text(), run)
    *groups, name = place.split(".")
    part: Any = changed
    for group in groups:
        part = part[group]
    part[name] = value
    return yaml.safe_dump(changed)


def rewrite(run: Path, place: str, value: Any) -> None:
    """Change a setting in the run's configuration and in its checkpoints."""
    text = changed_config(run, place, value)
    (run / "config.yaml").write_text(text)
    for path in run.glob("checkpoints/*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        torch.save(checkpoint | {"config": text}, path)


def setting(path: str, **options: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": options}


FOREIGN = [
    ("model.init_args.network", setting("evil.Net"), "evil.Net, which is not of this project"),
    ("model.init_args.network", "evil.Net", "evil.Net, which is not of this project"),
    ("model.init_args.network", "evil.yaml", "evil.yaml, which is not of this project"),
    ("model", setting("evil.Net"), "evil.Net, which is not of this project"),
    ("data", setting("subprocess.Popen", args=["touch", "trapped"]), "subprocess.Popen"),
    ("model.init_args.network", setting("torch.hub.load", repo_or_dir="x"), "a function, where"),
    (
        "model.init_args.network",
        setting("torch.utils.cpp_extension.load_inline", name="x"),
        "torch.utils.cpp_extension.load_inline, ",
    ),
    ("model.init_args.network", setting("torch.optim.SGD"), "which is no Module"),
    ("model.init_args.network", setting("torch.os.system"), "which is no Module"),
    (
        "model.init_args.network",
        setting("torch.nn.TransformerEncoderLayer", d_model=4, nhead=1, activation="os.system"),
        "os.system, which is not of this project",
    ),
    (
        "model.init_args.network",
        setting("torchvision.models.resnet18", norm_layer="evil.yaml"),
        "evil.yaml, which may be imported or read",
    ),
    (
        "model.init_args.network",
        setting("torchvision.models.resnet18", norm_layer="./evil"),
        "./evil, which may be imported or read",
    ),
    (
        "model.init_args.network",
        setting("torchvision.models.resnet18", norm_layer="this.\u00f1"),
        "which may be imported or read",
    ),
    (
        "model.init_args.network",
        setting("lit_models.networks.LeNet5", extra={"class_path": "evil.Net"}),
        "evil.Net, which is not of this project",
    ),
]
FOREIGN_TO_FIT = [
    ("model.init_args.optimizer", "os.system", "os.system, which is not of this project"),
    ("model.init_args.optimizer", setting("evil.Net"), "evil.Net, which is not of this project"),
    ("model.init_args.lr_scheduler", setting("torch.hub.load"), "torch.hub.load, a function"),
    (
        "model.init_args.lr_scheduler",
        setting("torch.optim.lr_scheduler.LambdaLR", lr_lambda="os.system"),
        "LambdaLR, which calls what it is given",
    ),
    (
        "trainer.callbacks",
        [setting("lightning.pytorch.callbacks.LambdaCallback", on_fit_start="os.system")],
        "LambdaCallback, which calls what it is given",
    ),
    (
        "trainer.callbacks",
        [setting("lightning.pytorch.callbacks.ModelCheckpoint", dirpath="/tmp/elsewhere")],
        "/tmp/elsewhere, a place outside the run's folder",
    ),
    (
        "trainer.callbacks",
        [setting("lightning.pytorch.callbacks.ModelCheckpoint", filename="../../x")],
        "../../x, a place outside the run's folder",
    ),
    (
        "trainer.logger",
        [setting("lightning.pytorch.loggers.CSVLogger", save_dir="elsewhere")],
        "elsewhere, a place outside the run's folder",
    ),
    ("trainer.accelerator", "runs/evil.yaml", "runs/evil.yaml, which is not of this project"),
    ("trainer.strategy", "evil.\u00f1et", "which is not of this project"),
    ("trainer.profiler", "evil", "evil, which is not of this project"),
    (
        "trainer.callbacks",
        [setting("LambdaCallback", setup="os.system")],
        "LambdaCallback, which calls what it is given",
    ),
    ("trainer.profiler", setting("evil.Net"), "evil.Net, which is not of this project"),
    ("trainer.strategy", "evil.Net", "evil.Net, which is not of this project"),
    ("trainer.plugins", [setting("evil.Net")], "evil.Net, which is not of this project"),
    ("evil", 1, "the configuration is not one of a run"),
]


@pytest.mark.parametrize(("place", "value", "said"), [*FOREIGN, *FOREIGN_TO_FIT])
def test_nothing_is_imported_that_a_configuration_names(
    place: str, value: Any, said: str, stranger: Path
) -> None:
    text = changed_config(stranger, place, value)
    with pytest.raises(UserError, match=re.escape(said)):
        admit(update(read_config(text, "x")), "x")
    assert "evil" not in sys.modules
    assert not Path("trapped").exists()


@pytest.mark.parametrize(
    ("command", "place", "value"),
    [
        ("predict", "model.init_args.network", "evil.Net"),
        ("predict", "data", setting("evil.Net")),
        ("fit", "model.init_args.network", "evil.yaml"),
        ("fit", "model.init_args.optimizer", "evil.Net"),
        ("test", "model.init_args.network", "evil.Net"),
        ("test", "trainer.callbacks", [setting("evil.Net")]),
    ],
)
def test_no_command_imports_what_a_run_names(
    command: str, place: str, value: Any, stranger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(stranger, place, value)
    args = [command, f"--run={stranger}", "--trainer.fast_dev_run=1"]
    if command == "predict":
        with pytest.raises(SystemExit):
            predict.main([str(stranger), "--data=DigitsDataModule"])
        assert "which is not of this project" in capsys.readouterr().err
    elif place == "trainer.callbacks":  # of a trainer a test takes plain values alone
        train.main([*args, "--data=DigitsDataModule", "--trainer.accelerator=cpu"])
    else:
        assert "which is not of this project" in sentence(args, capsys)
    assert "evil" not in sys.modules
    assert not Path("trapped").exists()


def test_what_is_trusted_is_imported(
    stranger: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An own network lies in the folder where the commands are typed."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / "evil.py").exists()])
    Path("own_nets.py").write_text(
        "from lit_models.networks import LeNet5\nclass OwnNet(LeNet5): pass\n"
    )
    options = read_config((stranger / "config.yaml").read_text(), "x")
    own = {"class_path": "own_nets.OwnNet"}
    network = options["model"]["init_args"]["network"] | own
    del network["init_args"]["padded_size"]  # LeNet5 has it no more
    rewrite(stranger, "model.init_args.network", network)
    with pytest.raises(SystemExit):
        predict.main([str(stranger), "--data=DigitsDataModule"])
    assert "if you trust whoever made this run, add --trust" in capsys.readouterr().err
    predict.main([str(stranger), "--data=DigitsDataModule", "--trust", "--accelerator=cpu"])
    assert (stranger / "submission.csv").is_file()


def test_a_text_of_the_configuration_admits_no_class_of_the_checkpoint(
    stranger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name that is a mere text in ``config.yaml`` was taken for one that the user had typed."""
    kept = (stranger / "config.yaml").read_text()
    rewrite(stranger, "model.init_args.network", setting("evil.Net"))
    (stranger / "config.yaml").write_text(kept)
    text = read_config(kept, "x")
    text["data"]["init_args"]["data_dir"] = "evil.Net"
    (stranger / "config.yaml").write_text(yaml.safe_dump(text))
    said = sentence(["fit", f"--run={stranger}", "--trainer.max_epochs=9"], capsys)
    assert "evil.Net, which is not of this project" in said
    assert "evil" not in sys.modules
    assert not Path("trapped").exists()


@pytest.mark.slow
def test_an_own_class_that_is_typed_again_needs_no_trust(tmp_path: Path) -> None:
    """The same command goes on; ``fit --run`` alone takes the name from the run's file."""
    (tmp_path / "typed_nets.py").write_text(
        "from lit_models.networks import LeNet5\nclass OwnNet(LeNet5): pass\n"
    )
    base = [f"--config={CONFIGS / 'mnist_lenet.yaml'}", "--data=DigitsDataModule", "--run=x"]
    own = ["--model.network=typed_nets.OwnNet", "--trainer.logger=callbacks.MetricsCSV"]
    for epochs in (1, 2):
        args = ["fit", *base, *own, f"--trainer.max_epochs={epochs}"]
        assert wait(start_command("train", args, tmp_path)) == 0
    args = ["fit", "--run=mnist_lenet/x", "--trainer.max_epochs=3"]
    assert wait(start_command("train", args, tmp_path)) == 1
    said = (tmp_path / "output.txt").read_text()
    assert said.endswith("if you trust whoever made this run, add --trust, in Python trust=True.\n")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_of_ours_is_admitted(path: Path, config: dict[str, Any]) -> None:
    own = yaml.safe_load(path.read_text())
    admit(config | {name: own[name] for name in ("model", "data", "trainer") if name in own}, path)


def test_a_test_takes_plain_values_and_callbacks_of_ours() -> None:
    trainer = {
        "max_epochs": 3,
        "callbacks": [setting("callbacks.CorrectionTable"), setting("evil.Net"), "evil.Net"],
        "logger": [setting("callbacks.MetricsCSV")],
        "profiler": setting("evil.Net"),
    }
    own = [setting("callbacks.CorrectionTable")]
    assert plain_trainer(trainer) == {"max_epochs": 3, "callbacks": own}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not valid YAML"),
        ("[1, 2]", "not one of a run"),
        ("model: 3\ndata: .nan", "the configuration holds nan"),
        ("model: 3\ndata: 4", "model is not a class with its settings"),
        ("a: &a [*a]", "not valid YAML"),
        ("[" * 1500, "not valid YAML"),
        (
            "a: &a [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]\n"
            + "".join(
                f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
                for old, new in zip("abcdefgh", "bcdefghi", strict=True)
            ),
            "grows beyond 20,000 values",
        ),
    ],
    ids=["broken", "list", "not finite", "numbers", "cycle", "deep", "bomb"],
)
def test_texts_that_are_no_configuration(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_config(text, "x")


def changed(checkpoint: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return {k: v for k, v in (checkpoint | parts).items() if v is not Ellipsis}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"state_dict": ...}, "its state_dict is missing or of another kind"),
        ({"state_dict": []}, "its state_dict is missing or of another kind"),
        ({"state_dict": {"network.x": 3}}, "'network.x' among its weights is no tensor"),
        ({"state_dict": {"network.x": torch.tensor(torch.nan)}}, "the run has diverged"),
        ({"state_dict": {"network.x": torch.zeros(3)}}, "the weights are those of another network"),
        ({"metrics": ...}, "its metrics is missing"),
        ({"metrics": {"val/accuracy": "good"}}, "the metric 'val/accuracy' is no finite number"),
        ({"epoch": "3"}, "its epoch is missing or of another kind"),
        ({"loops": 5}, "its loops is of another kind"),
        ({"callbacks": {"x": 5}}, "the state of a callback is of another kind"),
        ({"DigitsDataModule": 5}, "the state of its data is of another kind"),
        ({"epoch": -1}, "its epoch or step is negative"),
        ({"global_step": None}, "its global_step is missing or of another kind"),
        ({"config": 3}, "carries no configuration"),
        ({"config": ...}, "carries no configuration"),
        ({"config": "model: 3"}, "the configuration is not one of a run"),
        ({"config": "{"}, "the configuration is not valid YAML"),
    ],
)
def test_a_changed_checkpoint_is_refused(parts: dict[str, Any], said: str, stranger: Path) -> None:
    """Eleven of fourteen ended in a traceback, and weights of NaN in 500 predictions."""
    path = stranger / "checkpoints" / "best.ckpt"
    torch.save(changed(torch.load(path, weights_only=True), **parts), path)
    with pytest.raises(UserError, match=said):
        LoadedRun.load(str(stranger), "best", ["--data=DigitsDataModule"])


def test_nobody_is_advised_to_load_without_care(stranger: Path) -> None:
    path = stranger / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    torch.save(changed(checkpoint, extra=copy.copy), path)
    with pytest.raises(UserError, match="it is damaged, or holds more than tensors") as error:
        load_checkpoint(path)
    assert "weights_only" not in str(error.value)
