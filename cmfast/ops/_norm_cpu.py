"""GroupNorm with what stands around it on a CPU: in C, or PyTorch's in the memory of its result."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmfast import native, reference
from cmfast.native import group_norm
from cmfast.reference import Draw

#: Of batches that are served; computed in float32.
DTYPES = (torch.float32, torch.bfloat16)

#: From how many deviations on a group's mean is too large for variances of E[x^2] - E[x]^2, which lose a digit by then.
#: Below it errors are those of PyTorch in this layout. A limit of 1 has those of the other one, and costs a network
#: of digits 15% of its time.
LARGE_MEAN = 4

def _records(*inputs: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    x_bias: Tensor | None,
    residual: Tensor | None,
    dropout: float,
    draw: Draw | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """In C, or by PyTorch's own GroupNorm and gradients: in the memory of its result where no graph is recorded."""
    records = _records(x, weight, bias, scale, shift, x_bias, residual)
    pixels = (1,) * (x.ndim - 2)
    total = x
    if x_bias is not None:
        total = total.float() + x_bias.unflatten(0, (-1, *pixels))
    if residual is not None:
        total = total.float() + residual if records or total is x else total.add_(residual)
        total = total.to(x.dtype)
    # With gradients even before a mode that looks on: `group_norm` says why.
    if group_norm.fits(total) and (records or not native.watched()):
        options: dict[str, Any] = {"num_groups": num_groups, "eps": eps, "silu": silu}
        y = group_norm.group_norm_silu(total, weight, bias, scale, shift, **options)
    else:
        y = _group_norm(total.float(), num_groups, weight.float(), bias.float(), eps)
        if scale is not None and shift is not None:
            factor, summand = (t.float().unflatten(1, (-1, *pixels)) for t in (1 + scale.float(), shift))
            y = torch.addcmul(summand, y, factor, out=None if records else y)
        if silu:
            y = F.silu(y, inplace=not records)
    if dropout and draw is not None:
        factor = reference.dropout_mask(draw, x.shape, dropout) * (1 / (1 - dropout))
        y = y * factor if records else y.mul_(factor)
    y = y.to(x.dtype)
    return y if residual is None else (y, total)


def _group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """PyTorch's GroupNorm, where means are large without them: in channels_last variances are E[x^2] - E[x]^2."""
    if x.is_contiguous() or not native.channels_last(x):
        # Not F.group_norm, which refuses groups of one element.
        return torch.group_norm(x, num_groups, weight, bias, eps)
    batch, channels = x.shape[:2]
    sizes = batch, channels, x.numel() // (batch * channels), num_groups, eps
    y, mean, rstd = torch.native_group_norm(x, weight, bias, *sizes)
    # It is NaN if that of one group is.
    if not (mean * rstd).abs().max().item() <= LARGE_MEAN:
        of_channels = mean.detach().repeat_interleave(channels // num_groups, 1)
        y, *_ = torch.native_group_norm(x - of_channels.unflatten(1, (-1, *(1,) * (x.ndim - 2))), weight, bias, *sizes)
    return y
