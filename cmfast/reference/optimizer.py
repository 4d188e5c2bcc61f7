"""RAdam and Adam, with what a training step does around them: unscale, skip, clip, average.

Scalars are computed in float64 from the device's own step count; no value is read on the host.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cmfast.reference._common import compute_dtype
from cmfast.reference.averages import ema_update_

#: Moments m and v after a step -> what is subtracted from the parameter, divided by the learning rate.
_Direction = Callable[[Tensor, Tensor], Tensor]


def grad_norm(gradients: Sequence[Tensor], *, grad_scale: Tensor | None = None) -> Tensor:
    """sqrt(sum of (g / grad_scale)^2) over all elements of all gradients: a scalar, float32 or wider."""
    wide = compute_dtype(*gradients)
    total = sum(
        ((_unscaled(g.to(wide), grad_scale) ** 2).sum() for g in gradients),
        torch.zeros((), dtype=wide, device=gradients[0].device),
    )
    return total.sqrt()


def radam_ema_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    averages: Sequence[Sequence[Tensor]] = (),
    rates: Tensor | None = None,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    **options: object,
) -> Tensor:
    """A step of RAdam, Liu et al. 2019, algorithm 2, with t = step + 1 and rho_inf = 2 / (1 - beta2) - 1:

    m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2,  rho = rho_inf - 2 t beta2^t / (1 - beta2^t)
    p <- p - lr m / (1 - beta1^t) (r sqrt(1 - beta2^t) / (sqrt(v) + eps) if rho > 5 else 1)
    r^2 = (rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho)

    as in torch.optim.RAdam. The rest: `_step`.
    """
    t, correction1, correction2 = _corrections(step, betas)
    limit = 2 / (1 - betas[1]) - 1
    rho = limit - 2 * t * betas[1] ** t / correction2
    rectification = ((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)).sqrt()

    def direction(m: Tensor, v: Tensor) -> Tensor:
        adaptive = rectification * correction2.sqrt() / (v.sqrt() + eps)
        return m / correction1 * torch.where(rho > 5, adaptive, 1.0)

    lists = parameters, gradients, exp_avgs, exp_avg_sqs
    return _step(direction, lists, step, averages, rates, lr=lr, betas=betas, **options)  # type: ignore[arg-type]  # options of _step


def adam_ema_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    averages: Sequence[Sequence[Tensor]] = (),
    rates: Tensor | None = None,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    **options: object,
) -> Tensor:
    """A step of Adam, Kingma & Ba 2015, algorithm 1, with m and v as above and t = step + 1:

    p <- p - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    as in torch.optim.Adam. The rest: `_step`.
    """
    _, correction1, correction2 = _corrections(step, betas)

    def direction(m: Tensor, v: Tensor) -> Tensor:
        return m / correction1 / ((v / correction2).sqrt() + eps)

    lists = parameters, gradients, exp_avgs, exp_avg_sqs
    return _step(direction, lists, step, averages, rates, lr=lr, betas=betas, **options)  # type: ignore[arg-type]  # options of _step


def _step(
    direction: _Direction,
    lists: tuple[Sequence[Tensor], ...],
    step: Tensor,
    averages: Sequence[Sequence[Tensor]],
    rates: Tensor | None,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    grad_norm: Tensor | None = None,
    max_norm: float | None = None,
    copies: Sequence[Tensor] | None = None,
) -> Tensor:
    """g <- min(1, max_norm / (grad_norm + 1e-6)) g / grad_scale, negated to maximize; then with decay w either
    p <- (1 - lr w) p (decoupled: Loshchilov & Hutter 2019) or g <- g + w p; moments, parameters, averages, copies.

    Nothing changes, step count, averages and copies included, where found_inf is not 0 or grad_norm is not finite.
    Returns 1 where that was so, else 0.
    """
    parameters, gradients, exp_avgs, exp_avg_sqs = lists
    # Of one element in any number of dimensions; parameters may have none.
    lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
    skip = torch.zeros((), dtype=torch.bool, device=step.device)
    if found_inf is not None:
        skip = skip | (found_inf.reshape(()) != 0)
    if grad_norm is not None:
        skip = skip | ~grad_norm.reshape(()).isfinite()
    for p, grad, m, v in zip(parameters, gradients, exp_avgs, exp_avg_sqs, strict=True):
        wide = compute_dtype(p, grad, m, v)
        value, g = p.to(wide), _unscaled(grad.to(wide), grad_scale)
        if grad_norm is not None and max_norm is not None:
            g = g * (max_norm / (grad_norm.reshape(()) + 1e-6)).clamp(max=1)
        if maximize:
            g = -g
        if weight_decay and decoupled_weight_decay:
            value = value * (1 - lr * weight_decay)
        elif weight_decay:
            g = g + weight_decay * value
        new_m = betas[0] * m.to(wide) + (1 - betas[0]) * g
        new_v = betas[1] * v.to(wide) + (1 - betas[1]) * g * g
        new_p = value - lr * direction(new_m, new_v)
        for old, new in ((p, new_p), (m, new_m), (v, new_v)):
            old.copy_(torch.where(skip, old, new.to(old.dtype)))
    step.add_((~skip).to(step.dtype))
    others = [x for tensors in (*averages, copies or ()) for x in tensors]
    before = [x.clone() for x in others]
    ema_update_(parameters, averages, step.new_empty(0) if rates is None else rates, copies=copies)
    for x, old in zip(others, before):
        x.copy_(torch.where(skip, old, x))
    return skip.to(torch.float32)


def _corrections(step: Tensor, betas: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """t = step + 1, 1 - beta1^t and 1 - beta2^t."""
    t = step.reshape(()).double() + 1
    return t, 1 - betas[0] ** t, 1 - betas[1] ** t


def _unscaled(g: Tensor, grad_scale: Tensor | None) -> Tensor:
    return g if grad_scale is None else g / grad_scale.reshape(())
