"""Sentences with gaps, to learn what stands in them. Dimensions: N samples, T tokens."""

from typing import Any

import torch
from torch import Tensor

from core.errors import UserError
from datamodules.base import IGNORED, Tensors
from datamodules.sequences.synthetic import Split
from datamodules.text.books import BookDataModule
from datamodules.text.subwords import BEGIN, END, IS_NEXT, MASK, NOT_NEXT, SPECIAL, padded

_LONGEST_SPAN = 10  # as SpanBERT cuts them off


class MaskedBooksDataModule(BookDataModule):
    """Sentences of books in which some subwords are masked, as BERT reads them (arXiv:1810.04805).

    Of the subwords of a sample, a share is chosen to be predicted. Most of these are replaced by
    MASK, some by a random one, and some stay, so that the network cannot rely on a subword that it
    sees, nor wait for MASK, which no later task has. New ones are chosen in every epoch, the same
    on every machine.

    A batch is tokens (B, T), lengths (B,) and the target (B, T): what stood at the chosen places,
    IGNORED at all others. A sample is BEGIN, a sentence, END. With ``next_sentence`` a second
    sentence and END follow, and the target at BEGIN is IS_NEXT or NOT_NEXT: in half of the samples
    the second sentence is the next one in the books, else any other one. The next is the next that
    was kept: in the books for training one in five has lost what stood between.

    Args:
        data_dir: Root folder of all data sets.
        span_length: Mean length of the spans that are chosen, geometrically distributed and cut off
            at 10 (SpanBERT, arXiv:1907.10529); 1 chooses each subword alone.
        next_sentence: Predict also if the second of two sentences follows the first, by whose id
            the sample is known.
        **options: As of :class:`~datamodules.text.books.BookDataModule`.
    """

    mask_fraction = 0.15  # of the subwords of a sample, to the nearest number but at least one
    random_fraction = 0.1  # of the chosen ones, replaced by a random subword
    kept_fraction = 0.1  # of the chosen ones

    def __init__(
        self,
        data_dir: str = "data",
        *,
        span_length: float = 1.0,
        next_sentence: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(data_dir, **options)
        if not 1 <= span_length <= _LONGEST_SPAN:
            raise UserError(f"span_length must be from 1 to {_LONGEST_SPAN}, got {span_length}.")
        self.span_length = span_length
        self.next_sentence = next_sentence

    @property
    def num_classes(self) -> int:
        """The classes are the subwords."""
        return self.vocab_size

    def draw(self, split: Split, epoch: int) -> Tensors:
        generator = self.generator(split, epoch)
        drawn = self.drawn_sentences(split, epoch)
        sentences = [sentence for _, _, sentence in drawn]
        rows = [[BEGIN, *tokens, END] for tokens in self.encode(sentences)]
        if self.next_sentence and drawn:
            indices = torch.tensor([index for _, index, _ in drawn])
            seconds, labels = _second_sentences(indices, self.sample_sentences(split), generator)
            rows = [
                [*first, *second, END]
                for first, second in zip(rows, self.encode(seconds), strict=True)
            ]
        whole, lengths = padded(rows), torch.tensor([len(row) for row in rows])
        tokens, target = self.mask(whole, generator)
        if self.next_sentence and drawn:
            target[:, 0] = labels
        return tokens, lengths, target

    def encode(self, sentences: list[str]) -> list[list[int]]:
        return [tokens[: self.max_tokens] for tokens in self.subwords.encode(sentences)]

    def mask(self, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens (N, T) that the network reads instead, and its target (N, T)."""
        chosen = choose(tokens >= len(SPECIAL), self.mask_fraction, self.span_length, generator)
        random = torch.randint(len(SPECIAL), len(self.subwords), tokens.shape, generator=generator)
        fate = torch.rand(tokens.shape, generator=generator)
        seen = torch.where(fate < self.random_fraction, random, MASK)
        seen = torch.where(fate >= 1 - self.kept_fraction, tokens, seen)
        return torch.where(chosen, seen, tokens), torch.where(chosen, tokens, IGNORED)

    def read_predict(self) -> Tensors:
        raise UserError(
            "a masked language model has no predictions to hand in; read what it writes with "
            "python -m benchmarks.unmasking RUN."
        )


def choose(
    subwords: Tensor, fraction: float, span_length: float, generator: torch.Generator
) -> Tensor:
    """Choose the places (N, T) that are to be predicted.

    From each place a span begins at a time of chance; whatever a span covers is chosen, the earlier
    ones first, until there are enough.

    Args:
        subwords: True where a subword stands that may be chosen, (N, T).
        fraction: Share of these that are chosen in each row, at least one.
        span_length: Mean length of a span.
        generator: Random numbers.
    """
    begun = torch.rand(subwords.shape, generator=generator)
    if span_length == 1:
        time = begun
    else:
        lengths = torch.empty(subwords.shape).geometric_(1 / span_length, generator=generator)
        time = torch.full_like(begun, 2)
        for place in range(min(_LONGEST_SPAN, subwords.shape[1])):  # in a span that began before
            reaching = begun.masked_fill(lengths <= place, 2)
            covered = time[:, place:]
            torch.minimum(covered, reaching[:, : covered.shape[1]], out=covered)
    rank = time.masked_fill(~subwords, 3).argsort(dim=1, stable=True).argsort(1)
    enough = (fraction * subwords.sum(1, keepdim=True)).round().clamp_min(1)
    return subwords & (rank < enough)


def _second_sentences(
    indices: Tensor, everything: list[str], generator: torch.Generator
) -> tuple[list[str], Tensor]:
    """Draw for sentences (N,) the next one or any other, and IS_NEXT or NOT_NEXT (N,).

    Raises:
        UserError: There is no other sentence.
    """
    if len(everything) < 2:
        raise UserError("next_sentence needs books with at least two sentences.")
    following = indices + 1
    other = torch.randint(len(everything) - 1, indices.shape, generator=generator)
    other += other >= following  # all but the next one are equally probable
    is_next = torch.rand(indices.shape, generator=generator) < 0.5
    is_next &= following < len(everything)
    chosen = torch.where(is_next, following, other).tolist()
    return [everything[index] for index in chosen], torch.where(is_next, IS_NEXT, NOT_NEXT)
