"""The backward passes of the courses' questions, written by hand, are those of autograd."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closed_forms import (
    BATCH_NORM_FACTOR,
    TwoLayers,
    attention_rnn_jacobian,
    attention_rnn_state_gradient,
    conv1d_by_input,
    conv1d_by_weight,
    conv1d_input_gradient,
    conv1d_weight_gradient,
    conv2d_input_gradient,
    gated_rnn_jacobian,
    gated_rnn_weight_gradient,
    layer_factor,
    linear_rnn_state_gradient,
    scalar_rnn_gradients,
    three_step_edges,
    three_step_gradients,
    three_step_nodes,
    totals_through_time,
    two_layers,
)
from hypothesis import given
from hypothesis import strategies as st
from test_unrolled import (
    SEEDS,
    SIZES,
    assert_equal,
    attention_by_hand,
    exact,
    parts,
    states_of,
)
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from lit_models.networks import AttentionRNN, ConvStack, GatedRNN, VanillaRNN


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def state_by_state(later: Tensor, earlier: Tensor) -> Tensor:
    """dh[t]/dh[s] (H, H) over all paths, of two states (1, H)."""
    rows = [torch.autograd.grad(unit, earlier, retain_graph=True)[0][0] for unit in later[0]]
    return torch.stack(rows)


# Convolutions


@given(SIZES, SIZES, SIZES, SIZES, st.integers(0, 9), SEEDS)
@exact
def test_conv1d(channels: int, filters: int, k: int, stride: int, more: int, seed: int) -> None:
    torch.manual_seed(seed)
    length = k + more
    x, weight = randn(channels, length), randn(filters, channels, k)
    x.requires_grad_()
    weight.requires_grad_()
    output = F.conv1d(x[None], weight, stride=stride)[0]
    by_output = randn(*output.shape)
    by_x, by_weight = torch.autograd.grad(output, [x, weight], by_output)
    assert_equal(conv1d_weight_gradient(x, by_output, k, stride), by_weight)
    assert_equal(conv1d_input_gradient(by_output, weight, length, stride), by_x)


@given(SIZES, SIZES, SIZES, st.integers(0, 9), SEEDS)
@exact
def test_jacobians_of_one_filter(channels: int, k: int, stride: int, more: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = randn(channels, k + more), randn(1, channels, k)
    by_x, by_weight = jacobian(lambda x, w: F.conv1d(x, w, stride=stride), (x, weight))
    assert_equal(conv1d_by_input(weight, k + more, stride), by_x)
    assert_equal(conv1d_by_weight(x, k, stride), by_weight)


def test_shapes_of_the_question() -> None:
    """Five channels, length 7, kernel 3, stride 2."""
    assert conv1d_by_weight(randn(5, 7), 3, 2).shape == (1, 3, 1, 5, 3)
    by_input = conv1d_by_input(randn(1, 5, 3), 7, 2)
    assert by_input.shape == (1, 3, 5, 7)
    assert by_input.count_nonzero() == 45
    assert conv1d_weight_gradient(randn(5, 7), randn(1, 3), 3, 2).shape == (1, 5, 3)


@given(st.tuples(SIZES, SIZES), st.tuples(SIZES, SIZES), SEEDS)
@exact
def test_conv2d(kernel_size: tuple[int, int], output_size: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    height, width = (k + o - 1 for k, o in zip(kernel_size, output_size, strict=True))
    image, kernel = randn(height, width).requires_grad_(), randn(*kernel_size)
    output = F.conv2d(image[None, None], kernel[None, None])[0, 0]
    by_output = randn(*output.shape)
    (by_image,) = torch.autograd.grad(output, image, by_output)
    assert_equal(conv2d_input_gradient(by_output, kernel), by_image)


def test_an_edge_filter_has_no_gradient_inside_an_even_one() -> None:
    """The weights sum to 0, so a gradient that is the same everywhere cancels but at the border."""
    edges = torch.tensor([[-1.0, -1, -1], [-1, 8, -1], [-1, -1, -1]])
    gradient = conv2d_input_gradient(torch.ones(6, 6), edges)
    assert not gradient[2:-2, 2:-2].any()
    assert gradient.abs().sum() > 0


def measured_factor(network: nn.Module, x: Tensor) -> float:
    """Mean factor on the gradient of a layer, of 20 in the middle of 30."""
    torch.manual_seed(0)
    states = [x.requires_grad_()]
    for layer in network.children():
        states.append(layer(states[-1]))
    early, late = torch.autograd.grad(states[-1], [states[5], states[25]], randn(*x.shape).float())
    return (early.norm() / late.norm()).item() ** (1 / 20)


@pytest.mark.parametrize("init", ["torch", "kaiming"])
def test_factor_of_a_layer_as_it_is_drawn(init: Any) -> None:
    """0.387 by PyTorch's initialisation, 13 decades in 32 layers; 0.949 by He's, 0.7 decades."""
    torch.manual_seed(0)
    layers = ConvStack(30, width=64, init=init).layers
    network = nn.Sequential(*(nn.Sequential(conv, nn.ReLU()) for conv in layers))
    found = measured_factor(network, torch.rand(4, 64, 7, 7))
    assert found == pytest.approx(layer_factor(init, 7), rel=0.02)


def test_batch_normalisation_explodes() -> None:
    torch.manual_seed(0)
    layers = (nn.Sequential(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU()) for _ in range(30))
    found = measured_factor(nn.Sequential(*layers), torch.rand(256, 128))
    assert found == pytest.approx(BATCH_NORM_FACTOR, rel=0.02)


def test_a_filter_from_a_signal_and_its_output() -> None:
    """Each output is an equation in the filter. Berkeley homework 6, question 6b."""
    signal = torch.tensor([1.0, 4, 0, -2, 3], dtype=torch.float64)
    output = torch.tensor([-2.0, 2, 11], dtype=torch.float64)
    kernel = torch.linalg.solve(signal.unfold(0, 3, 1), output)
    assert_equal(kernel, torch.tensor([2.0, -1, 3], dtype=torch.float64))
    assert_equal(F.conv1d(signal[None, None], kernel[None, None])[0, 0], output)


@given(SIZES, st.integers(0, 9), SEEDS)
@exact
def test_any_filter_from_a_signal_and_its_output(k: int, more: int, seed: int) -> None:
    torch.manual_seed(seed)
    signal, kernel = randn(2 * k - 1 + more), randn(k)  # at least k outputs
    output = F.conv1d(signal[None, None], kernel[None, None])[0, 0]
    found = torch.linalg.lstsq(signal.unfold(0, k, 1), output[:, None]).solution[:, 0]
    torch.testing.assert_close(found, kernel, rtol=1e-5, atol=1e-5)  # equations may be near alike


def test_transpose_convolution() -> None:
    """Every input times the whole filter, overlaps summed. Berkeley homework 6, question 6c."""
    image, kernel = torch.tensor([[[-1.0, 2], [3, 1]], [[1.0, -1], [0, 1]]], dtype=torch.float64)
    output = F.conv_transpose2d(image[None, None], kernel[None, None])[0, 0]
    assert output.tolist() == [[-1, 3, -2], [3, -3, 1], [0, 3, 1]]
    assert_equal(conv2d_input_gradient(image, kernel), output)  # a convolution's backward pass

    (a, b, c), (x, y, z) = randn(2, 3)
    output = F.conv_transpose1d(
        torch.stack([a, b, c])[None], torch.stack([x, y, z])[None, None], stride=2
    )
    expected = [a * x, a * y, a * z + b * x, b * y, b * z + c * x, c * y, c * z]
    assert_equal(output[0], torch.stack(expected))


# Recurrent networks


@given(st.integers(1, 12), st.floats(-2, 2), st.floats(-1.5, 1.5), SEEDS)
@exact
def test_scalar_rnn(t: int, a: float, b: float, seed: int) -> None:
    torch.manual_seed(seed)
    core = VanillaRNN(1, 1, nonlinearity="identity", bias=False).double()
    layer: Any = core.layers[0]
    nn.init.constant_(layer.weight_x, a)
    nn.init.constant_(layer.weight_h, b)
    x = randn(1, t, 1)
    gradients = torch.autograd.grad(core(x)[0, -1, 0], [layer.weight_x, layer.weight_h])
    expected = scalar_rnn_gradients(x.flatten().tolist(), a, b)
    assert [g.item() for g in gradients] == pytest.approx(expected, rel=1e-10, abs=1e-10)


@given(SIZES, SIZES, st.integers(1, 8), SEEDS)
@exact
def test_linear_rnn(d: int, h: int, t: int, seed: int) -> None:
    torch.manual_seed(seed)
    core = VanillaRNN(d, h, nonlinearity="identity").double()
    weight_h = core.get_parameter("layers.0.weight_h")
    (states,) = states_of(core, randn(1, t, d))
    *by_states, by_last = torch.autograd.grad(states[-1].sin().sum(), states)
    for steps, by_state in enumerate(reversed(by_states), start=1):
        assert_equal(linear_rnn_state_gradient(weight_h, by_last[0], steps), by_state[0])


NUMBERS = st.floats(-3, 3)


@given(NUMBERS, st.tuples(NUMBERS, NUMBERS, NUMBERS))
@exact
def test_three_steps(w: float, u: tuple[float, float, float]) -> None:
    """Each node's derivative, and dy/dw = u3 + 2 w u2 + 3 w^2 u1 from the three edges of w."""
    weight, (u1, u2, u3) = torch.tensor(w, dtype=torch.float64, requires_grad=True), u
    p = torch.tensor(u1, dtype=torch.float64, requires_grad=True)
    q = weight * p
    r = q + u2
    s = weight * r
    t = s + u3
    y = weight * t
    nodes = [p, q, r, s, t, y]
    assert [n.item() for n in nodes] == pytest.approx([*three_step_nodes(w, u)], abs=1e-10)
    by_weight, *by_nodes = torch.autograd.grad(y, [weight, *nodes])
    assert [b.item() for b in by_nodes] == pytest.approx([*three_step_gradients(w)], abs=1e-10)
    assert by_weight.item() == pytest.approx(sum(three_step_edges(w, u)), abs=1e-10)
    assert by_weight.item() == pytest.approx(u3 + 2 * w * u2 + 3 * w**2 * u1, abs=1e-10)


