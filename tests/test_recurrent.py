"""Recurrent networks: their size, what their output depends on, and that they learn."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_models.networks import (
    GRU,
    LSTM,
    RNN,
    AttentionRNN,
    BidirectionalLSTM,
    GatedRNN,
    Recurrent,
    VanillaLSTM,
    VanillaRNN,
)

CORES: dict[str, Callable[..., Any]] = {
    "rnn": RNN,
    "lstm": LSTM,
    "gru": GRU,
    "bidirectional_lstm": BidirectionalLSTM,
    "vanilla_rnn": VanillaRNN,
    "vanilla_lstm": VanillaLSTM,
    "gated_rnn": GatedRNN,
    "attention_rnn": AttentionRNN,
    "attention_rnn_of_all_states": partial(AttentionRNN, past="inf"),
}
EACH_CORE = pytest.mark.parametrize("make_core", CORES.values(), ids=CORES)


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        (Recurrent(LSTM(8, 12), 4), 1_108),  # NYU's notebook on temporal order
        (Recurrent(LSTM(8, 4), 4), 244),
        (Recurrent(LSTM(8, 12, num_layers=2), 4), 2_356),
        (Recurrent(RNN(8, 4), 4), 76),
        (VanillaRNN(2, 3), 18),  # Berkeley's notebook on recurrent networks
        (Recurrent(VanillaRNN(2, 3), 4, read="every"), 34),
        (VanillaRNN(1, 1, bias=False), 2),
        (Recurrent(RNN(128, 128), 18, embedding=nn.Embedding(58, 128)), 42_770),
        (GatedRNN(2, 3), 6 + 9 + 6),
        (AttentionRNN(3, 3, past=2), 3 * 3 * 9),
        (AttentionRNN(3, 3, past="inf"), 3 * 2 * 9),
        (BidirectionalLSTM(2, 3, num_layers=2), 2 * (84 + 132)),
    ],
)
def test_size(network: nn.Module, parameters: int) -> None:
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_weights_begin_as_those_of_the_parts_alone() -> None:
    torch.manual_seed(1)
    network = Recurrent(LSTM(8, 12), 4)
    torch.manual_seed(1)
    parts = [*nn.LSTM(8, 12, batch_first=True).parameters(), *nn.Linear(12, 4).parameters()]
    for ours, other in zip(network.parameters(), parts, strict=True):
        assert torch.equal(ours, other)


@EACH_CORE
def test_every_step_counts(make_core: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 9, 8, requires_grad=True)
    Recurrent(make_core(8, 12), 4)(x)[0].sum().backward()
    assert x.grad is not None
    assert (x.grad[0].abs().sum(1) > 0).all()
    assert (x.grad[1:] == 0).all()  # sequences of a batch do not mix


@EACH_CORE
def test_starts_undecided(make_core: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    x = F.one_hot(torch.randint(8, (200, 81)), 8).float()
    network = Recurrent(make_core(8, 12), 4)
    loss = F.cross_entropy(network(x), torch.arange(200) % 4).item()
    assert loss == pytest.approx(math.log(4), abs=0.06)


@pytest.mark.parametrize(
    "name", ["lstm", "bidirectional_lstm", "gated_rnn", "attention_rnn_of_all_states"]
)
def test_overfits_one_batch(name: str) -> None:
    torch.manual_seed(0)
    network = Recurrent(CORES[name](8, 32), 4)
    x, target = F.one_hot(torch.randint(8, (16, 8)), 8).float(), torch.arange(16) % 4
    optimizer = torch.optim.Adam(network.parameters(), lr=0.007)
    for _ in range(150):
        optimizer.zero_grad()
        logits = network(x)
        loss = F.cross_entropy(logits, target)
        if loss < 0.05 and torch.equal(logits.argmax(1), target):  # the next step may leap away
            return
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    pytest.fail(f"the batch is not fitted, its loss is {loss.item():.3f}")


# Padding


@pytest.mark.parametrize("read", ["last", "every", "max"])
@EACH_CORE
def test_padding_changes_no_output_and_no_gradient(
    make_core: Callable[..., Any], read: Any
) -> None:
    torch.manual_seed(0)
    network = Recurrent(make_core(3, 4, num_layers=2), 5, read=read).double()
    lengths = torch.tensor([7, 1, 4, 6])
    x = torch.randn(4, 7, 3, dtype=torch.float64, requires_grad=True)

    def outputs(x: Tensor, lengths: Tensor | None) -> list[Tensor]:
        if read != "every":
            return list(network(x, lengths))
        ends = [x.shape[1]] if lengths is None else lengths.tolist()
        return [out[:end] for out, end in zip(network(x, lengths), ends, strict=True)]

    together = outputs(x, lengths)
    alone = [outputs(x[b : b + 1, :end], None)[0] for b, end in enumerate(lengths.tolist())]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    def gradients(parts: list[Tensor]) -> tuple[Tensor, ...]:
        loss = torch.stack([part.square().sum() for part in parts]).sum()
        return torch.autograd.grad(loss, [x, *network.parameters()])

    by_x, *by_weights = gradients(together)
    assert all((by_x[b, end:] == 0).all() for b, end in enumerate(lengths.tolist()))
    for a, b in zip([by_x, *by_weights], gradients(alone), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_reads_the_state_it_is_told_to() -> None:
    torch.manual_seed(0)
    core, x, lengths = RNN(3, 4), torch.randn(2, 5, 3), torch.tensor([5, 2])
    networks = {read: Recurrent(core, 6, read=read) for read in ("last", "every", "max")}
    states = core(x)
    for network in networks.values():
        network.load_state_dict(networks["last"].state_dict())
    output = networks["last"].output
    torch.testing.assert_close(networks["every"](x), output(states))
    ends = torch.stack([states[0, 4], states[1, 1]])
    torch.testing.assert_close(networks["last"](x, lengths), output(ends))
    highest = torch.stack([states[0].amax(0), states[1, :2].amax(0)])
    torch.testing.assert_close(networks["max"](x, lengths), output(highest))


def test_dropout_acts_in_training_alone() -> None:
    network, x = Recurrent(RNN(3, 64), 2, dropout=0.5), torch.randn(4, 5, 3)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


def test_both_directions_are_those_of_torch() -> None:
    torch.manual_seed(0)
    ours, torchs = (
        BidirectionalLSTM(3, 4, num_layers=2),
        nn.LSTM(3, 4, num_layers=2, batch_first=True, bidirectional=True),
    )
    for number, (ahead, back) in enumerate(zip(ours.ahead, ours.back, strict=True)):
        for name, parameter in ahead.named_parameters():
            name = name.replace("l0", f"l{number}")
            parameter.data = getattr(torchs, name).data
        for name, parameter in back.named_parameters():
            name = name.replace("l0", f"l{number}") + "_reverse"
            parameter.data = getattr(torchs, name).data
    x, lengths = torch.randn(3, 6, 3), torch.tensor([6, 3, 1])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    expected, _ = nn.utils.rnn.pad_packed_sequence(torchs(packed)[0], batch_first=True)
    for b, end in enumerate(lengths.tolist()):
        torch.testing.assert_close(ours(x, lengths)[b, :end], expected[b, :end])


# What is refused


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Recurrent(RNN(3, 4), 2, read="first"), "read must be one of last, every, max"),  # type: ignore[arg-type]
        (lambda: Recurrent(RNN(3, 4), 2, dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: VanillaRNN(3, 4, nonlinearity="sin"), "nonlinearity must be one of identity"),  # type: ignore[arg-type]
        (lambda: VanillaRNN(3, 4, num_layers=0), "num_layers must be at least 1"),
        (
            lambda: AttentionRNN(3, 4, past=0),
            "past must be at least 1, or inf for all past states, got 0",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ([5, 5, 5], r"a batch of 2 sequences needs as many lengths, got \(3,\)"),
        ([5, 0], "lengths must be from 1 to 5, the padded length, got 0 to 5"),
        ([6, 1], "lengths must be from 1 to 5, the padded length, got 1 to 6"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(lengths: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Recurrent(RNN(3, 4), 2)(torch.zeros(2, 5, 3), torch.tensor(lengths))
