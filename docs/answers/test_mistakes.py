"""Wrong or incomplete answers to the courses' questions, each with an example that refutes it.

A test is named for the document and its question: 002 answers NYU's homework 2, 004 answers
Berkeley's homework 6. Its docstring quotes what is wrong; it evaluates that as given, says by how
much it is off, and checks what is right.
"""

import math
from functools import partial
from itertools import chain, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closed_forms import (
    attention_rnn_jacobian,
    attention_rnn_state_gradient,
    conv1d_by_input,
    conv1d_by_weight,
    conv1d_weight_gradient,
    gated_rnn_weight_gradient,
    linear_rnn_state_gradient,
)
from test_closed_forms import direct_jacobians, randn, state_by_state
from test_unrolled import assert_equal, filled, states_of
from token_tree import BERKELEY, NETWORK, NEURAL, Prefix, TokenTree
from torch import Tensor, nn

from lit_models import LitClassifier
from lit_models.networks import LSTM, AttentionRNN, GatedRNN, Recurrent, VanillaRNN

# 002, convolutions


def test_002_1_1a() -> None:
    """(11 - 5) / 4 + 1, "after rounding up": it is 12, and rounded down."""
    size = nn.Conv2d(1, 1, (5, 4), stride=4)(torch.zeros(1, 1, 12, 21)).shape[2:]
    assert size == (2, 5) == ((12 - 5) // 4 + 1, (21 - 4) // 4 + 1)
    given = (11 - 5) / 4 + 1, (21 - 4) / 4 + 1
    assert given == (2.5, 5.25)
    assert tuple(map(math.ceil, given)) == (3, 6)  # not the 2 x 5 that is said to follow


@pytest.mark.parametrize(
    ("height", "k", "padding", "stride", "dilation", "given", "right"),
    [(12, 5, 0, 4, 1, 2.75, 2), (64, 5, 0, 2, 1, 30.5, 30), (9, 3, 1, 4, 2, 2.5, 2)],
)
def test_002_1_1b(
    height: int, k: int, padding: int, stride: int, dilation: int, given: float, right: int
) -> None:
    """The size (H + 2P - D (K - 1) - 1) / S + 1 without a floor is none: the rest is left out."""
    conv = nn.Conv2d(1, 3, k, stride, padding, dilation)
    assert conv(torch.zeros(1, 1, height, height)).shape[1:] == (3, right, right)
    assert (height + 2 * padding - dilation * (k - 1) - 1) / stride + 1 == given
    assert math.floor(given) == right < given


X, W = torch.arange(1.0, 36).view(5, 7), torch.arange(1.0, 16).view(1, 5, 3)  # all entries differ


def test_002_1_1c_ii() -> None:
    """df/dW[0, i, j] = "x[j % 3 + 2i, j // 3]": place and channel belong the other way round."""
    right = conv1d_by_weight(X, 3, 2).reshape(3, 15)
    wrong = outside = 0
    for i in range(3):
        for j in range(15):
            assert right[i, j] == X[j // 3, j % 3 + 2 * i]
            row, column = j % 3 + 2 * i, j // 3
            outside += row >= 5
            wrong += row >= 5 or bool(X[row, column] != right[i, j])
    assert (wrong, outside) == (38, 10)  # of 45


@pytest.mark.parametrize(
    ("position", "wrong", "outside"),
    [
        (lambda m, n: 7 * m + 3 * n, 60, 0),
        (lambda m, n: 7 * m * 3 * n, 40, 4),  # as the sign between them reads
        (lambda m, n: 9 * m + n, 0, 0),
    ],
    ids=["sum", "product", "right"],
)
def test_002_1_1c_iii(position: Any, wrong: int, outside: int) -> None:
    """df/dx[i, "7m x 3n"] = W[0, i, n], shape 5 x 21: flattened, the place is 7m + (2m + n)."""
    right = conv1d_by_input(W, 7, 2)[0].transpose(0, 1).reshape(5, 21)  # of 1 x 3 x 5 x 7
    given = torch.zeros(5, 21)
    places = [(position(m, n), n) for m in range(3) for n in range(3)]
    for place, n in places:
        if place < 21:
            given[:, place] = W[0, :, n]
    assert int((given != right).sum()) == wrong  # of 105
    assert sum(place >= 21 for place, _ in places) == outside


def test_002_1_1c_iv() -> None:
    """dl/dW as a forward pass of "the same format" over x: the stride must become a dilation.

    With the stride left where it is the shape is right, and nothing else.
    """
    by_output = torch.tensor([[1.0, 2.0, 4.0]])
    right = conv1d_weight_gradient(X, by_output, kernel_size=3, stride=2)
    strided = F.conv1d(X[:, None], by_output[None], stride=2).transpose(0, 1)
    dilated = F.conv1d(X[:, None], by_output[None], dilation=2).transpose(0, 1)
    assert_equal(dilated, right)
    assert strided.shape == right.shape
    assert_equal(strided - right, torch.tensor([-10.0, -3.0, 4.0]).expand(1, 5, 3))


# 002, the gated network


def test_002_1_2_1c() -> None:
    """dl/dW_x = "((1 - c[t]) * dl/dh[t]) x[t]^T" is one term of the sum over t = 1..K.

    And dl/dh[t] has to count all paths: the direct derivatives give another sum.
    """
    torch.manual_seed(0)
    core = GatedRNN(2, 3).double()
    layer: Any = core.layers[0]
    x = randn(1, 6, 2)
    (states,) = states_of(core, x)
    before = torch.cat([torch.zeros_like(states[0]), *states[:-1]])
    gates = torch.sigmoid(x[0] @ layer.weight_c.T + before @ layer.weight_h.T)
    loss = torch.stack(states).sin().sum()
    right, *by_states = torch.autograd.grad(loss, [layer.weight_x, *states])
    totals, direct = torch.cat(by_states), torch.cat(states).cos()
    assert_equal(gated_rnn_weight_gradient(gates, totals, x[0]), right)

    def error(by_weight: Tensor) -> float:
        return ((by_weight - right).norm() / right.norm()).item()

    single = [slice(t, t + 1) for t in range(6)]
    terms = [gated_rnn_weight_gradient(gates[one], totals[one], x[0, one]) for one in single]
    assert min(map(error, terms)) == pytest.approx(0.384, abs=1e-3)
    with_direct = gated_rnn_weight_gradient(gates, direct, x[0])
    assert error(with_direct) == pytest.approx(0.537, abs=1e-3)


def carried(core: GatedRNN, x: Tensor) -> float:
    """dh[T]/dh[1] of a network of one unit."""
    (states,) = states_of(core, x)
    return state_by_state(states[-1], states[0]).item()


def test_002_1_2_1d() -> None:
    """It is "not subject to gradient vanishing": it vanishes where gates are near 0.

    The path c[t] h[t-1] keeps the gradient only as far as c[t] is near 1; by W_h it can explode.
    """
    core = filled(GatedRNN(2, 1).double(), 0.0)
    layer: Any = core.layers[0]
    layer.weight_x.data[0, 0] = layer.weight_c.data[0, 1] = 1.0  # inputs: candidate, gate
    x = torch.ones(1, 20, 2, dtype=torch.float64)
    for gate, expected in [(-2.0, 2.815e-18), (0.0, 1.907e-6), (5.0, 0.8802)]:
        x[..., 1] = gate
        assert carried(core, x) == pytest.approx(expected, rel=1e-3, abs=0)

    layer.weight_h.data[:] = 4.0
    h = 0.0  # inputs that hold c[t] at 1/2 and W_x x[t] at 2 below h[t-1]: J = 1/2 + 2 * 4 / 4
    for t in range(20):
        x[0, t] = torch.tensor([h - 2, -4 * h])
        h -= 1
    assert carried(core, x) == pytest.approx(2.5**19)  # 3.6e7


# 002, attention to past states


def one_unit(past: Any) -> tuple[list[Tensor], Tensor]:
    """States of x = 1, 1, 0 and the values v_0..v_2 at t = 3, where every weight is 1."""
    core = filled(AttentionRNN(1, 1, past).double(), 1.0)
    x = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    (states,) = states_of(core, x.view(1, 3, 1))
    return states, torch.cat([x[2:], states[1][0], states[0][0]])


def test_002_1_2_2d() -> None:
    """The sum over i up to infinity: a state that does not exist still has the weight exp(0) = 1.

    The more of them, the less is left for those that exist; so the sum ends at the first state.
    """
    states, v = one_unit(past="inf")
    found = []
    for missing in (0, 10, 1000, 100_000):
        given = F.pad(v, (0, missing))
        found.append((given.pow(2).softmax(0) @ given).item())  # q = k = v
    assert states[-1].item() == pytest.approx(found[0])
    assert found == pytest.approx([0.84464, 0.33076, 5.4018e-3, 5.4362e-5], rel=1e-4, abs=0)


def test_002_1_2_2d_one_matrix_for_input_and_states() -> None:
    """The sheet's "Kx[t], Kh[t-1], ..." is no mistake: the hint allows tying the input as well.

    Cut at the first state, its equations are those of a network whose two sets of weights agree.
    """
    torch.manual_seed(0)
    core = AttentionRNN(3, 3, past="inf").double()
    layer: Any = core.layers[0]
    layer.weight_x.data = layer.weight_h.data.clone()
    query, key, value = layer.weight_h.chunk(3)
    x = randn(1, 6, 3)
    (states,) = states_of(core, x)
    for t, state in enumerate(states):
        read = torch.stack([x[0, t], *(before[0] for before in reversed(states[:t]))])
        scores = ((read @ query.T) * (read @ key.T)).sum(1)
        assert_equal(state[0], scores.softmax(0) @ (read @ value.T))


def test_002_1_2_2e() -> None:
    """dh[t]/dh[t-1] of a_i = w_i / (w_0 + w_1 + w_2), in shapes that fit: that is no softargmax."""
    states, v = one_unit(past=2)
    w = v**2
    a_1, by_score = w.softmax(0)[1], 2 * v[1]  # dw_1/dh[t-1]
    given = (v[1] / w.sum() - (w * v).sum() / w.sum() ** 2) * by_score + a_1
    one = torch.ones(1, 1, dtype=torch.float64)
    right = attention_rnn_jacobian(a_1, one, one, one, states[2][0], states[1][0])
    assert_equal(right, state_by_state(states[2], states[1]))
    assert right.item() == pytest.approx(0.5535, abs=1e-4)
    assert given.item() == pytest.approx(0.4223, abs=1e-4)


def test_002_1_2_2f() -> None:
    """dl/dh[T] as a sum over all "t > T": with derivatives over all paths, paths count many times.

    It takes the direct derivatives, which are 0 but for t = T+1..T+k.
    """
    torch.manual_seed(0)
    core = AttentionRNN(3, 3, past=2).double()
    x = randn(1, 8, 3)
    (states,) = states_of(core, x)
    by_states = torch.autograd.grad(states[-1].sin().sum(), states, retain_graph=True)
    by_first, *by_later = [by_state[0] for by_state in by_states]
    every = [state_by_state(later, states[0]) for later in states[1:]]
    direct = direct_jacobians(core.layers[0], 2, x[0], states, 0)
    assert_equal(attention_rnn_state_gradient(direct, by_later[:2]), by_first)
    given = attention_rnn_state_gradient(every, by_later)
    assert (given.norm() / by_first.norm()).item() == pytest.approx(3.650, abs=1e-3)


# 002, the spikes


def rmsprop_steps(gradients: list[float], clip: float = math.inf, eps: float = 1e-8) -> list[float]:
    """|Step| / learning rate, of one number that is given its gradients."""
    parameter = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.RMSprop([parameter], lr=0.001, eps=eps)
    steps = []
    for gradient in gradients:
        before = parameter.item()
        parameter.grad = torch.full_like(parameter, gradient)
        nn.utils.clip_grad_norm_(parameter, clip)
        optimizer.step()
        steps.append(abs(parameter.item() - before) / 0.001)
    return steps


PLATEAU = [0.01] * 800


def test_002_1_3a() -> None:
    """That the "gradient explodes": a large one makes no large step, one larger than before does.

    RMSprop divides it by its running RMS, so that the step is the learning rate if the gradient is
    always 10^4, and 10 times that, 1 / sqrt(1 - alpha), if it rises from 0.01 to 10 or to 10^4.
    """
    always = rmsprop_steps([1e4] * 800)[-1]
    rising = rmsprop_steps([*PLATEAU, 10.0])[-1]
    exploding = rmsprop_steps([*PLATEAU, 1e4])[-1]
    assert always == pytest.approx(1, rel=1e-3)
    assert rising == pytest.approx(10, rel=1e-3)
    assert exploding == pytest.approx(rising, rel=1e-3)


def test_002_1_3b() -> None:
    """Parameters that "move farther away" do not explain a loss above ln 4, sure mistakes do.

    Cross-entropy has no upper bound: uniform outputs cost ln 4, however far the weights are.
    """
    far, near = (filled(nn.Linear(8, 4), value) for value in (1000.0, 0.0))
    near.weight.data[0] = 1.25  # sure of class 0
    x, target = torch.ones(1, 8), torch.tensor([1])
    assert far.weight.norm() > 1000 * near.weight.norm()
    assert F.cross_entropy(far(x), target).item() == pytest.approx(math.log(4))
    assert F.cross_entropy(near(x), target).item() == pytest.approx(10, abs=1e-3)


def test_002_1_3c_clipping() -> None:
    """To "clip the gradient so that it will never get too big": RMSprop's step does not shrink.

    Its RMS is that of clipped gradients too. Where every gradient is clipped the limit cancels out,
    and where only the rise is, it has to be within the reach of the RMS to make a difference.
    """
    torch.manual_seed(0)
    gradients = randn(50).exp().tolist()
    assert min(gradients) > 1e-2
    less, least = (rmsprop_steps(gradients, clip, eps=0.0) for clip in (1e-2, 1e-4))
    assert less == pytest.approx(least, rel=1e-9)
    rise = [*PLATEAU, 1e4]
    assert rmsprop_steps(rise)[-1] == pytest.approx(10, abs=0.001)
    assert rmsprop_steps(rise, clip=1.0)[-1] == pytest.approx(9.95, abs=0.001)
    assert rmsprop_steps(rise, clip=0.01)[-1] == pytest.approx(1, abs=0.001)


def test_002_1_3c_batch_norm() -> None:
    """To "apply batch normalization": the model was not to be changed, and that changes it.

    It adds parameters, and what it says of a sequence depends on the others in the batch.
    """
    torch.manual_seed(0)
    network = Recurrent(LSTM(8, 12), 4)
    normalised = nn.Sequential(network, nn.BatchNorm1d(4))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (network, normalised)]
    assert sizes == [1108, 1116]
    one, some, others = torch.randn(3, 5, 9, 8)
    first, second = torch.cat([one[:1], some]), torch.cat([one[:1], others])
    assert torch.allclose(network(first)[0], network(second)[0], atol=1e-6)
    moved = (normalised(first)[0] - normalised(second)[0]).abs().max()
    assert moved.item() == pytest.approx(0.525, abs=1e-3)


# 004, beam search


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (2, {(NEURAL, NETWORK): -1.25, (NETWORK, NEURAL): -1.33}),
        (3, {(NEURAL, NETWORK, NETWORK): -1.85, (NETWORK, NEURAL, NETWORK): -1.93}),
    ],
    ids=["2b", "2c"],
)
def test_004_2b_2c(length: int, expected: dict[Any, float]) -> None:
    """The "log probability -0.6" is one token's: a sequence has the sum of its tokens'."""
    found = dict(TokenTree(BERKELEY).search(2, length))
    assert found == pytest.approx(expected, abs=1e-6)
    assert max(found.values()) < -0.6 - 0.6


