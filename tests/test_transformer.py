"""The Transformer: its size, what its output depends on, and that writing step by step is exact."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_models.networks import Transformer
from lit_models.networks.attention import Attention, KeysValues
from lit_models.networks.transformer import sinusoidal_positions

VOCAB = 11


def small(**options: Any) -> Transformer:
    torch.manual_seed(0)
    sizes = {"embedding_dim": 16, "num_heads": 4, "hidden_size": 24, "max_length": 20}
    return Transformer(VOCAB, **{**sizes, "dropout": 0.0, **options})


def sentences(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


EACH_KIND = pytest.mark.parametrize("options", [{}, {"copy": True}], ids=["plain", "copy"])


def test_size() -> None:
    network = Transformer(4_000)
    ends = sum(
        p.numel()
        for norm in (network.encoder_norm, network.decoder_norm)
        for p in norm.parameters()
    )
    size = sum(p.numel() for p in network.parameters())
    assert (size, size - ends) == (539_712, 539_456)  # the second is that of UCSB, homework 2


def test_number_of_heads_does_not_change_the_size() -> None:
    sizes = {sum(p.numel() for p in small(num_heads=h).parameters()) for h in (1, 2, 4, 8)}
    assert len(sizes) == 1


# Positions


def test_positions_are_those_of_the_formula() -> None:
    table = sinusoidal_positions(501, 64)
    for t, k in [(0, 0), (1, 0), (3, 5), (500, 31)]:
        angle = t / 10_000 ** (2 * k / 64)
        assert table[t, 2 * k].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[t, 2 * k + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize(
    ("lag", "product"),
    [
        (0, 32.0),
        (1, 30.916832),
        (2, 28.303862),
        (5, 23.503971),
        (10, 21.051629),
        (50, 15.673797),
        (100, 17.874669),
        (500, 6.418171),
    ],
)
def test_dot_product_of_two_positions_depends_on_their_distance(lag: int, product: float) -> None:
    table = sinusoidal_positions(601, 64)
    for t in (0, 7, 100):
        assert (table[t] @ table[t + lag]).item() == pytest.approx(product, abs=1e-4)


def test_without_positions_the_order_of_the_source_is_not_seen() -> None:
    network, source, target = small(), sentences(2, 7), sentences(2, 5)
    mixed = source[:, [3, 0, 6, 1, 5, 2, 4]]
    assert not torch.allclose(network(source, target), network(mixed, target), atol=1e-3)
    torch.nn.init.zeros_(network.positions)
    torch.testing.assert_close(network(source, target), network(mixed, target))


# Attention


@pytest.mark.parametrize("kind", ["all", "masked", "causal"])
def test_attention_equals_its_formula(kind: str) -> None:
    torch.manual_seed(0)
    attention = Attention(8, 2, dropout=0.0).double()
    x, memory = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    seen = torch.ones(3, 5, 5, dtype=torch.bool)
    if kind == "masked":
        seen[1, :, 3:] = False
    if kind == "causal":
        seen = seen.tril()
    w_key, w_value = attention.key_value.weight.chunk(2)
    b_key, b_value = attention.key_value.bias.chunk(2)
    parts = []
    for head in (slice(0, 4), slice(4, 8)):
        q, k, v = attention.query(x), memory @ w_key.T + b_key, memory @ w_value.T + b_value
        scores = q[:, :, head] @ k[:, :, head].transpose(1, 2) / 2.0
        parts.append(scores.masked_fill(~seen, -torch.inf).softmax(2) @ v[:, :, head])
    expected = attention.output(torch.cat(parts, 2))

    visible = seen[:, None, :1] if kind == "masked" else None
    found = attention(x, attention.keys_values(memory), visible, causal=kind == "causal")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dim", [64, 1024])
def test_scale_keeps_attention_from_saturating(dim: int) -> None:
    """Products of two random vectors have the variance D: without the scale one key takes all."""
    torch.manual_seed(0)
    attention = Attention(dim, 1, dropout=0.0)
    for layer in (attention.query, attention.output):
        nn.init.zeros_(layer.bias)
    torch.nn.init.eye_(attention.query.weight)
    torch.nn.init.eye_(attention.output.weight)
    x, keys = torch.randn(1, 200, dim), torch.randn(1, 1, 32, dim)
    shown = KeysValues(keys, torch.eye(32, dim)[None, None])  # what is found are the weights
    weights = attention(x, shown)[0, :, :32]
    products = x[0] @ keys[0, 0].T
    assert products.var().item() == pytest.approx(dim, rel=0.1)
    torch.testing.assert_close(weights, (products / dim**0.5).softmax(1))
    assert weights.amax(1).mean() < 0.25
    assert products.softmax(1).amax(1).mean() > 0.75


# What an output depends on


@EACH_KIND
def test_later_tokens_change_no_earlier_output(options: dict[str, Any]) -> None:
    network, source, target = small(**options), sentences(3, 7), sentences(3, 6)
    before = network(source, target)
    for t in range(1, 6):
        changed = target.clone()
        changed[:, t:] = (changed[:, t:] + 1) % VOCAB
        after = network(source, changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-6)
        assert ((after[:, t:] - before[:, t:]).abs().amax(2) > 1e-4).all()


@EACH_KIND
def test_every_token_of_the_source_counts(options: dict[str, Any]) -> None:
    network, source, target = small(**options), sentences(1, 7), sentences(1, 6)
    before = network(source, target)
    for s in range(7):
        changed = source.clone()
        changed[:, s] = (changed[:, s] + 1) % VOCAB
        assert ((network(changed, target) - before).abs().amax(2) > 1e-5).all()


@EACH_KIND
def test_padding_changes_no_output_and_no_gradient(options: dict[str, Any]) -> None:
    network = small(**options).double()
    source, target, answer = sentences(4, 7), sentences(4, 6), sentences(4, 6).flip(1)
    lengths, ends = torch.tensor([7, 1, 4, 6]), [3, 6, 1, 5]

    def loss(outputs: list[Tensor]) -> Tensor:
        parts = zip(outputs, answer, ends, strict=True)
        return torch.stack([F.cross_entropy(o, a[:t], reduction="sum") for o, a, t in parts]).sum()

    logits = network(source, target, lengths)
    together = [row[:end] for row, end in zip(logits, ends, strict=True)]
    alone = [
        network(source[b : b + 1, : lengths[b]], target[b : b + 1, :end])[0]
        for b, end in enumerate(ends)
    ]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    weights = list(network.parameters())
    for a, b in zip(
        torch.autograd.grad(loss(together), weights),
        torch.autograd.grad(loss(alone), weights),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_dropout_acts_in_training_alone() -> None:
    network, source, target = small(dropout=0.5), sentences(2, 7), sentences(2, 6)
    assert not torch.equal(network(source, target), network(source, target))
    network.eval()
    assert torch.equal(network(source, target), network(source, target))
    torch.testing.assert_close(network(source, target), small()(source, target))


# Copying


def test_copying_equals_its_formula() -> None:
    """p = g p_copy + (1 - g) p_vocabulary, where a token may stand at several places."""
    network, source, target = small(copy=True), sentences(2, 7), sentences(2, 6)
    lengths = torch.tensor([7, 4])
    seen: list[Any] = []
    assert network.pointer is not None
    network.pointer.register_forward_pre_hook(lambda module, given: seen.extend(given))
    p = network(source, target, lengths).exp()
    x, logits, read = seen
    scores = network.pointer.query(x) @ read.keys.transpose(1, 2) / 16**0.5
    gate = network.pointer.gate(x).sigmoid()
    for b, length in enumerate(lengths):
        attention = scores[b, :, :length].softmax(1)
        copied = attention @ F.one_hot(source[b, :length], VOCAB).float()
        expected = gate[b] * copied + (1 - gate[b]) * logits[b].softmax(1)
        torch.testing.assert_close(p[b], expected)
    torch.testing.assert_close(p.sum(2), torch.ones(2, 6))


def test_learns_to_copy_tokens_it_has_never_seen_in_a_target() -> None:
    network = small(copy=True, num_encoder_layers=1, num_decoder_layers=1)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(150):
        source = torch.randint(1, VOCAB - 3, (32, 6))  # tokens 8 to 10 are never shown
        target_in = torch.cat([torch.zeros(32, 1, dtype=torch.long), source[:, :-1]], 1)
        loss = F.cross_entropy(network(source, target_in).flatten(0, 1), source.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    source = torch.tensor([[8, 2, 9, 4, 10, 3]])
    logits = network(source, torch.cat([torch.zeros(1, 1, dtype=torch.long), source[:, :-1]], 1))
    assert (logits.argmax(2) == source).float().mean() >= 0.8


# Step by step


@EACH_KIND
def test_steps_equal_teacher_forcing(options: dict[str, Any]) -> None:
    network, source, target = small(**options), sentences(3, 7), sentences(3, 6)
    lengths = torch.tensor([7, 2, 5])
    expected = network(source, target, lengths).log_softmax(2)
    state = network.start(source, lengths)
    for t in range(6):
        log_probabilities, state = network.step(target[:, t], state)
        torch.testing.assert_close(log_probabilities, expected[:, t], rtol=0, atol=1e-5)


def test_reordered_state_goes_on_as_the_rows_it_was_made_of() -> None:
    network, source, target = small(), sentences(3, 7), sentences(3, 4)
    lengths, index = torch.tensor([7, 2, 5]), torch.tensor([2, 0, 0, 1, 2])
    state = network.start(source, lengths)
    for t in range(3):
        _, state = network.step(target[:, t], state)
    expected, _ = network.step(target[:, 3], state)
    found, _ = network.step(target[index, 3], state.reorder(index))
    torch.testing.assert_close(found, expected[index], rtol=0, atol=1e-6)
    again, _ = network.step(target[:, 3], state)  # neither step nor reorder changed it
    assert torch.equal(again, expected)


@pytest.mark.parametrize("moved", [False, True], ids=["own", "other"])
def test_hypotheses_of_a_source_share_what_was_read_of_it(moved: bool) -> None:
    """In a beam search nothing of the source is copied, but rows may also go to other sources."""
    network, source, lengths = small(), sentences(3, 7), torch.tensor([7, 2, 5])
    _, start = network.step(sentences(3, 1)[:, 0], network.start(source, lengths))
    state = start.reorder(torch.tensor([0, 0, 1, 1, 2, 2]))
    _, state = network.step(sentences(6, 1)[:, 0], state)
    index = torch.tensor([5, 0, 0, 3, 2, 4] if moved else [1, 0, 2, 2, 4, 5])
    state = state.reorder(index)
    assert (state.source is start.source) != moved
    found, _ = network.step(sentences(6, 2)[:, 1], state)

    written = torch.stack(
        [sentences(3, 1)[index // 2, 0], sentences(6, 1)[index, 0], sentences(6, 2)[:, 1]], 1
    )
    expected = network(source[index // 2], written, lengths[index // 2])[:, -1].log_softmax(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_step_computes_the_new_token_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    network, source, target = small(), sentences(3, 7), sentences(3, 6)
    state = network.start(source)
    projected: list[int] = []
    keys_values = Attention.keys_values

    def counted(self: Attention, x: Tensor) -> KeysValues:
        projected.append(x.shape[1])
        return keys_values(self, x)

    monkeypatch.setattr(Attention, "keys_values", counted)
    for t in range(6):
        _, state = network.step(target[:, t], state)
    assert projected == [1] * 12  # two layers; the source is not projected again


# Learning


def test_starts_undecided() -> None:
    torch.manual_seed(0)
    network = Transformer(1_000, dropout=0.0)
    source, target, answer = torch.randint(1_000, (3, 16, 12))
    loss = F.cross_entropy(network(source, target).flatten(0, 1), answer.flatten()).item()
    # normalised features times weights of variance 1 / D: logits of variance 1, which cost 0.5
    assert loss == pytest.approx(math.log(1_000), abs=0.8)


def test_overfits_one_batch() -> None:
    network, source, answer = small(), sentences(8, 6), sentences(16, 6)[8:]
    target = F.pad(answer[:, :-1], (1, 0))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(120):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(source, target).flatten(0, 1), answer.flatten())
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


# What is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_decoder_layers": 0}, "must be at least 1, got 3 and 0"),
        ({"num_heads": 3}, "even and a multiple of num_heads, got 16 and 3"),
        ({"num_heads": 0}, "even and a multiple of num_heads, got 16 and 0"),
        ({"embedding_dim": 15, "num_heads": 5}, "must be even and a multiple .*, got 15 and 5"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small(**options)


def test_batches_that_do_not_fit_are_refused() -> None:
    network = small()
    with pytest.raises(ValueError, match="needs as many lengths"):
        network(sentences(2, 5), sentences(2, 5), torch.tensor([5]))
    with pytest.raises(ValueError, match="lengths must be from 1 to 5"):
        network(sentences(2, 5), sentences(2, 5), torch.tensor([5, 6]))
    with pytest.raises(ValueError, match="a sequence of 21 tokens is longer than max_length, 20"):
        network(sentences(2, 21), sentences(2, 5))
