"""Forms of the operations for the CPU that write into memory they already have: fewer passes, fewer page faults.

Same arguments and, within rounding, same results as `cmfast.reference`; for float32 without gradients, and for
the losses and GroupNorm with them. Each was measured faster than the reference, in batches of `LEAST` elements or more,
GroupNorm in any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmfast import native, reference
from cmfast.native import group_norm
from cmfast.ops._autograd import fused
from cmfast.ops._strips import lpips_layer
from cmfast.reference import Draw
from cmfast.reference._common import per_sample
from cmfast.reference.noise import _epsilon

#: Elements of a batch from which on these forms pay, and with gradients.
LEAST, LEAST_WITH_GRADIENTS = 2**16, 2**17

#: What takes batches in bfloat16 as well, and computes in float32.
HALF = ("group_norm_silu",)

#: From how many deviations on a group's mean is too large for variances of E[x^2] - E[x]^2, which lose a digit by then.
#: Below it errors are those of PyTorch in this layout. A limit of 1 has those of the other one, and costs a network
#: of digits 15% of its time.
LARGE_MEAN = 4

_Sizes = dict[str, Any]


def _scalings(sigma: Tensor, x: Tensor, sigma_data: float, boundary: float) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in, shaped to broadcast against x."""
    return reference.scalings(_beside(sigma, x), sigma_data=sigma_data, boundary=boundary)


def _beside(sigma: Tensor, x: Tensor) -> Tensor:
    return per_sample(sigma, x, torch.float32)


def _input(x: Tensor, sigma: Tensor, model_output: Tensor, options: _Sizes) -> tuple[Tensor, Tensor]:
    return reference.scale_input(
        x, sigma, sigma_data=options["sigma_data"], dtype=options["dtype"] or model_output.dtype
    )


def _denoised(
    model_output: Tensor, x_t: Tensor, sigma: Tensor, sigma_data: float | None, boundary: float, clip: bool
) -> Tensor:
    """D in memory of its own."""
    if sigma_data is None:
        denoised = torch.empty_like(x_t).copy_(model_output)  # as the state lies, which it may become
    else:
        c_skip, c_out, _ = _scalings(sigma, x_t, sigma_data, boundary)
        denoised = (x_t * c_skip).addcmul_(model_output, c_out)
    return denoised.clamp_(-1, 1) if clip else denoised


def denoise(model_output: Tensor, x_t: Tensor, sigma: Tensor, **options: Any) -> Tensor:
    return _denoised(model_output, x_t, sigma, **options)


