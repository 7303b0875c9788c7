"""A network that is a table: what each token is worth after each prefix, for searches in trees."""

import itertools

import torch
from torch import Tensor, nn

from lit_models.networks import beam_search

Prefix = tuple[int, ...]

NEURAL, NETWORK = 0, 1
# Berkeley's question on beam search: log probabilities of `neural` and `network`
BERKELEY: dict[Prefix, list[float]] = {
    (): [-0.65, -0.73],
    (NEURAL,): [-0.80, -0.60],
    (NETWORK,): [-0.60, -0.80],
    (NEURAL, NEURAL): [-0.01, -4.60],
    (NEURAL, NETWORK): [-0.80, -0.60],
    (NETWORK, NEURAL): [-0.80, -0.60],
    (NETWORK, NETWORK): [-4.60, -0.01],
}


class TokenTree(nn.Module):
    """Sequences of a fixed length T over V tokens, by the log probability of each next token.

    Args:
        table: The log probabilities (V,) of the next token after each prefix of up to T - 1 tokens.
    """

    def __init__(self, table: dict[Prefix, list[float]]) -> None:
        super().__init__()
        self.table = table
        self.vocab_size = len(table[()])
        self.length = 1 + max(map(len, table))
        self.read = 0  # log probabilities that were computed so far

    def step(self, token: Tensor, prefixes: Tensor) -> tuple[Tensor, Tensor]:
        """Next log probabilities (N, V); a prefix holds the token that begins it, too."""
        prefixes = torch.cat([prefixes, token[:, None]], 1)
        log_probabilities = torch.tensor([self.table[tuple(row[1:])] for row in prefixes.tolist()])
        self.read += log_probabilities.numel()
        return log_probabilities, prefixes

    def search(self, beam_width: int, length: int | None = None) -> list[tuple[Prefix, float]]:
        """What the beam holds after ``length`` tokens, by default all T: tokens and score."""
        length = length or self.length
        nothing = torch.zeros(1, 0, dtype=torch.long)
        found = beam_search(
            self.step,
            nothing,
            torch.zeros(1, dtype=torch.long),
            end=None,
            beam_width=beam_width,
            max_length=length,
            n_best=beam_width,
        )
        assert (found.lengths == length).all()
        rows = zip(found.tokens[0].tolist(), found.scores[0].tolist(), strict=True)
        return [(tuple(tokens), score) for tokens, score in rows]

    def score(self, tokens: Prefix) -> float:
        return sum(self.table[tokens[:t]][token] for t, token in enumerate(tokens))

    def best(self, length: int | None = None) -> tuple[Prefix, float]:
        """The most probable of all sequences, each of which is looked at."""
        every = itertools.product(range(self.vocab_size), repeat=length or self.length)
        tokens = max(every, key=self.score)
        return tokens, self.score(tokens)
