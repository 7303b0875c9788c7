"""Lines of text as tokens: words and sentences, and the subwords that a network reads.

Dimensions: N sequences, T tokens.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.errors import UserError, needed

PAD, BEGIN, END, MASK, IS_NEXT, NOT_NEXT = range(6)
# a blank is in no subword, so that no text can be taken for one of these
SPECIAL = (" pad", " begin", " end", " mask", " is next", " not next")
MIN_VOCAB_SIZE = len(SPECIAL) + 256  # the bytes

_WORD = re.compile(
    r"(?:Mr|Mrs|Ms|Messrs|Dr|St|Rev|Hon|Capt|Col|Esq|etc|vs|e\.g|i\.e)\."
    r"|n't\b|'(?:s|m|d|ll|re|ve)\b"  # clitics are words of their own, as in the Penn Treebank
    r"|\w+?(?=n't\b)"
    r"|\d+(?:[.,:]\d+)+"
    r"|\w+(?:[-\u2019]\w+|'(?!(?:s|m|d|ll|re|ve)\b)\w+)*"
    r"|\.\.\.+|--+|``|''|\S",
    re.IGNORECASE,
)
_END_OF_SENTENCE = re.compile(r"""(?<=[.!?])(["')\]]*)\s+(?=["'(\[]*[A-Z0-9])""")
_NO_END = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Messrs|Dr|St|Rev|Hon|Capt|Col|e\.g|i\.e|vs)|\b[A-Z])\.$")


class Span(NamedTuple):
    """Characters ``start`` up to ``end`` of a line: a word or a sentence."""

    start: int
    end: int


def words(text: str) -> list[Span]:
    """Find the words of a text, punctuation and clitics (do n't) being words of their own."""
    return [Span(*match.span()) for match in _WORD.finditer(text)]


def sentences(text: str) -> list[Span]:
    """Find the sentences of a text; without a full stop it is all one."""
    spans, start = [], 0
    for match in _END_OF_SENTENCE.finditer(text):
        if not _NO_END.search(text, start, match.start()):
            spans.append(Span(start, match.end(1)))
            start = match.end()
    return [*spans, Span(start, len(text))]


class Subwords:
    """Byte-pair encoding of lines whose words stand between blanks (arXiv:1508.07909).

    It begins with the 256 bytes, so nothing is unknown to it. A subword never spans two words.

    Args:
        merges: Pairs of subwords that are put together, ``a b``, one a line, the most frequent
            first. It is a single text because jsonargparse takes a minute for a list so long.
    """

    def __init__(self, merges: str) -> None:
        self.merges = merges
        pairs = [(a, b) for a, _, b in (line.partition(" ") for line in merges.split("\n") if line)]
        names = (*SPECIAL, *_alphabet(), *(a + b for a, b in pairs))
        vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
        try:
            model = _library().models.BPE(vocab=vocabulary, merges=pairs)
        except Exception as error:  # the library raises no narrower one
            raise UserError(f"these merges are no byte-pair encoding: {error}.") from error
        self.encoding = _library().Tokenizer(model)
        self.encoding.pre_tokenizer = _pre_tokenizer()
        self.encoding.decoder = _library().decoders.ByteLevel()

    def __len__(self) -> int:
        return self.encoding.get_vocab_size()

    @classmethod
    def train(cls, lines: Iterable[str], vocab_size: int) -> "Subwords":
        """Learn the merges from lines; few lines make fewer than ``vocab_size`` subwords."""
        blank = _library().Tokenizer(_library().models.BPE())
        blank.pre_tokenizer = _pre_tokenizer()
        trainer = _library().trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL),
            initial_alphabet=_alphabet(),
            show_progress=False,
        )
        blank.train_from_iterator(lines, trainer)
        pairs = json.loads(blank.to_str())["model"]["merges"]
        return cls("\n".join(map(" ".join, pairs)))

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        return [encoded.ids for encoded in self.encoding.encode_batch_fast(list(lines))]

    def decode(self, tokens: Iterable[int]) -> str:
        """Line of some tokens up to the end, without signs, words between single blanks."""
        until_end = takewhile(lambda token: token != END, tokens)
        kept = [token for token in until_end if token >= len(SPECIAL)]
        return " ".join(self.encoding.decode(kept, skip_special_tokens=False).split())


@cache
def _library() -> Any:
    return needed("tokenizers", "text")


def _alphabet() -> list[str]:
    """Characters that stand for the 256 bytes."""
    return sorted(_library().pre_tokenizers.ByteLevel.alphabet())


def _pre_tokenizer() -> Any:
    pre_tokenizers = _library().pre_tokenizers
    parts = [
        pre_tokenizers.Split(" ", "removed"),
        pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
    ]
    return pre_tokenizers.Sequence(parts)


def padded(sequences: Sequence[Sequence[int]], filler: int = PAD) -> Tensor:
    """Tokens (N, T) int64 of sequences, filled up after their ends."""
    longest = max((len(sequence) for sequence in sequences), default=0)
    rows = [[*sequence, *[filler] * (longest - len(sequence))] for sequence in sequences]
    return torch.tensor(rows).reshape(len(sequences), longest).long()
