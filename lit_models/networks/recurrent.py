"""Recurrent networks. Dimensions: B batch, T time, D features, H hidden, K classes."""

from typing import Literal

from torch import Tensor, nn


class RecurrentClassifier(nn.Module):
    """A recurrent core, and a linear layer that reads the last step.

    Shorter sequences of a batch are padded in front, so that all of them end at the last step.

    Args:
        core: Maps (B, T, D) to states (B, T, H), as its first output.
        num_classes: Number of classes K.
    """

    def __init__(self, core: nn.RNNBase, num_classes: int) -> None:
        super().__init__()
        self.core = core
        self.head = nn.Linear(core.hidden_size, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, K)
        states, _ = self.core(x)  # (B, T, H)
        # Reading all steps for the sake of one rounds as the course notebook does, whose spikes
        # come at other steps, some hundred updates on, if the last bit of a single sum differs.
        return self.head(states)[:, -1]


class LSTM(RecurrentClassifier):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997; forget gate of Gers et al., 2000).

    Args:
        input_size: Features D of a step.
        hidden_size: Units H of a layer.
        num_layers: Layers, each reading the states of the one below.
        num_classes: Number of classes K.
    """

    def __init__(
        self, input_size: int = 8, hidden_size: int = 12, num_layers: int = 1, num_classes: int = 4
    ) -> None:
        super().__init__(
            nn.LSTM(input_size, hidden_size, num_layers, batch_first=True), num_classes
        )


class RNN(RecurrentClassifier):
    """The simple recurrent network of Elman ("Finding structure in time", 1990).

    Args:
        input_size: Features D of a step.
        hidden_size: Units H of a layer.
        num_layers: Layers, each reading the states of the one below.
        num_classes: Number of classes K.
        nonlinearity: Activation of the units.
    """

    def __init__(
        self,
        input_size: int = 8,
        hidden_size: int = 12,
        num_layers: int = 1,
        num_classes: int = 4,
        nonlinearity: Literal["tanh", "relu"] = "relu",
    ) -> None:
        core = nn.RNN(
            input_size, hidden_size, num_layers, nonlinearity=nonlinearity, batch_first=True
        )
        super().__init__(core, num_classes)
