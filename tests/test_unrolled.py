"""The recurrences written step by step: golden values and equations."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_models.networks import RNN, AttentionRNN, GatedRNN, Recurrent, VanillaLSTM, VanillaRNN
from lit_models.networks.unrolled import State

# Berkeley CS182, homework 6, "Implementing RNNs": every weight is -0.1
X = torch.tensor(
    [
        [[0.1, 0.15], [0.2, 0.25], [0.3, 0.35], [0.4, 0.45]],
        [[-0.1, -1.5], [-0.2, -2.5], [-0.3, -3.5], [-0.4, -0.45]],
    ]
)


def filled(network: Any, value: float = -0.1) -> Any:
    for parameter in network.parameters():
        nn.init.constant_(parameter, value)
    return network


def assert_golden(ours: Tensor, golden: list[list[float]]) -> None:
    torch.testing.assert_close(ours, torch.tensor(golden), rtol=0, atol=1e-4)


def states_of(core: nn.Module, x: Tensor, *, cell: bool = False) -> list[list[Tensor]]:
    """The states of each layer as the places to hook see them, connected by autograd."""
    seen: list[list[Tensor]] = []
    hooks = []
    for name, module in core.named_modules():
        if isinstance(module, State) and name.endswith("cell") == cell:
            seen.append([])
            hooks.append(
                module.register_forward_hook(lambda m, i, h, keep=seen[-1]: keep.append(h))
            )
    core(x)
    for hook in hooks:
        hook.remove()
    return seen


def test_one_unit() -> None:
    (state,) = filled(VanillaRNN(1, 1), 0.1)(torch.ones(1, 1, 1)).flatten()
    assert state.item() == pytest.approx(0.1973753273487091, abs=1e-7)


@pytest.mark.parametrize(
    ("core", "golden"),
    [
        (
            VanillaRNN(2, 3, nonlinearity="identity"),
            [[-0.1250, -0.1075, -0.1328, -0.1452], [0.0600, 0.1520, 0.2344, -0.0853]],
        ),
        (
            VanillaRNN(2, 3),
            [[-0.1244, -0.1073, -0.1320, -0.1444], [0.0599, 0.1509, 0.2305, -0.0840]],
        ),
        (
            VanillaRNN(2, 3, num_layers=2),
            [[-0.0626, -0.0490, -0.0457, -0.0430], [-0.1174, -0.1096, -0.1354, -0.0342]],
        ),
        (
            VanillaLSTM(2, 3, num_layers=3),
            [[-0.0212, -0.0296, -0.0329, -0.0343], [-0.0211, -0.0291, -0.0320, -0.0332]],
        ),
    ],
    ids=["linear", "tanh", "two_layers", "lstm"],
)
def test_states_are_those_of_the_course(core: Any, golden: list[list[float]]) -> None:
    states = filled(core)(X)
    assert_golden(states[:, :, 0], golden)
    assert torch.equal(states, states[:, :, :1].expand(-1, -1, 3))


def test_predictions_are_those_of_the_course() -> None:
    network = filled(Recurrent(VanillaRNN(2, 3), 4, read="every"))
    golden = [[-0.0627, -0.0678, -0.0604, -0.0567], [-0.1180, -0.1453, -0.1692, -0.0748]]
    assert_golden(network(X)[:, :, 0], golden)


def test_lstm_states_and_cells_are_those_of_the_course() -> None:
    core = filled(VanillaLSTM(2, 3, num_layers=3))
    last_h = [layer[-1][:, 0].tolist() for layer in states_of(core, X)]
    last_c = [layer[-1][:, 0].tolist() for layer in states_of(core, X, cell=True)]
    assert_golden(torch.tensor(last_h), [[-0.0583, 0.0369], [-0.0320, -0.0430], [-0.0343, -0.0332]])
    assert_golden(torch.tensor(last_c), [[-0.1280, 0.0759], [-0.0666, -0.0907], [-0.0716, -0.0693]])


def test_vanilla_networks_are_those_of_torch_with_one_bias() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, 2)
    pairs: list[tuple[Any, Any]] = [
        (VanillaRNN(2, 5), nn.RNN(2, 5, batch_first=True)),
        (
            VanillaRNN(2, 5, nonlinearity="relu"),
            nn.RNN(2, 5, nonlinearity="relu", batch_first=True),
        ),
        (VanillaLSTM(2, 5), nn.LSTM(2, 5, batch_first=True)),
    ]
    for ours, other in pairs:
        (layer,) = ours.layers
        layer.weight_x.data, layer.weight_h.data = other.weight_ih_l0.data, other.weight_hh_l0.data
        layer.bias.data = other.bias_ih_l0.data + other.bias_hh_l0.data
        torch.testing.assert_close(ours(x), other(x)[0])


# The equations, in float64, at random sizes

SIZES = st.integers(1, 5)
SEEDS = st.integers(0, 2**31)
exact = settings(max_examples=25, deadline=None)


def assert_equal(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@given(SIZES, SIZES, st.integers(1, 8), SEEDS)
@exact
def test_gated_rnn_is_its_equations(d: int, h: int, t: int, seed: int) -> None:
    torch.manual_seed(seed)
    core = GatedRNN(d, h).double()
    layer: Any = core.layers[0]
    x = torch.randn(3, t, d, dtype=torch.float64)
    expected = []
    state = torch.zeros(3, h, dtype=torch.float64)
    for step in x.unbind(1):
        c = torch.sigmoid(step @ layer.weight_c.T + state @ layer.weight_h.T)
        state = c * state + (1 - c) * (step @ layer.weight_x.T)
        expected.append(state)
    assert_equal(core(x), torch.stack(expected, 1))


def parts(layer: Any, past: int, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q_i, K_i and V_i of an AttentionRNN, i = 0 for the input."""
    if i == 0:
        return layer.weight_x.chunk(3)
    return layer.weight_h.view(past, 3, *layer.weight_h.shape[1:2] * 2)[i - 1].unbind(0)


