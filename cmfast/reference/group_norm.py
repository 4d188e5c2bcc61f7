"""Group normalisation with all that stands around it in a U-Net: Wu & He 2018, Perez et al. 2018 (FiLM)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cmfast.reference._common import compute_dtype
from cmfast.reference.noise import Draw
from cmfast.reference.philox import draw_words


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
    dropout: float = 0.0,
    draw: Draw | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = dropout(silu(z)), z = (GroupNorm(t) weight + bias) (1 + scale) + shift, of t = x + x_bias + residual.

    x, residual [B, C, ...]; weight, bias, x_bias [C]; scale, shift [B, C]. With a residual, t is rounded to the dtype
    of x before it is normalised, and returned: (y, t). Variances are those of the population.
    """
    wide = compute_dtype(x, weight, bias, scale, shift, x_bias, residual)
    channels = (-1, *(1,) * (x.ndim - 2))
    total = x.to(wide)
    if x_bias is not None:
        total = total + x_bias.to(wide).view(channels)
    if residual is not None:
        total = (total + residual.to(wide)).to(x.dtype)
    grouped = total.to(wide).unflatten(1, (num_groups, x.shape[1] // num_groups))
    if x.numel():
        variance, mean = torch.var_mean(grouped, tuple(range(2, grouped.ndim)), correction=0, keepdim=True)
        grouped = (grouped - mean) * torch.rsqrt(variance + eps)
    normalised = grouped.flatten(1, 2)
    z = normalised * weight.to(wide).view(channels) + bias.to(wide).view(channels)
    if scale is not None and shift is not None:
        z = z * (1 + scale.to(wide).unflatten(1, channels)) + shift.to(wide).unflatten(1, channels)
    y = F.silu(z) if silu else z
    if dropout:
        if draw is None:
            raise ValueError("dropout needs a draw")
        y = y * dropout_mask(draw, x.shape, dropout) * (1 / (1 - dropout))
    y = y.to(x.dtype)
    return y if residual is None else (y, total)


def dropout_mask(draw: Draw, shape: tuple[int, ...], dropout: float) -> Tensor:
    """Which elements of a batch of shape [B, C, ...] are kept, from (seed, sample index, draw, channel, pixel) alone.

    Channel c of pixel r (row-major) is kept where word c % 4 of the counter with first word r ceil(C / 4) + c // 4 is
    round(dropout 2^32) or more: the four words of a counter lie along the channels.
    """
    batch, count, *spatial = shape
    groups = -(-count // 4)
    word = torch.stack(draw_words(draw.seed, draw.index, draw.draw, math.prod(spatial) * groups), dim=-1)
    kept = word >= min(round(dropout * 2**32), 2**32 - 1)
    return kept.view(batch, *spatial, 4 * groups)[..., :count].movedim(-1, 1)