@given(SIZES, SIZES, st.integers(1, 8), SEEDS)
@exact
def test_gated_rnn(d: int, h: int, t: int, seed: int) -> None:
    """One step's Jacobian, the recursion back in time, and the gradient by W_x."""
    torch.manual_seed(seed)
    core = GatedRNN(d, h).double()
    layer: Any = core.layers[0]
    x = randn(1, t, d)
    (states,) = states_of(core, x)
    before = torch.cat([torch.zeros(1, h, dtype=torch.float64), *states[:-1]])  # (T, H)
    gates = torch.sigmoid(x[0] @ layer.weight_c.T + before @ layer.weight_h.T)
    candidates = x[0] @ layer.weight_x.T
    jacobians = [
        gated_rnn_jacobian(gates[i], before[i], candidates[i], layer.weight_h) for i in range(1, t)
    ]
    for i, by_hand in enumerate(jacobians, start=1):
        assert_equal(by_hand, state_by_state(states[i], states[i - 1]))

    loss = torch.stack(states).sin().sum()  # reads every state
    by_weight, *totals = torch.autograd.grad(loss, [layer.weight_x, *states])
    recursion = totals_through_time([state[0].cos() for state in states], jacobians)
    assert_equal(torch.stack(recursion), torch.cat(totals))
    assert_equal(gated_rnn_weight_gradient(gates, torch.stack(recursion), x[0]), by_weight)


