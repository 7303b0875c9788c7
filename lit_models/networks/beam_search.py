"""Beam search, for any network that gives log probabilities of the next token step by step.

Dimensions: B sentences, k hypotheses of each, N = B k rows, T tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

State = TypeVar("State")
Step = Callable[[Tensor, State], tuple[Tensor, State]]


class Hypotheses(NamedTuple):
    """The best hypotheses of each sentence, best first.

    Attributes:
        tokens: (B, n_best, T) without the token that began them; after the end they repeat it.
        lengths: Number of tokens (B, n_best), the end included.
        scores: (B, n_best), sum of log probabilities. Where there are not as many sequences as were
            asked for, the places left have the score -inf.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor


@torch.no_grad()
def beam_search(
    step: Step,
    state: State,
    begin: Tensor,
    end: int | None,
    beam_width: int,
    max_length: int,
    n_best: int = 1,
) -> Hypotheses:
    """Search the most probable sequences, keeping the best ``beam_width`` after each token.

    A hypothesis that has ended stays among them as long as its score is good enough. The search
    stops as soon as no unfinished hypothesis can come among the ``n_best``, or at ``max_length``,
    where unfinished ones count as they are. Width 1 is greedy decoding. A network with dropout
    belongs in evaluation mode.

    Args:
        step: Called with the last tokens (N,) and the state of the rows; returns log probabilities
            (N, V) of the next token and the new state.
        state: The state of B rows before the first token: a tensor whose first dimension is the
            rows, a tuple of states, or anything with a method ``reorder(index)`` that
            returns the state of the rows ``index`` (N,).
        begin: The token each sentence begins with (B,); the search runs on its device.
        end: The token that ends a sequence, or None where all have ``max_length`` tokens.
        beam_width: Number k of hypotheses that are kept.
        max_length: The most tokens of a hypothesis, the end included.
        n_best: Number of hypotheses that are returned.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check_arguments(begin, beam_width, max_length, n_best)
    sentences = torch.arange(len(begin), device=begin.device)[:, None]  # (B, 1)
    token = begin[:, None]  # (B, k), and k = 1 at first
    tokens = token[:, :, None][:, :, :0]  # (B, k, T)
    sums = torch.zeros_like(token, dtype=torch.float)
    lengths = torch.zeros_like(token)
    ended = torch.zeros_like(token, dtype=torch.bool)

    for _ in range(max_length):
        log_probabilities, state = step(token.flatten(), state)
        log_probabilities = log_probabilities.unflatten(0, token.shape)  # (B, k, V)
        k, vocab_size = log_probabilities.shape[1:]
        if end is not None:  # after its end a hypothesis has one continuation, which is certain
            stay = torch.full_like(log_probabilities[0, 0], -torch.inf)
            stay[end].zero_()  # to assign 0.0 would copy it from the host
            log_probabilities = torch.where(ended[:, :, None], stay, log_probabilities)
        all_sums = sums[:, :, None] + log_probabilities
        lengths = lengths + ~ended

        width = min(beam_width, k * vocab_size)
        sums, best = all_sums.flatten(1).topk(width)  # (B, k) from here on, of the new k
        parent, token = best // vocab_size, best % vocab_size
        lengths = lengths.gather(1, parent)
        tokens = torch.cat([tokens[sentences, parent], token[:, :, None]], 2)
        if end is not None:
            ended = ended.gather(1, parent) | (token == end)
            if _is_final(sums, ended, n_best):
                break
        state = _reorder(state, (sentences * k + parent).flatten())
    return Hypotheses(tokens[:, :n_best], lengths[:, :n_best], sums[:, :n_best])


def with_copy_bias(step: Step, change_penalty: float) -> Step:
    """Bias a step towards copying its source: precision before recall.

    It takes ``change_penalty`` from the log probability of each token that does not follow its
    predecessor somewhere in the source. Its state is a pair: that of ``step``, and the source
    (N, S) from the token that begins a hypothesis to the one that ends it.
    """

    def biased(token: Tensor, state: tuple[Any, Tensor]) -> tuple[Tensor, tuple[Any, Tensor]]:
        inner, source = state
        log_probabilities, inner = step(token, inner)
        follows = (source[:, :-1] == token[:, None]).float()
        kept = torch.zeros_like(log_probabilities).scatter_add(1, source[:, 1:], follows)
        return log_probabilities - change_penalty * (kept == 0), (inner, source)

    return biased


def _is_final(sums: Tensor, ended: Tensor, n_best: int) -> bool:
    """Return True once no unfinished hypothesis, whose sum can only fall, can reach the n best."""
    finished = sums.masked_fill(~ended, -torch.inf)
    worst = finished.topk(min(n_best, sums.shape[1])).values[:, -1]
    hope = sums.masked_fill(ended, -torch.inf).amax(1)
    return bool((worst >= hope).all())


def _reorder(state: Any, index: Tensor) -> Any:
    """The rows ``index`` of a state of any of the kinds ``beam_search`` takes."""
    if isinstance(state, Tensor):
        return state[index]
    if hasattr(state, "reorder"):
        return state.reorder(index)
    return tuple(_reorder(part, index) for part in state)


def _check_arguments(begin: Tensor, beam_width: int, max_length: int, n_best: int) -> None:
    if begin.dim() != 1:
        raise ValueError(
            f"begin must be one token for each sentence, (B,), got the shape {tuple(begin.shape)}."
        )
    if beam_width < 1:
        raise ValueError(
            f"beam_width must be at least 1, got {beam_width}; use 1 for greedy decoding."
        )
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}.")
    if not 1 <= n_best <= beam_width:
        raise ValueError(f"n_best must be from 1 to beam_width, {beam_width}, got {n_best}.")
