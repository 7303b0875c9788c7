"""Accuracy of an echo run at each delay, on 10,000 sequences of 15 to 25 letters.

    python -m benchmarks.echo_delays runs/echo/NAME

Counted are all steps, those before the first echo too, at which nothing is to be said.
"""

import argparse

import torch

from core.errors import UserError, exit_on_user_error
from datamodules import EchoDataModule
from datamodules.base import IGNORED
from pipeline.loading import LoadedRun


@torch.inference_mode()
def accuracies(member: LoadedRun) -> dict[int, tuple[float, int]]:
    """Accuracy and number of sequences of each delay.

    Raises:
        UserError: The run is not one on the echo.
    """
    data, model = member.data, member.model.eval()
    if not isinstance(data, EchoDataModule):
        raise UserError(f"{member.source} was not trained on the echo.")
    data.setup("test")
    _, delays, _, _ = data.splits["test"]
    right, steps = [], []
    for x, lengths, target in data.test_dataloader():
        counted = target != IGNORED
        right.append(((model(x, lengths).argmax(2) == target) & counted).sum(1))
        steps.append(counted.sum(1))
    hits, counts = torch.cat(right), torch.cat(steps)
    found = {}
    for delay in delays.unique().tolist():
        rows = delays == delay
        accuracy = hits[rows].sum() / counts[rows].sum()
        found[delay] = (accuracy.item(), int(rows.sum()))
    return found


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="run folder or .ckpt file")
    options = parser.parse_args(args)
    with exit_on_user_error():
        found = accuracies(LoadedRun.load(options.run, "best", []))
        for delay, (accuracy, sequences) in found.items():
            print(f"delay {delay}  accuracy {accuracy:.4f}  {sequences:,} sequences")


if __name__ == "__main__":
    main()