def attention_by_hand(
    layer: Any, past: int, x: Tensor, *, tied: bool = False
) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
    """States h[t] (H,), weights a[t] and values v_i of one sequence (T, D), one sum at a time."""
    states: list[Tensor] = []
    weights, all_values = [], []
    for step in x:
        sources = [step, *reversed(states)][: past + 1]
        w, values = [], []
        for i, source in enumerate(sources):
            q, k, v = parts(layer, 1, min(i, 1)) if tied else parts(layer, past, i)
            w.append((q @ source) @ (k @ source))
            values.append(v @ source)
        a = torch.stack(w).softmax(0)
        states.append(sum(a_i * v_i for a_i, v_i in zip(a, values, strict=True)))
        weights.append(a)
        all_values.append(values)
    return states, weights, all_values


@given(SIZES, SIZES, st.integers(1, 4), st.integers(1, 8), SEEDS)
@exact
def test_attention_rnn_is_its_equations(d: int, h: int, past: int, t: int, seed: int) -> None:
    torch.manual_seed(seed)
    core = AttentionRNN(d, h, past).double()
    x = torch.randn(2, t, d, dtype=torch.float64)
    for ours, sequence in zip(core(x), x, strict=True):
        expected, _, _ = attention_by_hand(core.layers[0], past, sequence)
        assert_equal(ours, torch.stack(expected))


