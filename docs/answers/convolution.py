"""Receptive field of a network: the pixels that each of its outputs depends on.

Araujo et al., "Computing receptive fields of convolutional neural networks" (Distill, 2019).
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class ReceptiveField(NamedTuple):
    """The part of the input that one output depends on, in pixels of each axis.

    Attributes:
        size: Of that part, its padding included.
        stride: Distance between those of two neighbouring outputs.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]


def receptive_field(network: nn.Module, images: Tensor) -> ReceptiveField:
    """Return the part of the images that an output of the last convolution or pooling sees.

    A kernel of K with dilation D adds D (K - 1) times the stride up to there, and then multiplies
    that by its own. Branches that come together count with the largest. Layers that see all
    positions anyway add nothing: means, maxima and linear layers at the end of a network.

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

    fields: dict[Any, ReceptiveField | None] = {}  # by node
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
            fields[node] = _extended(node, seen) if seen else None
    if not (field := fields.get(output.grad_fn)):
        raise ValueError("the network's output does not depend on the images.")
    return field


def _extended(node: Any, before: list[ReceptiveField]) -> ReceptiveField:
    """Field after a node of autograd's graph, given those of its branches."""
    size, stride = (tuple(map(max, zip(*x, strict=True))) for x in zip(*before, strict=True))
    kernel, steps, dilation = _window(node, len(size))
    reach = (d * (k - 1) * s for d, k, s in zip(dilation, kernel, stride, strict=True))
    return ReceptiveField(
        tuple(a + b for a, b in zip(size, reach, strict=True)),
        tuple(a * b for a, b in zip(stride, steps, strict=True)),
    )


_RESAMPLING = ("Upsample", "Adaptive", "FractionalMaxPool", "Im2Col", "Col2Im", "GridSampler")


def _window(node: Any, axes: int) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Kernel size, stride and dilation of the layer that made a node of autograd's graph."""
    name, ones = node.name(), (1,) * axes
    enlarges = name.startswith("ConvolutionBackward") and node._saved_transposed
    jumps = name.startswith("SliceBackward") and node._saved_step > 1
    if enlarges or jumps or name.startswith(_RESAMPLING):
        raise ValueError(f"the receptive field after {name} is not known; give what is before it.")
    if name.startswith("ConvolutionBackward"):
        return node._saved_weight.shape[2:], node._saved_stride, node._saved_dilation
    if name.startswith(("MaxPool", "AvgPool")):
        kernel = node._saved_kernel_size
        each = kernel, node._saved_stride or kernel, getattr(node, "_saved_dilation", ones)
        kernel, steps, dilation = (x[-axes:] for x in each)  # one axis is pooled as the last of two
        return kernel, steps, dilation
    return ones, ones, ones
