"""Arithmetic of convolutions and poolings: what sizes they leave, and how far each output sees.

Dumoulin and Visin, "A guide to convolution arithmetic for deep learning" (arXiv:1603.07285);
Araujo et al., "Computing receptive fields of convolutional neural networks" (Distill, 2019).
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PerAxis = int | Sequence[int]  # one number for all axes, or one for each


def output_size(
    size: Sequence[int],
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    padding: PerAxis = 0,
    dilation: PerAxis = 1,
) -> tuple[int, ...]:
    """What a convolution or pooling leaves: floor((H + 2 P - D (K - 1) - 1) / S) + 1 on each axis.

    Args:
        size: Of the input, without batch and channels.
        kernel_size: K.
        stride: S; of a pooling it is mostly K.
        padding: P, on both sides.
        dilation: D, the distance of two neighbours in the kernel.

    Raises:
        ValueError: The kernel is larger than the input, or a number is out of range.
    """
    axes = len(size)
    options = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    each = {name: spread(name, x, axes) for name, x in (options | {"dilation": dilation}).items()}
    extents = [d * (k - 1) + 1 for d, k in zip(each["dilation"], each["kernel_size"], strict=True)]
    padded = [h + 2 * p for h, p in zip(size, each["padding"], strict=True)]
    if any(extent > h for extent, h in zip(extents, padded, strict=True)):
        raise ValueError(
            f"no output is left: the kernel reaches over {by(extents)} and the padded input has "
            f"{by(padded)}; lower kernel_size or dilation, or raise padding."
        )
    return tuple(
        (h - extent) // s + 1 for h, extent, s in zip(padded, extents, each["stride"], strict=True)
    )


class ReceptiveField(NamedTuple):
    """The part of the input that one output depends on, in pixels of each axis.

    Attributes:
        size: Of that part, its padding included.
        stride: How far apart those of two neighbouring outputs are.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]


def receptive_field(network: nn.Module, images: Tensor) -> ReceptiveField:
    """How much of the images each output behind the last convolution or pooling sees.

    A kernel of K with dilation D adds D (K - 1) times the stride up to there, and then multiplies
    that by its own. Branches that come together count with the largest. What sees all positions
    anyway adds nothing: means, maxima and linear layers at the end of a network.

    The convolutions are not looked for among the modules, but in the graph that autograd makes of
    an evaluation: it knows their order, and what branches off.

    Args:
        network: Made of convolutions and poolings, as layers or as functions.
        images: An example of what it takes, (B, C, ...).

    Raises:
        ValueError: The network enlarges its images, resamples them, or does not look at them.
    """
    axes = images.ndim - 2
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        output = copy.deepcopy(network).eval()(images.clone())  # its first layer may work in place

    fields: dict[Any, ReceptiveField | None] = {}  # by what a node was the gradient of
    waiting = [output.grad_fn] if output.grad_fn else []
    while waiting:
        node = waiting[-1]
        parents = [parent for parent, _ in node.next_functions if parent]
        if missing := [parent for parent in parents if parent not in fields]:
            waiting += missing
            continue
        waiting.pop()
        seen = [field for parent in parents if (field := fields[parent])]
        if getattr(node, "variable", None) is images:
            fields[node] = ReceptiveField((1,) * axes, (1,) * axes)
        else:
            fields[node] = extended(node, seen) if seen else None
    if not (field := fields.get(output.grad_fn)):
        raise ValueError("the network's output does not depend on the images.")
    return field


def extended(node: Any, before: list[ReceptiveField]) -> ReceptiveField:
    """What is seen behind a node of autograd's graph, of which the branches saw ``before``."""
    size, stride = (tuple(map(max, zip(*x, strict=True))) for x in zip(*before, strict=True))
    kernel, steps, dilation = window(node, len(size))
    reach = (d * (k - 1) * s for d, k, s in zip(dilation, kernel, stride, strict=True))
    return ReceptiveField(
        tuple(a + b for a, b in zip(size, reach, strict=True)),
        tuple(a * b for a, b in zip(stride, steps, strict=True)),
    )


RESAMPLING = ("Upsample", "Adaptive", "FractionalMaxPool", "Im2Col", "Col2Im", "GridSampler")


def window(node: Any, axes: int) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Kernel size, stride and dilation of what a node of autograd's graph came from."""
    name, ones = node.name(), (1,) * axes
    enlarges = name.startswith("ConvolutionBackward") and node._saved_transposed
    jumps = name.startswith("SliceBackward") and node._saved_step > 1
    if enlarges or jumps or name.startswith(RESAMPLING):
        raise ValueError(f"the receptive field behind {name} is not known; give what is before it.")
    if name.startswith("ConvolutionBackward"):
        return node._saved_weight.shape[2:], node._saved_stride, node._saved_dilation
    if name.startswith(("MaxPool", "AvgPool")):
        kernel = node._saved_kernel_size
        each = kernel, node._saved_stride or kernel, getattr(node, "_saved_dilation", ones)
        kernel, steps, dilation = (x[-axes:] for x in each)  # one axis is pooled as the last of two
        return kernel, steps, dilation
    return ones, ones, ones


def spread(name: str, value: PerAxis, axes: int) -> tuple[int, ...]:
    """The number of each axis, checked."""
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes:
        raise ValueError(f"{name} must be one number or {axes}, one for each axis, got {values}.")
    least = 0 if name == "padding" else 1
    if min(values) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")
    return values


def by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
