"""Dropout from counters."""

from torch import Tensor

from cmfast import reference
from cmfast.ops import _check
from cmfast.reference import Draw


def dropout(x: Tensor, p: float, draw: Draw) -> Tensor:
    """x [B, C, ...] with the part p set to 0, in [0, 1), and the rest divided by 1 - p; in the dtype of x.

    What is kept depends on (draw.seed, draw.index[b], draw.draw, channel, pixel) alone, as in `group_norm_silu`: the
    backward pass makes the mask again, and nothing is stored.

    Raises: TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.

    >>> import torch
    >>> x = torch.ones(1, 8, 100, 100)
    >>> y = dropout(x, 0.25, Draw(0, torch.tensor([5])))
    >>> y.unique(), round(y.mean().item(), 2)
    (tensor([0.0000, 1.3333]), 1.0)
    """
    _check.float_tensor("x", x, min_ndim=2)
    if not 0 <= p < 1:
        raise ValueError(f"p must be in [0, 1), got {p}")
    _check.draw_for("draw", draw, x, "x")
    return reference.dropout(x, p, draw)
