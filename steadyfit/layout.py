"""Layout of the tensors of one optimizer for the sums over each of them.

Dimensions: A parameters of one optimizer have a gradient in a step, N elements together.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

# Elements up to which all tensors are gathered into one: an operator on few elements costs its
# dispatch and not their memory, and then there is one dispatch instead of A.
FLAT_SIZE = 1 << 16


class Layout:
    """The parameters that have a gradient, and how they lie in the tensors that are computed with.

    These are one flat tensor (N,) for a small model, else one for each parameter.

    Args:
        active: Indices among all parameters of the optimizer (A).
        groups: Of each, the index of its parameter group, ascending.
        params: These parameters.
    """

    def __init__(self, active: list[int], groups: list[int], params: Sequence[Tensor]) -> None:
        tensors = [local(p) for p in params]
        self.active = active
        self.group_of = groups
        self.elements = [p.numel() for p in params]  # over all processes
        self.sizes = [tensor.numel() for tensor in tensors]  # in this one
        self.groups = {g: slice(groups.index(g), groups.index(g) + groups.count(g)) for g in groups}
        kinds = self.kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
        self.dtype, self.device = next(iter(kinds), (torch.float32, torch.device("cpu")))
        of_cpu_or_gpu = self.device.type in ("cpu", "cuda")
        self.sums_segments = of_cpu_or_gpu and self.dtype in (torch.float32, torch.float64)
        self.is_flat = (
            len(kinds) == 1
            and len(tensors) > 1
            and sum(self.elements) <= FLAT_SIZE  # the same in all processes
            and self.sums_segments
        )

    @property
    def on_host(self) -> bool:
        """True if a few numbers are there without a read: their arithmetic needs no operator."""
        return self.is_flat and self.device.type == "cpu"

    @cached_property
    def ends(self) -> Tensor:
        """End of each parameter in the flat tensor, after a zero (A + 1,)."""
        return torch.tensor([0, *self.sizes]).cumsum(0).to(self.device)

    @cached_property
    def owner(self) -> Tensor:
        """The parameter of each element of the flat tensor (N,)."""
        sizes = torch.tensor(self.sizes)
        return torch.arange(len(sizes)).repeat_interleave(sizes).to(self.device)

    @cached_property
    def counts(self) -> Tensor:
        """Elements of each parameter (A,) over all processes."""
        return torch.tensor(self.elements, dtype=torch.float32).to(self.device)

    def gather(self, tensors: list[Tensor]) -> list[Tensor]:
        """One flat copy of the tensors, or the tensors."""
        return [_flatten_dense_tensors(tensors)] if self.is_flat else tensors

    def copy(self, tensors: list[Tensor]) -> list[Tensor]:
        """The same, never the tensors themselves."""
        if self.is_flat or not tensors:
            return self.gather(tensors)
        return list(torch._foreach_mul(tensors, 1))

    def scatter(self, gathered: list[Tensor], like: list[Tensor]) -> list[Tensor]:
        """Views of gathered tensors, one for each parameter."""
        if not self.is_flat:
            return gathered
        pieces = zip(gathered[0].split(self.sizes), like, strict=True)
        return [piece.view(t.shape) for piece, t in pieces]

    def of_group(self, gathered: list[Tensor], group: int) -> list[Tensor]:
        """A parameter group's part of gathered tensors."""
        places = self.groups.get(group, slice(0, 0))
        if not self.is_flat:
            return gathered[places]
        start = sum(self.sizes[: places.start])
        return [gathered[0][start : start + sum(self.sizes[places])]]

    def squares(self, gathered: list[Tensor], *, exact: bool = False) -> Tensor:
        """Squared L2 norms (A,); ``exact`` takes those as well that float32 cannot hold."""
        double = exact and self.device.type in ("cpu", "cuda")
        if not self.is_flat:
            found = norms(gathered)
            return found.double().square_() if double else found.square_()
        flat = [gathered[0].double()] if double else gathered
        return self.inner(flat, flat)

    def inner(self, first: list[Tensor], second: list[Tensor]) -> Tensor:
        """Inner products (A,)."""
        if self.is_flat:
            return _sums_of(first[0] * second[0], self.ends)
        small, ends, order = self._by_size
        products = [_inner(first[i], second[i]) for i in order[len(small) :]]
        if not small:
            return torch.stack(products)
        a, b = (_flatten_dense_tensors([t[i] for i in small]) for t in (first, second))
        sums = _sums_of(a * b, ends)
        return torch.cat([sums, torch.stack(products)])[self._places] if products else sums

    @cached_property
    def _by_size(self) -> tuple[list[int], Tensor, list[int]]:
        """Small parameters, to be put together; where each of them ends; all, these in front."""
        can = len(self.kinds) == 1 and self.sums_segments
        is_small = [can and size <= FLAT_SIZE for size in self.sizes]
        small = [i for i, is_one in enumerate(is_small) if is_one]
        ends = torch.tensor([0, *(self.sizes[i] for i in small)]).cumsum(0)
        order = [*small, *(i for i, is_one in enumerate(is_small) if not is_one)]
        return small, ends.to(self.device), order

    @cached_property
    def _places(self) -> Tensor:
        """Place of each parameter in the order by size (A,)."""
        return torch.tensor(self._by_size[2]).argsort().to(self.device)

    def lerp_(self, start: list[Tensor], end: list[Tensor], weights: Tensor) -> None:
        """Move from ``start`` towards ``end``, by a weight for each parameter (A,), in place."""
        if self.is_flat:
            start[0].lerp_(end[0], weights.to(self.dtype).index_select(0, self.owner))
        else:
            pairs = zip(weights.unbind(), start, strict=True)
            torch._foreach_lerp_(start, end, [weight.to(t.dtype) for weight, t in pairs])


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: of a DTensor its shard."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


def norms(tensors: list[Tensor]) -> Tensor:
    """L2 norms (A,) of A tensors; bfloat16 and float16 are summed in float32."""
    if not tensors:
        return torch.zeros(0)
    is_double = any(tensor.dtype is torch.float64 for tensor in tensors)
    dtype = torch.float64 if is_double else torch.float32
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype))


def _sums_of(values: Tensor, ends: Tensor) -> Tensor:
    """Sums (A,) of the parts of a flat tensor (N,); ``ends`` (A + 1,) begins with a zero."""
    return torch.segment_reduce(values, "sum", offsets=ends, unsafe=True)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product () of two tensors of one shape; of low precision, summed in float32."""
    if a.dtype in (torch.float16, torch.bfloat16):
        a, b = a.float(), b.float()
    return torch.dot(a.reshape(-1), b.reshape(-1))
