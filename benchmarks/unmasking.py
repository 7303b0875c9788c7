"""What a masked language model writes, from nothing and where half of the words are given.

    python -m benchmarks.unmasking runs/masked_language/NAME

One step fills all gaps without a look at each other, several steps the most certain ones first. At
temperature 0 each gap gets its most probable subword, at temperature 1 one is drawn.
"""

import argparse

import torch

from core.errors import UserError, exit_on_user_error
from datamodules.text.masked_books import MaskedBooksDataModule
from datamodules.text.subwords import BEGIN, END, MASK, SPECIAL, Subwords, words
from lit_models.networks import unmask
from pipeline.loading import LoadedRun

LENGTH = 12  # subwords written from nothing
STEPS = (1, 4, 12)
SAMPLES = 3  # at temperature 1
SENTENCES = [  # from no book
    "She looked at the old man and smiled, for she knew that he was not angry.",
    "In the morning the whole family went to church, and nobody stayed in the house.",
    "I do not think that you will ever see him again, my dear.",
]


class Writer:
    """A trained network and its subwords.

    Raises:
        UserError: The run is no masked language model.
    """

    def __init__(self, member: LoadedRun, seed: int) -> None:
        if not isinstance(member.data, MaskedBooksDataModule):
            raise UserError(f"{member.source} was not trained on masked books.")
        self.network = member.model.network.eval()
        self.subwords: Subwords = member.data.subwords
        self.generator = torch.Generator().manual_seed(seed)

    def fill(self, tokens: list[int], steps: int, temperature: float) -> str:
        """The text of some subwords, each MASK among them filled."""
        filled = unmask(
            self.network,
            torch.tensor([[BEGIN, *tokens, END]]),
            steps,
            mask_id=MASK,
            forbidden=range(len(SPECIAL)),
            temperature=temperature,
            generator=self.generator,
        )
        return self.subwords.decode(filled[0].tolist())

    def half_given(self, sentence: str) -> tuple[list[int], str]:
        """A sentence whose every other word is masked, as tokens and as text."""
        parts = [sentence[start:end] for start, end in words(sentence)]
        tokens, shown = [], []
        for place, pieces in enumerate(self.subwords.encode(parts)):
            hidden = place % 2 == 1
            tokens += [MASK] * len(pieces) if hidden else pieces
            shown.append("_" * len(pieces) if hidden else parts[place])
        return tokens, " ".join(shown)


def show(writer: Writer, tokens: list[int]) -> None:
    for temperature, samples in ((0.0, 1), (1.0, SAMPLES)):
        for steps in STEPS:
            for _ in range(samples):
                text = writer.fill(tokens, steps, temperature)
                print(f"  temperature {temperature:g}  steps {steps:2d}  {text}")


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="run folder or .ckpt file")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at temperature 1")
    options = parser.parse_args(args)
    with exit_on_user_error():
        writer = Writer(LoadedRun.load(options.run, "best", []), options.seed)
        print(f"from {LENGTH} masks")
        show(writer, [MASK] * LENGTH)
        for sentence in SENTENCES:
            tokens, shown = writer.half_given(sentence)
            print(f"\n{shown}")
            show(writer, tokens)


if __name__ == "__main__":
    main()