def direct_jacobians(
    layer: Any, past: int, x: Tensor, states: list[Tensor], s: int
) -> list[Tensor]:
    """Direct dh[t]/dh[s] for the states behind s that look back on it; all counted from 0."""
    _, weights, _ = attention_by_hand(layer, past, x)
    return [
        attention_rnn_jacobian(
            weights[s + lag][lag], *parts(layer, past, lag), states[s + lag][0], states[s][0]
        )
        for lag in range(1, min(past, len(states) - 1 - s) + 1)
    ]


@given(SIZES, st.integers(2, 6), SEEDS)
@exact
def test_jacobian_of_attention_rnn_2(h: int, t: int, seed: int) -> None:
    torch.manual_seed(seed)
    core = AttentionRNN(h, h, past=2).double()
    x = randn(1, t, h)
    (states,) = states_of(core, x)
    by_hand, *_ = direct_jacobians(core.layers[0], 2, x[0], states, t - 2)
    assert_equal(by_hand, state_by_state(states[-1], states[-2]))


@given(SIZES, st.integers(1, 3), st.integers(2, 7), SEEDS)
@exact
def test_a_state_reaches_the_loss_through_the_next_k_states(
    h: int, past: int, t: int, seed: int
) -> None:
    torch.manual_seed(seed)
    core = AttentionRNN(h, h, past).double()
    x = randn(1, t, h)
    (states,) = states_of(core, x)
    totals = [g[0] for g in torch.autograd.grad(states[-1].sin().sum(), states)]
    for s in range(t - 1):
        jacobians = direct_jacobians(core.layers[0], past, x[0], states, s)
        later = totals[s + 1 : s + 1 + len(jacobians)]
        assert_equal(attention_rnn_state_gradient(jacobians, later), totals[s])


