"""Recurrent networks that attend to their own past states.

Dimensions: B batch, T time, D features, H state, k states that are looked back on.

A query, a key and a value are made of the input x[t] and of each past state; the softargmax of the
scores weighs the values:

    w_0 = (Q_0 x[t]) . (K_0 x[t]),  w_i = (Q_i h[t-i]) . (K_i h[t-i])
    h[t] = sum_i a_i v_i,  a = softargmax(w),  v_0 = V_0 x[t],  v_i = V_i h[t-i]

The sums go over the states that exist: one before the first step would have the weight
exp(0) = 1 for a value of zero, and infinitely many of them all the weight there is.
"""

from typing import Literal

import torch
from torch import Tensor

from lit_models.networks.unrolled import Layer, Stack


class AttentionRNN(Stack):
    """AttentionRNN(k), or AttentionRNN(inf) with one Q, K and V for all past states.

    A score and a value depend on a state and on how long ago it was, never on the state that
    looks back, so each is computed once. With k past states a step takes O(k H^2) time and the
    sequence O(T k H) memory. With all of them the softargmax of a step goes on from that of the
    step before, and a step takes O(H^2) time, the sequence O(T H) memory, however long it is.

    Args:
        input_size: Features D of a step.
        hidden_size: Units H of a layer.
        past: Number k of past states that are attended to; "inf" for all of them.
        num_layers: Layers, each reading the states of the one below.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        past: int | Literal["inf"] = 2,
        num_layers: int = 1,
    ) -> None:
        if past != "inf" and (isinstance(past, str) or past < 1):
            raise ValueError(f"past must be at least 1, or inf for all past states, got {past!r}.")

        def make_layer(size: int) -> AttentionLayer:
            if past == "inf":
                return WholePastLayer(size, hidden_size)
            return Window(size, hidden_size, past)

        super().__init__(make_layer, input_size, hidden_size, num_layers)


class AttentionLayer(Layer):
    """The parameters; ``weight_h`` holds Q_i, K_i and V_i for i = 1..k one below the other."""

    def __init__(self, input_size: int, hidden_size: int, past: int) -> None:
        rows = 3 * hidden_size
        super().__init__(
            hidden_size, weight_x=(rows, input_size), weight_h=(past * rows, hidden_size)
        )
        self.past = past

    def of_inputs(self, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Scores w_0 (B, 1) and values v_0 (B, H) of all steps."""
        query, key, value = (x @ self.weight_x.T).chunk(3, 2)
        return (query * key).sum(2, keepdim=True).unbind(1), value.unbind(1)

    def of_state(self, h: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Scores w_i (B, 1) and values v_i (B, H) of a state (B, H), for i = 1..k."""
        projected = (h @ self.weight_h.T).view(len(h), self.past, 3, self.state_size)
        query, key, value = projected.unbind(2)  # (B, k, H)
        return (query * key).sum(2, keepdim=True).unbind(1), value.unbind(1)


class Window(AttentionLayer):
    def forward(self, x: Tensor) -> Tensor:
        states: list[Tensor] = []
        scores: list[tuple[Tensor, ...]] = []  # of each state, for all i
        values: list[tuple[Tensor, ...]] = []
        for score, value in zip(*self.of_inputs(x), strict=True):
            lags = range(1, min(self.past, len(states)) + 1)
            w = torch.cat([score, *(scores[-i][i - 1] for i in lags)], 1)  # (B, 1 + k)
            v = torch.stack([value, *(values[-i][i - 1] for i in lags)], 1)  # (B, 1 + k, H)
            h = self.state((w.softmax(1)[:, None] @ v)[:, 0])
            states.append(h)
            score_h, value_h = self.of_state(h)
            scores.append(score_h)
            values.append(value_h)
        return torch.stack(states, 1)


class WholePastLayer(AttentionLayer):
    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size, past=1)

    def forward(self, x: Tensor) -> Tensor:
        # softargmax over all past states: the log of its denominator, and its mean value
        log_total, mean = x.new_full((len(x), 1), -torch.inf), self.start(x)
        states = []
        for score, value in zip(*self.of_inputs(x), strict=True):
            # the sums keep the precision of x where autocast lowers that of the products
            h = self.state(torch.lerp(mean, value.to(mean), torch.sigmoid(score - log_total)))
            states.append(h)
            (score_h,), (value_h,) = self.of_state(h)
            mean = torch.lerp(mean, value_h.to(mean), torch.sigmoid(score_h - log_total))
            log_total = torch.logaddexp(log_total, score_h)
        return torch.stack(states, 1)
