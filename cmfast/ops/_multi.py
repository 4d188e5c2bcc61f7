"""Forms for the CPU of the operations on lists of tensors, float32: steps and averages in C, norms by PyTorch.

They read scalars (step count, rates, scale) on the host, which is where the memory of a CPU's tensors is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cmfast.native import optimizer
from cmfast.ops._lists import alike, is_dense, written_by_a_kernel

Tensors = list[Tensor]
#: Elements of a gradient that PyTorch's norm, which adds up in float32 one after the other, takes with few digits lost.
ROW = 1024


def ema_update_(
    parameters: Tensors, averages: list[Tensors], rates: Tensor, *, copies: Tensors | None = None
) -> None:
    with alike(averages, [parameters]) as (outputs, (inputs,)):
        optimizer.go_through(inputs, outputs, _weights(rates))
    if copies is not None:
        torch._foreach_copy_(copies, parameters)
    written_by_a_kernel(*averages)


def grad_norm(gradients: Tensors, *, grad_scale: Tensor | None = None) -> Tensor:
    """By the norms of rows, whose squares are added in float64."""
    small: Tensors = []
    norms: Tensors = []
    for g in gradients:
        count = g.numel()
        if count > ROW:
            g = g if is_dense(g) else g.contiguous()
            rows = g.as_strided((count // ROW, ROW), (ROW, 1))
            norms.append(torch.linalg.vector_norm(rows, dim=1))
            g = g.as_strided((count % ROW,), (1,), g.storage_offset() + rows.numel())
        small.append(g)
    total = torch.cat([*norms, torch.stack(torch._foreach_norm(small))]).double().square().sum()
    norm = total.to(torch.float32).sqrt()
    return norm if grad_scale is None else norm / grad_scale.reshape(()).abs()


def radam_ema_(*arguments: Any, **options: Any) -> Tensor:
    return _step(True, *arguments, **options)


def adam_ema_(*arguments: Any, **options: Any) -> Tensor:
    return _step(False, *arguments, **options)


def _step(
    rectified: bool,
    parameters: Tensors,
    gradients: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    step: Tensor,
    averages: list[Tensors],
    rates: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    grad_norm: Tensor | None,
    max_norm: float | None,
    copies: Tensors | None,
) -> Tensor:
    norm = 0.0 if grad_norm is None else _host(grad_norm)
    if (found_inf is not None and _host(found_inf)) or not math.isfinite(norm):
        return _scalar(1)
    # What gradients are divided by. A scale of 0 is a divisor like others: it makes them infinite.
    divisor = 1.0 if grad_scale is None else _host(grad_scale)
    if max_norm is not None:
        divisor *= max(1.0, (norm + 1e-6) / max_norm)
    step.add_(1)
    t, rate = _host(step), _host(lr) if isinstance(lr, Tensor) else float(lr)
    size, root, slope = rate / (1 - betas[0] ** t), math.sqrt(1 - betas[1] ** t), 1.0
    rectification = _rectification(t, betas[1]) if rectified else None
    if not rectified:
        slope = 1 / root
    elif rectification is not None:
        size *= rectification * root
    decay, l2 = (rate * weight_decay, 0.0) if decoupled_weight_decay else (0.0, weight_decay)
    sizes = {"divisor": divisor, "sign": -1 if maximize else 1, "l2": l2, "decay": decay, "size": size, "slope": slope}
    adaptive = not rectified or rectification is not None
    made = optimizer.Step(beta1=betas[0], beta2=betas[1], eps=eps, adaptive=adaptive, **sizes)
    written = [parameters, exp_avgs, exp_avg_sqs, *averages]
    with alike(written, [gradients]) as ((p, m, v, *others), (g,)):
        optimizer.go_through(p, others, _weights(rates), made, g, m, v)
    if copies is not None:
        torch._foreach_copy_(copies, parameters)
    written_by_a_kernel(*written)
    return _scalar(0)


def _scalar(value: float) -> Tensor:
    """In no other dtype, and on no other device, that may be the default."""
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _rectification(t: float, beta2: float) -> float | None:
    """r of `reference.radam_ema_`; None where rho <= 5."""
    limit = 2 / (1 - beta2) - 1
    rho = limit - 2 * t * beta2**t / (1 - beta2**t)
    return math.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) if rho > 5 else None


def _weights(rates: Tensor) -> list[float]:
    return [1 - float(rate) for rate in rates.double().numpy()]


def _host(x: Tensor) -> float:
    return float(x.detach().reshape(()).double().numpy())


FORMS: dict[str, Callable[..., Any]] = {
    form.__name__: form for form in (ema_update_, grad_norm, radam_ema_, adam_ema_)
}
#: Those that C does.
IN_C = ("ema_update_", "radam_ema_", "adam_ema_")
