"""A Transformer that reads one sequence and writes another.

Dimensions: B batch, S source tokens, T target tokens, N rows that are written (B, or more with
several hypotheses of each), D embedding, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_models.networks._checks import check_lengths, checked_dropout
from lit_models.networks.attention import Attention, KeysValues, check_heads, of_one_source


class Source(NamedTuple):
    """An encoded source.

    Attributes:
        memory: Keys and values of the source, for each layer of the decoder.
        visible: Mask (B, 1, 1, S) of the tokens that are no padding, or None for all.
        tokens: The tokens (B, S).
        keys: Keys (B, S, D) of the pointer, or None without one.
    """

    memory: list[KeysValues]
    visible: Tensor | None
    tokens: Tensor
    keys: Tensor | None

    def reorder(self, index: Tensor) -> "Source":
        return Source(
            [layer.reorder(index) for layer in self.memory],
            None if self.visible is None else self.visible[index],
            self.tokens[index],
            None if self.keys is None else self.keys[index],
        )


@dataclass(frozen=True)
class DecoderState:
    """Source and prefix of the target; a step makes a new one and changes none.

    Args:
        source: The encoded source, once for all its hypotheses.
        past: Keys and values of the prefix, for each layer; empty before the first token.
        written: Number of tokens of the prefix.
    """

    source: Source
    past: list[KeysValues]
    written: int = 0

    def reorder(self, index: Tensor) -> "DecoderState":
        """The state whose row i is row index[i] of this one; rows can be repeated or dropped."""
        source, sources = self.source, len(self.source.tokens)
        rows = len(self.past[0].keys) if self.past else sources
        owner = index // (rows // sources)  # of each new row
        own = torch.arange(sources, device=index.device).repeat_interleave(len(index) // sources)
        if not (self.past and torch.equal(owner, own)):  # in a beam search all stay where they are
            source = source.reorder(owner)
        return DecoderState(source, [layer.reorder(index) for layer in self.past], self.written)


class Encoder(nn.Module):
    """Encoder of a sequence; networks with the same one can load each other's weights.

    It makes no parameters; a subclass does, under these names.
    """

    source_embedding: nn.Embedding
    positions: Tensor
    encoder: nn.ModuleList
    encoder_norm: nn.Module
    dropout: nn.Dropout
    max_length: int

    def encode(self, tokens: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Encode tokens (B, S) to (B, S, D), with the mask (B, 1, 1, S) of those not padding."""
        visible = None
        if lengths is not None:
            check_lengths(lengths, tokens)
            places = torch.arange(tokens.shape[1], device=lengths.device)
            visible = (places < lengths[:, None])[:, None, None]
        x = self.embed(tokens, self.source_embedding)  # (B, S, D)
        for layer in self.encoder:
            x = layer(x, visible)
        return self.encoder_norm(x), visible

    def embed(self, tokens: Tensor, embedding: nn.Embedding, begin: int = 0) -> Tensor:
        end = begin + tokens.shape[1]
        if end > self.max_length:
            raise ValueError(
                f"a sequence of {end} tokens is longer than max_length, {self.max_length}; "
                "shorten it or raise max_length."
            )
        # section 3.4 of the paper: the weights are small for the output, large for the input
        x = embedding(tokens) * math.sqrt(embedding.embedding_dim)
        return self.dropout(x + self.positions[begin:end])