def test_004_2d() -> None:
    """No, for "it will only store k": that loses nothing as long as the best prefix is among them.

    Two of four are enough at length 2, three of eight at length 3. Two miss it there, because
    `neural neural` is the third of length 2.
    """
    tree = TokenTree(BERKELEY)
    assert tree.search(2, 2)[0][0] == tree.best(2)[0]
    assert tree.search(3)[0][0] == tree.best()[0] == (NEURAL,) * 3
    assert tree.best()[1] - tree.search(2)[0][1] == pytest.approx(0.39, abs=1e-6)
    assert tree.search(3, 2)[2][0] == tree.best()[0][:2]
    assert tree.best()[0][:2] not in dict(tree.search(2, 2))


def test_004_2d_by_more() -> None:
    """The same with three tokens: the third best first token is the only one sure how to go on.

    Two hypotheses find 0.4 / 9, a fifth of 0.25 * 0.98^2; three find the best.
    """
    sure, unsure = [0.98, 0.01, 0.01], [1 / 3] * 3
    probabilities: dict[Prefix, list[float]] = {(): [0.40, 0.35, 0.25]}
    for first in range(3):
        for prefix in [(first,), *((first, second) for second in range(3))]:
            probabilities[prefix] = sure if first == 2 else unsure
    tree = TokenTree({prefix: [math.log(p) for p in row] for prefix, row in probabilities.items()})
    assert tree.best() == ((2, 0, 0), pytest.approx(math.log(0.25 * 0.98**2)))
    assert tree.best()[1] - tree.search(2)[0][1] == pytest.approx(1.687, abs=1e-3)
    for width in (3, 4):
        assert tree.search(width)[0][0] == (2, 0, 0)


