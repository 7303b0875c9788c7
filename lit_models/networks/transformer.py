"""A Transformer that reads one sequence and writes another.

Dimensions: B batch, S source tokens, T target tokens, N rows that are written (B, or more with
several hypotheses of each), D embedding, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lit_models.networks.attention import Attention, Block, KeysValues, check_heads, of_one_source
from lit_models.networks.recurrent import check_choice, check_lengths, checked_dropout

Positions = Literal["sinusoidal", "learned"]
Embeddings = Literal["tied", "shared", "separate"]
Norm = Literal["final", "inner", "none"]


class Source(NamedTuple):
    """What was read.

    Attributes:
        memory: Of each layer of the decoder, the keys and values of the source.
        visible: Which tokens are no padding, (B, 1, 1, S), or None for all.
        tokens: The tokens (B, S).
        keys: By which they are copied, (B, S, D), or None where they cannot be.
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
    """What has been read and written so far; a step makes a new one and changes none.

    Args:
        source: What was read, once for all hypotheses of it.
        past: Of each layer, the keys and values of the tokens written; empty before the first.
        written: Number of these tokens.
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
    """Reads a sequence; networks that do it alike can take over each other's weights.

    It makes no parameters; a subclass does, under these names.
    """

    source_embedding: nn.Embedding
    positions: Tensor
    encoder: nn.ModuleList
    encoder_norm: nn.Module
    dropout: nn.Dropout
    max_length: int

    def read(self, tokens: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What is known of each token (B, S), (B, S, D), and which are no padding (B, 1, 1, S)."""
        visible = None
        if lengths is not None:
            check_lengths(lengths, tokens)
            visible = ~padding_mask(lengths, tokens.shape[1])[:, None, None]
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

    Source and target share one vocabulary. Sources of different length are padded behind their end,
    and ``lengths`` (B,) says where each one ends. A padded target needs no lengths: no output
    depends on a later token.

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
        positions: What is added to tell one place from another, ``sinusoidal`` or ``learned``.
        embeddings: ``tied``: source, target and output layer share one matrix; ``shared``: source
            and target do; ``separate``: none do.
        output_bias: Whether the output layer has a bias.
        bias: Whether all other layers have one.
        norm: Where LayerNorm stands: before each block and behind the last one of encoder and
            decoder (``final``), before each block alone (``inner``), or nowhere (``none``).
        copy: Whether a token may also be copied from the source: the decoder points at one, and a
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
        positions: Positions = "sinusoidal",
        embeddings: Embeddings = "tied",
        output_bias: bool = False,
        bias: bool = True,
        norm: Norm = "final",
        copy: bool = False,
    ) -> None:
        super().__init__()
        check_choice("positions", positions, get_args(Positions))
        check_choice("embeddings", embeddings, get_args(Embeddings))
        check_choice("norm", norm, get_args(Norm))
        if min(num_encoder_layers, num_decoder_layers) < 1:
            raise ValueError(
                "num_encoder_layers and num_decoder_layers must be at least 1, got "
                f"{num_encoder_layers} and {num_decoder_layers}."
            )
        check_heads(num_heads, embedding_dim)
        block = Block(embedding_dim, num_heads, hidden_size, dropout, bias, norm != "none")
        self.encoder = nn.ModuleList(EncoderLayer(block) for _ in range(num_encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(block) for _ in range(num_decoder_layers))
        final = block._replace(norm=norm == "final")
        self.encoder_norm, self.decoder_norm = final.make_norm(), final.make_norm()
        self.dropout = checked_dropout(dropout)
        self.max_length = max_length

        self.source_embedding = nn.Embedding(vocab_size, embedding_dim)
        self.target_embedding = self.source_embedding
        if embeddings == "separate":
            self.target_embedding = nn.Embedding(vocab_size, embedding_dim)
        for embedding in (self.source_embedding, self.target_embedding):
            nn.init.normal_(embedding.weight, std=embedding_dim**-0.5)
        self.output = nn.Linear(embedding_dim, vocab_size, bias=output_bias)
        if embeddings == "tied":
            self.output.weight = self.source_embedding.weight

        self.pointer = Pointer(embedding_dim) if copy else None

        if positions == "learned":
            self.positions = nn.Parameter(torch.empty(max_length, embedding_dim))
            nn.init.normal_(self.positions, std=embedding_dim**-0.5)
        else:
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
        """Read the source (B, S): the state before anything is written."""
        x, visible = self.read(source, lengths)
        memory = [layer.cross_attention.keys_values(x) for layer in self.decoder]  # type: ignore[operator, union-attr]
        keys = self.pointer.key(x) if self.pointer else None
        return DecoderState(Source(memory, visible, source, keys), past=[])

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Write one token (N,) more; returns log probabilities (N, V) of the next, and the state.

        Only the new token is computed: the keys and values of those before are in the state.
        """
        logits, state = self.decode(tokens[:, None], state)
        return logits[:, 0].log_softmax(1), state

    def decode(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Write tokens (N, T), all at once into an empty state or one by one."""
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
    """Copies tokens of the source where that is more probable than a token of the vocabulary."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.gate = nn.Linear(dim, 1)

    def forward(self, x: Tensor, logits: Tensor, source: Source) -> Tensor:
        """Log probabilities (N, T, V) of the tokens, copied or not.

        Args:
            x: What the decoder knows of each place, (N, T, D).
            logits: Of the vocabulary, (N, T, V).
            source: What can be copied, of B sources.
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


def padding_mask(lengths: Tensor, size: int) -> Tensor:
    """Mask (B, size), True where padding."""
    return torch.arange(size, device=lengths.device) >= lengths[:, None]


def sinusoidal_positions(length: int, dim: int) -> Tensor:
    """Positions (length, dim): p_t = [..., sin(w_k t), cos(w_k t), ...], w_k = 1 / 10000^(2k/dim).

    The dot product of two of them, sum_k cos(w_k (t - s)), depends on their distance alone.
    """
    t = torch.arange(length, dtype=torch.float64)[:, None]
    w = 10_000 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.stack([torch.sin(w * t), torch.cos(w * t)], 2).flatten(1).float()


class EncoderLayer(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.attention_norm = block.make_norm()
        self.attention = Attention(block)
        self.feed_forward_norm = block.make_norm()
        self.feed_forward = block.make_feed_forward()
        self.dropout = nn.Dropout(block.dropout)

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, self.attention.keys_values(normed), visible))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class DecoderLayer(EncoderLayer):
    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.cross_attention_norm = block.make_norm()
        self.cross_attention = Attention(block)

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
