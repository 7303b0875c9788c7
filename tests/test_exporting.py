"""A trained network as a file that needs nothing of this project."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import predict
from lit_models import exporting, load

BARE_PT2 = """
import sys, json, numpy, torch
extra = {"classes.json": ""}
network = torch.export.load(sys.argv[1], extra_files=extra).module()
print(extra["classes.json"])
numpy.save("found.npy", network(torch.from_numpy(numpy.load("images.npy"))).detach().numpy())
"""
BARE_ONNX = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
print(session.get_modelmeta().custom_metadata_map["classes"])
numpy.save("found.npy", session.run(None, {"images": numpy.load("images.npy")})[0])
"""


def sentence(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        predict.main([*args])
    (said,) = capsys.readouterr().err.splitlines()
    return said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("name", "script"), [("x.pt2", BARE_PT2), ("x.onnx", BARE_ONNX)])
def test_the_file_gives_what_the_run_gives_without_us(
    name: str,
    script: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a process that cannot import anything of this project, for any number of images."""
    if name.endswith(".onnx"):
        pytest.importorskip("onnxruntime", reason="needs requirements-export.txt")
        pytest.importorskip("onnxscript", reason="needs requirements-export.txt")
    monkeypatch.chdir(tmp_path)
    predict.main([str(trained), "--export", name])
    said = capsys.readouterr().out
    assert "uint8 (N, 32, 32, 3) in, probabilities (N, 10) out" in said
    assert "40 of 40 labels equal" in said
    model = load(trained)
    images = model.data.read_test()[0][:7]
    np.save("images.npy", images.numpy())
    command = [sys.executable, "-I", "-c", script, name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == list(model.class_names)
    found = np.load("found.npy")
    np.testing.assert_allclose(found, model.predict(images).probabilities, atol=1e-5)


def test_a_file_that_gives_something_else_is_not_written(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exporting.ImagesToProbabilities, "forward", mirrored_colours)
    said = sentence(capsys, str(trained), "--export", "x.pt2")
    assert "x.pt2 is not written: its probabilities are up to" in said
    assert not list(tmp_path.iterdir())


def mirrored_colours(
    self: exporting.ImagesToProbabilities, images: torch.Tensor
) -> torch.Tensor:  # a fault: blue for red
    pixels = (images.flip(3).float() * self.scale - self.shift).permute(0, 3, 1, 2)
    return self.network(pixels).softmax(1)


def test_what_has_no_effect_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(trained)
    assert "leave out --output" in sentence(capsys, run, "--export=x.pt2", "--output=x.csv")
    assert "leave out --precision" in sentence(capsys, run, "--export=x.pt2", "--precision=64")
    assert "not x.pth" in sentence(capsys, run, "--export=x.pth")
    assert "writes one run" in sentence(capsys, run, run, "--export=x.pt2")


def test_others_than_images_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path(__file__).parent / "old_runs" / "temporal_order_lstm" / "old"
    assert "is no classifier of images" in sentence(capsys, str(run), "--export=x.pt2")
