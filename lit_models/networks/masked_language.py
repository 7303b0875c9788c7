"""A Transformer that fills the gaps of a text.

Dimensions: B batch, T tokens, D embedding, V vocabulary.
"""

from torch import Tensor, nn

from lit_models.networks._checks import checked_dropout
from lit_models.networks.attention import check_heads
from lit_models.networks.transformer import Encoder, EncoderLayer, sinusoidal_positions


class MaskedLanguageModel(Encoder):
    """The encoder of a Transformer and an output layer tied to its embedding.

    It is BERT (Devlin et al., arXiv:1810.04805) but for LayerNorm before each block, ReLU,
    sinusoidal positions, no embedding of the segments, and no layer in front of the output.
    :class:`~lit_models.networks.Transformer` has the same names for what both have.

    Args:
        vocab_size: Number of tokens V.
        embedding_dim: Features D of a token, an even number.
        num_heads: Attention heads; they share the features out among them.
        num_layers: Layers of the encoder.
        hidden_size: Units between the two linear layers of a block.
        dropout: Share set to zero, in training, of the embedded tokens, of the attention's weights
            and of what each block adds.
        max_length: The most tokens of a text.

    Raises:
        ValueError: If an argument is out of range, or a batch does not fit.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int = 192,
        num_heads: int = 6,
        num_layers: int = 3,
        hidden_size: int = 768,
        dropout: float = 0.1,
        max_length: int = 256,
    ) -> None:
        super().__init__()
        check_heads(num_heads, embedding_dim)
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}.")
        sizes = embedding_dim, num_heads, hidden_size, dropout
        self.source_embedding = nn.Embedding(vocab_size, embedding_dim)
        nn.init.normal_(self.source_embedding.weight, std=embedding_dim**-0.5)
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(num_layers))
        self.encoder_norm = nn.LayerNorm(embedding_dim)
        self.dropout = checked_dropout(dropout)
        self.output = nn.Linear(embedding_dim, vocab_size, bias=False)
        self.output.weight = self.source_embedding.weight
        self.max_length = max_length
        table = sinusoidal_positions(max_length, embedding_dim)
        self.register_buffer("positions", table, persistent=False)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the token at each place, seen from all places.

        Args:
            tokens: Tokens (B, T), some of them masked.
            lengths: Tokens of each text (B,); without them all have T.
        """
        x, _ = self.encode(tokens, lengths)
        return self.output(x)
