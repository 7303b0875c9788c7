"""A network that reads sequences. Dimensions: B batch, T time, D features, H state, K outputs.

A core maps a sequence (B, T, D) to the states of its top layer (B, T, H), one for each step.
Sequences of different length are padded after their end to a common T, and ``lengths`` (B,) says
where each one ends; padding never changes a state before it.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lit_models.networks._checks import check_choice, check_lengths, checked_dropout

Read = Literal["last", "every", "max"]


class Recurrent(nn.Module):
    """A recurrent core between an embedding, where the input is tokens, and a linear layer.

    Args:
        rnn: The core, called with (B, T, D) and lengths (B,) or None.
        num_classes: Number of outputs K: classes, or 1 for a number.
        embedding: Maps tokens (B, T) to (B, T, D); without one the input is (B, T, D) itself.
        read: States that the linear layer reads: the ``last`` one of each sequence, ``every`` one,
            or of each unit the ``max`` over time.
        dropout: Share of the state that is set to zero before the linear layer, in training.

    Raises:
        ValueError: If an argument is out of range, or the lengths do not fit the batch.
    """

    def __init__(
        self,
        rnn: nn.Module,
        num_classes: int,
        embedding: nn.Module | None = None,
        read: Read = "last",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("read", read, get_args(Read))
        self.embedding = embedding or nn.Identity()
        self.rnn = rnn
        self.dropout = checked_dropout(dropout)
        self.output = nn.Linear(rnn.state_size, num_classes)  # type: ignore[arg-type]
        self.read = read

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Outputs (B, K), or (B, T, K) of ``every`` step, of sequences that may end early.

        Args:
            x: The sequences (B, T, D), or tokens (B, T) for the embedding.
            lengths: Steps of each sequence (B,); without them all have T.
        """
        if lengths is not None:
            check_lengths(lengths, x)
        states = self.rnn(self.embedding(x), lengths)  # (B, T, H)
        if self.read == "max":
            if lengths is not None:
                padding_mask = torch.arange(states.shape[1], device=x.device) >= lengths[:, None]
                states = states.masked_fill(padding_mask[:, :, None], -torch.inf)
            return self.output(self.dropout(states.amax(1)))
        # Reading all steps for the sake of one rounds as NYU's notebook on temporal order does. Its
        # spikes come at other steps, some hundred updates on, if the last bit of a sum differs.
        outputs = self.output(self.dropout(states))  # (B, T, K)
        if self.read == "every":
            return outputs
        if lengths is None:
            return outputs[:, -1]
        return outputs[torch.arange(len(x), device=x.device), lengths - 1]


class _Fused(nn.RNNBase):
    """A recurrent network of PyTorch as a core; it runs from left to right and needs no lengths."""

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, dropout: float = 0.0
    ) -> None:
        # the options of nn.LSTM and nn.GRU, before which this class stands
        options: Any = {"batch_first": True, "dropout": dropout}
        super().__init__(input_size, hidden_size, num_layers, **options)  # type: ignore[arg-type]

    @property
    def state_size(self) -> int:
        return self.hidden_size

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        # in the place of lengths, PyTorch takes the first state
        states, _ = super().forward(x)
        return states


class RNN(_Fused, nn.RNN):  # type: ignore[misc]  # as said above
    """The simple recurrent network of Elman ("Finding structure in time", 1990).

    Args:
        input_size: Features D of a step.
        hidden_size: Units H of a layer.
        num_layers: Layers, each reading the states of the one below.
        nonlinearity: Activation of the units.
        dropout: Share of the states that is set to zero between two layers, in training.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
        dropout: float = 0.0,
    ) -> None:
        options: Any = {"batch_first": True, "dropout": dropout, "nonlinearity": nonlinearity}
        nn.RNN.__init__(self, input_size, hidden_size, num_layers, **options)


class LSTM(_Fused, nn.LSTM):  # type: ignore[misc]  # as said above
    """Long short-term memory (Hochreiter and Schmidhuber, 1997; forget gate of Gers et al., 2000).

    Arguments are those of :class:`RNN` without ``nonlinearity``.
    """


class GRU(_Fused, nn.GRU):  # type: ignore[misc]  # as said above
    """Gated recurrent units (Cho et al., arXiv:1406.1078).

    Arguments are those of :class:`RNN` without ``nonlinearity``.
    """


class BidirectionalLSTM(nn.Module):
    """Layers of two LSTMs, one of which reads each sequence from its last step to its first.

    The reversed sequences are made by their lengths, so that padding stays at the end: packing
    them, as PyTorch's own bidirectional networks want it, would need the lengths on the CPU in each
    step.

    Args:
        input_size: Features D of a step.
        hidden_size: Units of each direction; a state has twice as many.
        num_layers: Layers, each reading the states of both directions of the one below.
        dropout: Share of the states that is set to zero between two layers, in training.
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.state_size = 2 * hidden_size
        sizes = [input_size] + [self.state_size] * (num_layers - 1)
        self.ahead = nn.ModuleList(LSTM(size, hidden_size) for size in sizes)
        self.back = nn.ModuleList(LSTM(size, hidden_size) for size in sizes)
        self.dropout = checked_dropout(dropout)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        for number, (ahead, back) in enumerate(zip(self.ahead, self.back, strict=True)):
            if number:
                x = self.dropout(x)
            x = torch.cat([ahead(x), _reverse(back(_reverse(x, lengths)), lengths)], 2)
        return x


def _reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Sequences (B, T, D) from their last step to their first; the padding stays at the end."""
    if lengths is None:
        return x.flip(1)
    steps = torch.arange(x.shape[1], device=x.device)
    mirrored = lengths[:, None] - 1 - steps  # (B, T), negative in the padding
    index = torch.where(mirrored < 0, steps, mirrored)
    return x.gather(1, index[:, :, None].expand_as(x))
