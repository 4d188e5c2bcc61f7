"""Forms for the CPU of the operations on lists of tensors: PyTorch's multi-tensor functions, float32.

They read scalars (step count, rates, scale) on the host, which is where the memory of a CPU's tensors is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cmfast.ops._lists import alike, written_by_a_kernel

Tensors = list[Tensor]


def ema_update_(
    parameters: Tensors, averages: Sequence[Tensors], rates: Tensor, *, copies: Tensors | None = None
) -> None:
    for rate, tensors in zip(rates.detach().double().numpy(), averages):
        torch._foreach_lerp_(tensors, [p.to(a.dtype) for p, a in zip(parameters, tensors)], 1 - float(rate))
    if copies is not None:
        torch._foreach_copy_(copies, parameters)


def grad_norm(gradients: Tensors, *, grad_scale: Tensor | None = None) -> Tensor:
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm if grad_scale is None else norm / grad_scale.reshape(())


def radam_ema_(
    parameters: Tensors, gradients: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, step: Tensor,
    averages: Sequence[Tensors] = (), rates: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """RAdam is Adam with another learning rate, r lr, and another eps, eps / sqrt(1 - beta2^t), where it adapts."""
    return _step(True, (parameters, gradients, exp_avgs, exp_avg_sqs), step, averages, rates, **options)


def adam_ema_(
    parameters: Tensors, gradients: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, step: Tensor,
    averages: Sequence[Tensors] = (), rates: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    return _step(False, (parameters, gradients, exp_avgs, exp_avg_sqs), step, averages, rates, **options)


def _step(
    rectified: bool,
    lists: tuple[Tensors, ...],
    step: Tensor,
    averages: Sequence[Tensors],
    rates: Tensor | None,
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
    copies: Tensors | None = None,
) -> Tensor:
    norm = 0.0 if grad_norm is None else _host(grad_norm)
    if (found_inf is not None and _host(found_inf)) or not math.isfinite(norm):
        return torch.ones(())
    factor = 1.0 if grad_scale is None else 1 / _host(grad_scale)
    if grad_norm is not None and max_norm is not None:
        factor *= min(1.0, max_norm / (norm + 1e-6))
    step.add_(1)
    t, rate = _host(step), _host(lr) if isinstance(lr, Tensor) else float(lr)
    parameters, gradients, exp_avgs, exp_avg_sqs = lists
    with alike([parameters, exp_avgs, exp_avg_sqs], [gradients]) as ((p, m, v), (g,)):
        rectification = _rectification(t, betas[1]) if rectified else 1.0
        if rectification is None:
            decay = rate * weight_decay if decoupled_weight_decay else 0.0
            l2 = 0.0 if decoupled_weight_decay else weight_decay
            _momentum_alone(p, g, m, v, t, rate, betas, decay, l2, -factor if maximize else factor)
        else:
            # The function divides gradients by a scale, and stores them so.
            scale = None if factor == 1 else torch.tensor(1 / factor)
            # Its decay is taken off with its learning rate, which here is not the one that decay goes by.
            decay = weight_decay / rectification if decoupled_weight_decay else weight_decay
            function: Callable[..., None] = torch._fused_adamw_ if decoupled_weight_decay else torch._fused_adam_
            function(
                p, g, m, v, [], [step] * len(p), lr=rate * rectification, beta1=betas[0], beta2=betas[1],
                weight_decay=decay, eps=eps / math.sqrt(1 - betas[1] ** t) if rectified else eps, amsgrad=False,
                maximize=maximize, grad_scale=scale, found_inf=None,
            )  # fmt: skip
            written_by_a_kernel(p, m, v)
    ema_update_(parameters, averages, step.new_empty(0) if rates is None else rates, copies=copies)
    return torch.zeros(())


def _rectification(t: float, beta2: float) -> float | None:
    """r of `reference.radam_ema_`; None where rho <= 5."""
    limit = 2 / (1 - beta2) - 1
    rho = limit - 2 * t * beta2**t / (1 - beta2**t)
    return math.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) if rho > 5 else None


def _momentum_alone(
    p: Tensors, g: Tensors, m: Tensors, v: Tensors, t: float, lr: float, betas: tuple[float, float], decay: float,
    l2: float, factor: float,
) -> None:  # fmt: skip
    """RAdam's first steps: p <- (1 - decay) p - lr m / (1 - beta1^t)."""
    if factor != 1:
        g = torch._foreach_mul(g, factor)
    if l2:
        g = torch._foreach_add(g, p, alpha=l2)
    torch._foreach_lerp_(m, g, 1 - betas[0])
    torch._foreach_mul_(v, betas[1])
    torch._foreach_addcmul_(v, g, g, 1 - betas[1])
    if decay:
        torch._foreach_mul_(p, 1 - decay)
    torch._foreach_add_(p, m, alpha=-lr / (1 - betas[0] ** t))


def _host(x: Tensor) -> float:
    return float(x.detach().reshape(()).double().numpy())


FORMS: dict[str, Callable[..., Any]] = {
    form.__name__: form for form in (ema_update_, grad_norm, radam_ema_, adam_ema_)
}
