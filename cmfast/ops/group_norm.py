"""Group normalisation with what stands around it in a U-Net: a bias and a sum before it, scale and shift of the time
embedding, SiLU and dropout after it."""

from torch import Tensor

from cmfast.ops import _check
from cmfast.ops._dispatch import plain
from cmfast.reference import Draw


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

    Returns y in the dtype and layout of x; with a residual (y, t), where t is rounded to the dtype of x before it is
    normalised. Group normalisation: Wu & He 2018; scale and shift (FiLM): Perez et al. 2018.

    Args:
        x: [B, C, ...], contiguous or channels_last: others are copied. residual: of its shape.
        num_groups, eps: of the normalisation. Statistics are taken in float32 (float64 for float64), from differences
            to the mean.
        weight, bias, x_bias: [C]. scale, shift: [B, C], both or neither; rows may lie apart, as in the halves of a
            larger projection. Any floating dtype.
        silu: False leaves z as it is.
        dropout: the part of y that is set to 0, in [0, 1); the rest is divided by 1 - dropout. What is kept depends on
            (draw.seed, draw.index[b], draw.draw, channel, pixel) alone (`reference.dropout_mask`), and the backward
            pass makes the mask again: the seed and draw number, where they are tensors, must not change between.

    Inside `torch.compile`, `auto` leaves it to inductor, unless it drops.

    Raises: TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.

    >>> import torch
    >>> x = torch.tensor([[[1.0, 3.0], [5.0, 5.0]]])
    >>> group_norm_silu(x, 2, torch.ones(2), torch.zeros(2), eps=0.0, scale=torch.zeros(1, 2),
    ...                 shift=torch.ones(1, 2), silu=False)[0, 0]
    tensor([0., 2.])
    """
    _check.float_tensor("x", x, min_ndim=2)
    batch, channels = x.shape[:2]
    if not isinstance(num_groups, int) or num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels of x, got {num_groups!r}")
    _check.parameter("weight", weight, (channels,), "C", x)
    _check.parameter("bias", bias, (channels,), "C", x)
    if x_bias is not None:
        _check.parameter("x_bias", x_bias, (channels,), "C", x)
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift go together: give both, or neither")
    if scale is not None:
        _check.parameter("scale", scale, (batch, channels), "B, C", x)
        _check.parameter("shift", shift, (batch, channels), "B, C", x)
    if residual is not None:
        _check.float_tensor("residual", residual)
        _check.same_shape(x=x, residual=residual)
    if not eps >= 0:
        raise ValueError(f"eps must be 0 or more, got {eps}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if dropout:
        if draw is None:
            raise ValueError("draw is missing: dropout needs a Draw(seed, index, draw)")
        _check.draw_for("draw", draw, x, "x")
    inputs = x, weight, bias, scale, shift, x_bias, residual, draw if dropout else None
    return plain("group_norm_silu", *inputs)(
        x, num_groups, weight, bias, eps=eps, scale=scale, shift=shift, silu=silu, x_bias=x_bias, residual=residual,
        dropout=dropout, draw=draw,
    )