def test_004_2e() -> None:
    """The cost "O(T k^2 log k)" leaves out that k M logits are read at each step but the first.

    With ten times the tokens ten times as many are read, and for k = 1 the formula says none.
    """
    torch.manual_seed(0)
    length, read = 3, {}
    for k in (1, 2, 4):
        for size in (5, 50):
            row = torch.randn(size).log_softmax(0).tolist()
            prefixes = chain.from_iterable(product(range(size), repeat=t) for t in range(length))
            tree = TokenTree(dict.fromkeys(prefixes, row))
            tree.search(k)
            read[k, size] = tree.read
            assert tree.read == size + (length - 1) * k * size <= length * k * size
        assert read[k, 50] == 10 * read[k, 5]
    assert read[1, 5] == 15 > length * 1**2 * math.log(1)


# 004, recurrent networks


def linear_rnn(weight_h: list[list[float]]) -> VanillaRNN:
    size = len(weight_h)
    core = VanillaRNN(1, size, nonlinearity="identity", bias=False).double()
    layer: Any = core.layers[0]
    nn.init.ones_(layer.weight_x)
    layer.weight_h.data = torch.tensor(weight_h, dtype=torch.float64)
    return core


@pytest.mark.parametrize(
    ("weight_h", "explodes"),
    [
        ([[0.5]], False),
        ([[1.2]], True),
        ([[0.6, 0.6], [0.6, 0.6]], True),  # every weight below 1, but the eigenvalue 1.2
        ([[0.5, 10.0], [0.0, 0.5]], False),  # a weight above 1, but the eigenvalues 0.5
    ],
)
def test_004_3e(weight_h: list[list[float]], explodes: bool) -> None:
    """If "w is smaller than 1, the h_t term will become zero": the gradient does, not the state.

    dl/dh[t] = (W_h^T)^(T-t) dl/dh[T], so the eigenvalues decide; above 1 it explodes.
    """
    steps = 60
    core: Any = linear_rnn(weight_h)
    (states,) = states_of(core, torch.ones(1, steps, 1, dtype=torch.float64))
    by_first, by_last = torch.autograd.grad(states[-1].sum(), [states[0], states[-1]])
    weights = core.layers[0].weight_h
    assert_equal(by_first[0], linear_rnn_state_gradient(weights, by_last[0], steps - 1))
    assert (by_first.norm() > 1e4) if explodes else (by_first.norm() < 1e-12)
    assert states[-1].abs().min() >= 2  # with w = 0.5, h[t] -> 1 / (1 - 0.5)


