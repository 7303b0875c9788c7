"""Decoding of a grammar run: effect of the change penalty and of the width of the beam.

    python -m benchmarks.correction_decoding runs/grammar/NAME
    python -m benchmarks.correction_decoding runs/grammar/NAME --sentences 200

First the scores of the validation sentences for several change penalties, by which one is chosen;
then, for the run's own penalty, how often a wider beam finds a hypothesis of lower score: that can
happen, because a hypothesis that is best in the end may fall out of the wider beam before.
"""

import argparse
from itertools import pairwise
from math import nan

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from core.errors import UserError, exit_on_user_error
from datamodules import GrammarDataModule
from lit_models import LitSeq2Seq
from pipeline.loading import LoadedRun

PENALTIES = (0.0, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 3.0, 4.0)
WIDTHS = (1, 2, 4, 8)
SHOWN = ("f05", "precision", "recall", "f05_of_wrong", "corrected", "left_alone", "gleu")


@torch.inference_mode()
def written(
    model: LitSeq2Seq, batches: list[list[Tensor]], beam_width: int
) -> tuple[dict[int, list[int]], Tensor]:
    """The tokens of each id, and the scores (N,) in the order of the batches."""
    tokens: dict[int, list[int]] = {}
    scores = []
    for source, lengths, _, ids, _ in batches:
        found = model.generate(source, lengths, beam_width)
        tokens |= dict(zip(ids.tolist(), found.tokens[:, 0].tolist(), strict=True))
        scores.append(found.scores[:, 0])
    return tokens, torch.cat(scores)


def penalties(model: LitSeq2Seq, data: GrammarDataModule) -> Table:
    """Scores on the validation part, by penalty and width."""
    data.setup("validate")
    batches = list(data.val_dataloader())
    table = Table("change_penalty", "beam_width", *SHOWN)
    for penalty in PENALTIES:
        for width in (1, model.beam_width):
            model.change_penalty = penalty
            scores = data.score(written(model, batches, width)[0])
            table.add_row(
                str(penalty), str(width), *(f"{scores.get(name, nan):.3f}" for name in SHOWN)
            )
    return table


def widths(model: LitSeq2Seq, data: GrammarDataModule, sentences: int) -> Table:
    """Score of the best hypothesis by width, on test sentences."""
    data.test_size = sentences
    data.setup("test")
    batches = list(data.test_dataloader())
    found = {width: written(model, batches, width)[1] for width in WIDTHS}
    table = Table("beam_width", "mean score", "better than before", "worse than before")
    table.add_row(str(WIDTHS[0]), f"{found[WIDTHS[0]].mean():.4f}", "", "")
    for narrow, wide in pairwise(WIDTHS):
        gain = found[wide] - found[narrow]
        better, worse = int((gain > 1e-4).sum()), int((gain < -1e-4).sum())
        table.add_row(str(wide), f"{found[wide].mean():.4f}", str(better), str(worse))
    return table


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="run folder or .ckpt file")
    parser.add_argument("--data_dir", default="data", help="root folder of the data sets")
    parser.add_argument("--change_penalty", type=float, help="for the widths, instead of the run's")
    parser.add_argument("--sentences", type=int, default=200, help="test sentences for the widths")
    options = parser.parse_args(args)
    with exit_on_user_error():
        member = LoadedRun.load(options.run, "best", [f"--data.data_dir={options.data_dir}"])
        model, data = member.model.eval(), member.data
        if not isinstance(model, LitSeq2Seq) or not isinstance(data, GrammarDataModule):
            raise UserError(f"{member.source} was not trained on grammar.")
        own = model.change_penalty if options.change_penalty is None else options.change_penalty
        if data.val_size == 0:
            raise UserError(f"{member.source} has no validation part to choose by.")
        console = Console()
        console.print(penalties(model, data))
        model.change_penalty = own
        console.print(f"{options.sentences} test sentences, change_penalty {own}")
        console.print(widths(model, data, options.sentences))


if __name__ == "__main__":
    main()
