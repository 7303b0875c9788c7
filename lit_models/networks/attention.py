"""Attention with several heads.

Dimensions: B batch, S source tokens, T target tokens, N rows that are written (B, or more with
several hypotheses of each), D embedding.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeysValues(NamedTuple):
    """What an attention reads: keys and values (N, heads, tokens, D / heads)."""

    keys: Tensor
    values: Tensor

    def reorder(self, index: Tensor) -> "KeysValues":
        return KeysValues(self.keys[index], self.values[index])

    def followed_by(self, more: "KeysValues") -> "KeysValues":
        return KeysValues(
            torch.cat([self.keys, more.keys], 2), torch.cat([self.values, more.values], 2)
        )


class Block(NamedTuple):
    """The measures all layers share."""

    dim: int
    num_heads: int
    hidden_size: int
    dropout: float
    bias: bool
    norm: bool

    def make_norm(self) -> nn.Module:
        return nn.LayerNorm(self.dim, bias=self.bias) if self.norm else nn.Identity()

    def make_feed_forward(self) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(self.dim, self.hidden_size, bias=self.bias),
            nn.ReLU(),
            nn.Linear(self.hidden_size, self.dim, bias=self.bias),
        )


class Attention(nn.Module):
    """Multi-head attention, softmax(Q K^T / sqrt(D / heads)) V in each head (section 3.2)."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.num_heads = block.num_heads
        self.dropout = block.dropout
        self.query = nn.Linear(block.dim, block.dim, bias=block.bias)
        self.key_value = nn.Linear(block.dim, 2 * block.dim, bias=block.bias)
        self.output = nn.Linear(block.dim, block.dim, bias=block.bias)

    def forward(
        self,
        x: Tensor,
        keys_values: KeysValues,
        visible: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """What x (N, T, D) finds, (N, T, D).

        Args:
            x: The tokens that ask.
            keys_values: What they ask.
            visible: Which keys take part, (N, 1, 1, S), or None for all.
            causal: Whether a token sees only those up to itself.
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
    """(N, T, ...) -> (B, N / B T, ...): what is written for a source (B, ...) asks it together."""
    return x.reshape(len(source), -1, *x.shape[2:])


def check_heads(num_heads: int, embedding_dim: int) -> None:
    if num_heads < 1 or embedding_dim % num_heads or embedding_dim % 2:
        raise ValueError(
            "embedding_dim must be even and a multiple of num_heads, got "
            f"{embedding_dim} and {num_heads}."
        )
