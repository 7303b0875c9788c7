"""Several networks as one. Dimensions: M members, B batch, K classes."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """Members that start differently, see the same batches and vote.

    Deep ensembles (Lakshminarayanan et al., arXiv:1612.01474). That every member starts with
    weights of its own is what makes them differ; other batches would add little (Fort et al.,
    arXiv:1912.02757). LitClassifier trains each member as if it were alone; what looks at the whole
    gradient, as clipping by its norm does, sees all of them at once, and Muon leaves to AdamW only
    the last member's output layer.

    Args:
        member: Makes a network that maps inputs to logits (B, K).
        members: Number of members M.
        num_classes: Number of classes K that each member is made for; None leaves it to ``member``.

    Raises:
        ValueError: If there is no member.
    """

    def __init__(
        self, member: Callable[[], nn.Module], members: int = 5, num_classes: int | None = None
    ) -> None:
        super().__init__()
        if members < 1:
            raise ValueError(f"members must be at least 1, got {members}.")
        facts: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
        self.members = nn.ModuleList(member(**facts) for _ in range(members))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits of one member after the other (M * B, K); in evaluation those of the vote (B, K).

        The vote is the mean of the members' probabilities; its logits are their logarithm.
        """
        logits = torch.stack([member(*inputs) for member in self.members])  # (M, B, K)
        if self.training:
            return logits.flatten(0, 1)
        log_probabilities = logits.float().log_softmax(2)
        return log_probabilities.logsumexp(0) - math.log(len(self.members))
