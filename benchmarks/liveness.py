"""The memory that a forward pass needs if every tensor is freed after its last use: a yardstick for peaks.

It is that of the network's operations, not of anyone's program: no allocator, no workspace, nothing held for too long.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cmfast.benchmarks.networks import without_memory


class Operation(NamedTuple):
    """The memories that an operation reads, and those that it creates; by number."""

    reads: list[int]
    creates: list[int]
    pointwise: bool


class Liveness(TorchDispatchMode):
    """Records operations, and says how many bytes of their results are alive at most.

    A result lives from the operation that creates it to the last that reads it or a view of it; a pointwise operation
    may write its result over an operand that dies there. What was there before, weights and inputs, is not counted.

    >>> with Liveness() as liveness:
    ...     x = torch.zeros(256)
    ...     skip = x * 2            # x and skip
    ...     y = x + 1               # in the place of x, which is not read again
    ...     z = torch.cat([y[:2], skip])
    >>> liveness.peak()             # y, skip and their concatenation
    3080
    """

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[Operation] = []
        self._sizes: dict[int, int] = {}
        # Kept, so that no address is given away twice.
        self._storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        reads = self._memories((args, kwargs))
        result = func(*args, **(kwargs or {}))
        known = len(self._storages)
        self._memories(result)
        creates = list(self._storages)[known:]
        self._sizes |= {memory: self._storages[memory].nbytes() for memory in creates}
        self._operations.append(Operation(reads, creates, torch.Tag.pointwise in func.tags))
        return result

    def _memories(self, tree: Any) -> list[int]:
        storages = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
        for storage in storages:
            self._storages.setdefault(storage._cdata, storage)
        return list(dict.fromkeys(storage._cdata for storage in storages))

    def peak(self) -> int:
        """Bytes alive at most, an operation's operands and results together."""
        last = {memory: i for i, op in enumerate(self._operations) for memory in (*op.reads, *op.creates)}
        alive = peak = 0
        for i, operation in enumerate(self._operations):
            created = sum(self._sizes[memory] for memory in operation.creates)
            dying = [self._sizes.get(memory, 0) for memory in operation.reads if last[memory] == i]
            in_place = operation.pointwise and max(dying, default=0) >= created
            peak = max(peak, alive + (0 if in_place else created))
            unread = sum(self._sizes[memory] for memory in operation.creates if last[memory] == i)
            alive += created - unread - sum(dying)
        return peak


class _Fused(torch.autograd.Function):
    """What attention's kernels make, and keep for their gradient; all of one shape."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _Attention(TorchFunctionMode):
    """Attention as one operation, without the matrix of all pairs that it falls into where there is no kernel."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Fused.apply(*args[:3])
        return func(*args, **(kwargs or {}))


def forward_peak(name: str, batch: int, dtype: torch.dtype, training: bool = False) -> int:
    """Bytes alive at most in one forward pass of a network of `NETWORKS`, its skip connections among them.

    training: and in the backward pass that follows, with what it needs of the forward pass; gradients of weights are
    not counted. Walked in float32, in which the plain network makes no casts, and counted in `dtype`.
    """
    network = without_memory(name, torch.float32).requires_grad_(training)
    size = network.image_size
    x = torch.empty(batch, network.in_channels, size, size, device="meta")
    timesteps = torch.empty(batch, device="meta")
    labels = None if network.num_classes is None else torch.empty(batch, dtype=torch.int64, device="meta")
    with torch.set_grad_enabled(training), Liveness() as liveness, _Attention():
        out = network(x, timesteps, labels)
        if training:
            out.backward(torch.empty_like(out))
    return liveness.peak() * dtype.itemsize // torch.float32.itemsize


def forward_flops(name: str, batch: int) -> int:
    """Of one forward pass of a network of `NETWORKS`: convolutions and matrix products, attention's among them."""
    network = without_memory(name, torch.float32)
    x = torch.empty(1, network.in_channels, network.image_size, network.image_size, device="meta")
    labels = None if network.num_classes is None else torch.empty(1, dtype=torch.int64, device="meta")
    # Attention as matrix products, which the counter knows on every device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(x, torch.empty(1, device="meta"), labels)
    return batch * counter.get_total_flops()


def weight_bytes(name: str, dtype: torch.dtype) -> int:
    """Bytes of a network's parameters."""
    return sum(p.numel() for p in without_memory(name, dtype).parameters()) * dtype.itemsize
