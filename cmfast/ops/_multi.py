"""Forms for the CPU of the operations on lists of tensors: PyTorch's multi-tensor functions, float32.

They read scalars (step count, rates, scale) on the host, which is where the memory of a CPU's tensors is, and go
through the parameters in blocks that its cache holds from one function to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cmfast.ops._lists import alike, is_dense, written_by_a_kernel

Tensors = list[Tensor]
#: Elements of the parameters of a block, where none of them is larger.
BLOCK = 2**18
#: Elements of a gradient that PyTorch's norm, which adds up in float32 one after the other, takes with few digits lost.
ROW = 1024


def ema_update_(
    parameters: Tensors, averages: list[Tensors], rates: Tensor, *, copies: Tensors | None = None
) -> None:
    weights = _weights(rates)
    for block in _blocks(parameters):
        _average(parameters, averages, weights, copies, block)


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
    rectification = _rectification(t, betas[1]) if rectified else 1.0
    update: Callable[..., None]
    if rectification is None:
        update = _momentum_alone
        options: dict[str, Any] = {
            "t": t, "lr": rate, "betas": betas, "maximize": maximize,
            "decay": rate * weight_decay if decoupled_weight_decay else 0.0,
            "l2": 0.0 if decoupled_weight_decay else weight_decay,
        }  # fmt: skip
    else:
        # RAdam is Adam with the learning rate r lr and an eps of eps / sqrt(1 - beta2^t).
        update = torch._fused_adamw_ if decoupled_weight_decay else torch._fused_adam_
        options = {
            "lr": rate * rectification, "beta1": betas[0], "beta2": betas[1], "amsgrad": False, "maximize": maximize,
            "eps": eps / math.sqrt(1 - betas[1] ** t) if rectified else eps,
            # It is taken off by this learning rate, which is not the one that decay goes by.
            "weight_decay": weight_decay / rectification if decoupled_weight_decay else weight_decay,
            "grad_scale": None, "found_inf": None,
        }  # fmt: skip
    weights = _weights(rates)
    with alike([parameters, exp_avgs, exp_avg_sqs], [gradients]) as ((p, m, v), (g,)):
        for block in _blocks(p):
            # Not by the functions' grad_scale, which divides in place: two gradients, as of a + b, may be one tensor.
            scaled = g[block] if divisor == 1 else list(torch._foreach_div(g[block], divisor))
            update(p[block], scaled, m[block], v[block], [], [step] * len(p[block]), **options)
            if p is parameters:
                _average(p, averages, weights, copies, block)
    if p is not parameters:
        ema_update_(parameters, averages, rates, copies=copies)
    # torch's fused functions leave versions as they were.
    written_by_a_kernel(parameters, exp_avgs, exp_avg_sqs)
    return _scalar(0)


def _scalar(value: float) -> Tensor:
    """In no other dtype, and on no other device, that may be the default."""
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _rectification(t: float, beta2: float) -> float | None:
    """r of `reference.radam_ema_`; None where rho <= 5."""
    limit = 2 / (1 - beta2) - 1
    rho = limit - 2 * t * beta2**t / (1 - beta2**t)
    return math.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) if rho > 5 else None


def _momentum_alone(
    p: Tensors, g: Tensors, m: Tensors, v: Tensors, _maxima: Tensors, _steps: Tensors, *, t: float, lr: float,
    betas: tuple[float, float], maximize: bool, decay: float, l2: float,
) -> None:  # fmt: skip
    """RAdam's first steps, with the arguments of PyTorch's functions: p <- (1 - decay) p - lr m / (1 - beta1^t)."""
    if maximize:
        g = list(torch._foreach_neg(g))
    if l2:
        g = list(torch._foreach_add(g, p, alpha=l2))
    torch._foreach_lerp_(m, g, 1 - betas[0])
    torch._foreach_mul_(v, betas[1])
    torch._foreach_addcmul_(v, g, g, 1 - betas[1])
    if decay:
        torch._foreach_mul_(p, 1 - decay)
    torch._foreach_add_(p, m, alpha=-lr / (1 - betas[0] ** t))


def _average(
    parameters: Tensors, averages: list[Tensors], weights: list[float], copies: Tensors | None, block: slice
) -> None:
    for weight, tensors in zip(weights, averages):
        torch._foreach_lerp_(tensors[block], parameters[block], weight)
    if copies is not None:
        torch._foreach_copy_(copies[block], parameters[block])


def _blocks(parameters: Tensors) -> Iterator[slice]:
    """Parameters that follow one another, about BLOCK elements at a time."""
    start = elements = 0
    for i, count in enumerate(map(Tensor.numel, parameters)):
        if start < i and elements + count > BLOCK:
            yield slice(start, i)
            start, elements = i, 0
        elements += count
    yield slice(start, len(parameters))


def _weights(rates: Tensor) -> list[float]:
    return [1 - float(rate) for rate in rates.double().numpy()]


def _host(x: Tensor) -> float:
    return float(x.detach().reshape(()).double().numpy())


FORMS: dict[str, Callable[..., Any]] = {
    form.__name__: form for form in (ema_update_, grad_norm, radam_ema_, adam_ema_)
}