@given(SIZES, SIZES, st.integers(1, 8), SEEDS)
@exact
def test_attention_to_all_states_is_its_equations(d: int, h: int, t: int, seed: int) -> None:
    torch.manual_seed(seed)
    core = AttentionRNN(d, h, past="inf").double()
    x = torch.randn(2, t, d, dtype=torch.float64)
    for ours, sequence in zip(core(x), x, strict=True):
        expected, _, _ = attention_by_hand(core.layers[0], t, sequence, tied=True)
        assert_equal(ours, torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "core",
    [
        VanillaRNN(2, 3),
        VanillaLSTM(2, 3),
        GatedRNN(2, 3, num_layers=2),
        AttentionRNN(2, 3),
        AttentionRNN(2, 3, past="inf", num_layers=2),
    ],
    ids=["rnn", "lstm", "gated", "attention", "attention to all"],
)
def test_mixed_precision_changes_little(core: nn.Module, dtype: torch.dtype) -> None:
    """GatedRNN and the attention to all states refused it: lerp takes one precision alone."""
    x = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(0))
    exact = core(x)
    with torch.autocast("cpu", dtype):
        mixed = core(x)
    mixed.sum().backward()
    torch.testing.assert_close(mixed.float(), exact, rtol=0, atol=0.02)


def test_large_scores_do_not_overflow() -> None:
    torch.manual_seed(0)
    core = AttentionRNN(3, 3, past="inf")
    states = core(100 * torch.randn(2, 20, 3))
    states.sum().backward()
    assert states.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in core.parameters())


@given(SIZES, SIZES, st.integers(1, 6), st.integers(0, 3), SEEDS)
@exact
def test_a_window_over_all_steps_sees_all_states(
    d: int, h: int, t: int, more: int, seed: int
) -> None:
    """AttentionRNN(inf) is AttentionRNN(k) with tied parameters as long as t <= k."""
    torch.manual_seed(seed)
    whole, window = AttentionRNN(d, h, "inf").double(), AttentionRNN(d, h, t + more).double()
    weights = whole.state_dict()
    weights["layers.0.weight_h"] = weights["layers.0.weight_h"].repeat(t + more, 1)
    window.load_state_dict(weights)
    x = torch.randn(2, t, d, dtype=torch.float64)
    assert_equal(window(x), whole(x))


def test_relu_rnn_is_torchs() -> None:
    torch.manual_seed(0)
    assert RNN(3, 4, nonlinearity="relu")(torch.randn(2, 5, 3)).min() == 0


def test_recurrent_weights_are_drawn_to_scale() -> None:
    torch.manual_seed(0)
    plain = VanillaRNN(2, 4)
    torch.manual_seed(0)
    scaled = VanillaRNN(2, 4, weight_scale=3)
    for (name, one), other in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        assert torch.equal(3 * one if name.endswith("weight_h") else one, other)


@pytest.mark.parametrize("init", ["orthogonal", "identity"])
def test_eigenvalues_are_one_at_the_start(init: Any) -> None:
    """Linear, and with a scale of 2, such a network carries 2^T of the gradient over T steps."""
    torch.manual_seed(0)
    core = VanillaRNN(2, 4, nonlinearity="identity", weight_scale=2, init=init).double()
    (states,) = states_of(core, torch.randn(1, 6, 2, dtype=torch.float64))
    first, last = torch.autograd.grad(states[-1].sum(), (states[0], states[-1]))
    assert first.norm() == pytest.approx(2**5 * last.norm())


def test_a_truncated_gradient_ends_where_it_is_cut() -> None:
    """Steps 0 to 2, 3 to 5 and 6: the loss of the last reaches no state of the two before."""
    torch.manual_seed(0)
    core = VanillaRNN(2, 4, truncation=3)
    x = torch.randn(1, 7, 2, requires_grad=True)
    torch.manual_seed(0)
    torch.testing.assert_close(core(x), VanillaRNN(2, 4)(x))
    for read, reached in ((6, [6]), (5, [3, 4, 5])):
        (by_input,) = torch.autograd.grad(core(x)[0, read].sum(), x)
        assert by_input[0].any(1).nonzero().flatten().tolist() == reached


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "zeros"}, "init must be one of torch, orthogonal, identity, got 'zeros'"),
        ({"truncation": 0}, "truncation must be at least 1 step or None, got 0"),
    ],
)
def test_options_out_of_range_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VanillaRNN(2, 4, **options)