def test_004_3f() -> None:
    """tanh vanishes more for "its output between 0 and 1": it is from -1 to 1, its slope to 1.

    An output from 0 to 1 is the sigmoid's, whose slope is at most 1/4. Near 0 tanh passes nearly
    the whole gradient on; only saturated it vanishes.
    """
    z = torch.linspace(-5, 5, 1001, dtype=torch.float64, requires_grad=True)
    slopes = {}
    for activation in (torch.tanh, torch.sigmoid):
        (slope,) = torch.autograd.grad(activation(z).sum(), z)
        slopes[activation] = slope.max().item()
    assert slopes[torch.tanh] == pytest.approx(1, abs=1e-4)
    assert slopes[torch.sigmoid] == pytest.approx(0.25, abs=1e-4)

    core = VanillaRNN(1, 1, bias=False).double()
    layer: Any = core.layers[0]
    nn.init.ones_(layer.weight_h)
    reached = {}
    for scale in (0.001, 3.0):
        nn.init.constant_(layer.weight_x, scale)
        x = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(10).view(1, 20, 1)
        (states,) = states_of(core, x)
        reached[scale] = state_by_state(states[-1], states[0]).item()
    assert min(states).item() < -0.9  # far below 0
    assert reached[0.001] == pytest.approx(0.99999, abs=2e-6)
    assert reached[3.0] == pytest.approx(4.16e-23, rel=1e-2, abs=0)


