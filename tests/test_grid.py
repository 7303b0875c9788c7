"""Study files, and the point that arguments mean."""

import importlib.metadata
import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import CONFIGS

from core.errors import UserError
from pipeline.studies.grid import PointRecord, Study

STUDIES = sorted((CONFIGS / "studies").glob("*.yaml"))
ROOT = CONFIGS.parent


def sweep(**changes: Any) -> dict[str, Any]:
    """A small study with a setting and a group."""
    return {
        "program": "train.py",
        "method": "grid",
        "metric": {"name": "val/accuracy", "goal": "maximize"},
        "parameters": {
            "data.train_fraction": {"values": [0.5, 1.0]},
            "variant": {"values": ["plain", "both --model.lr=2 --config=more.yaml"]},
            "seed_everything": {"values": [0, 1]},
        },
        "command": [
            "${env}",
            "OMP_NUM_THREADS=1",
            "${interpreter}",
            "${program}",
            "fit",
            "--config=some.yaml",
            "--study=small.yaml",
            "${args}",
        ],
    } | changes


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.yaml").write_text("trainer: {}\n")
    (tmp_path / "more.yaml").write_text("data: {}\n")
    return tmp_path


def load(content: Any) -> Study:
    Path("small.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return Study.load("small.yaml")


def args_of(study: Study, point: dict[str, Any], *flags: str) -> list[str]:
    return study.arguments(point, flags)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_study_files_are_sweeps_to_wandb(path: Path) -> None:
    """Validated with the JSON schema that W&B publishes in its package ``sweeps``."""
    files = importlib.metadata.files("sweeps") or []
    (schema,) = [file for file in files if file.name == "schema.json"]
    content = yaml.safe_load(path.read_text())
    jsonschema.Draft7Validator(json.loads(schema.read_text())).validate(content)
    study = Study.load(path)
    assert (ROOT / study.template[0].removeprefix("--config=")).is_file()
    assert f"--study={path.relative_to(ROOT)}" in study.template
    for line in path.read_text().splitlines():  # its header says how to run it and to read it
        if line.startswith("#   python study.py"):
            assert str(path.relative_to(ROOT)) in shlex.split(line)


@pytest.mark.usefixtures("folder")
def test_points_in_the_order_of_wandb() -> None:
    study = load(sweep())
    assert len(study.points) == 8
    assert study.points[1] == {
        "data.train_fraction": 0.5,
        "variant": "plain",
        "seed_everything": 1,
    }
    assert study.name_of(study.points[1]) == "train_fraction=0.5,variant=plain,seed_everything=1"


@pytest.mark.usefixtures("folder")
def test_an_agent_types_what_we_do() -> None:
    """W&B's own function sends whole values, of which the name is what we type."""
    # imports for seconds, which all processes that collect this file would wait for
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    study = load(sweep())
    assert study.environment == {"OMP_NUM_THREADS": "1"}
    values = [each["values"] for each in sweep()["parameters"].values()]
    for point, sent in zip(study.points, itertools.product(*values), strict=True):
        args = {key: {"value": v} for key, v in zip(point, sent, strict=True)}
        flags = create_sweep_command_args({"args": args})["args"]
        theirs = ["--config=some.yaml", "--study=small.yaml", *flags]
        assert study.read(theirs) == study.read(study.arguments(point))


@pytest.mark.usefixtures("folder")
def test_typed_arguments_mean_a_point() -> None:
    study = load(sweep())
    read = study.read([
        *("--config=some.yaml", "--seed_everything=1", "--data.train_fraction=1"),
        *("--variant=both", "--trainer.x=3"),
    ])  # fmt: skip
    assert list(read.point.items()) == [  # W&B's server may turn 1.0 into 1
        ("data.train_fraction", 1.0),
        ("variant", "both"),
        ("seed_everything", 1),
    ]
    own = ["--data.train_fraction=1.0", "--model.lr=2", "--config=more.yaml", "--seed_everything=1"]
    assert read.all == ["--config=some.yaml", *own, "--trainer.x=3"]


@pytest.mark.usefixtures("folder")
def test_what_decides_a_run_is_in_its_record() -> None:
    study = load(sweep())
    plain, both = study.points[0], study.points[2]
    args = args_of(study, plain)
    before = study.record(args)
    assert study.record(args_of(study, both))["settings"] != before["settings"]
    assert study.record(args_of(study, both))["common"] == before["common"]
    longer = study.record([*args, "--trainer.max_epochs=1"])
    assert longer["settings"] != before["settings"]
    assert longer["common"] != before["common"]
    for place in ("--data.data_dir=x", "--trainer.default_root_dir=y", "--data.download=true"):
        assert study.record([*args, place]) == before
    Path("some.yaml").write_text("# a comment changes nothing\ntrainer: {}\n")
    assert study.record(args) == before
    Path("some.yaml").write_text("trainer: {max_epochs: 3}\n")
    assert study.record(args)["common"] != before["common"]


@pytest.mark.usefixtures("folder")
def test_a_changed_group_or_overlay_is_another_setting() -> None:
    study = load(sweep())
    args = args_of(study, study.points[2])
    before = study.record(args)["settings"]
    Path("more.yaml").write_text("data: {x: 1}\n")
    changed = study.record(args)["settings"]
    assert changed != before
    study.groups["variant"]["both"][0] = "--model.lr=3"
    assert study.record(args)["settings"] not in (before, changed)


@pytest.mark.usefixtures("folder")
def test_a_trained_run_with_other_settings_is_refused() -> None:
    study = load(sweep())
    now = study.record(args_of(study, study.points[0]))
    other = study.record(args_of(study, study.points[0], "--trainer.max_epochs=1"))
    kept = PointRecord(Path("run"))
    assert not kept.is_finished(now)
    kept.write(other, finished=False)
    assert not kept.is_finished(now)  # nothing came of it: the settings were what was wrong
    (kept.folder / "checkpoints").mkdir()
    (kept.folder / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(UserError, match="run was trained with other settings than the study has"):
        kept.is_finished(now)
    (kept.folder / "checkpoints" / "last.ckpt").unlink()
    kept.write(other, finished=True)
    assert kept.is_finished(other)
    with pytest.raises(UserError, match="delete this folder to train it again"):
        kept.is_finished(now)


def grid_of(**parameters: Any) -> dict[str, Any]:
    return sweep(parameters=parameters)


@pytest.mark.usefixtures("folder")
def test_groups_in_a_file_of_their_own_are_asked_for() -> None:
    Path("small_groups.yaml").write_text("variant: {plain: []}\n")
    with pytest.raises(
        UserError, match=r"^the groups of small_groups.yaml now stand in small.yaml"
    ):
        load(sweep())


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (grid_of(), "small.yaml has an empty grid"),
        (grid_of(a={"values": []}), "a needs `values`"),
        (grid_of(a={"min": 0, "max": 1}), "{'min': 0, 'max': 1}"),
        (grid_of(a={"values": [1], "distribution": "normal"}), "'distribution'"),
        (grid_of(a={"values": [1, None]}), "[1, None]"),
        (grid_of(a={"values": [1, 2, 1]}), "the point a=1"),
        (grid_of(a={"values": ["x", "x --y=1"]}), "the point a=x"),
        (grid_of(a={"values": ["x", "y --z"]}), "a: write --z as --NAME=VALUE"),
        (grid_of(a={"values": ["", "y --z=1"]}), "a: write a name before the flags of ''"),
        (grid_of(a={"values": ["x", "--y=1 --z=1"]}), "before the flags of '--y=1 --z=1'"),
        (sweep(command=["torchrun", *sweep()["command"][2:]]), "'torchrun' before fit"),
        (sweep(parameters=["a"]), "parameters must hold keys and values, got ['a']"),
        (sweep(metric="val/accuracy"), "'val/accuracy'"),
        (sweep(method="bayes"), "method must be grid, got 'bayes'"),
        (sweep(program="mine.py"), "program must be train.py, got 'mine.py'"),
        (sweep(variants=[]), "the unknown key variants"),
        (sweep(command=["--config=x", "--study=small.yaml", "${args}"]), "command must hold fit"),
        (sweep(command=["fit", "--seed=1", "--config=x"]), "'fit --seed=1 --config=x'"),
        (sweep(command=["fit", "--config=x", "--study=o.yaml", "${args}"]), "--study=o.yaml"),
        (sweep(command=["fit", "--config=x", "--study=small.yaml"]), "once ${args}"),
        ([1, 2], "must hold keys and values"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_wrong_file_is_told(content: Any, named: str) -> None:
    with pytest.raises(UserError) as error:
        load(content)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        Study.load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="is not YAML"):
        Study.load(tmp_path / "bad.yaml")


@pytest.mark.usefixtures("folder")
def test_arguments_outside_the_grid_are_told() -> None:
    study = load(sweep())
    with pytest.raises(UserError, match="has no variant 'new'; its values are plain, both"):
        study.read(["--variant=new"])
    with pytest.raises(UserError, match=r"a run of small.yaml needs --seed_everything=VALUE"):
        study.read(["--variant=both", "--data.train_fraction=1"])
    for arg in ("--seed_everything", "-c", "3"):
        with pytest.raises(UserError, match=f"with --study, write {arg} as --NAME=VALUE"):
            study.read([arg])
    assert study.where(["variant=both", "train_fraction=1"]) == {
        "variant": "both",
        "data.train_fraction": 1.0,
    }
    with pytest.raises(UserError, match="has no single parameter color"):
        study.where(["color=red"])


def test_numbers_that_yaml_takes_for_text(folder: Path) -> None:
    """``1e-3`` was a text, and ``0.001`` no such value."""
    rates = {"model.optimizer.lr": {"values": ["1e-3", 0.01, "2E+1"]}}
    study = load(sweep(parameters=rates))
    assert study.parameters["model.optimizer.lr"] == [0.001, 0.01, 20.0]
    for text in ("0.001", "1e-3", "1e-03"):
        assert study.value("model.optimizer.lr", text) == 0.001
