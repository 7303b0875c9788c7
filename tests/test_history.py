"""Recorded configurations are read by later versions."""

from pathlib import Path

import pytest
import yaml

from core.errors import UserError
from pipeline import history
from pipeline.history import Removed, Renamed, update
from pipeline.loading import LoadedRun
from pipeline.parser import Parser

OLD_RUNS = Path(__file__).parent / "old_runs"
SETTINGS = (
    Removed("lit_models.LitClassifier", "tta", "none", "9.9", "take an older version."),
    Renamed("datamodules.DigitsDataModule", "val_size", "splits.val", "9.9"),
)


@pytest.mark.parametrize(
    "path", sorted(OLD_RUNS.glob("*/*/config.yaml")), ids=lambda p: p.parts[-3]
)
def test_what_is_up_to_date_is_left_as_it_is(path: Path) -> None:
    recorded = update(yaml.safe_load(path.read_text()))
    assert update(recorded) == recorded


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("callbacks.run_folder.MetricsCSV", "callbacks.MetricsCSV"),
        ("callbacks.freeze.Freeze", "callbacks.Freeze"),
        ("datamodules.mnist.MNISTDataModule", "datamodules.MNISTDataModule"),
    ],
)
def test_a_class_whose_module_has_moved_is_found_by_its_package(old: str, new: str) -> None:
    """``callbacks.run_folder.MetricsCSV`` was a path that a user could type and a run record."""
    assert update({"class_path": old}) == {"class_path": new}


def test_removed_settings_are_dropped_at_their_default_and_else_refused() -> None:
    recorded = {"model": {"class_path": "lit_models.LitClassifier", "init_args": {"tta": "none"}}}
    assert update(recorded, SETTINGS)["model"]["init_args"] == {}
    recorded["model"]["init_args"] = {"tta": "mirror"}
    with pytest.raises(UserError, match=r"has no tta since version 9\.9.*sets it to 'mirror'"):
        update(recorded, SETTINGS)


def test_a_class_that_is_gone_is_refused() -> None:
    with pytest.raises(UserError, match=r"networks\.Filtered is gone .* benchmarks/edges"):
        update({"class_path": "lit_models.networks.Filtered", "init_args": {}})


def test_a_setting_that_has_become_a_class() -> None:
    options = {"cutmix": 0.5, "tta": "mirror"}
    recorded = {"class_path": "lit_models.LitClassifier", "init_args": options}
    assert update(recorded) == {"class_path": "lit_models.LitCutMix", "init_args": options}
    recorded["init_args"] = {"cutmix": 0.0}
    assert update(recorded) == {"class_path": "lit_models.LitClassifier", "init_args": {}}


@pytest.mark.parametrize("name", ["GradientNormClipping", "callbacks.AdaptiveGradientClipping"])
def test_a_class_that_is_gone_is_answered_with_what_to_do(name: str) -> None:
    with pytest.raises(UserError, match=rf"^{name} .*UpdateClipping.*spike_rivals"):
        update({"trainer": {"callbacks": [{"class_path": name}]}})
    assert update({"class_names": ["Raw", name]}) == {"class_names": ["Raw", name]}
    with pytest.raises(UserError, match="UpdateClipping"):
        Parser().parse_args([f"--trainer.callbacks+={name}"])


def test_renamed_settings_go_on_by_their_new_name() -> None:
    recorded = [
        {"class_path": "datamodules.DigitsDataModule", "init_args": {"val_size": 2, "mean": 1}}
    ]
    assert update(recorded, SETTINGS)[0]["init_args"] == {"splits": {"val": 2}, "mean": 1}


@pytest.mark.parametrize("name", ["DigitsDataModule", "datamodules.DigitsDataModule"])
def test_augmentation_is_one_setting(name: str) -> None:
    """Crop, flip and eleven others were settings of the data."""
    recorded = {"class_path": name, "init_args": {"crop": 2, "augmentation": {"flip": "random"}}}
    nested = {"augmentation": {"crop": 2, "flip": "random"}}
    assert update(recorded) == {"class_path": name, "init_args": nested}
    assert update({"init_args": {"crop": 2}}) == {"init_args": {"crop": 2}}  # of whatever class
    assert update("--data.trivial") == "--data.augmentation.trivial"
    assert update("--data.init_args.crop") == "--data.init_args.augmentation.crop"
    for group in ({"crop": 2}, {"init_args": {"crop": 2}}):  # of a file for the data of another one
        options = update({"data": group})["data"]
        assert options.get("init_args", options) == {"augmentation": {"crop": 2}}
    unset = {"class_path": name, "init_args": {"crop": 2, "augmentation": None}}
    assert update(unset)["init_args"] == {"augmentation": {"crop": 2}}
    with pytest.raises(UserError, match="augmentation needs names and values, got 3"):
        update({"class_path": name, "init_args": {"crop": 2, "augmentation": 3}})


def test_options_of_somebody_else_s_data_keep_their_names() -> None:
    """``--data=mine.Data --data.scale=2`` was told that there is no augmentation."""
    parser = Parser()
    for name in ("data", "data.scale", "data.augmentation.scale"):
        parser.add_argument(f"--{name}")
    assert parser.parse_args(["--data=mine.Data", "--data.scale=2"])["data.scale"] == "2"
    assert parser.parse_args(["--data.scale=2"])["data.augmentation.scale"] == "2"


def test_a_module_of_somebody_in_a_room_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "__file__", str(tmp_path / "pipeline" / "history.py"))
    assert update("callbacks.mine.Timing") == "callbacks.Timing"
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "mine.py").touch()
    assert update("callbacks.mine.Timing") == "callbacks.mine.Timing"


def test_paths_and_texts_that_only_look_alike_stay() -> None:
    for text in (
        "data/mnist.v2",
        "callbacks.progress",
        "callbacks.mine.OfSomebody",
        "callbacks.run.progress.ProgressBar",
        "a.b",
    ):
        assert update(text) == text


def test_a_config_and_a_flag_may_name_a_class_by_its_old_module(tmp_path: Path) -> None:
    config = tmp_path / "old.yaml"
    config.write_text("callbacks: [{class_path: callbacks.run_folder.BestCheckpoint}]\n")
    parser = Parser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--callbacks", type=list)
    assert parser.parse_args([f"--config={config}"]).callbacks == [
        {"class_path": "callbacks.BestCheckpoint"}
    ]


@pytest.mark.slow
def test_a_checkpoint_may_name_a_class_by_its_old_module(tmp_path: Path) -> None:
    import torch

    old = OLD_RUNS / "mnist_lenet" / "old" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(old, weights_only=True)
    moved = "datamodules.digits.DigitsDataModule"
    checkpoint["config"] = checkpoint["config"].replace("datamodules.DigitsDataModule", moved)
    assert moved in checkpoint["config"]
    torch.save(checkpoint, tmp_path / "moved.ckpt")
    member = LoadedRun.load(str(tmp_path / "moved.ckpt"), "last", [])
    assert type(member.data).__name__ == "DigitsDataModule"
