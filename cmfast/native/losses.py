"""The losses on a CPU, each in one pass over its batch, and another for its gradient: by the functions of losses.c.

Forms of the operations of `cmfast.reference`, for batches that `steps.fits`. Their gradients are those that training
asks for; the others are the reference's.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor

from cmfast import native, reference
from cmfast.native import steps
from cmfast.native.steps import DTYPE, DTYPES, beside, level, real, sizes
from cmfast.reference import WEIGHTINGS

_NORMS = {"l1": 0, "l2": 1, "huber": 2}
#: By name; 0 is a weight that is given.
_WEIGHTINGS = {name: 1 + i for i, name in enumerate(WEIGHTINGS)}


class _Functions:
    """Those of losses.c for a CPU."""

    def __init__(self, cpu: str | None = None) -> None:
        # Arguments as in losses.c.
        function = functools.partial(native.function, native.library(cpu))
        pointer, number, real, flag = ctypes.c_void_p, ctypes.c_long, ctypes.c_double, ctypes.c_int
        level = pointer, number
        inputs = *[pointer] * 4, *level * 3, flag, real, flag, real, real, real, number, number, flag

        self.part: int = function("losses_part", result=number)()
        self.forward = function("losses_forward", *[pointer] * 3, *inputs)
        self.backward = function("losses_backward", *[pointer] * 3, *level, *inputs)


#: Those for a CPU, None: this one. Raises: Unavailable: they cannot be had here.
functions = functools.cache(_Functions)


def _arguments(
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    target: Tensor,
    weight: Tensor | str,
    x_t2: Tensor | None,
    next_sigma: Tensor | None,
    *,
    norm: str,
    huber_c: float,
    weight_sigma_data: float = 1.0,
    sigma_data: float | None,
    boundary: float = 0.0,
) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    """What both functions take of the inputs of a consistency loss, and the memory that this is of."""
    output, target, second = beside(model_output, x_t), beside(target, x_t), beside(x_t2, x_t)
    weighting, weight = (_WEIGHTINGS[weight], sigma) if isinstance(weight, str) else (0, weight)
    (sigma, of_sigma), (weight, of_weight) = level(sigma), level(weight)
    next_sigma, of_next = (sigma, of_sigma) if next_sigma is None else level(next_sigma)
    arguments = (
        x_t.data_ptr(), output.data_ptr(), target.data_ptr(), None if x_t2 is None else second.data_ptr(),
        sigma.data_ptr(), of_sigma, next_sigma.data_ptr(), of_next, weight.data_ptr(), of_weight,
        _NORMS[norm], huber_c, weighting, weight_sigma_data, real(sigma_data), boundary, *sizes(x_t),
    )  # fmt: skip
    return arguments, (output, target, second, sigma, next_sigma, weight)


def forward(*inputs: Any, cpu: str | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """The losses [B], and the distances [B] for `backward`."""
    made, (arguments, held) = functions(cpu), _arguments(*inputs, **options)
    batch, count = arguments[-3:-1]
    loss = torch.empty(batch, dtype=DTYPE, device="cpu")
    distance = torch.empty_like(loss)
    sums = torch.empty(batch, -(-count // made.part), dtype=torch.float64, device="cpu")
    made.forward(loss.data_ptr(), distance.data_ptr(), sums.data_ptr(), *arguments)
    del held
    return loss, distance


def backward(
    grad: Tensor, distance: Tensor, *inputs: Any, opposite: bool = False, cpu: str | None = None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The gradient of model_output from that of the losses; and its opposite, if that is asked for."""
    made, (arguments, held) = functions(cpu), _arguments(*inputs, **options)
    of_output = torch.empty_like(inputs[1])
    minus = torch.empty_like(of_output) if opposite else None
    grad, of_grad = level(grad)
    distance = distance.contiguous()
    to = of_output.data_ptr(), None if minus is None else minus.data_ptr(), distance.data_ptr()
    made.backward(*to, grad.data_ptr(), of_grad, *arguments)
    del held
    return of_output, minus


def consistency_loss(*inputs: Any, **options: Any) -> Tensor:
    from cmfast.ops._autograd import fused  # of a package that takes its forms from here

    return fused(_forward, _backward, reference.consistency_loss, *inputs, keep=1, **options)


def weighted_loss(x: Tensor, target: Tensor, weight: Tensor, **options: Any) -> Tensor:
    from cmfast.ops._autograd import fused

    return fused(_weighted_forward, _weighted_backward, reference.weighted_loss, x, target, weight, keep=1, **options)


def _forward(*inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`forward`; before a mode that looks on by the reference. What is kept is the same: a mode may look on in one pass
    of torch.utils.checkpoint alone."""
    if not native.watched():
        return forward(*inputs, **options)
    model_output, x_t, sigma, target, weight, *rest = inputs
    if isinstance(weight, str):
        weight = reference.loss_weight(sigma.to(DTYPE), weight, sigma_data=options["weight_sigma_data"])
    distance = reference.consistency_loss(model_output, x_t, sigma, target, "uniform", *rest, **options)
    return distance * weight, distance


def _backward(
    needed: tuple[bool, ...], grads: tuple[Tensor | None, ...], *inputs: Any, saved: tuple[Tensor], **options: Any
) -> tuple[Tensor | None, ...]:
    """The gradient of the student's output, which training asks for."""
    none: tuple[None, ...] = (None,) * (len(inputs) - 1)
    if not needed[0] or not _can_go_back(grads[0], *saved, *inputs):
        return None, *none
    return backward(grads[0], *saved, *inputs, **options)[0], *none


def _can_go_back(grad: Tensor | None, distance: Tensor, *inputs: Any) -> TypeGuard[Tensor]:
    """Whether there is a gradient, and C can read it and what was saved, of which a caller's hooks may have made
    something else."""
    if grad is None or native.watched() or not native.lies_here(grad, (torch.float64, *DTYPES)):
        return False
    kept = [x for x in inputs if isinstance(x, Tensor)]
    return (
        native.lies_here(distance, (DTYPE,))
        and all(native.lies_here(x, DTYPES) for x in kept)
        and steps.fits(inputs[1])
    )


def _whole(x: Tensor, target: Tensor, weight: Tensor) -> tuple[Any, ...]:
    """A weighted loss as a consistency loss of a network that is D itself."""
    return x, x, weight, target, weight, None, None


def _weighted_forward(*inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return _forward(*_whole(*inputs), sigma_data=None, **options)


def _weighted_backward(
    needed: tuple[bool, ...],
    grads: tuple[Tensor | None, ...],
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    saved: tuple[Tensor],
    **options: Any,
) -> tuple[Tensor | None, ...]:
    (grad,), (distance,) = grads, saved
    if not _can_go_back(grad, distance, x, x, weight, target):
        return (None,) * 3
    of_x = of_target = None
    if needed[0] or needed[1]:
        whole = _whole(x, target, weight)
        of_x, of_target = backward(grad, distance, *whole, opposite=needed[1], sigma_data=None, **options)
    return of_x, of_target, (grad * distance).sum_to_size(weight.shape) if needed[2] else None


FORMS: dict[str, Callable[..., Any]] = {form.__name__: form for form in (weighted_loss, consistency_loss)}
