"""Sentences with gaps, to learn what stands in them. Dimensions: N samples, T tokens."""

import torch
from torch import Tensor

from core.errors import UserError
from datamodules.base import IGNORED, Tensors
from datamodules.sequences.synthetic import Split
from datamodules.text.books import TEST_BOOKS, TRAIN_BOOKS, VAL_BOOKS, BookDataModule
from datamodules.text.subwords import BEGIN, END, IS_NEXT, MASK, NOT_NEXT, SPECIAL, padded

LONGEST_SPAN = 10  # as SpanBERT cuts them off


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
        batch_size: Samples in a training batch of one process.
        eval_batch_size: Samples in a batch of validation and test.
        epoch_size: Training samples in an epoch; the next one goes on where it ended.
        val_size: Samples for validation, the same for all seeds; 0 goes without.
        vocab_size: Number of subwords, 256 bytes and a few signs among them.
        books: Names of the books for training.
        val_books: Names of those for validation.
        test_books: Names of those for test.
        merges: The subwords, as a checkpoint knows them; null learns them from the books.
        mask_fraction: Share of the subwords of a sample that are chosen, to the nearest number but
            at least one of them.
        random_fraction: Share of the chosen ones that are replaced by a random subword.
        kept_fraction: Share of the chosen ones that stay.
        span_length: Mean length of the spans that are chosen, geometrically distributed and cut off
            at 10 (SpanBERT, arXiv:1907.10529); 1 chooses each subword alone.
        next_sentence: Whether to predict also if the second of two sentences follows the first.
        max_tokens: The most subwords of a sentence; what is longer is cut off.
        exclude: Text file of sentences that are not trained on, an id a line, as ``spikes.jsonl``
            names them: by where they begin. Of two sentences, a sample has the id of the first.
    """

    def __init__(
        self,
        data_dir: str = "data",
        batch_size: int = 64,
        eval_batch_size: int = 200,
        epoch_size: int = 32_000,
        val_size: int = 1000,
        vocab_size: int = 4000,
        books: list[str] = TRAIN_BOOKS,
        val_books: list[str] = VAL_BOOKS,
        test_books: list[str] = TEST_BOOKS,
        merges: str | None = None,
        mask_fraction: float = 0.15,
        random_fraction: float = 0.1,
        kept_fraction: float = 0.1,
        span_length: float = 1.0,
        next_sentence: bool = False,
        max_tokens: int = 80,
        exclude: str | None = None,
    ) -> None:
        super().__init__(
            data_dir, batch_size, eval_batch_size, epoch_size, val_size, vocab_size, books,
            val_books, test_books, merges, exclude,
        )  # fmt: skip
        if not 0 < mask_fraction <= 1:
            raise UserError(f"mask_fraction must be above 0 and at most 1, got {mask_fraction}.")
        if not (min(random_fraction, kept_fraction) >= 0 and random_fraction + kept_fraction <= 1):
            raise UserError(
                "random_fraction and kept_fraction must not be negative and must be at most 1 "
                f"together, got {random_fraction} and {kept_fraction}."
            )
        if not 1 <= span_length <= LONGEST_SPAN:
            raise UserError(f"span_length must be from 1 to {LONGEST_SPAN}, got {span_length}.")
        if max_tokens < 8:
            raise UserError(f"max_tokens must be at least 8, got {max_tokens}.")
        self.mask_fraction = mask_fraction
        self.random_fraction = random_fraction
        self.kept_fraction = kept_fraction
        self.span_length = span_length
        self.next_sentence = next_sentence
        self.max_tokens = max_tokens

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
            seconds, labels = second_sentences(indices, self.sample_sentences(split), generator)
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
        """What the network reads instead of tokens (N, T), and its target (N, T)."""
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
    """Which places (N, T) are to be predicted.

    From each place a span begins at a time of chance; whatever a span covers is chosen, the earlier
    ones first, until there are enough.

    Args:
        subwords: Where a subword stands that may be chosen, (N, T).
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
        for place in range(min(LONGEST_SPAN, subwords.shape[1])):  # in a span that began before
            reaching = begun.masked_fill(lengths <= place, 2)
            covered = time[:, place:]
            torch.minimum(covered, reaching[:, : covered.shape[1]], out=covered)
    rank = time.masked_fill(~subwords, 3).argsort(dim=1, stable=True).argsort(1)
    enough = (fraction * subwords.sum(1, keepdim=True)).round().clamp_min(1)
    return subwords & (rank < enough)


def second_sentences(
    indices: Tensor, everything: list[str], generator: torch.Generator
) -> tuple[list[str], Tensor]:
    """For sentences (N,) of everything, the next one or any other, and IS_NEXT or NOT_NEXT (N,).

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
