"""Broadcasting and accumulation dtype, shared by the reference operations."""

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64, else float32: the dtype coefficients and sums are computed in."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def per_sample(sigma: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`sigma` [B] or scalar, shaped to broadcast against `like` [B, ...]."""
    sigma = sigma.to(dtype)
    return sigma.reshape(sigma.shape + (1,) * (like.ndim - 1)) if sigma.ndim else sigma


def clip_unit(x: Tensor, clip: bool) -> Tensor:
    """Clamp to the data range [-1, 1] when `clip`."""
    return x.clamp(-1, 1) if clip else x
