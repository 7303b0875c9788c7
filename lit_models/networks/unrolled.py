"""Recurrent cores step by step, as their equations read.

Dimensions: B batch, T time, D features, H state.

Each keeps to the interface of :mod:`lit_models.networks.recurrent`. All that depends on the inputs
alone is computed for all steps together, so that a step costs one matrix product and its
activation.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lit_models.networks._checks import check_choice

Nonlinearity = Literal["identity", "relu", "tanh"]
Init = Literal["torch", "orthogonal", "identity"]
ACTIVATIONS: dict[Nonlinearity, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "tanh": torch.tanh,
}


class State(nn.Identity):
    """Place of a layer that each of its states (B, H) passes: one to hook."""


class Layer(nn.Module):
    """One layer of a recurrence, (B, T, D) -> (B, T, H).

    Args:
        state_size: Units H.
        parameters: Shapes of the parameters by name, all drawn from U(-1, 1) / sqrt(H), as PyTorch
            does for its own; None for one that is left out.
    """

    weight_x: nn.Parameter  # multiplies the inputs
    weight_h: nn.Parameter  # multiplies the states

    def __init__(self, state_size: int, **parameters: Sequence[int] | None) -> None:
        super().__init__()
        self.state_size = state_size
        self.state = State()
        bound = 1 / math.sqrt(state_size)
        for name, shape in parameters.items():
            values = nn.Parameter(torch.empty(*shape).uniform_(-bound, bound)) if shape else None
            self.register_parameter(name, values)

    def start(self, x: Tensor) -> Tensor:
        """The state (B, H) before the first step."""
        return x.new_zeros(len(x), self.state_size)


class Stack(nn.Module):
    """Layers above each other.

    Args:
        make_layer: Makes a layer of H units from the number of features that it reads.
    """

    def __init__(
        self,
        make_layer: Callable[[int], Layer],
        input_size: int,
        hidden_size: int,
        num_layers: int,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}.")
        sizes = [input_size, *[hidden_size] * (num_layers - 1)]
        self.layers = nn.Sequential(*map(make_layer, sizes))
        self.state_size = hidden_size

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.layers(x)


class VanillaRNN(Stack):
    """h[t] = sigma(W_h h[t-1] + W_x x[t] + b), with one bias (PyTorch's has two that add up).

    Linear, with one unit and without bias, it is h[t] = a x[t] + b h[t-1].

    Args:
        input_size: Features D of a step.
        hidden_size: Units H of a layer.
        num_layers: Layers, each reading the states of the one below.
        nonlinearity: The activation sigma.
        bias: Add b.
        weight_scale: Factor on W_h as it is drawn, whose largest |eigenvalue| is about 0.58 of it.
        init: ``torch`` draws W_h as the other weights. All |eigenvalues| of an ``orthogonal`` one
            (Saxe et al., arXiv:1312.6120) and of the ``identity`` (Le et al., arXiv:1504.00941)
            are 1.
        truncation: Steps after which the gradient's way back is cut; None never does.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: Nonlinearity = "tanh",
        bias: bool = True,
        weight_scale: float = 1.0,
        init: Init = "torch",
        truncation: int | None = None,
    ) -> None:
        check_choice("nonlinearity", nonlinearity, tuple(ACTIVATIONS))
        check_choice("init", init, get_args(Init))
        if truncation is not None and truncation < 1:
            raise ValueError(f"truncation must be at least 1 step or None, got {truncation}.")
        super().__init__(
            lambda size: VanillaLayer(
                size, hidden_size, nonlinearity, bias, weight_scale, init, truncation
            ),
            input_size,
            hidden_size,
            num_layers,
        )


class VanillaLayer(Layer):
    bias: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        nonlinearity: Nonlinearity,
        bias: bool,
        weight_scale: float,
        init: Init,
        truncation: int | None,
    ) -> None:
        super().__init__(
            hidden_size,
            weight_x=(hidden_size, input_size),
            weight_h=(hidden_size, hidden_size),
            bias=(hidden_size,) if bias else None,
        )
        if init == "orthogonal":
            nn.init.orthogonal_(self.weight_h)
        elif init == "identity":
            nn.init.eye_(self.weight_h)
        self.weight_h.data *= weight_scale
        self.truncation = truncation
        self.activation = ACTIVATIONS[nonlinearity]

    def forward(self, x: Tensor) -> Tensor:
        h, states = self.start(x), []
        inputs = nn.functional.linear(x, self.weight_x, self.bias).unbind(1)  # W_x x[t] + b
        for t, z in enumerate(inputs):
            if self.truncation and t % self.truncation == 0:
                h = h.detach()
            h = self.state(self.activation(torch.addmm(z, h, self.weight_h.T)))
            states.append(h)
        return torch.stack(states, 1)


class VanillaLSTM(Stack):
    """Long short-term memory with one bias for each gate (PyTorch's has two that add up).

    ``[i, f, g, o] = W_x x[t] + W_h h[t-1] + b; c[t] = sigmoid(f) c[t-1] + sigmoid(i) tanh(g);
    h[t] = sigmoid(o) tanh(c[t])`` (Gers et al., "Learning to forget", 2000).

    Args:
        input_size: Features D of a step.
        hidden_size: Units H of a layer.
        num_layers: Layers, each reading the states of the one below.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1) -> None:
        super().__init__(
            lambda size: VanillaLSTMLayer(size, hidden_size),
            input_size,
            hidden_size,
            num_layers,
        )


class VanillaLSTMLayer(Layer):
    bias: nn.Parameter

    def __init__(self, input_size: int, hidden_size: int) -> None:
        gates = 4 * hidden_size
        super().__init__(
            hidden_size, weight_x=(gates, input_size), weight_h=(gates, hidden_size), bias=(gates,)
        )
        self.cell = State()

    def forward(self, x: Tensor) -> Tensor:
        h, c, states = self.start(x), self.start(x), []
        for z in nn.functional.linear(x, self.weight_x, self.bias).unbind(1):
            i, f, g, o = torch.addmm(z, h, self.weight_h.T).chunk(4, 1)
            c = self.cell(torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g))
            h = self.state(torch.sigmoid(o) * torch.tanh(c))
            states.append(h)
        return torch.stack(states, 1)


class GatedRNN(Stack):
    """c[t] = sigmoid(W_c x[t] + W_h h[t-1]); h[t] = c[t] h[t-1] + (1 - c[t]) W_x x[t].

    Args:
        input_size: Features D of a step.
        hidden_size: Units H of a layer.
        num_layers: Layers, each reading the states of the one below.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1) -> None:
        super().__init__(
            lambda size: GatedLayer(size, hidden_size), input_size, hidden_size, num_layers
        )


class GatedLayer(Layer):
    weight_c: nn.Parameter

    def __init__(self, input_size: int, hidden_size: int) -> None:
        wide, square = (hidden_size, input_size), (hidden_size, hidden_size)
        super().__init__(hidden_size, weight_c=wide, weight_h=square, weight_x=wide)

    def forward(self, x: Tensor) -> Tensor:
        gate_inputs, candidates = (x @ self.weight_c.T).unbind(1), (x @ self.weight_x.T).unbind(1)
        h, states = self.start(candidates[0]), []  # of their precision, as lerp asks for
        for z, candidate in zip(gate_inputs, candidates, strict=True):
            c = torch.sigmoid(torch.addmm(z, h, self.weight_h.T))
            h = self.state(torch.lerp(candidate, h, c))
            states.append(h)
        return torch.stack(states, 1)
