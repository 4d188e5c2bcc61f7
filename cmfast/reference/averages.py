"""Averages of parameters over the steps of training."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cmfast.reference._common import compute_dtype


def ema_update_(
    parameters: Sequence[Tensor],
    averages: Sequence[Sequence[Tensor]],
    rates: Tensor,
    *,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """average_k <- average_k + (1 - rate_k) (parameter - average_k), in place; each copy becomes its parameter.

    1 - rate is taken in the dtype of `rates` [K]: in float32 it has lost three digits of a rate of 0.9999.
    """
    for weight, tensors in zip(1 - rates, averages, strict=True):
        for parameter, average in zip(parameters, tensors, strict=True):
            wide = compute_dtype(parameter, average)
            # From the nearer end, so that a rate of 0 copies.
            average.copy_(torch.lerp(average.to(wide), parameter.to(wide), weight.to(wide)))
    for parameter, duplicate in zip(parameters, copies or (), strict=copies is not None):
        duplicate.copy_(parameter)
