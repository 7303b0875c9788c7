"""Arguments that networks share, checked where they are given."""

from torch import Tensor, nn


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")


def check_lengths(lengths: Tensor, x: Tensor) -> None:
    rows, steps = x.shape[:2]
    if lengths.shape != (rows,):
        raise ValueError(
            f"a batch of {rows} sequences needs as many lengths, got {tuple(lengths.shape)}."
        )
    # on another device the loop would have to wait for an answer
    if lengths.device.type == "cpu" and not 1 <= lengths.min() <= lengths.max() <= steps:
        raise ValueError(
            f"lengths must be from 1 to {steps}, the padded length, got {int(lengths.min())} to "
            f"{int(lengths.max())}."
        )


def checked_dropout(dropout: float) -> nn.Dropout:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
    return nn.Dropout(dropout)