def add_noise(
    x_start: Tensor, noise: Tensor | Draw, sigma: Tensor, input_sigma: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    x_t = torch.addcmul(x_start, _epsilon(noise, x_start.shape, torch.float32), _beside(sigma, x_start))
    return x_t, *reference.scale_input(x_t, sigma if input_sigma is None else input_sigma, **options)


def renoise(
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    noise: Tensor | Draw,
    *,
    sigma_min: float,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    epsilon = _epsilon(noise, x_t.shape, torch.float32)
    x_next = _denoised(model_output, x_t, sigma, options["sigma_data"], options["boundary"], options["clip"])
    level = _beside(next_sigma, x_t)
    x_next.addcmul_(epsilon, ((level - sigma_min) * (level + sigma_min)).clamp(min=0).sqrt())
    return x_next, *_input(x_next, next_sigma, model_output, options)


def _euler(model_output: Tensor, x_t: Tensor, sigma: Tensor, next_sigma: Tensor, options: _Sizes) -> Tensor:
    """x' = x + (x - D) (sigma' - sigma) / sigma = lerp(D, x, sigma' / sigma), in D's memory."""
    x_next = _denoised(model_output, x_t, sigma, options["sigma_data"], options["boundary"], options["clip"])
    ratio = _beside(next_sigma, x_t) / _beside(sigma, x_t)
    if bool(ratio.isfinite().all()):
        return torch.lerp(x_next, x_t, ratio, out=x_next)
    # From a level near 0 the ratio overflows where the slope, and the step, need not.
    return reference.euler_step(model_output, x_t, sigma, next_sigma, **options)[0]


def euler_step(
    model_output: Tensor, x_t: Tensor, sigma: Tensor, next_sigma: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    x_next = _euler(model_output, x_t, sigma, next_sigma, options)
    return x_next, *_input(x_next, next_sigma, model_output, options)


def heun_predictor(
    model_output: Tensor, x_t: Tensor, sigma: Tensor, next_sigma: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    return _input(_euler(model_output, x_t, sigma, next_sigma, options), next_sigma, model_output, options)


def heun_corrector(
    model_output: Tensor, model_output_next: Tensor, x_t: Tensor, sigma: Tensor, next_sigma: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _corrected(model_output, model_output_next, x_t, sigma, next_sigma, next_sigma, False, options)


def midpoint_corrector(
    model_output: Tensor,
    model_output_mid: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    mid_sigma: Tensor,
    next_sigma: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _corrected(model_output, model_output_mid, x_t, sigma, mid_sigma, next_sigma, True, options)


def _corrected(
    model_output: Tensor,
    model_output_2: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    sigma_2: Tensor,
    next_sigma: Tensor,
    midpoint: bool,
    options: _Sizes,
) -> tuple[Tensor, Tensor, Tensor]:
    """With e = x - D at either point: x'' = x + k r e + k_2 r_2 e_2, r = (sigma'' - sigma) / sigma, in few buffers."""
    sizes = options["sigma_data"], options["boundary"], options["clip"]
    start, mid, end = (_beside(level, x_t) for level in (sigma, sigma_2, next_sigma))
    # Where sigma_2 = 0 there is no second slope: an Euler step.
    ends = mid == 0
    safe_level, safe = torch.where(sigma_2 == 0, 1.0, sigma_2), torch.where(ends, 1.0, mid)
    k_2 = (end - start) / safe if midpoint else torch.where(ends, 0.0, 0.5 * (end - start) / safe)
    if not bool(k_2.isfinite().all()):  # as in _euler
        levels = (sigma, sigma_2, next_sigma) if midpoint else (sigma, next_sigma)
        whole = reference.midpoint_corrector if midpoint else reference.heun_corrector
        return whole(model_output, model_output_2, x_t, *levels, **options)
    x_2 = _euler(model_output, x_t, sigma, sigma_2, options)
    e_2 = _denoised(model_output_2, x_2, safe_level, *sizes).sub_(x_2).mul_(-k_2)
    # As e = (x_2 - x) / r_mid, the first slope's part is half of x_2 - x in Heun's method, none in the other.
    x_next = e_2.add_(x_t if midpoint else torch.lerp(x_t, x_2, 0.5))
    if bool(ends.any()):
        x_next = torch.where(ends, x_2, x_next)
    return x_next, *_input(x_next, next_sigma, model_output, options)


def weighted_loss(x: Tensor, target: Tensor, weight: Tensor, *, norm: str, huber_c: float) -> Tensor:
    if _records(x, target, weight):
        functions = _weighted_loss_fwd, _weighted_loss_bwd, reference.weighted_loss
        return fused(*functions, x, target, weight, keep=2, norm=norm, huber_c=huber_c)
    return _distance_in(_rows(x - target), norm, huber_c) * weight


def consistency_loss(*inputs: Any, **options: Any) -> Tensor:
    if _records(*inputs):
        kernels = _consistency_loss_fwd, _consistency_loss_bwd
        return fused(*kernels, reference.consistency_loss, *inputs, keep=2, **options)
    sizes = options["norm"], options["huber_c"]
    return _distance_in(_difference(*inputs, options=options), *sizes) * _weight(inputs, options)


def _records(*inputs: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def _rows(x: Tensor) -> Tensor:
    """A batch as [B, N]."""
    return x.unsqueeze(-1).flatten(1)


def _difference(
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    target: Tensor,
    weight: Tensor | str,
    x_t2: Tensor | None,
    next_sigma: Tensor | None,
    *,
    options: _Sizes,
) -> Tensor:
    """D minus the target's D, as [B, N] in memory of its own."""
    sizes = options["sigma_data"], options["boundary"], False
    if x_t2 is not None and next_sigma is not None:
        target = _denoised(target, x_t2, next_sigma, *sizes)
    return _rows(_denoised(model_output, x_t, sigma, *sizes).sub_(target))


def _weight(inputs: tuple[Any, ...], options: _Sizes) -> Tensor:
    """The weights of a consistency loss: given, or of its noise levels."""
    _, _, sigma, _, weight, *_ = inputs
    if isinstance(weight, str):
        weight = reference.loss_weight(sigma.to(torch.float32), weight, sigma_data=options["weight_sigma_data"])
    return weight


def _distance_in(delta: Tensor, norm: str, huber_c: float) -> Tensor:
    """The distance of each row of delta [B, N], in whose memory it is computed."""
    if norm == "l1":
        return delta.abs_().mean(1)
    squares = delta.square_()
    return squares.mean(1) if norm == "l2" else _huber(squares.sum(1), huber_c)


def _distance(delta: Tensor, norm: str, huber_c: float) -> Tensor:
    """The same where delta is wanted again."""
    if norm == "l1":
        return delta.abs().mean(1)
    # Not vector_norm, which adds up in float32 one after the other: of a large image that loses half of the digits.
    squared = delta.square().sum(1)
    return _huber(squared, huber_c) if norm == "huber" else squared / delta.shape[1]


def _huber(squared: Tensor, huber_c: float) -> Tensor:
    return (squared + huber_c**2).sqrt_().sub_(huber_c)


def _slope(scale: Tensor, distance: Tensor, delta: Tensor, norm: str, huber_c: float) -> Tensor:
    """The gradient of delta [B, N] from that of the distances [B]."""
    if norm == "huber":
        length = distance + huber_c
        scale = torch.where(length != 0, scale / length, 0.0)
    else:
        scale = scale * ((2 if norm == "l2" else 1) / max(delta.shape[1], 1))
    return (delta.sign() if norm == "l1" else delta) * scale[:, None]


def _weighted_loss_fwd(
    x: Tensor, target: Tensor, weight: Tensor, *, norm: str, huber_c: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and for the backward pass the distances and delta [B, N]."""
    delta = _rows(x - target)
    distance = _distance(delta, norm, huber_c)
    return distance * weight, distance, delta


def _weighted_loss_bwd(
    needed: tuple[bool, ...],
    grads: tuple[Tensor | None, ...],
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    saved: tuple[Tensor, Tensor],
    norm: str,
    huber_c: float,
) -> tuple[Tensor | None, ...]:
    (grad,), (distance, delta) = grads, saved
    if grad is None:
        return (None,) * 3
    grad_x = grad_target = None
    if needed[0] or needed[1]:
        grad_x = _slope(grad * weight, distance, delta, norm, huber_c).view(x.shape)
        grad_target = grad_x.neg() if needed[1] else None
    return grad_x, grad_target, (grad * distance).sum_to_size(weight.shape) if needed[2] else None


def _consistency_loss_fwd(*inputs: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and for the backward pass the distances and delta [B, N]."""
    delta = _difference(*inputs, options=options)
    distance = _distance(delta, options["norm"], options["huber_c"])
    return distance * _weight(inputs, options), distance, delta


def _consistency_loss_bwd(
    needed: tuple[bool, ...],
    grads: tuple[Tensor | None, ...],
    *inputs: Any,
    saved: tuple[Tensor, Tensor],
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """The gradient of the student's output, which training asks for; others come from the reference."""
    (grad,), (distance, delta) = grads, saved
    x_t, sigma = inputs[1:3]
    if grad is None or not needed[0]:
        return (None,) * 7
    g = _slope(grad * _weight(inputs, options), distance, delta, options["norm"], options["huber_c"]).view(x_t.shape)
    if options["sigma_data"] is not None:
        g.mul_(_scalings(sigma, x_t, options["sigma_data"], options["boundary"])[1])
    return g, *(None,) * 6


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    x_bias: Tensor | None,
    residual: Tensor | None,
    dropout: float,
    draw: Draw | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """In C, or by PyTorch's own GroupNorm and gradients: in the memory of its result where no graph is recorded."""
    records = _records(x, weight, bias, scale, shift, x_bias, residual)
    pixels = (1,) * (x.ndim - 2)
    total = x
    if x_bias is not None:
        total = total.float() + x_bias.unflatten(0, (-1, *pixels))
    if residual is not None:
        total = total.float() + residual if records or total is x else total.add_(residual)
        total = total.to(x.dtype)
    # With gradients even before a mode that looks on: `group_norm` says why.
    if group_norm.fits(total) and (records or not native.watched()):
        options: dict[str, Any] = {"num_groups": num_groups, "eps": eps, "silu": silu}
        y = group_norm.group_norm_silu(total, weight, bias, scale, shift, **options)
    else:
        y = _group_norm(total.float(), num_groups, weight.float(), bias.float(), eps)
        if scale is not None and shift is not None:
            factor, summand = (t.float().unflatten(1, (-1, *pixels)) for t in (1 + scale.float(), shift))
            y = torch.addcmul(summand, y, factor, out=None if records else y)
        if silu:
            y = F.silu(y, inplace=not records)
    if dropout and draw is not None:
        factor = reference.dropout_mask(draw, x.shape, dropout) * (1 / (1 - dropout))
        y = y * factor if records else y.mul_(factor)
    y = y.to(x.dtype)
    return y if residual is None else (y, total)


def _group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """PyTorch's GroupNorm, where means are large without them: in channels_last variances are E[x^2] - E[x]^2."""
    if x.is_contiguous() or not _channels_last(x):
        # Not F.group_norm, which refuses groups of one element.
        return torch.group_norm(x, num_groups, weight, bias, eps)
    batch, channels = x.shape[:2]
    sizes = batch, channels, x.numel() // (batch * channels), num_groups, eps
    y, mean, rstd = torch.native_group_norm(x, weight, bias, *sizes)
    # It is NaN if that of one group is.
    if not (mean * rstd).abs().max().item() <= LARGE_MEAN:
        of_channels = mean.detach().repeat_interleave(channels // num_groups, 1)
        y, *_ = torch.native_group_norm(x - of_channels.unflatten(1, (-1, *(1,) * (x.ndim - 2))), weight, bias, *sizes)
    return y


def _channels_last(x: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim])


FORMS: dict[str, Callable[..., Any]] = {
    form.__name__: form
    for form in (
        denoise,
        add_noise,
        renoise,
        euler_step,
        heun_predictor,
        heun_corrector,
        midpoint_corrector,
        weighted_loss,
        consistency_loss,
        group_norm_silu,
        lpips_layer,
    )
}
#: Those that know their gradients.
DIFFERENTIABLE = ("weighted_loss", "consistency_loss", "group_norm_silu", "lpips_layer")
#: Those that pay in batches of any size.
ANY_SIZE = ("group_norm_silu",)
