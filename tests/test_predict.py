"""Predictions from runs alone, and the files they end in."""

import csv
import gc
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import full_disk
from fake_data import draw, labels_of, write_batch
from processes import by_two

import predict
from core.files import sha256
from core.locks import locked
from datamodules import CIFAR10DataModule
from datamodules.images.base import ImageDataModule
from pipeline import loading, prediction

KAGGLE = "KaggleCIFAR10DataModule"


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the trained run that a test may change."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "runs/cifar10_cpu/first", symlinks=True)
    return Path("runs/cifar10_cpu/first")


def predict_csv(*args: str | Path) -> bytes:
    predict.main([str(arg) for arg in args])
    output = next((a for a in map(str, args) if a.endswith(".csv")), None)
    return Path(output or f"{args[0]}/submission.csv").read_bytes()


def sentence(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        predict.main([str(arg) for arg in args])
    assert stop.value.code == 1
    (said,) = capsys.readouterr().err.splitlines()
    return said


def change_config(path: Path, **data: object) -> None:
    """Write other settings of the data into a checkpoint."""
    checkpoint = torch.load(path, weights_only=True)
    config = yaml.safe_load(checkpoint["config"])
    config["data"]["init_args"] |= data
    checkpoint["config"] = yaml.safe_dump(config)
    torch.save(checkpoint, path)


def test_files_of_a_prediction(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(csv.reader(predict_csv(run).decode().splitlines()))
    assert rows[0] == ["id", "label"]
    assert [int(i) for i, _ in rows[1:]] == list(range(1, 41))
    assert f"Next: python submit.py {run} --dry_run" in capsys.readouterr().out
    record = json.loads((run / "submission.json").read_text())
    assert record["sha256"] == sha256(run / "submission.csv")
    assert record["runs"][0]["sha256"] == sha256(run / "checkpoints" / "best.ckpt")
    assert record["runs"][0]["validation_samples"] == 40
    assert 0 < record["runs"][0]["validation_accuracy"] <= 1
    assert record["tta"] == "mirror_translate"
    saved = np.load(run / "submission.npz")
    np.testing.assert_allclose(saved["probabilities"].sum(1), 1, rtol=1e-5)
    labels = [str(saved["classes"][k]) for k in saved["probabilities"].argmax(1)]
    assert labels == [label for _, label in rows[1:]]


@pytest.mark.slow
def test_predictions_are_those_of_the_test(run: Path, trained: Path) -> None:
    """The classes agree with the labels as often as ``test`` counted."""
    predict_csv(run)
    saved = np.load(run / "submission.npz")
    config = yaml.safe_load((run / "config.yaml").read_text())
    settings = config["data"]["init_args"]
    data = CIFAR10DataModule(data_dir=settings["data_dir"], verify=False)
    targets = data.read_test()[1].numpy()
    accuracy = (saved["probabilities"].argmax(1) == targets).mean()
    import train

    train.main(["test", f"--run={run}", "--trainer.logger=[{class_path: callbacks.MetricsCSV}]"])
    with (run / "metrics.csv").open(newline="") as file:
        (tested,) = [r["test/accuracy"] for r in csv.DictReader(file) if r["test/accuracy"]]
    assert accuracy == pytest.approx(float(tested))


def test_same_bytes_again_and_for_another_batch_size(run: Path) -> None:
    first = predict_csv(run)
    assert predict_csv(run) == first
    assert predict_csv(run, "--data.eval_batch_size", "7") == first
    assert json.loads((run / "submission.json").read_text())["rows"] == 40


def test_ensemble_is_the_mean_of_the_probabilities(run: Path) -> None:
    other = Path("runs/cifar10_cpu/other")
    shutil.copytree(run, other)
    path = other / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["network.head.weight"] *= -1
    torch.save(checkpoint, path)
    single = []
    for source in (run, other):
        predict_csv(source, "--tta=none")
        single.append(np.load(source / "submission.npz")["probabilities"])
    predict_csv(run, other, "--tta=none", "--output", "both.csv")
    both = np.load("both.npz")["probabilities"]
    np.testing.assert_allclose(both, np.mean(single, axis=0), rtol=1e-6)
    assert len(json.loads(Path("both.json").read_text())["runs"]) == 2


def test_members_of_an_ensemble_share_a_precision(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path("runs/cifar10_cpu/other")
    shutil.copytree(run, other)
    path = other / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["config"] = checkpoint["config"].replace("precision: 32-true", "precision: 64-true")
    torch.save(checkpoint, path)
    with pytest.raises(SystemExit):
        predict.main([str(run), str(other), "--output", "both.csv"])
    said = capsys.readouterr().err
    assert "were trained in 32-true and 64-true; choose one with --precision." in said


def test_next_of_a_checkpoint_is_its_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict.main([str(run / "checkpoints" / "best.ckpt"), "--tta=none"])
    (said,) = re.findall(r"Next: python submit.py (\S+) --dry_run", capsys.readouterr().out)
    assert Path(said).samefile(run / "checkpoints" / "submission.csv")


def beside(run: Path, **data: object) -> Path:
    """A copy of a run, with other settings of the data."""
    other = run.with_name("other")
    shutil.copytree(run, other)
    change_config(other / "checkpoints" / "best.ckpt", **data)
    return other


def other_images(data_dir: Path) -> Path:
    """Data of which only the test images differ."""
    folder = Path("moved/cifar-10-batches-py")
    shutil.copytree(data_dir / folder.name, folder)
    write_batch(folder / "test_batch", draw(labels_of(40)), labels_of(40))
    return folder.parent


def test_other_data_are_not_averaged(
    run: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The probabilities of different images were averaged where their ids were the same."""
    other = beside(run, data_dir=str(other_images(data_dir)))
    said = sentence(capsys, run, other, "--output=both.csv")
    assert f"{run} and {other} predict different samples, which have no average" in said
    assert "--data_dir" in said
    assert not list(Path().glob("*both*"))
    predict_csv(run, other, f"--data_dir={data_dir}", "--output", "both.csv")
    predict_csv(run, other, f"--data_dir={data_dir}", "--data", KAGGLE, "--output", "kaggle.csv")
    assert len(np.load("kaggle.npz")["ids"]) == 30


def test_other_ids_are_not_averaged(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def read_predict(self: CIFAR10DataModule) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(self)
        images, _ = self.read_test()
        return images, torch.arange(len(images)) + len(calls)

    monkeypatch.setattr(CIFAR10DataModule, "read_predict", read_predict)
    said = sentence(capsys, run, beside(run), "--output=both.csv")
    assert "predict different samples" in said


def test_test_time_augmentation_can_be_chosen(run: Path) -> None:
    probabilities = {}
    for tta in ("none", "mirror", "mirror_translate"):
        predict_csv(run, "--tta", tta)
        probabilities[tta] = np.load(run / "submission.npz")["probabilities"]
        assert json.loads((run / "submission.json").read_text())["tta"] == tta
    assert not np.allclose(probabilities["none"], probabilities["mirror"])
    assert not np.allclose(probabilities["mirror"], probabilities["mirror_translate"])


def test_other_set_with_the_normalisation_of_the_run(run: Path, data_dir: Path) -> None:
    path = run / "checkpoints" / "best.ckpt"
    change_config(path, mean=[0.1, 0.2, 0.3])
    written = predict_csv(path, "--data", "UCSBCIFAR10DataModule", "--output", "ucsb.csv")
    rows = list(csv.reader(written.decode().splitlines()))
    assert rows[0] == ["id", "label"]
    assert [int(i) for i, _ in rows[1:]] == list(range(20))
    assert all(label.isdecimal() for _, label in rows[1:])
    member = loading.LoadedRun.load(str(path), "best", ["--data=UCSBCIFAR10DataModule"])
    assert isinstance(member.data, ImageDataModule)
    assert member.data.mean.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert json.loads(Path("ucsb.json").read_text())["competition"] == "ucsb-cs291k-hw2-2022-fall"


def test_kaggle_form_follows_the_sample_file(run: Path) -> None:
    written = predict_csv(run, "--data", KAGGLE, "--output", "kaggle.csv")
    rows = list(csv.reader(written.decode().splitlines()))
    assert [int(i) for i, _ in rows[1:]] == list(range(1, 31))
    assert {label for _, label in rows[1:]} <= set(np.load("kaggle.npz")["classes"].tolist())


def test_mistakes_are_told_in_one_sentence(
    run: Path, capsys: pytest.CaptureFixture[str], data_dir: Path
) -> None:
    assert "none is not a run folder" in sentence(capsys, "none")
    assert "none.ckpt does not exist" in sentence(capsys, "none.ckpt")
    shutil.copytree(run, "runs/elsewhere/first")
    assert "several runs make one file" in sentence(capsys, run, "runs/elsewhere/first")
    assert "unknown argument --foo" in sentence(capsys, run, "--foo=3")
    for option in ("--images=photos", "--names=Li", "--text_file=x", "--json"):
        told = sentence(capsys, run, option)
        assert f"{option.partition('=')[0]} does not fit {run}: a run on CIFAR10DataModule" in told
        assert "leave it out" in told
    assert "there is no foo" in sentence(capsys, run, "--data.foo=3")
    assert "missing" in sentence(capsys, run, "--data_dir=missing")
    assert "NoSuch is neither a class" in sentence(capsys, run, "--data=NoSuch")
    assert not (run / "submission.csv").exists()
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    assert "holds no checkpoint; train it first" in sentence(capsys, run)


def test_weights_of_another_network(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict_csv(run)
    before = (run / "submission.csv").read_bytes()
    said = sentence(capsys, run, "--model.network.widths=[8,8,16]")
    assert "the weights are those of another network" in said
    assert (run / "submission.csv").read_bytes() == before


@pytest.mark.parametrize("key", ["model", "data"])
def test_stranger_cannot_have_other_classes_built(
    key: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    config = yaml.safe_load(checkpoint["config"])
    config[key] = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "trapped"]}}
    checkpoint["config"] = yaml.safe_dump(config)
    torch.save(checkpoint, path)
    assert "subprocess.Popen" in sentence(capsys, run)
    assert not Path("trapped").exists()


def test_where_nothing_can_be_written_another_place_is_named(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (
        run / ".submission.csv.parts"
    ).touch()  # where predict.py wants a folder: as on a read-only disk
    assert "cannot be written to" in (said := sentence(capsys, run))
    assert said.endswith("choose another place with --output FILE.")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_full_disk_keeps_the_former_prediction(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict_csv(run)
    before = {p.name: p.read_bytes() for p in run.glob("submission.*")}
    # the probabilities fit in no more
    with full_disk(2500):
        assert "could not be written" in sentence(capsys, run, "--tta=none")
    assert {p.name: p.read_bytes() for p in run.glob("submission.*")} == before
    assert not list(run.glob(".submission*"))
    gc.collect()  # here, and not in another test, the archive that numpy 2.0 leaves open complains


def predict_by_two(*args: str | Path) -> int:
    """Predict in two processes, into two.csv."""
    flags = ["--devices=2", "--accelerator=cpu", "--output=two.csv"]
    status = by_two("predict", [*args, *flags], Path())
    assert not list(Path().glob(".two*"))
    return status


def predict_csv_by_two(*args: str | Path) -> bytes:
    assert predict_by_two(*args) == 0
    return Path("two.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_freed_memory_is_not_asked_of_the_kernel_again(run: Path) -> None:
    """Every page of every batch was zeroed anew, a third of the time of a prediction."""
    script = "import sys, conftest, predict; predict.main(sys.argv[1:])"
    script += "; print('faults', conftest.faults_of_large_tensors())"
    folders = [Path(predict.__file__).parent, Path(__file__).parent]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-c", script, str(run)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    faults = int(result.stdout.split("faults")[1])
    assert faults < 10 * 2**26 / resource.getpagesize()


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(run: Path) -> None:
    first = predict_csv(run, "--data.eval_batch_size=9")
    assert predict_csv_by_two(run, "--data.eval_batch_size=9") == first
    ids = np.load("two.npz")["ids"]
    assert ids.tolist() == list(range(1, 41))


@pytest.mark.slow
def test_members_of_an_ensemble_may_share_their_batches_differently(run: Path) -> None:
    """Two processes averaged what each had, which other batch sizes made different samples."""
    change_config(run / "checkpoints" / "best.ckpt", eval_batch_size=9)
    members = [run, beside(run, eval_batch_size=7)]
    one = predict_csv(*members, "--output", "one.csv")
    assert predict_csv_by_two(*members) == one
    saved = [np.load(name)["probabilities"] for name in ("one.npz", "two.npz")]
    np.testing.assert_array_equal(*saved)


@pytest.mark.slow
def test_a_process_may_have_nothing_to_predict(run: Path) -> None:
    """Lightning refused a loader that is empty in one of the processes."""
    first = predict_csv(run)  # one batch of 40
    assert predict_csv_by_two(run) == first


@pytest.mark.slow
def test_two_processes_refuse_other_data(run: Path, data_dir: Path) -> None:
    other = beside(run, data_dir=str(other_images(data_dir)))
    assert predict_by_two(run, other, "--data.eval_batch_size=9") == 1
    assert "predict different samples" in Path("output.txt").read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("foo.json", "--output foo.json: beside the predictions lie foo.npz and foo.json"),
        ("foo.npz", "--output foo.npz: beside the predictions lie foo.npz and foo.json"),
        ("foo.txt", "--output foo.txt: submit.py takes .csv files alone; name it so."),
        ("foo", "--output foo: submit.py takes .csv files alone"),
        ("runs.csv", "--output runs.csv is a folder; name a file in it."),
        ("a.npy/foo.csv", "a.npy cannot be written to (Not a directory); choose"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_the_prediction(
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    said: str,
) -> None:
    """foo.json was reported as written, though the record had taken the predictions' place."""
    Path("runs.csv").mkdir()
    Path("a.npy").touch()
    monkeypatch.setattr(prediction, "predict", None)
    assert said in sentence(capsys, run, f"--output={output}")
    assert sorted(path.name for path in Path().iterdir()) == ["a.npy", "runs", "runs.csv"]


def test_two_predictions_into_one_file_at_once(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each read the other's parts, or took them away."""
    parts = run / ".submission.csv.parts"
    parts.mkdir()
    with locked(parts / "lock", parts, "busy"):
        said = sentence(capsys, run)
        assert "submission.csv is being written by another predict.py" in said
        assert (parts / "lock").exists()
    predict_csv(run)
    assert not parts.exists()


def test_what_a_killed_prediction_left_behind_is_not_read(run: Path) -> None:
    """It ended in "an id was predicted twice"."""
    whole = predict_csv(run, "--accelerator=cpu")
    left = run / ".submission.csv.parts"
    left.mkdir()
    with (left / "member0-rank1").open("wb") as file:
        np.save(file, np.array([1]))
        np.save(file, np.full((1, 10), 0.1, np.float32))
    assert predict_csv(run, "--accelerator=cpu") == whole
