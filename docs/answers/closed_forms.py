"""Backward passes written out by hand, for the tests to hold against autograd.

Dimensions: C channels, F filters, K kernel size, N length of the input and R of the output, S
stride, D features, H state, T time. Steps of time are counted from 1, as in the formulas, all else
from 0. ``by_y`` is the gradient of a scalar loss l by y, ``y_by_x`` a Jacobian, y's axes first.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Convolutions


def dilate(y: Tensor, stride: int) -> Tensor:
    """(..., R) with stride - 1 zeros between neighbours: (..., S (R - 1) + 1)."""
    dilated = y.new_zeros(*y.shape[:-1], stride * (y.shape[-1] - 1) + 1)
    dilated[..., ::stride] = y
    return dilated


def conv1d_by_weight(x: Tensor, kernel_size: int, stride: int) -> Tensor:
    """df/dW (1, R, 1, C, K) of one filter, x (C, N): df[0, r]/dW[0, c, k] = x[c, S r + k].

    NYU homework 2, question 1.1c (ii).
    """
    return x.unfold(1, kernel_size, stride).transpose(0, 1)[None, :, None]


def conv1d_by_input(weight: Tensor, length: int, stride: int) -> Tensor:
    """df/dx (1, R, C, N) of one filter W (1, C, K): df[0, r]/dx[c, n] = W[0, c, n - S r].

    It is 0 where W has no such entry. NYU homework 2, question 1.1c (iii).
    """
    _, channels, kernel_size = weight.shape
    outputs = (length - kernel_size) // stride + 1
    jacobian = weight.new_zeros(1, outputs, channels, length)
    for r in range(outputs):
        jacobian[0, r, :, stride * r : stride * r + kernel_size] = weight[0]
    return jacobian


def conv1d_weight_gradient(x: Tensor, by_output: Tensor, kernel_size: int, stride: int) -> Tensor:
    """dl/dW[f, c, k] = sum over r of dl/df[f, r] x[c, S r + k], from x (C, N) and dl/df (F, R).

    The forward pass again, with dl/df for a filter, but the stride has become a dilation.
    NYU homework 2, question 1.1c (iv).
    """
    kernel = dilate(by_output, stride)  # (F, M)
    windows = x.unfold(1, kernel.shape[1], 1)[:, :kernel_size]  # (C, K, M)
    return torch.einsum("fm,ckm->fck", kernel, windows)


def conv1d_input_gradient(by_output: Tensor, weight: Tensor, length: int, stride: int) -> Tensor:
    """dl/dx[c, n] = sum over f, r of dl/df[f, r] W[f, c, n - S r], from dl/df (F, R), W (F, C, K).

    A correlation of the dilated dl/df, between zeros, with the flipped kernel.
    """
    kernel_size = weight.shape[2]
    dilated = dilate(by_output, stride)
    padded = F.pad(dilated, (kernel_size - 1, length - dilated.shape[1]))
    windows = padded.unfold(1, kernel_size, 1)  # (F, N, K)
    return torch.einsum("fnk,fck->cn", windows, weight.flip(2))


def conv2d_input_gradient(by_output: Tensor, kernel: Tensor) -> Tensor:
    """dl/dI[x, y] = sum over i, j of dl/dO[x - i, y - j] K[i, j], where O has such a place.

    Of O[x, y] = sum K[i, j] I[x + i, y + j], one channel, no padding. Midterm, question 2 on
    convolutions.
    """
    (height, width), (rows, columns) = by_output.shape, kernel.shape
    gradient = by_output.new_zeros(height + rows - 1, width + columns - 1)
    for i in range(rows):
        for j in range(columns):
            gradient[i : i + height, j : j + width] += by_output * kernel[i, j]
    return gradient


def layer_factor(init: str, size: int) -> float:
    """|dL/dx[l]| over |dL/dx[l+1]| of relu(conv(x)) as drawn, of many channels, far from the ends.

    He's variance of 2 / fan_in makes up for the half that ReLU takes; PyTorch's, 1 / (3 fan_in), is
    a sixth of that. A 3 x 3 kernel then sums a ninth of each neighbour's energy, and the zeros
    around size x size places have none: per axis (1 + 2 cos(pi / (size + 1))) / 3, the largest
    eigenvalue of that sum. Midterm, question 3 on convolutions.
    """
    border = (1 + 2 * math.cos(math.pi / (size + 1))) / 3
    return border * {"kaiming": 1.0, "torch": 1 / math.sqrt(6)}[init]


BATCH_NORM_FACTOR = math.sqrt(math.pi / (math.pi - 1))
"""The same of relu(norm(linear(x))), a large batch, any initialisation: arXiv:1902.08129."""


# Recurrent networks


def scalar_rnn_gradients(x: Sequence[float], a: float, b: float) -> tuple[float, float]:
    """dh[T]/da and dh[T]/db of h[t] = a x[t] + b h[t-1], h[0] = 0.

    dh[T]/da = sum b^(T-t) x[t] and dh[T]/db = sum b^(T-t) h[t-1]; a loss multiplies both by
    dl/dh[T]. Midterm, question 1 on backpropagation through time.
    """
    h = [0.0]
    for x_t in x:
        h.append(a * x_t + b * h[-1])
    powers = [b ** (len(x) - t) for t in range(1, len(x) + 1)]
    by_a = sum(power * x_t for power, x_t in zip(powers, x, strict=True))
    by_b = sum(power * before for power, before in zip(powers, h[:-1], strict=True))
    return by_a, by_b


def linear_rnn_state_gradient(weight_h: Tensor, by_last: Tensor, steps: int) -> Tensor:
    """dl/dh[T-steps] (H,) = (W_h^T)^steps dl/dh[T] of h[t] = W_h h[t-1] + W_x x[t].

    Berkeley homework 6, question 3e.
    """
    return torch.linalg.matrix_power(weight_h.T, steps) @ by_last


class Unrolled(NamedTuple):
    """Berkeley's graph of three inputs and one weight: a number for each node, or dy/d(node)."""

    p: float
    q: float
    r: float
    s: float
    t: float
    y: float