# A network of two layers


def by_autograd(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, x: Tensor, y: float) -> TwoLayers:
    leaves = [leaf.clone().requires_grad_() for leaf in (w1, b1, w2, b2)]

    def first(w: Tensor) -> Tensor:
        return F.linear(x, w, leaves[1])

    def second(a: Tensor) -> Tensor:
        return F.linear(a, leaves[2], leaves[3])

    def cost(p: Tensor) -> Tensor:
        return F.binary_cross_entropy(p, torch.full_like(p, y), reduction="none")

    z1 = first(leaves[0])
    a1 = z1.relu()
    z2 = second(a1)
    p = z2.sigmoid()
    loss = cost(p)
    by_z2, by_a1, by_z1, by_w1, by_b1, by_w2, by_b2 = torch.autograd.grad(
        loss.sum(), [z2, a1, z1, *leaves]
    )
    return TwoLayers(
        z1,
        a1,
        z2,
        p,
        loss,
        loss_by_p=jacobian(cost, p)[0],
        p_by_z2=jacobian(torch.sigmoid, z2)[0],
        z2_by_a1=jacobian(second, a1),
        a1_by_z1=jacobian(torch.relu, z1),
        z1_by_w1=jacobian(first, leaves[0]),
        by_z2=by_z2,
        by_a1=by_a1,
        by_z1=by_z1,
        by_w1=by_w1,
        by_w2=by_w2,
        by_b1=by_b1,
        by_b2=by_b2,
    )


@given(SIZES, SIZES, st.sampled_from([0.0, 1.0]), SEEDS)
@exact
def test_two_layers(d: int, h: int, y: float, seed: int) -> None:
    torch.manual_seed(seed)
    network = randn(h, d), randn(h), randn(1, h), randn(1), randn(d)
    by_hand, expected = two_layers(*network, y), by_autograd(*network, y)
    for name in TwoLayers._fields:
        assert_equal(getattr(by_hand, name), getattr(expected, name))


def test_numbers_of_the_question() -> None:
    """UCSB homework 2, problem 1: p, all that its seven parts ask for, and what leads there."""
    found = two_layers(
        w1=torch.tensor([[-0.2, 0.1], [0.5, 0.3], [0.35, 0.4]], dtype=torch.float64),
        b1=torch.tensor([1.2, 0.0, -0.7], dtype=torch.float64),
        w2=torch.tensor([[1.5, 0.6, -0.4]], dtype=torch.float64),
        b2=torch.tensor([0.5], dtype=torch.float64),
        x=torch.tensor([1.5, -0.8], dtype=torch.float64),
        y=0.0,
    )
    expected: dict[str, Any] = {
        "z1": [0.82, 0.51, -0.495],
        "a1": [0.82, 0.51, 0],
        "z2": [2.036],
        "p": [0.884525334873],
        "loss": [2.158704122634],
        "loss_by_p": [8.659908205006],
        "p_by_z2": [0.102140266840],
        "z2_by_a1": [[1.5, 0.6, -0.4]],
        "a1_by_z1": [[1, 0, 0], [0, 1, 0], [0, 0, 0]],
        "z1_by_w1": [
            [[1.5, -0.8], [0, 0], [0, 0]],
            [[0, 0], [1.5, -0.8], [0, 0]],
            [[0, 0], [0, 0], [1.5, -0.8]],
        ],
        "by_z2": [0.884525334873],
        "by_a1": [1.326788002310, 0.530715200924, -0.353810133949],
        "by_z1": [1.326788002310, 0.530715200924, 0],
        "by_w1": [[1.990182003465, -1.061430401848], [0.796072801386, -0.424572160739], [0, 0]],
        "by_w2": [[0.725310774596, 0.451107920785, 0]],
        "by_b1": [1.326788002310, 0.530715200924, 0],
        "by_b2": [0.884525334873],
    }
    assert [*expected] == [*TwoLayers._fields]
    for name, values in expected.items():
        torch.testing.assert_close(
            getattr(found, name), torch.tensor(values, dtype=torch.float64), rtol=0, atol=1e-9
        )
