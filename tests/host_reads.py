"""A guard that fails where a tensor's value is read on the host: what would make a GPU's stream wait."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
)


class NoHostReads(TorchDispatchMode):
    """Raises an AssertionError at `.item()`, `float(x)`, `if x:` and their kin."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in _READS, f"{function} reads a value on the host"
        return function(*args, **(kwargs or {}))
