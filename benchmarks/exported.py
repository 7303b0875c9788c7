"""Exported files against PyTorch: largest difference, equal labels, time of an image.

    python predict.py RUN --export x.onnx
    python predict.py RUN --export x.pt2
    python -m benchmarks.exported RUN x.onnx x.pt2 --images 2000

The images are the first ones of the test set. Rounds are interleaved, and the first is left out.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.errors import needed
from lit_models import load

BATCH = 250  # images that are given at once, to all alike


def runner(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """What runs a file, as somebody without this project would."""
    if path.suffix == ".onnx":
        session = needed("onnxruntime", "this benchmark").InferenceSession(str(path))
        return lambda images: session.run(None, {"images": images})[0]
    network = torch.export.load(path).module()
    return lambda images: network(torch.from_numpy(images)).detach().numpy()


def in_batches(run: Callable[[np.ndarray], Any], images: np.ndarray) -> np.ndarray:
    parts = [run(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = load(options.run)
    model.run_precision = "32-true"  # as the files have it
    images = model.data.read_test()[0][: options.images].numpy()
    runs: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "model.predict": lambda part: model.predict(part, accelerator="cpu").probabilities,
        **{path.name: runner(path) for path in options.files},
    }
    found: dict[str, np.ndarray] = {}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            found[name] = in_batches(run, images)
            seconds[name].append(time.perf_counter() - start)
    expected = found["model.predict"]
    print(f"{len(images):,} images, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, probabilities in found.items():
        difference = np.abs(probabilities - expected).max()
        equal = (probabilities.argmax(1) == expected.argmax(1)).sum()
        each = statistics.median(seconds[name][1:]) / len(images) * 1000
        print(f"{name:>14}  difference {difference:.1e}  equal {equal:,}  {each:.2f} ms an image")


if __name__ == "__main__":
    main()