def test_004_3f_small_weights() -> None:
    """tanh "will lead more to vanishing gradients": with small weights ReLU does.

    With W_h orthogonal times 1/2 tanh, nearly linear, leaves 2^-19 over 19 steps; ReLU lets half of
    the units through at each, which leaves about 2^(-19/2) of that.
    """
    reached = {"tanh": 0.0, "relu": 0.0}
    for nonlinearity in reached:
        torch.manual_seed(0)
        options: Any = {"nonlinearity": nonlinearity, "init": "orthogonal", "weight_scale": 0.5}
        core = VanillaRNN(8, 128, bias=False, **options).double()
        (states,) = states_of(core, 0.1 * randn(1, 20, 8))
        first, last = torch.autograd.grad(states[-1].square().sum(), (states[0], states[-1]))
        reached[nonlinearity] = (first.norm() / last.norm()).item()
    assert reached["tanh"] == pytest.approx(2**-19, rel=0.01, abs=0)
    assert reached["relu"] / reached["tanh"] == pytest.approx(2**-9.5, rel=0.5, abs=0)


@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
def test_004_3g(mean: bool) -> None:
    """A loss at every step "helps to learn dependencies across long sequences": it adds near ones.

    The gradient at the first state grows a lot. But how it answers to the last target, 19 steps
    later, stays the same (1 / T of that, where the losses are averaged).
    """
    torch.manual_seed(0)
    core = VanillaRNN(1, 4).double()
    x, target = randn(1, 20, 1), randn(20)

    def by_first(target: Tensor, last_only: bool) -> Tensor:
        (states,) = states_of(core, x)
        errors = (torch.cat(states).sum(1) - target) ** 2
        loss = errors[-1] if last_only else errors.mean() if mean else errors.sum()
        return torch.autograd.grad(loss, states[0])[0][0]

    later = target.clone()
    later[-1] += 100
    last, every = (by_first(target, last_only) for last_only in (True, False))
    larger = (every.norm() / last.norm()).item()
    assert larger == pytest.approx(1.06e7 if mean else 2.12e8, rel=1e-2)
    answer, among_others = by_first(later, True) - last, by_first(later, False) - every
    torch.testing.assert_close(among_others * (20 if mean else 1), answer, rtol=1e-6, atol=0)


