"""Cost of a beam search, counted and not timed, beside O(T (k M + k^2 log k)) of the course.

    python -m benchmarks.beam_search_cost

The course takes the best k of M tokens for each of k hypotheses and sorts the k^2 continuations.
``beam_search`` takes the best k of all k M continuations at once and sorts those: per step k M to
choose from and k log k to sort, so that nothing is quadratic in k. The step of one hypothesis that
comes first has M to choose from.

Dimensions: T tokens, k hypotheses, M vocabulary.
"""

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_models.networks import beam_search

LENGTHS, BEAM_WIDTHS, VOCAB_SIZES = (10, 20), (1, 4, 16), (1000, 4000)


@dataclass
class Counts:
    """Operations of a search for one sentence that never ends.

    Attributes:
        steps: Calls of the network.
        logits: What it returned.
        compared: Scores of which the best were chosen.
        chosen: How many of them were, in order.
        copied: Tokens moved, because a hypothesis takes along what it has written: of order k T^2
            in all, though of whole rows at a time.
    """

    steps: int = 0
    logits: int = 0
    compared: int = 0
    chosen: int = 0
    copied: int = 0


class Counter(TorchDispatchMode):
    """Counts what operators are given; whatever code calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        match func.overloadpacket.__name__:
            case "topk" | "sort":
                self.counts.compared += args[0].numel()
                self.counts.chosen += output[0].numel()
            case "cat":
                self.counts.copied += output.numel()
        return output


def count(length: int, beam_width: int, vocab_size: int) -> Counts:
    """Search T tokens with k hypotheses of a vocabulary M, by a network that says anything."""
    counter = Counter()
    torch.manual_seed(0)
    log_probabilities = torch.randn(beam_width, vocab_size).log_softmax(1)

    def step(tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        rows = log_probabilities[: len(tokens)]
        counter.counts.steps += 1
        counter.counts.logits += rows.numel()
        return rows, state

    begin = torch.zeros(1, dtype=torch.long)
    with counter:
        beam_search(step, begin, begin, None, beam_width, length)
    return counter.counts


def bound(length: int, beam_width: int, vocab_size: int) -> float:
    """T (k M + k^2 log2 k)."""
    return length * (beam_width * vocab_size + beam_width**2 * math.log2(beam_width))


def work(counts: Counts, beam_width: int) -> float:
    """Scores to choose from, and log2 k for each one that is put in order."""
    return counts.compared + counts.chosen * math.log2(beam_width)


def main() -> None:
    names = ("T", "k", "M", *vars(Counts()), "bound", "work / bound")
    print("| " + " | ".join(names) + " |")
    print("|" + " ---: |" * len(names))
    for setting in product(LENGTHS, BEAM_WIDTHS, VOCAB_SIZES):
        counts, most = count(*setting), bound(*setting)
        row = *setting, *vars(counts).values(), round(most)
        numbers = [f"{x:,}" for x in row] + [f"{work(counts, setting[1]) / most:.3f}"]
        print("| " + " | ".join(numbers) + " |")


if __name__ == "__main__":
    main()
