"""Dropout from counters, as `group_norm_silu` has it."""

from torch import Tensor

from cmfast.reference._common import compute_dtype
from cmfast.reference.group_norm import dropout_mask
from cmfast.reference.noise import Draw


def dropout(x: Tensor, p: float, draw: Draw) -> Tensor:
    """x [B, C, ...] where `dropout_mask` keeps it, divided by 1 - p; 0 elsewhere."""
    kept = x.to(compute_dtype(x)) * dropout_mask(draw, x.shape, p) * (1 / (1 - p))
    return kept.to(x.dtype)
