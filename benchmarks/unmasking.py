"""Texts of a masked language model, from nothing and where half of the words are given.

Dimensions: B batch, T tokens, V vocabulary.

    python -m benchmarks.unmasking runs/masked_language/NAME

One step fills all gaps without a look at each other, several steps the most certain ones first. At
temperature 0 each gap gets its most probable subword, at temperature 1 one is drawn.
"""

import argparse

import torch
from torch import Tensor, nn

from core.errors import UserError, exit_on_user_error
from datamodules.text.masked_books import MaskedBooksDataModule
from datamodules.text.subwords import BEGIN, END, MASK, SPECIAL, Subwords, words
from pipeline.loading import LoadedRun

LENGTH = 12  # subwords written from nothing
STEPS = (1, 4, 12)
SAMPLES = 3  # at temperature 1
SENTENCES = [  # from no book
    "She looked at the old man and smiled, for she knew that he was not angry.",
    "In the morning the whole family went to church, and nobody stayed in the house.",
    "I do not think that you will ever see him again, my dear.",
]


@torch.no_grad()
def unmask(
    network: nn.Module,
    tokens: Tensor,
    steps: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill the gaps of texts in some steps, the most certain first.

    Each step predicts all gaps that are left, keeps an equal share of them and forgets the others,
    which the next step predicts again with what was kept in view. Mask-predict (Ghazvininejad et
    al., arXiv:1904.09324) also takes back what became doubtful; here what is written stays, so
    that as many steps as gaps fill one place after the other (as Wang and Cho do in an order of
    chance, arXiv:1902.04094).

    Args:
        network: Gives logits (B, T, V) of tokens (B, T); in evaluation mode.
        tokens: Tokens (B, T) with MASK in the gaps; all others stay as they are.
        steps: Number of steps. With one, all gaps are filled without a look at each other.
        temperature: 0 writes the most probable token; else one is drawn from the probabilities
            p^(1 / temperature), scaled to sum to one.
        generator: Random numbers of what is drawn, on the device of the tokens.

    Returns:
        Tokens (B, T) without a gap.
    """
    for left in range(steps, 0, -1):
        gaps = tokens == MASK  # (B, T)
        logits = network(tokens).float()
        logits[:, :, : len(SPECIAL)] = -torch.inf
        probabilities = logits.softmax(2)
        if temperature:
            weights = (logits / temperature).softmax(2).flatten(0, 1)
            written = weights.multinomial(1, generator=generator).view_as(tokens)
        else:
            written = logits.argmax(2)
        certainty = probabilities.gather(2, written[:, :, None])[:, :, 0].masked_fill(~gaps, -1)
        rank = certainty.argsort(dim=1, descending=True, stable=True).argsort(1)
        share = (gaps.sum(1, keepdim=True) + left - 1) // left  # ceil: none is left in the end
        tokens = torch.where(gaps & (rank < share), written, tokens)
    return tokens


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
            temperature,
            self.generator,
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