class Transformer(Encoder):
    """Encoder and decoder of Vaswani et al. (arXiv:1706.03762), with LayerNorm before each block.

    Source, target and output layer share one vocabulary and one embedding. Sources of different
    length are padded after their end, and ``lengths`` (B,) says where each one ends. A padded
    target needs no lengths: no output depends on a later token.

    Args:
        vocab_size: Number of tokens V.
        embedding_dim: Features D of a token, an even number.
        num_heads: Attention heads; they share the features out among them.
        num_encoder_layers: Layers that read the source.
        num_decoder_layers: Layers that write the target.
        hidden_size: Units between the two linear layers of a block.
        dropout: Share set to zero, in training, of the embedded tokens, of the attention's weights
            and of what each block adds.
        max_length: The most tokens of a source or a target.
        copy: Also copy tokens of the source: the decoder points at one, and a
            gate g says how probable that is, p = g p_copy + (1 - g) p_vocabulary (See et al.,
            arXiv:1704.04368; for correction Zhao et al., arXiv:1903.00138). Logits are log p then.

    Raises:
        ValueError: If an argument is out of range, or a batch does not fit.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int = 64,
        num_heads: int = 8,
        num_encoder_layers: int = 3,
        num_decoder_layers: int = 2,
        hidden_size: int = 256,
        dropout: float = 0.1,
        max_length: int = 512,
        copy: bool = False,
    ) -> None:
        super().__init__()
        if min(num_encoder_layers, num_decoder_layers) < 1:
            raise ValueError(
                "num_encoder_layers and num_decoder_layers must be at least 1, got "
                f"{num_encoder_layers} and {num_decoder_layers}."
            )
        check_heads(num_heads, embedding_dim)
        sizes = embedding_dim, num_heads, hidden_size, dropout
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(num_encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(num_decoder_layers))
        self.encoder_norm, self.decoder_norm = (
            nn.LayerNorm(embedding_dim),
            nn.LayerNorm(embedding_dim),
        )
        self.dropout = checked_dropout(dropout)
        self.max_length = max_length

        self.source_embedding = self.target_embedding = nn.Embedding(vocab_size, embedding_dim)
        for _ in range(2):  # once would draw other weights than the same seed gave before
            nn.init.normal_(self.source_embedding.weight, std=embedding_dim**-0.5)
        self.output = nn.Linear(embedding_dim, vocab_size, bias=False)
        self.output.weight = self.source_embedding.weight

        self.pointer = Pointer(embedding_dim) if copy else None
        table = sinusoidal_positions(max_length, embedding_dim)
        self.register_buffer("positions", table, persistent=False)

    def forward(self, source: Tensor, target_in: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the token that follows each one of the target.

        Args:
            source: Tokens (B, S).
            target_in: Tokens (B, T) of the right answer, the one that begins it included.
            lengths: Tokens of each source (B,); without them all have S.
        """
        logits, _ = self.decode(target_in, self.start(source, lengths))
        return logits

    def start(self, source: Tensor, lengths: Tensor | None = None) -> DecoderState:
        """Encode the source (B, S): the state before the first token of the target."""
        x, visible = self.encode(source, lengths)
        memory = [layer.cross_attention.keys_values(x) for layer in self.decoder]  # type: ignore[operator, union-attr]
        keys = self.pointer.key(x) if self.pointer else None
        return DecoderState(Source(memory, visible, source, keys), past=[])

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Append one token (N,); return log probabilities (N, V) of the next, and the state.

        Only the new token is computed: the keys and values of those before are in the state.
        """
        logits, state = self.decode(tokens[:, None], state)
        return logits[:, 0].log_softmax(1), state

    def decode(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Append tokens (N, T), all at once to an empty state or one by one: logits (N, T, V)."""
        x = self.embed(tokens, self.target_embedding, state.written)  # (N, T, D)
        pasts: list[KeysValues | None] = [*state.past] or [None] * len(self.decoder)
        now = []
        for layer, past, memory in zip(self.decoder, pasts, state.source.memory, strict=True):
            x, past = layer(x, past, memory, state.source.visible)
            now.append(past)
        x = self.decoder_norm(x)
        logits = self.output(x)  # (N, T, V)
        if self.pointer:
            logits = self.pointer(x, logits, state.source)
        return logits, DecoderState(state.source, now, state.written + tokens.shape[1])


class Pointer(nn.Module):
    """Mixture of the vocabulary and of copying a token of the source."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.gate = nn.Linear(dim, 1)

    def forward(self, x: Tensor, logits: Tensor, source: Source) -> Tensor:
        """Log probabilities (N, T, V) of the tokens, copied or not.

        Args:
            x: States of the decoder, (N, T, D).
            logits: Of the vocabulary, (N, T, V).
            source: B sources, from which is copied.
        """
        assert source.keys is not None
        asking = of_one_source(x, source.tokens)  # (B, N / B T, D)
        scores = self.query(asking) @ source.keys.transpose(1, 2) / math.sqrt(x.shape[2])
        if source.visible is not None:
            scores = scores.masked_fill(~source.visible[:, 0], -torch.inf)
        exact = torch.promote_types(x.dtype, torch.float)  # under autocast sums would be too coarse
        gate = self.gate(asking).to(exact)
        copied = scores.softmax(2, exact) * gate.sigmoid()  # (B, N / B T, S)
        p = of_one_source(logits.softmax(2, exact), source.tokens) * (-gate).sigmoid()
        p = p.scatter_add(2, source.tokens[:, None].expand(copied.shape), copied)
        return p.clamp_min(torch.finfo(p.dtype).tiny).log().view_as(logits)


def sinusoidal_positions(length: int, dim: int) -> Tensor:
    """Positions (length, dim): p_t = [..., sin(w_k t), cos(w_k t), ...], w_k = 1 / 10000^(2k/dim).

    The dot product of two of them, sum_k cos(w_k (t - s)), depends on their distance alone.
    """
    t = torch.arange(length, dtype=torch.float64)[:, None]
    w = 10_000 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.stack([torch.sin(w * t), torch.cos(w * t)], 2).flatten(1).float()


class EncoderLayer(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads, dropout)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, hidden_size), nn.ReLU(), nn.Linear(hidden_size, dim)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, self.attention.keys_values(normed), visible))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class DecoderLayer(EncoderLayer):
    def __init__(self, dim: int, num_heads: int, hidden_size: int, dropout: float) -> None:
        super().__init__(dim, num_heads, hidden_size, dropout)
        self.cross_attention_norm = nn.LayerNorm(dim)
        self.cross_attention = Attention(dim, num_heads, dropout)

    def forward(  # type: ignore[override]
        self, x: Tensor, past: KeysValues | None, memory: KeysValues, visible: Tensor | None
    ) -> tuple[Tensor, KeysValues]:
        normed = self.attention_norm(x)
        now = self.attention.keys_values(normed)
        if past is not None:
            now = past.followed_by(now)
        several = x.shape[1] > 1  # a single token is the last one and sees all
        x = x + self.dropout(self.attention(normed, now, causal=several))
        normed = self.cross_attention_norm(x)
        asking = of_one_source(normed, memory.keys)
        x = x + self.dropout(self.cross_attention(asking, memory, visible).view_as(x))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), now
