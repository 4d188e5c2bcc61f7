"""What surrounds the trunk of LPIPS on a CPU, each in one pass, with gradients: by the functions of lpips.c.

Forms of the operations of `cmfast.reference`, for images that `steps.fits` and maps in channels_last. Their gradients
are those of the image and of the first maps; the others are the reference's.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cmfast import native, reference
from cmfast.native.steps import DTYPE, LEAST, beside


class _Functions:
    """Those of lpips.c for a CPU."""

    def __init__(self, cpu: str | None = None) -> None:
        # Arguments as in lpips.c.
        function = functools.partial(native.function, native.library(cpu))
        pointer, number, real, flag = ctypes.c_void_p, ctypes.c_long, ctypes.c_double, ctypes.c_int
        resizing = real, real, pointer, flag, flag

        self.part: int = function("lpips_part", result=number)()
        self.room = function("lpips_room", number, number, flag, result=number)
        self.layer = function("lpips_layer", *[pointer] * 6, *[number] * 3, flag)
        self.input = function("lpips_input", *[pointer] * 5, *resizing)
        self.input_backward = function("lpips_input_backward", *[pointer] * 4, *resizing)


#: Those for a CPU, None: this one. Raises: Unavailable: they cannot be had here.
functions = functools.cache(_Functions)


def layer(
    features: Tensor, target_features: Tensor, weight: Tensor, gradient: bool = False, cpu: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """`reference.lpips_layer` of maps in channels_last [B]; and if it is asked for the gradient of the first, of
    distances whose own is 1."""
    made, weight, target_features = functions(cpu), weight.contiguous(), beside(target_features, features)
    batch, channels, height, width = features.shape
    pixels = height * width
    distance = torch.empty(batch, dtype=DTYPE, device="cpu")
    sums = torch.empty(batch, -(-pixels // made.part), dtype=torch.float64, device="cpu")
    slope = torch.empty_like(features) if gradient else None
    made.layer(
        distance.data_ptr(), sums.data_ptr(), None if slope is None else slope.data_ptr(),
        features.data_ptr(), target_features.data_ptr(), weight.data_ptr(),
        batch, pixels, channels, native.threads(features.numel(), LEAST),
    )  # fmt: skip
    return distance, slope


def lpips_layer(features: Tensor, target_features: Tensor, weight: Tensor) -> Tensor:
    from cmfast.ops._autograd import fused  # of a package that takes its forms from here

    inputs = features, target_features, weight
    recorded = torch.is_grad_enabled()
    if not native.channels_last(features) or (recorded and (target_features.requires_grad or weight.requires_grad)):
        return reference.lpips_layer(*inputs)
    if not (recorded and features.requires_grad):
        return layer(*inputs)[0]
    return fused(_layer_forward, _layer_backward, reference.lpips_layer, *inputs, keep=1)


def _layer_forward(features: Tensor, target_features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The distances, and for the backward pass the gradient; before a mode that looks on by the reference, which keeps
    the same."""
    if native.watched():
        from cmfast.ops._autograd import reference_grads, without_hooks

        inputs = [features, target_features, weight]
        distance = reference.lpips_layer(*inputs)
        with without_hooks():
            (kept,) = reference_grads(reference.lpips_layer, inputs, [0], (torch.ones_like(distance),), {})
    else:
        distance, kept = layer(features, target_features, weight, gradient=True)
    assert kept is not None
    return distance, kept


def _layer_backward(
    needed: tuple[bool, ...], grads: tuple[Tensor | None, ...], *inputs: Any, saved: tuple[Tensor]
) -> tuple[Tensor | None, ...]:
    return times(saved[0], grads[0]), None, None


def times(gradient: Tensor, grad: Tensor | None) -> Tensor | None:
    """A gradient [B, ...] of distances [B] whose own is 1, where their own is another."""
    if grad is None:
        return None
    # Not where the graph is kept: the next one to ask for it would be given the same memory.
    once = not torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore  # it is not declared
    if once and not native.watched() and native.lies_here(grad, (DTYPE,)) and (grad.numpy() == 1).all():
        return gradient
    return gradient * grad.view(-1, *[1] * (gradient.ndim - 1))


