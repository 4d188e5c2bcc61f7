"""Averages of parameters, several in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cmfast import reference
from cmfast.ops import _lists
from cmfast.ops._dispatch import plain_list, use_kernel


def ema_update_(
    parameters: Iterable[Tensor],
    averages: Iterable[Iterable[Tensor]],
    rates: Tensor | Sequence[float],
    *,
    copies: Iterable[Tensor] | None = None,
) -> None:
    """average_k <- average_k + (1 - rate_k) (parameter - average_k), in place, from one read of the parameters.

    Computes in float32, float64 where a tensor is float64, and rounds once.

    Args:
        parameters: any shapes, floating dtypes and layouts, all on one device. This and other lists may be generators,
            as `parameters()` of a model is.
        averages: [K][parameters], of the same shapes, those of one parameter in one dtype. float32 where they are slow:
            at a rate of 0.9999 a bfloat16 average stands still.
        rates: [K], float64 or float32. A tensor is read on the device alone. 1 - rate is taken in its dtype, so that
            float32 moves an average of rate 0.9999 by up to 0.03% more or less than it should.
        copies: each becomes its parameter, in its own dtype.

    Raises: TypeError, ValueError: an argument of the wrong type, length, shape, dtype or device; the message names it.

    >>> weight, average = torch.ones(2), torch.zeros(2)
    >>> ema_update_([weight], [[average]], [0.75])
    >>> average
    tensor([0.2500, 0.2500])
    """
    inputs, like = _lists.check_first("parameters", parameters)
    groups, duplicates = check_averages(like, averages, copies)
    if not inputs:
        return
    rates = as_rates(rates, len(groups), like.device)
    written = [*groups, *([] if duplicates is None else [duplicates])]
    if not written:
        return
    with torch.no_grad():
        if not use_kernel("ema_update_", *_lists.kinds(inputs, *written), levels=False):
            form = plain_list(reference.ema_update_, _lists.kinds(inputs, *groups))
            form(inputs, groups, rates, copies=duplicates)
            return
        from cmfast.kernels import averages as kernels

        with _lists.alike(written, [inputs]) as (outputs, (inputs,)):
            kernels.ema_update_(inputs, outputs[: len(groups)], rates, copies=outputs[-1] if duplicates else None)
        _lists.written_by_a_kernel(*written)


def check_averages(
    like: _lists.Like, averages: Iterable[Iterable[Tensor]], copies: Iterable[Tensor] | None
) -> tuple[_lists.Lists, _lists.Tensors | None]:
    """Both as lists."""
    if not isinstance(averages, Iterable):
        raise TypeError(f"averages must be a list of lists of tensors, got {type(averages).__name__}")
    groups = [_lists.check(f"averages[{k}]", tensors, like) for k, tensors in enumerate(averages)]
    _lists.one_dtype("averages", groups)
    return groups, None if copies is None else _lists.check("copies", copies, like)


def as_rates(rates: Tensor | Sequence[float], count: int, device: torch.device) -> Tensor:
    """`rates` as a tensor [count] on the device. Numbers are filled in there: a copy from the host would wait for it.

    Raises: TypeError: neither. ValueError: not so many, not from 0 to 1, on another device, or of an integer dtype.
    """
    if not isinstance(rates, Tensor):
        if not isinstance(rates, tuple | list):
            raise TypeError(f"rates must be a tensor or numbers, got {type(rates).__name__}")
        numbers = [float(rate) for rate in rates]
        if not all(0 <= rate <= 1 for rate in numbers):
            raise ValueError(f"rates must be from 0 to 1, got {rates}")
        filled = [torch.full((), rate, dtype=torch.float64, device=device) for rate in numbers]
        rates = torch.stack(filled) if filled else torch.empty(0, dtype=torch.float64, device=device)
    if rates.shape != (count,) or rates.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"rates must be [{count}] for {count} averages, float32 or float64, got {rates.dtype} {list(rates.shape)}"
        )
    if rates.device != device:
        raise ValueError(f"rates is on {rates.device}, the parameters on {device}: move one of them")
    return rates.detach()
