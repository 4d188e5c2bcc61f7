"""A training step's last part in one pass over memory: unscale, skip, clip, RAdam or Adam, averages, a copy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from cmfast import reference
from cmfast.ops import _check, _lists
from cmfast.ops._dispatch import plain_list, use_kernel
from cmfast.ops.averages import as_rates, check_averages


def grad_norm(gradients: Iterable[Tensor], *, grad_scale: Tensor | None = None) -> Tensor:
    """sqrt(sum of (g / grad_scale)^2) over all gradients, a scalar on their device: float32, float64 for float64.

    Not finite where a gradient is not, or where the sum is too large for its dtype. The same gradients give the same
    bits, in any number of calls.

    Raises: TypeError, ValueError: an argument of the wrong type, dtype or device, or no gradients.

    >>> grad_norm([torch.full((3,), 2.0), torch.full((1,), 2.0)])
    tensor(4.)
    """
    inputs, like = _lists.check_first("gradients", gradients)
    if not inputs:
        raise ValueError("gradients is empty: there is no norm, nor a device for it")
    if grad_scale is not None:
        _lists.scalar("grad_scale", grad_scale, like.device)
    with torch.no_grad():
        if use_kernel("grad_norm", *_lists.kinds(inputs), levels=False):
            from cmfast.kernels import optimizer as kernels

            with _lists.alike([], [inputs]) as (_, (dense,)):
                return kernels.grad_norm(dense, grad_scale=grad_scale)
        return plain_list(reference.grad_norm, inputs)(inputs, grad_scale=grad_scale)


def radam_ema_(
    parameters: Iterable[Tensor],
    gradients: Iterable[Tensor],
    exp_avgs: Iterable[Tensor],
    exp_avg_sqs: Iterable[Tensor],
    step: Tensor,
    averages: Iterable[Iterable[Tensor]] = (),
    rates: Tensor | Sequence[float] = (),
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    grad_norm: Tensor | None = None,
    max_norm: float | None = None,
    copies: Iterable[Tensor] | None = None,
) -> Tensor:
    """One step of RAdam (Liu et al. 2019) as torch.optim.RAdam takes it, then `ema_update_`, in one pass.

    Parameters, moments, averages and copies change in place, and `step` grows by 1. Returns 0; where the step was
    skipped, 1, and nothing has changed. Both are a float32 scalar on the device: no value is read on the host.

    Args:
        parameters, gradients, exp_avgs, exp_avg_sqs: of the same shapes, any floating dtypes and layouts, on one
            device. Gradients are only read.
        step: steps taken so far, one float32 number.
        averages, rates, copies: as in `ema_update_`. A skipped step is none, so that averages skip it too.
        lr: a number, or a scalar tensor. betas, eps, weight_decay, decoupled_weight_decay, maximize: torch.optim's.
        grad_scale: what gradients are divided by. found_inf: the step is skipped where it is not 0.
        grad_norm: what `grad_norm(gradients, grad_scale=grad_scale)` is, over all that are clipped together. The step
            is skipped where it is not finite. max_norm: gradients are multiplied by max_norm / (grad_norm + 1e-6) where
            that is below 1; grad_norm is computed where it is not given.

    Raises: TypeError, ValueError: an argument of the wrong type, length, shape, dtype, device or range.

    >>> weight, grad, step = torch.ones(2), torch.tensor([1.0, float("nan")]), torch.zeros(())
    >>> radam_ema_([weight], [grad], [torch.zeros(2)], [torch.zeros(2)], step, lr=0.1, max_norm=1.0)
    tensor(1.)
    """
    options = {
        "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize,
        "decoupled_weight_decay": decoupled_weight_decay, "grad_scale": grad_scale, "found_inf": found_inf,
        "grad_norm": grad_norm, "max_norm": max_norm, "copies": copies,
    }  # fmt: skip
    return _step("radam_ema_", (parameters, gradients, exp_avgs, exp_avg_sqs), step, averages, rates, options)


def adam_ema_(
    parameters: Iterable[Tensor],
    gradients: Iterable[Tensor],
    exp_avgs: Iterable[Tensor],
    exp_avg_sqs: Iterable[Tensor],
    step: Tensor,
    averages: Iterable[Iterable[Tensor]] = (),
    rates: Tensor | Sequence[float] = (),
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    grad_norm: Tensor | None = None,
    max_norm: float | None = None,
    copies: Iterable[Tensor] | None = None,
) -> Tensor:
    """One step of Adam (Kingma & Ba 2015) as torch.optim.Adam takes it, or AdamW with `decoupled_weight_decay`; all
    else, arguments and errors included, as in `radam_ema_`.

    >>> weight, step = torch.ones(2), torch.zeros(())
    >>> adam_ema_([weight], [torch.ones(2)], [torch.zeros(2)], [torch.zeros(2)], step, lr=0.25)
    tensor(0.)
    >>> weight, step
    (tensor([0.7500, 0.7500]), tensor(1.))
    """
    options = {
        "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize,
        "decoupled_weight_decay": decoupled_weight_decay, "grad_scale": grad_scale, "found_inf": found_inf,
        "grad_norm": grad_norm, "max_norm": max_norm, "copies": copies,
    }  # fmt: skip
    return _step("adam_ema_", (parameters, gradients, exp_avgs, exp_avg_sqs), step, averages, rates, options)


def _step(
    name: str,
    lists: tuple[Iterable[Tensor], ...],
    step: Tensor,
    averages: Iterable[Iterable[Tensor]],
    rates: Tensor | Sequence[float],
    options: dict[str, Any],
) -> Tensor:
    p, like = _lists.check_first("parameters", lists[0])
    if not p:
        raise ValueError("parameters is empty: there is nothing to step")
    device = like.device
    g, m, v = (
        _lists.check(kind, tensors, like)
        for kind, tensors in zip(("gradients", "exp_avgs", "exp_avg_sqs"), lists[1:])
    )
    _lists.one_dtype("moments", [m, v])
    groups, copies = check_averages(like, averages, options["copies"])
    _lists.scalar("step", step, device)
    lr = options["lr"]
    if not isinstance(lr, float | int | Real | Tensor):
        raise TypeError(f"lr must be a number or a tensor, got {type(lr).__name__}")
    tensors, numbers = ["grad_scale", "found_inf", "grad_norm"], ["eps", "weight_decay"]
    (tensors if isinstance(lr, Tensor) else numbers).append("lr")
    for kind in tensors:
        if options[kind] is not None:
            _lists.scalar(kind, options[kind], device)
    betas = options["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"betas must be two numbers, got {betas!r}")
    for beta in betas:
        _check.part("each of betas", beta)
    # NumPy's numbers as Python's: powers of a float32 miss RAdam's threshold rho > 5.
    options["betas"] = tuple(map(float, betas))
    for kind in numbers:
        _check.number(kind, options[kind])
        options[kind] = float(options[kind])
    if options["max_norm"] is not None:
        _check.positive("max_norm", options["max_norm"], finite=False)
        options["max_norm"] = float(options["max_norm"])
        if options["grad_norm"] is None:
            options["grad_norm"] = grad_norm(g, grad_scale=options["grad_scale"])
    rates = as_rates(rates, len(groups), device)
    options["copies"] = copies
    written = [p, m, v, *groups, *([] if copies is None else [copies])]
    with torch.no_grad():
        if not use_kernel(name, *_lists.kinds(g, *written), levels=False):
            form = plain_list(getattr(reference, name), _lists.kinds(p, g, m, v, *groups))
            return form(p, g, m, v, step, groups, rates, **options)
        from cmfast.kernels import optimizer as kernels

        with _lists.alike(written, [g]) as ((p, m, v, *others), (g,)):
            options["copies"] = None if copies is None else others.pop()
            skipped = getattr(kernels, name)(p, g, m, v, step, others, rates, **options)
        _lists.written_by_a_kernel(*written, [step])
        return skipped