def three_step_nodes(w: float, u: Sequence[float]) -> Unrolled:
    """p = u1, q = w p, r = q + u2, s = w r, t = s + u3, y = w t. Berkeley homework 6, 1a."""
    u1, u2, u3 = u
    p, q = u1, w * u1
    r, s = q + u2, w * (q + u2)
    t = s + u3
    return Unrolled(p, q, r, s, t, w * t)


def three_step_gradients(w: float) -> Unrolled:
    """dy/dp to dy/dy: each multiplication by w gives a factor, an addition none. Question 1c."""
    return Unrolled(p=w**3, q=w**2, r=w**2, s=w, t=w, y=1.0)


def three_step_edges(w: float, u: Sequence[float]) -> tuple[float, float, float]:
    """Contributions to dy/dw through q, s and y: dy/dq p, dy/ds r, t. Question 1d."""
    node, by = three_step_nodes(w, u), three_step_gradients(w)
    return by.q * node.p, by.s * node.r, node.t


def gated_rnn_jacobian(c: Tensor, before: Tensor, candidate: Tensor, weight_h: Tensor) -> Tensor:
    """dh[t]/dh[t-1] (H, H) = diag(c) + diag((h[t-1] - W_x x[t]) c (1 - c)) W_h.

    Of h[t] = c h[t-1] + (1 - c) W_x x[t], c = sigmoid(W_c x[t] + W_h h[t-1]). NYU homework 2,
    question 1.2.1.

    Args:
        c: The gate c[t] (H,).
        before: h[t-1] (H,).
        candidate: W_x x[t] (H,).
        weight_h: W_h (H, H).
    """
    by_gate = (before - candidate) * c * (1 - c)
    return c.diag() + by_gate[:, None] * weight_h


def totals_through_time(direct: Sequence[Tensor], jacobians: Sequence[Tensor]) -> list[Tensor]:
    """dl/dh[t] over all paths, for t = 1..T: what h[t] gives by itself + J[t+1]^T dl/dh[t+1].

    Args:
        direct: Gradients (H,) of what the loss reads of h[1]..h[T], the other states held.
        jacobians: J[t] = dh[t]/dh[t-1] (H, H) for t = 2..T.
    """
    totals = [direct[-1]]
    for own, jacobian in zip(reversed(direct[:-1]), reversed(jacobians), strict=True):
        totals.insert(0, own + jacobian.T @ totals[0])
    return totals