def _sizes(image: Tensor, channels: int, size: tuple[int, int]) -> Any:
    """A layout of lpips.c."""
    sizes = (*image.stride(), *image.shape, channels, *size)
    return (ctypes.c_long * len(sizes))(*sizes)


def _room(made: _Functions, channels: int, size: tuple[int, int], last: bool) -> tuple[Tensor, int]:
    """Memory for all threads, and how many there are."""
    threads = native.threads(channels * size[0] * size[1], LEAST)
    return torch.empty(threads, made.room(channels, size[1], last), dtype=DTYPE, device="cpu"), threads


def lpips_input(
    image: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    size: tuple[int, int] | None,
    value_range: tuple[float, float],
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
) -> Tensor:
    from cmfast.ops._autograd import fused

    options: dict[str, Any] = {"value_range": value_range, "dtype": dtype, "memory_format": memory_format, "size": size}
    if dtype not in (None, DTYPE) or not len(mean):
        return reference.lpips_input(image, mean, std, **options)
    return fused(_input_forward, _input_backward, reference.lpips_input, image, mean, std, **options)


def resized(
    image: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    size: tuple[int, int] | None,
    value_range: tuple[float, float],
    memory_format: torch.memory_format | None,
    cpu: str | None = None,
) -> Tensor:
    """`reference.lpips_input`, in float32."""
    made, size, channels = functions(cpu), size or (image.shape[2], image.shape[3]), len(mean)
    if memory_format is None:
        memory_format = torch.contiguous_format if image.is_contiguous() else torch.channels_last
    last = memory_format is torch.channels_last
    out = torch.empty(len(image), channels, *size, dtype=DTYPE, device="cpu", memory_format=memory_format)
    mean, std = mean.contiguous(), std.contiguous()
    room, threads = _room(made, channels, size, last)
    made.input(
        out.data_ptr(), room.data_ptr(), image.data_ptr(), mean.data_ptr(), std.data_ptr(), *value_range,
        _sizes(image, channels, size), last, threads,
    )  # fmt: skip
    return out


def resized_backward(
    grad: Tensor,
    image: Tensor,
    std: Tensor,
    *,
    value_range: tuple[float, float],
    cpu: str | None = None,
) -> Tensor:
    """The gradient of the image from that of `resized`."""
    made, (channels, *size) = functions(cpu), grad.shape[1:]
    last = native.channels_last(grad)
    grad, std, out = grad if last else grad.contiguous(), std.contiguous(), torch.empty_like(image)
    room, threads = _room(made, channels, (size[0], size[1]), last)
    made.input_backward(
        out.data_ptr(), room.data_ptr(), grad.data_ptr(), std.data_ptr(), *value_range,
        _sizes(out, channels, (size[0], size[1])), last, threads,
    )  # fmt: skip
    return out


def _input_forward(image: Tensor, mean: Tensor, std: Tensor, **options: Any) -> Tensor:
    if native.watched():
        return reference.lpips_input(image, mean, std, **options)
    del options["dtype"]
    return resized(image, mean, std, **options)


def _input_backward(
    needed: tuple[bool, ...], grads: tuple[Tensor | None, ...], image: Tensor, mean: Tensor, std: Tensor, **options: Any
) -> tuple[Tensor | None, ...]:
    """The gradient of the image, which training asks for."""
    (grad,) = grads
    if not needed[0] or grad is None or native.watched():
        return None, None, None
    # A caller's hooks may have made something else of what was saved.
    if not all(native.lies_here(x, (DTYPE,)) for x in (grad, image, std)):
        return None, None, None
    return resized_backward(grad, image, std, value_range=options["value_range"]), None, None


#: Gradients included.
FORMS: dict[str, Callable[..., Any]] = {form.__name__: form for form in (lpips_input, lpips_layer)}
