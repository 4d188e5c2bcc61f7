"""From the data range to pixels."""

from torch import Tensor

from cmfast import reference
from cmfast.ops import _check
from cmfast.ops._dispatch import plain, use_kernel

ROUNDINGS = ("trunc", "nearest")


def to_uint8(x: Tensor, *, rounding: str = "trunc") -> Tensor:
    """[-1, 1] [B, C, ...] to uint8 [B, ..., C], channels last; clamped, NaN to 0. Not differentiable.

    `rounding="trunc"` cuts 127.5 (x + 1) off (openai/consistency_models); `"nearest"` rounds it (diffusers).

    Raises: TypeError: x is not a floating tensor. ValueError: fewer than 2 dimensions, or an unknown rounding.

    >>> import torch
    >>> to_uint8(torch.tensor([[[[-1.0, 0.0, 1.0]]]])).flatten().tolist()
    [0, 127, 255]
    """
    _check.float_tensor("x", x, min_ndim=2)
    _check.choice("rounding", rounding, ROUNDINGS)
    if use_kernel("to_uint8", x):
        from cmfast.kernels.images import to_uint8_fwd

        return to_uint8_fwd(x.detach(), rounding=rounding)
    x = x.detach()
    return plain(reference.to_uint8, x, state=x)(x, rounding=rounding)
