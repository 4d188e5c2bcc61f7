"""GroupNorm with scale, shift and SiLU on a CPU, and its gradients, in two passes each: functions of group_norm.c."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from cmfast import native, reference
from cmfast.ops._autograd import fused

#: What images may be in; all is computed in float32.
DTYPES = (torch.float32, torch.bfloat16)
#: What the number of channels must be divisible by: a line of the cache. Fewest numbers that all threads share.
LINE, LEAST = 16, 2**15


class _Functions:
    """Those of group_norm.c for a CPU."""

    def __init__(self, cpu: str | None = None) -> None:
        # Arguments as in group_norm.c.
        function = functools.partial(native.function, native.library(cpu))
        pointer, number, flag, threads, real = (
            ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_float,
        )  # fmt: skip

        self.space = function("group_norm_space", *[number] * 3, result=number)
        self.forward = function("group_norm_forward", *[pointer] * 8, *[number] * 4, real, flag, flag, threads)
        self.backward = function("group_norm_backward", *[pointer] * 10, *[number] * 4, flag, flag, threads)


#: Those for a CPU, None: this one. Raises: Unavailable: they cannot be had here.
functions = functools.cache(_Functions)
#: Why they cannot be had here; None if they can.
refusal = functools.cache(functools.partial(native.refusal, functions))


def fits(x: Tensor) -> bool:
    """Whether x [B, C, ...] can be normalised so."""
    return (
        x.dtype in DTYPES
        and x.ndim > 2
        and x.shape[1] % LINE == 0
        and x.numel() > 0
        and not native.traced()
        and x.movedim(1, -1).is_contiguous()
        and refusal() is None
    )


def _shape(x: Tensor) -> tuple[int, int, int]:
    """Samples, pixels, channels."""
    batch, channels = x.shape[:2]
    return batch, x.numel() // (batch * channels), channels


def _pointers(*given: Tensor | None) -> list[int | None]:
    return [None if x is None else x.data_ptr() for x in given]


def _vectors(*given: Tensor | None) -> list[Tensor | None]:
    """Parameters as C takes them."""
    return [None if x is None else x.float().contiguous() for x in given]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    num_groups: int,
    eps: float,
    silu: bool,
    cpu: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.group_norm_silu`, in the layout and dtype of x [B, C, ...]; and what `backward` wants of the groups
    [3, B, G]: means, reciprocal deviations, and what float32 leaves of the means, over deviations."""
    made, sizes, out = functions(cpu), _shape(x), torch.empty_like(x)
    moments = torch.empty(3, len(x), num_groups, dtype=torch.float32, device="cpu")
    space = torch.empty(made.space(*sizes), dtype=torch.float64, device="cpu")
    held = [x, *_vectors(weight, bias, scale, shift), out, moments, space]
    half, threads = x.dtype != torch.float32, native.threads(x.numel(), LEAST)
    made.forward(*_pointers(*held), *sizes, num_groups, eps, silu, half, threads)
    return out, moments


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    moments: Tensor,
    *,
    num_groups: int,
    silu: bool,
    cpu: str | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the five, None where there is no scale and no shift, for that of the result."""
    # As C reads them, also where a caller's hooks for what is saved made another x of it.
    x, grad = (each.movedim(1, -1).contiguous().movedim(-1, 1) for each in (x, grad.to(x.dtype).resolve_neg()))
    made, sizes, out = functions(cpu), _shape(x), torch.empty_like(x)
    totals = torch.empty(len(x), 2, x.shape[1], dtype=torch.float32, device="cpu")
    space = torch.empty(made.space(*sizes), dtype=torch.float64, device="cpu")
    vectors = _vectors(weight, bias, scale, shift)
    held = [grad, x, *vectors, moments.contiguous(), out, totals, space]
    half, threads = x.dtype != torch.float32, native.threads(x.numel(), LEAST)
    made.backward(*_pointers(*held), *sizes, num_groups, silu, half, threads)
    of_z, of_h = totals.unbind(1)  # of z = (h weight + bias) (1 + scale) + shift, and of that times h
    if scale is None or shift is None:
        return out, of_h.sum(0).to(weight.dtype), of_z.sum(0).to(bias.dtype), None, None
    factor = 1 + scale.float()
    of_weight, of_bias = (of_h * factor).sum(0), (of_z * factor).sum(0)
    of_scale = of_h * weight.float() + of_z * bias.float()
    return out, of_weight.to(weight.dtype), of_bias.to(bias.dtype), of_scale.to(scale.dtype), of_z.to(shift.dtype)


def _backward(
    needed: tuple[bool, ...], grads: tuple[Tensor | None, ...], *inputs: Any, saved: Any, eps: float, **options: Any
) -> tuple[Tensor | None, ...]:
    if grads[0] is None or native.watched():
        return (None,) * len(inputs)  # of which the reference makes them
    return backward(grads[0], *inputs, *saved, **options)


def _forward(*inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`forward`; before a mode that looks on, by PyTorch. What is kept for gradients is the same: a mode may look on in
    one pass of torch.utils.checkpoint alone."""
    if not native.watched():
        return forward(*inputs, **options)
    x, groups = inputs[0], options["num_groups"]
    grouped = x.float().unflatten(1, (groups, -1)).flatten(2)
    variance, mean = torch.var_mean(grouped, 2, correction=0)
    moments = mean, (variance + options["eps"]).rsqrt(), torch.zeros_like(mean)
    return _reference(*inputs, **options), torch.stack(moments)


def _reference(x: Tensor, weight: Tensor, bias: Tensor, scale: Any, shift: Any, **options: Any) -> Any:
    return reference.group_norm_silu(x, weight=weight, bias=bias, scale=scale, shift=shift, **options)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    num_groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """silu((GroupNorm(x) weight + bias) (1 + scale) + shift), of x [B, C, ...] that `fits`, weight and bias [C], scale
    and shift [B, C] or None; with gradients. Those of gradients are the reference's."""
    options: dict[str, Any] = {"num_groups": num_groups, "eps": eps, "silu": silu}
    return fused(_forward, _backward, _reference, x, weight, bias, scale, shift, keep=1, **options)