def gated_rnn_weight_gradient(gates: Tensor, by_states: Tensor, x: Tensor) -> Tensor:
    """dl/dW_x (H, D) = sum over t of ((1 - c[t]) * dl/dh[t]) x[t]^T, dl/dh[t] over all paths.

    From gates and dl/dh (T, H) and x (T, D). NYU homework 2, question 1.2.1c.
    """
    return torch.einsum("th,td->hd", (1 - gates) * by_states, x)


def attention_rnn_jacobian(
    a: Tensor, query: Tensor, key: Tensor, value: Tensor, state: Tensor, past: Tensor
) -> Tensor:
    """Direct dh[t]/dh[t-i] (H, H) of an AttentionRNN, all other states held.

    a_i V_i + a_i (v_i - h[t]) (Q_i^T k_i + K_i^T q_i)^T, for a softargmax turns a change of w_i
    into one of a_i (v_i - h[t]). NYU homework 2, question 1.2.2e.

    Args:
        a: The weight a_i[t] ().
        query, key, value: Q_i, K_i and V_i (H, H).
        state: h[t] (H,).
        past: h[t-i] (H,).
    """
    by_score = query.T @ (key @ past) + key.T @ (query @ past)
    return a * value + a * torch.outer(value @ past - state, by_score)


def attention_rnn_state_gradient(jacobians: Sequence[Tensor], by_later: Sequence[Tensor]) -> Tensor:
    """dl/dh[T] = sum over t = T+1..T+k of (dh[t]/dh[T])^T dl/dh[t], for an h[T] that no loss reads.

    The Jacobians (H, H) are direct, the gradients dl/dh[t] (H,) over all paths: with Jacobians over
    all paths too, a path would be counted once for each state on it. NYU homework 2, 1.2.2f.
    """
    terms = [jacobian.T @ by for jacobian, by in zip(jacobians, by_later, strict=True)]
    return torch.stack(terms).sum(0)


# A network of two layers


class TwoLayers(NamedTuple):
    """All that UCSB homework 2 asks of its network, problem 1; one example, so m = 1."""

    z1: Tensor  # (3,)
    a1: Tensor  # (3,)
    z2: Tensor  # (1,)
    p: Tensor  # (1,)
    loss: Tensor  # (1,), J
    loss_by_p: Tensor  # (1,), question 2
    p_by_z2: Tensor  # (1,), question 3
    z2_by_a1: Tensor  # (1, 3), question 4
    a1_by_z1: Tensor  # (3, 3), question 5
    z1_by_w1: Tensor  # (3, 3, 2), question 6
    by_z2: Tensor  # (1,)
    by_a1: Tensor  # (3,)
    by_z1: Tensor  # (3,)
    by_w1: Tensor  # (3, 2), question 7
    by_w2: Tensor  # (1, 3)
    by_b1: Tensor  # (3,)
    by_b2: Tensor  # (1,)


def two_layers(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, x: Tensor, y: float) -> TwoLayers:
    """p = sigmoid(W2 relu(W1 x + b1) + b2) and its binary cross-entropy J, with every derivative.

    Args:
        w1, b1: (3, 2) and (3,), or of any other sizes.
        w2, b2: (1, 3) and (1,).
        x: The input (2,).
        y: The label, 0 or 1.
    """
    z1 = w1 @ x + b1
    a1 = z1.relu()
    z2 = w2 @ a1 + b2
    p = z2.sigmoid()
    loss = -(y * p.log() + (1 - y) * (1 - p).log())

    by_z2 = p - y  # dJ/dp dp/dz2, without its two factors that can under- and overflow
    by_a1 = w2.T @ by_z2
    by_z1 = by_a1 * (z1 > 0)
    return TwoLayers(
        z1,
        a1,
        z2,
        p,
        loss,
        loss_by_p=(p - y) / (p * (1 - p)),
        p_by_z2=p * (1 - p),
        z2_by_a1=w2,
        a1_by_z1=(z1 > 0).to(z1.dtype).diag(),
        z1_by_w1=torch.einsum("ij,k->ijk", torch.eye(len(z1), dtype=x.dtype), x),
        by_z2=by_z2,
        by_a1=by_a1,
        by_z1=by_z1,
        by_w1=torch.outer(by_z1, x),
        by_w2=torch.outer(by_z2, a1),
        by_b1=by_z1,
        by_b2=by_z2,
    )
