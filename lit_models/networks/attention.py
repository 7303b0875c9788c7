"""Attention with several heads.

Dimensions: B batch, S source tokens, T target tokens, N rows that are written (B, or more with
several hypotheses of each), D embedding.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeysValues(NamedTuple):
    """Keys and values of tokens, (N, heads, tokens, D / heads) each."""

    keys: Tensor
    values: Tensor

    def reorder(self, index: Tensor) -> "KeysValues":
        return KeysValues(self.keys[index], self.values[index])

    def followed_by(self, more: "KeysValues") -> "KeysValues":
        return KeysValues(
            torch.cat([self.keys, more.keys], 2), torch.cat([self.values, more.values], 2)
        )


class Attention(nn.Module):
    """Multi-head attention, softmax(Q K^T / sqrt(D / heads)) V in each head (section 3.2)."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        keys_values: KeysValues,
        visible: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attend from x (N, T, D) to keys and values, (N, T, D).

        Args:
            x: Tokens that the queries are made of.
            keys_values: Keys and values of S tokens.
            visible: Mask (N, 1, 1, S) of the keys that take part, or None for all.
            causal: Let a token see only those up to itself.
        """
        heads = F.scaled_dot_product_attention(
            self.split(self.query(x)),
            *keys_values,
            attn_mask=visible,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
        )  # (N, heads, T, D / heads)
        return self.output(heads.transpose(1, 2).flatten(2))

    def keys_values(self, x: Tensor) -> KeysValues:
        keys, values = self.key_value(x).chunk(2, 2)
        return KeysValues(self.split(keys), self.split(values))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def of_one_source(x: Tensor, source: Tensor) -> Tensor:
    """Put all rows of a source (B, ...) together: (N, T, ...) -> (B, N / B T, ...)."""
    return x.reshape(len(source), -1, *x.shape[2:])


def check_heads(num_heads: int, embedding_dim: int) -> None:
    if num_heads < 1 or embedding_dim % num_heads or embedding_dim % 2:
        raise ValueError(
            "embedding_dim must be even and a multiple of num_heads, got "
            f"{embedding_dim} and {num_heads}."
        )
