"""Group normalisation with what stands around it in a U-Net: a bias and a sum before it, scale and shift of the time
embedding, SiLU and dropout after it."""

from typing import Any

import torch
from torch import Tensor

from cmfast import reference
from cmfast.ops import _check
from cmfast.ops._autograd import reference_grads, saved, stands_for_many
from cmfast.ops._dispatch import plain, use_kernel
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
            to the mean; on a CPU as PyTorch's GroupNorm takes them, in channels_last from E[x^2] - E[x]^2 where no mean
            is more than 4 deviations.
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
    # NumPy's as Python's, which torch.compile may let vary.
    num_groups = num_groups if isinstance(num_groups, int) else _check.whole("num_groups", num_groups)
    if num_groups < 1 or channels % num_groups:
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
    _check.number("eps", eps)
    _check.part("dropout", dropout)
    if dropout:
        if draw is None:
            raise ValueError("draw is missing: dropout needs a Draw(seed, index, draw)")
        draw = _check.draw_for("draw", draw, x, "x")
    draw = draw if dropout else None
    tensors = x, weight, bias, scale, shift, x_bias, residual
    options: dict[str, Any] = {"eps": eps, "silu": silu, "dropout": dropout}
    if not use_kernel("group_norm_silu", *tensors, draw, levels=False):
        names = ("scale", "shift", "x_bias", "residual", "draw")
        options |= dict(zip(names, (*tensors[3:], draw)))
        return plain(reference.group_norm_silu, *tensors, state=x)(x, num_groups, weight, bias, **options)
    options["num_groups"] = num_groups
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        results: tuple[Tensor, ...] = _GroupNormSilu.apply(options, *(draw or (None,) * 3), *tensors)
    else:
        results = _forward(options, draw, *tensors)
    return results[0] if residual is None else (results[0], results[1])


def _forward(options: dict[str, Any], draw: Draw | None, *tensors: Any) -> tuple[Tensor, ...]:
    """y, with a residual the sum, and what the backward pass needs to know of the groups."""
    from cmfast.kernels.group_norm import group_norm_silu_fwd

    arguments: list[Any] = [*tensors, draw]
    return group_norm_silu_fwd(*arguments, **options)


def _of_sum(
    t: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    x_bias: Tensor | None,
    draw: Draw | None,
    *,
    num_groups: int,
    **options: Any,
) -> Any:
    """The reference, of what the backward pass has."""
    return reference.group_norm_silu(
        t, num_groups, weight, bias, scale=scale, shift=shift, x_bias=x_bias, draw=draw, **options
    )


class _GroupNormSilu(torch.autograd.Function):
    """The kernels. Of all that has the size of x, the backward pass keeps what was normalised alone: x, or the sum."""

    @staticmethod
    def forward(options: Any, seed: Any, index: Any, draw: Any, *tensors: Any) -> tuple[Tensor, ...]:
        return _forward(options, None if index is None else Draw(seed, index, draw), *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.options, *draw, x, weight, bias, scale, shift, x_bias, residual = inputs
        *total, moments = output[1:]
        ctx.mark_non_differentiable(moments)
        ctx.set_materialize_grads(False)
        ctx.added = [None if t is None else t.dtype for t in (x_bias, residual)]
        ctx.draw = [None if isinstance(t, Tensor) else t for t in draw]
        normalised, late_bias = (total[0], None) if total else (x, x_bias)
        ctx.save_for_backward(*saved(normalised, weight, bias, scale, shift, late_bias), moments, *saved(*draw))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *of_sum: Tensor | None) -> tuple[Any, ...]:
        *tensors, moments, seed, index, number = ctx.saved_tensors
        given = [kept if t is None else t for t, kept in zip((seed, index, number), ctx.draw)]
        inputs = [*tensors, None if index is None else Draw(*given)]
        grad_sum = of_sum[0] if len(of_sum) > 1 else None
        *_, need_x_bias, need_residual = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * 6
        if grad is not None and not torch.is_grad_enabled() and not stands_for_many(grad, grad_sum):
            from cmfast.kernels.group_norm_bwd import group_norm_silu_bwd

            grads = list(group_norm_silu_bwd(grad, grad_sum, moments, *inputs, need_x_bias=need_x_bias, **ctx.options))
        else:
            if grad is not None:
                wanted = [i for i, t in enumerate(tensors) if t is not None and t.requires_grad]
                for i, made in zip(wanted, reference_grads(_of_sum, inputs, wanted, (grad,), ctx.options)):
                    grads[i] = made
            if grad_sum is not None:
                grads[0] = grad_sum if grads[0] is None else grads[0] + grad_sum
            if need_x_bias and inputs[5] is None and grads[0] is not None:
                grads[5] = grads[0].sum([i for i in range(grads[0].ndim) if i != 1])
        x_bias_dtype, residual_dtype = ctx.added
        grad_x_bias = grads[5].to(x_bias_dtype) if need_x_bias and grads[5] is not None else None
        grad_residual = grads[0].to(residual_dtype) if need_residual and grads[0] is not None else None
        return None, None, None, None, *grads[:5], grad_x_bias, grad_residual