# 004, the rest


def test_004_5c() -> None:
    """Faster by label smoothing, as it needs no "more parameters": it has the same, in any case.

    What it changes is the aim: the logits of the best answer are finite, ln 41 apart with ten
    classes and 0.2, instead of farther apart at every step.
    """
    sizes = set()
    for label_smoothing in (0.0, 0.2):
        model = LitClassifier(
            nn.Linear(5, 10), partial(torch.optim.SGD, lr=0.1), label_smoothing=label_smoothing
        )
        sizes.add(sum(p.numel() for p in model.parameters()))
    assert sizes == {60}

    def loss_and_slope(gap: float, label_smoothing: float) -> tuple[float, float]:
        right = torch.tensor(gap, dtype=torch.float64, requires_grad=True)
        logits = F.pad(right[None], (0, 9))
        loss = F.cross_entropy(logits, torch.tensor(0), label_smoothing=label_smoothing)
        (slope,) = torch.autograd.grad(loss, right)
        return loss.item(), slope.item()

    best = math.log((0.8 + 0.02) / 0.02)
    assert best == pytest.approx(math.log(41))
    assert loss_and_slope(best, 0.2)[1] == pytest.approx(0, abs=1e-12)
    assert loss_and_slope(2 * best, 0.2)[0] > loss_and_slope(best, 0.2)[0] + 0.4
    assert loss_and_slope(best, 0.0)[1] < -0.1
    assert loss_and_slope(2 * best, 0.0)[0] < loss_and_slope(best, 0.0)[0]


def test_004_6a() -> None:
    """The "translation invariance" of a convolution: it is equivariant, the output moves along.

    Pooling over all places makes it invariant.
    """
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular").double()
    image = randn(1, 1, 8, 8)
    output, moved = conv(image), conv(image.roll((2, 3), (2, 3)))
    assert_equal(moved, output.roll((2, 3), (2, 3)))
    assert (moved - output).abs().max().item() == pytest.approx(2.507, abs=1e-3)
    for pool in (F.adaptive_max_pool2d, F.adaptive_avg_pool2d):
        assert_equal(pool(moved, 1), pool(output, 1))
