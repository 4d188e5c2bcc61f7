"""Dropout from counters."""

from typing import Any

import torch
from torch import Tensor

from cmfast import reference
from cmfast.ops import _check
from cmfast.ops._autograd import saved, stands_for_many
from cmfast.ops._dispatch import use_kernel
from cmfast.reference import Draw


def dropout(x: Tensor, p: float, draw: Draw) -> Tensor:
    """x [B, C, ...] with the part p set to 0, in [0, 1), and the rest divided by 1 - p; in the dtype of x.

    What is kept depends on (draw.seed, draw.index[b], draw.draw, channel, pixel) alone, as in `group_norm_silu`. The
    kernel stores no mask: the backward pass makes it again, and the seed and draw number, where they are tensors, must
    not change between.

    Raises: TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.

    >>> x = torch.ones(1, 8, 100, 100)
    >>> y = dropout(x, 0.25, Draw(0, torch.tensor([5])))
    >>> y.unique(), round(y.mean().item(), 2)
    (tensor([0.0000, 1.3333]), 1.0)
    """
    _check.float_tensor("x", x, min_ndim=2)
    _check.part("p", p)
    draw = _check.draw_for("draw", draw, x, "x")
    if not use_kernel("dropout", x, draw, levels=False):
        return reference.dropout(x, p, draw)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Dropout.apply(x, p, *draw)
    return _forward(x, p, draw)


def _forward(x: Tensor, p: float, draw: Draw) -> Tensor:
    from cmfast.kernels.dropout import dropout_fwd

    return dropout_fwd(x, p, draw)


class _Dropout(torch.autograd.Function):
    """The kernel, which is its own backward pass and keeps neither x nor a mask."""

    @staticmethod
    def forward(x: Tensor, p: float, seed: Any, index: Tensor, number: Any) -> Tensor:
        return _forward(x, p, Draw(seed, index, number))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.p, *draw = inputs
        ctx.draw = [None if isinstance(part, Tensor) else part for part in draw]
        ctx.save_for_backward(*saved(*draw))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        draw = Draw(*(kept if part is None else part for part, kept in zip(ctx.saved_tensors, ctx.draw)))
        op = reference.dropout if stands_for_many(grad) else dropout
        return op(grad, ctx.p, draw), None, None, None, None
